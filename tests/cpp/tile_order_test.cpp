// The order in which a persistent grid takes its tiles: every tile once, and the work even.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <set>
#include <vector>

#include "core/hopper_params.h"

namespace anyflash {
namespace {

/// The tiles of each thread block, in its order.
std::vector<std::vector<sm90::Tile>> walk(const sm90::TileOrder& order) {
  std::vector<std::vector<sm90::Tile>> all(static_cast<size_t>(order.grid));
  for (int index = 0; index < order.grid; ++index)
    for (int turn = 0;; ++turn) {
      const sm90::Tile tile = order.tile(index, turn);
      if (tile.state == sm90::Tile::end) break;
      if (tile.state == sm90::Tile::work) all[static_cast<size_t>(index)].push_back(tile);
    }
  return all;
}

TEST(TileOrder, TakesEveryTileOnce) {
  for (const bool by_size : {false, true})
    for (const int grid : {1, 2, 7, 132})
      for (const int blocks : {1, 2, 3, 5, 16, 33})
        for (const int heads : {1, 2, 3, 16, 131, 132, 257}) {
          if (grid > blocks * heads) continue;
          std::set<std::pair<int, int>> seen;
          for (const auto& tiles : walk(make_tile_order(blocks, heads, grid, by_size, 3 * grid)))
            for (const sm90::Tile& tile : tiles) {
              ASSERT_TRUE(0 <= tile.head && tile.head < heads);
              ASSERT_TRUE(0 <= tile.block && tile.block < blocks);
              ASSERT_TRUE(seen.emplace(tile.head, tile.block).second) << "twice";
            }
          ASSERT_EQ(static_cast<int>(seen.size()), blocks * heads)
              << blocks << " blocks, " << heads << " heads, grid " << grid;
        }
}

TEST(TileOrder, UnderACausalMaskTheWorkIsEven) {
  constexpr int grid = 132;
  for (const int cached_tiles : {96, 192, 256}) // of d 256, 128, 64
    for (const int blocks : {4, 8, 10, 11, 16, 24, 32, 64, 128}) {
      const int heads = 2048 / blocks;
      std::vector<double> work;
      for (const auto& tiles : walk(make_tile_order(blocks, heads, grid, true, cached_tiles))) {
        double sum = 0;
        for (const sm90::Tile& tile : tiles) sum += tile.block + 3; // a start as of two blocks
        work.push_back(sum);
      }
      const double mean = std::accumulate(work.begin(), work.end(), 0.0) / grid;
      EXPECT_LE(*std::ranges::max_element(work), mean * 1.04)
          << blocks << " blocks, of which the cache holds " << cached_tiles;
    }
}

} // namespace
} // namespace anyflash
