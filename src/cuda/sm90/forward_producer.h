// The warps that find tiles and start copies: Q once a tile, K and V through their stages.
#pragma once

#include "cuda/attn/key_blocks.h"
#include "cuda/ptx/copy.h"
#include "cuda/ptx/tma.h"
#include "cuda/sm90/forward_layout.h"
#include "cuda/sm90/packed_order.h"

namespace anyflash::sm90 {

/// By one warp: every tile of this thread block, then the word that there are no more. Up to three
/// tiles ahead of those who compute: in packed sequences it takes a while to find one.
template <class Row>
DEVICE void find_tiles(const ForwardParams& p, uint32_t shared) {
  TileQueue<Row> queue(shared);
  PackedOrder<Row> packed(p);
  QueryTile tile;
  int turn = 0; // of dense sequences
  do {
    Tile next;
    do {
      next = p.cu_seqlens_q ? packed.next(p) : p.order.tile(blockIdx.x, turn++);
    } while (next.state == Tile::nothing);
    tile.sequence = divide(next.head, p.heads);
    tile.head = next.head - tile.sequence * p.heads.divisor;
    tile.first_query = next.block * Row::Br;
    const SequenceLengths lengths(p, tile.sequence);
    tile.first_q = lengths.first_q;
    tile.first_k = lengths.first_k;
    tile.rows = lengths.rows_q;
    tile.seqlen_q = lengths.seqlen_q;
    tile.seqlen_k = lengths.seqlen_k;
    if (next.state == Tile::end) tile.sequence = -1;
    queue.push(tile, p);
  } while (tile.sequence >= 0);
}

template <class Row>
class ForwardProducer {
  using F = Forward<Row>;
  using Barriers = ForwardBarriers<Row>;

public:
  DEVICE ForwardProducer(const ForwardParams& p, uint32_t shared)
      : p_(p), shared_(shared), barriers_{shared + F::shared.barriers}, tiles_(shared) {}

  /// By one warp: the copies of every tile of this thread block.
  DEVICE void run() {
    if (lane_index() == 0) {
      prefetch_tensor_map(&p_.q_map);
      prefetch_tensor_map(&p_.k_map);
      prefetch_tensor_map(&p_.v_map);
    }
    QueryTile tile;
    TileShare share;
    ROLLED
    while (true) {
      tiles_.pop(tile, share, 0);
      if (tile.sequence < 0) break;
      load(tile, share.begin, share.end_of_tile());
    }
    pretend();
  }

private:
  /// Starts the copies of a tile, keys from block end - 1 down to begin, as stages become free.
  DEVICE void load(const QueryTile& tile, int begin, int end) {
    const int head_k = divide(tile.head, p_.group);
    const int batch = p_.cu_seqlens_q ? 0 : tile.sequence;
    if constexpr (F::early_queries) load_queries(tile, batch);
    ROLLED
    for (int j = end - 1; j >= begin; --j) {
      const int key = tile.first_k + j * Row::Bc;
      load_stage<typename F::KTile>(F::shared.k, p_.k_map, barriers_.k_full(ring_.stage),
                                    barriers_.k_empty(ring_.stage), key, head_k, batch);
      if (!F::early_queries && j == end - 1) load_queries(tile, batch);
      load_stage<typename F::VTile>(0, p_.v_map, barriers_.v_full(ring_.stage),
                                    barriers_.v_empty(ring_.stage), key, head_k, batch);
      ring_.next();
    }
  }

  /// Consumers start a product for the end too: on whatever is there.
  DEVICE void pretend() {
    mbarrier_wait(barriers_.k_empty(ring_.stage), ring_.parity ^ 1);
    mbarrier_wait(barriers_.q_empty(q_ring_.stage), q_ring_.parity ^ 1);
    if (lane_index() == 0) {
      mbarrier_arrive(barriers_.k_full(ring_.stage));
      mbarrier_arrive(barriers_.q_full(q_ring_.stage));
    }
  }

  DEVICE void load_queries(const QueryTile& tile, int batch) {
    mbarrier_wait(barriers_.q_empty(q_ring_.stage), q_ring_.parity ^ 1);
    load_tile<typename F::QTile>(shared_ + F::shared.q + q_ring_.stage * F::QTile::bytes, p_.q_map,
                                 barriers_.q_full(q_ring_.stage), tile.first_q + tile.first_query,
                                 tile.head, batch);
    q_ring_.next();
  }

  template <class Tile>
  DEVICE void load_stage(int begin, const TensorMap& map, uint32_t full, uint32_t empty, int row,
                         int head, int batch) {
    mbarrier_wait(empty, ring_.parity ^ 1);
    load_tile<Tile>(shared_ + begin + ring_.stage * Tile::bytes, map, full, row, head, batch);
  }

  /// One box a page; rows and columns outside of the tensor become zeros.
  template <class Tile>
  DEVICE void load_tile(uint32_t target, const TensorMap& map, uint32_t full, int row, int head,
                        int batch) {
    if (lane_index() != 0) return;
    mbarrier_arrive_expect(full, Tile::bytes);
    UNROLL
    for (int page = 0; page < Tile::pages; ++page)
      tma_load(target + page * Tile::page_bytes, &map, full, page * Tile::page_columns, row, head,
               batch);
  }

  const ForwardParams& p_;
  uint32_t shared_;
  Barriers barriers_;
  TileQueue<Row> tiles_;
  Place<Row::stages> ring_;
  Place<Row::q_stages> q_ring_;
};

} // namespace anyflash::sm90
