// How a block of the sm80 family lays out its dynamic shared memory: one place for the host, which
// asks for the bytes, and the kernel, which uses them.
#pragma once

namespace anyflash::sm80 {

/// Q, then the stages of K, then the stages of V, each [rows, columns] of 16-bit values. O leaves
/// through the same bytes when the loop is over.
constexpr int forward_shared_bytes(int d, int dv, int Br, int Bc, int k_stages, int v_stages) {
  const int loop = (Br * d + Bc * (k_stages * d + v_stages * dv)) * 2;
  const int o = Br * dv * 2;
  return loop > o ? loop : o;
}

/// K, V, the stages of Q, the stages of dO, then P and dS [Br, Bc]. dK and dV leave through the
/// bytes of K and V.
constexpr int backward_shared_bytes(int d, int dv, int Br, int Bc, int q_stages, int o_stages) {
  return (Bc * (d + dv) + Br * (q_stages * d + o_stages * dv) + 2 * Br * Bc) * 2;
}

} // namespace anyflash::sm80
