// How a block of the sm90 family lays out its dynamic shared memory: one place for the host, which
// asks for the bytes, and the kernel, which uses them.
#pragma once

namespace anyflash::sm90 {

/// Everything starts on 1024 bytes: the stages of V, of K and of Q, O, then barriers.
struct ForwardShared {
  int k, q, o, barriers, bytes; // v begins at 0

  /// o_parts: in so many parts, one after the other, does O leave.
  constexpr ForwardShared(int d, int dv, int Br, int Bc, int stages, int q_stages, int o_parts) {
    k = stages * Bc * dv * 2;
    q = k + stages * Bc * d * 2;
    o = q + q_stages * Br * d * 2;
    barriers = o + Br * dv * 2 / o_parts;
    bytes = barriers + barrier_bytes;
  }

  static constexpr int barrier_bytes = 512;
};

} // namespace anyflash::sm90
