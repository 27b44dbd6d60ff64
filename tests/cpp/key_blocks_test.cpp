// key_blocks() against brute force over every (query, key) pair.
#include "cuda/attn/key_blocks.h"

#include <gtest/gtest.h>

#include <random>

namespace anyflash {
namespace {

bool sees(int i, int j, int seqlen_q, int seqlen_k, int left, int right) {
  const int diagonal = seqlen_k - seqlen_q;
  return j >= 0 && j < seqlen_k && j >= i + diagonal - left && j <= i + diagonal + right;
}

TEST(KeyBlocks, AgreeWithBruteForce) {
  std::mt19937 random(7);
  auto draw = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  };
  constexpr int unbounded = 1 << 30;
  for (int trial = 0; trial < 20000; ++trial) {
    const int Br = draw(1, 40), Bc = draw(1, 24);
    const int seqlen_q = draw(1, 90), seqlen_k = draw(0, 90);
    const int left = draw(0, 2) ? draw(0, 60) : unbounded,
              right = draw(0, 2) ? draw(0, 60) : unbounded;
    const int first = Br * draw(0, (seqlen_q - 1) / Br);
    const KeyBlocks blocks = key_blocks(first, Br, Bc, seqlen_q, seqlen_k, left, right);
    for (int block = 0; block * Bc < seqlen_k + Bc; ++block) {
      bool any = false, all = true;
      for (int i = first; i < std::min(first + Br, seqlen_q); ++i)
        for (int j = block * Bc; j < (block + 1) * Bc; ++j) {
          const bool seen = sees(i, j, seqlen_q, seqlen_k, left, right);
          any |= seen;
          all &= seen;
        }
      const bool visited = block >= blocks.begin && block < blocks.end;
      // A block between two others may hold no visible pair only when windows leave gaps, which
      // bands cannot.
      ASSERT_TRUE(!any || visited) << "block " << block << " is seen but not visited";
      if (visited) {
        ASSERT_EQ(blocks.on_edge(block), !all)
            << "block " << block << " Br " << Br << " Bc " << Bc << " q " << seqlen_q << " k "
            << seqlen_k << " left " << left << " right " << right << " first " << first;
      }
    }
  }
}

TEST(KeyBlocks, UnboundedWindowsDoNotOverflow) {
  const int longest = (1 << 30) - 1;
  const KeyBlocks blocks = key_blocks(longest - 1, 128, 64, longest, longest, 1 << 30, 1 << 30);
  EXPECT_EQ(blocks.begin, 0);
  EXPECT_EQ(blocks.end, (longest + 63) / 64);
}

} // namespace
} // namespace anyflash
