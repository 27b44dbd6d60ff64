// Where the sm90 backward keeps things in shared memory. Also what the core asks for a block: no
// includes.
#pragma once

namespace anyflash::sm90 {

/// Offsets in bytes. Tiles start on 1024.
struct BackwardShared {
  int k, v;  // stages of K and of V
  int q, o;  // stages of Q and of dO
  int ds, p; // two stages of dS; of P, above head dim 128, two, or one in a pair of blocks
  int peer_ds, peer_k; // in a pair: stages of a part of the other block's dS; a part of its K
  int stats;           // as many as of Q
  int work;            // two slots: the block of keys that is being worked on, and the next
  int steps;           // what belongs to a block of queries: as many as stages of Q
  int barriers;
  int finder; // in a gap of the barriers: TicketFinder, two ints
  int turns;  // two of Turn, and their barriers
  int end;
};

constexpr int backward_work_bytes(bool pair) { return pair ? 120 : 96; }
constexpr int backward_step_bytes = 32;
constexpr int backward_turn_bytes = 24;
constexpr int backward_turn_barriers = 6;

constexpr BackwardShared backward_shared(int d, int dv, int Br, int Bc, int kv_stages, int q_stages,
                                         int o_stages, int cluster, int peer_stages, int direct_v) {
  const bool pair = cluster == 2;
  const int tile = Br * Bc * 2;
  BackwardShared at{};
  at.k = 0;
  at.v = at.k + kv_stages * Bc * d * 2;
  at.q = at.v + kv_stages * Bc * (dv - direct_v) * 2;
  at.o = at.q + q_stages * Br * d * 2;
  at.ds = at.o + o_stages * Br * dv * 2;
  at.p = at.ds + 2 * tile;
  at.peer_ds = at.p + (d <= 128 ? 0 : pair ? 1 : 2) * tile;
  at.peer_k = at.peer_ds + peer_stages * 64 * Bc * 2;
  at.stats = at.peer_k + (pair ? Bc * (Br == 128 ? d : d <= 128 ? d / 2 : 128) * 2 : 0);
  at.work = at.stats + q_stages * Br * 8;
  at.steps = at.work + 2 * backward_work_bytes(pair);
  at.barriers = at.steps + q_stages * backward_step_bytes;
  at.finder = at.barriers + 48;
  at.turns = at.barriers + 96 + 16 * (2 * kv_stages + q_stages + o_stages) + (pair ? 56 : 0);
  at.end = at.turns + 2 * backward_turn_bytes + 8 * backward_turn_barriers;
  return at;
}

} // namespace anyflash::sm90
