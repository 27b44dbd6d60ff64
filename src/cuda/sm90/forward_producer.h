// The warps that find tiles and start copies: Q once a tile, K and V through their stages.
#pragma once

#include "cuda/attn/key_blocks.h"
#include "cuda/ptx/copy.h"
#include "cuda/ptx/tma.h"
#include "cuda/sm90/forward_layout.h"
#include "cuda/sm90/packed_order.h"
#include "cuda/sm90/ragged_load.h"

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

/// The copies of every tile of this thread block, keys from the last block down, as stages become
/// free: K by one warp, V by another, since they become free in another order than they are wanted.
template <class Row>
class ForwardProducer {
  using F = Forward<Row>;
  using Barriers = ForwardBarriers<Row>;

public:
  DEVICE ForwardProducer(const ForwardParams& p, uint32_t shared)
      : p_(p), shared_(shared), barriers_{shared + F::shared.barriers}, tiles_(shared) {}

  /// By one warp.
  DEVICE void copy_queries_and_keys() {
    if (lane_index() == 0) {
      prefetch_tensor_map(&p_.q_map);
      prefetch_tensor_map(&p_.k_map);
    }
    ROLLED
    while (next_tile()) {
      if constexpr (F::early_queries) load_queries();
      ROLLED
      for (int j = end_ - 1; j >= begin_; --j) {
        mbarrier_wait(barriers_.k_empty(ring_.stage), ring_.parity ^ 1);
        load_tile<typename F::KTile>(shared_ + F::shared.k + ring_.stage * F::KTile::bytes,
                                     p_.k_map, barriers_.k_full(ring_.stage),
                                     tile_.first_k + j * Row::Bc, key_head(), batch());
        if (!F::early_queries && j == end_ - 1) load_queries();
        ring_.next();
      }
    }
    pretend();
  }

  /// By one warp.
  DEVICE void copy_values() {
    if (lane_index() == 0) prefetch_tensor_map(&p_.v_map);
    ROLLED
    while (next_tile()) {
      ROLLED
      for (int j = end_ - 1; j >= begin_; --j) {
        mbarrier_wait(barriers_.v_empty(ring_.stage), ring_.parity ^ 1);
        load_values(j * Row::Bc, barriers_.v_full(ring_.stage));
        ring_.next();
      }
    }
  }

private:
  /// False: there are no more.
  DEVICE bool next_tile() {
    TileShare share;
    tiles_.pop(tile_, share, 0);
    begin_ = share.begin;
    end_ = share.end_of_tile();
    return tile_.sequence >= 0;
  }
  DEVICE int key_head() const { return divide(tile_.head, p_.group); }
  DEVICE int batch() const { return p_.cu_seqlens_q ? 0 : tile_.sequence; }

  /// Consumers start a product for the end too: on whatever is there.
  DEVICE void pretend() {
    mbarrier_wait(barriers_.k_empty(ring_.stage), ring_.parity ^ 1);
    mbarrier_wait(barriers_.q_empty(q_ring_.stage), q_ring_.parity ^ 1);
    if (lane_index() == 0) {
      mbarrier_arrive(barriers_.k_full(ring_.stage));
      mbarrier_arrive(barriers_.q_full(q_ring_.stage));
    }
  }

  DEVICE void load_queries() {
    mbarrier_wait(barriers_.q_empty(q_ring_.stage), q_ring_.parity ^ 1);
    load_tile<typename F::QTile>(shared_ + F::shared.q + q_ring_.stage * F::QTile::bytes, p_.q_map,
                                 barriers_.q_full(q_ring_.stage), tile_.first_q + tile_.first_query,
                                 tile_.head, batch());
    q_ring_.next();
  }

  /// V with zeros behind the last key, where another sequence may lie, or anything: P is 0 there,
  /// but 0 times NaN is not. Where there are no keys, and in pages without columns, it does not
  /// matter what V is.
  DEVICE void load_values(int first_key, uint32_t full) {
    using Tile = typename F::VTile;
    const uint32_t values = shared_ + ring_.stage * Tile::bytes;
    if (!p_.cu_seqlens_k) {
      load_tile<Tile>(values, p_.v_map, full, tile_.first_k + first_key, key_head(), batch());
    } else if (lane_index() == 0) {
      const int pages = tile_.seqlen_k > 0 ? pages_with<Tile>(p_.dv) : 0;
      mbarrier_arrive_expect(full, pages * Tile::page_bytes);
      load_rows<Tile>(values, pages, &p_.v_map, full, 0, tile_.first_k, first_key, tile_.seqlen_k,
                      key_head(), 0);
    }
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
  QueryTile tile_;
  int begin_, end_; // of its blocks of keys
  Place<Row::stages> ring_;
  Place<Row::q_stages> q_ring_;
};

} // namespace anyflash::sm90
