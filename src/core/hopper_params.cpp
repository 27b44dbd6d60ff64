#include "core/hopper_params.h"

#include <algorithm>

#include "core/kernel_params.h"
#include "core/tensor_maps.h"

namespace anyflash {
namespace {

constexpr int warp_rows = 16; // of O, that one store writes

int32_t int32_of(int64_t value) { return static_cast<int32_t>(value); }

} // namespace

sm90::TileOrder make_tile_order(int64_t blocks, int64_t heads, int64_t grid, bool by_size,
                                int64_t cached_tiles) {
  // Enough tiles to even out the others, few enough for their keys and values to stay in the cache.
  // Tiles of few sizes even out little, and those of short sequences wait for memory.
  const int64_t rows = blocks < 16 || cached_tiles < grid ? 1 : 2;
  const int64_t sorted = std::clamp(cached_tiles, rows * grid, 8 * grid);
  // Whole rounds of couples, but for what the last pair of heads lacks.
  const int64_t rounds = by_size ? std::max<int64_t>(blocks * heads - sorted, 0) / (2 * grid) : 0;
  const int64_t first_heads = rounds * grid / blocks * 2;
  const int64_t couples = first_heads / 2 * blocks;
  sm90::TileOrder order{};
  order.blocks = make_divisor(blocks);
  order.last_heads = make_divisor(heads - first_heads);
  order.grid = int32_of(grid);
  order.first_heads = int32_of(first_heads);
  order.couples = int32_of(couples);
  order.rounds = int32_of(couples / grid);
  order.rest = int32_of(couples % grid);
  order.tiles = int32_of((heads - first_heads) * blocks);
  order.by_size = by_size;
  return order;
}

sm90::ForwardParams hopper_forward_params(const Problem& problem, const Row& row, uint32_t grid) {
  sm90::ForwardParams p{};
  static_cast<ForwardParams&>(p) = forward_params(problem, row);
  // Under a causal mask the tiles of a head grow, up to the width of a window: of half the length
  // is enough. Of packed sequences: where they are so many that going over them again costs more
  // than an uneven end, once must do.
  const int64_t half = problem.seqlen_k / 2;
  const bool causal = problem.mask.right <= half;
  const bool by_size = problem.packed ? problem.batch <= 256 : causal && problem.mask.left >= half;
  // A quarter of an H100's cache: with twice as much some of it was read from memory again.
  constexpr int64_t cache_bytes = int64_t{12} << 20;
  const int64_t tile_bytes = int64_t{row.Br} * (row.d + row.dv) * size_of(problem.dtype);
  p.order = make_tile_order(p.query_blocks, problem.batch * problem.heads, grid, by_size,
                            cache_bytes / tile_bytes);
  // So many that a couple more or less is little; under a causal mask tiles by size cost more.
  const int64_t tiles = problem.total_q / row.Br * problem.heads;
  p.order.in_couples = problem.packed && tiles >= (causal ? 6 : 16) * int64_t{grid};
  const int width = box_columns(row.d), width_v = box_columns(row.dv);
  const int width_o = box_columns(row.dv / row.constant("o_parts", 1));
  const DType dtype = problem.dtype;
  const auto keys = [&](const View& view, const View& instead, int64_t d, int columns) {
    const Extents extents = key_extents(problem, d);
    return extents.rows > 0 ? tensor_map(view, extents, dtype, columns, row.Bc)
                            : tensor_map(instead, {1, 1, 1, d}, dtype, columns, row.Bc);
  };
  p.q_map = tensor_map(problem.q, query_extents(problem, problem.d), dtype, width, row.Br);
  // Without keys the kernel still loads a block of K, of which its mask leaves nothing.
  p.k_map = keys(problem.k, problem.q, problem.d, width);
  p.v_map = problem.packed ? ragged_tensor_map(problem.v, key_extents(problem, problem.dv), dtype,
                                               width_v, row.Bc)
                           : keys(problem.v, problem.o, problem.dv, width_v);
  p.o_map = tensor_map(problem.o, query_extents(problem, problem.dv), dtype, width_o, warp_rows);
  return p;
}

} // namespace anyflash
