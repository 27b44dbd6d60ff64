// Where the sm90 backward keeps things in shared memory. Also what the core asks for a block: no
// includes.
#pragma once

namespace anyflash::sm90 {

/// Offsets in bytes. Tiles start on 1024.
struct BackwardShared {
  int k, v;  // stages of K and of V
  int q, o;  // stages of Q and of dO
  int ds;    // two stages; above head dim 128 then two of P
  int stats; // as many as of Q
  int work;  // two slots: the block of keys that is being worked on, and the next
  int steps; // what belongs to a block of queries: as many as stages of Q
  int barriers;
  int end;
};

constexpr int backward_work_bytes = 96, backward_step_bytes = 32;

constexpr BackwardShared backward_shared(int d, int dv, int Br, int Bc, int kv_stages, int q_stages,
                                         int o_stages) {
  BackwardShared at{};
  at.k = 0;
  at.v = at.k + kv_stages * Bc * d * 2;
  at.q = at.v + kv_stages * Bc * dv * 2;
  at.o = at.q + q_stages * Br * d * 2;
  at.ds = at.o + o_stages * Br * dv * 2;
  at.stats = at.ds + (d > 128 ? 4 : 2) * Br * Bc * 2;
  at.work = at.stats + q_stages * Br * 8;
  at.steps = at.work + 2 * backward_work_bytes;
  at.barriers = at.steps + q_stages * backward_step_bytes;
  at.end = at.barriers + 112 + 16 * (2 * kv_stages + q_stages + o_stages);
  return at;
}

} // namespace anyflash::sm90
