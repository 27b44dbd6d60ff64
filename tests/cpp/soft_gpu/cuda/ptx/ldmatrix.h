// cuda/ptx/ldmatrix.h in software.
#pragma once

#include "cuda/ptx/device.h"

namespace anyflash {

inline uint32_t shared_address(const void* pointer) { return soft_gpu::shared_address(pointer); }

namespace soft {

/// Four 8x8 tiles of 16-bit values: what a lane names and holds.
struct MatrixAccess {
  uint32_t address;
  uint32_t r[4];

  /// The element of its tile that half `half` of a lane's register holds.
  static void place(int lane, int half, bool transposed, int& row, int& column) {
    row = lane / 4;
    column = lane % 4 * 2 + half;
    if (transposed) std::swap(row, column);
  }
};

template <bool transposed, bool store>
void access_matrix(void* const* lanes) {
  for (int lane = 0; lane < warp_size; ++lane)
    if (!lanes[lane]) soft_gpu::fault("ldmatrix or stmatrix without all lanes");
  for (int tile = 0; tile < 4; ++tile) {
    uint16_t* rows[8];
    for (int i = 0; i < 8; ++i) {
      const int lane = tile * 8 + i;
      const uint32_t address = static_cast<const MatrixAccess*>(lanes[lane])->address;
      rows[i] = reinterpret_cast<uint16_t*>(store ? soft_gpu::shared_target(address, 16, 16, lane)
                                                  : soft_gpu::shared_place(address, 16, 16));
    }
    for (int lane = 0; lane < warp_size; ++lane) {
      auto& mine = *static_cast<MatrixAccess*>(lanes[lane]);
      if constexpr (!store) mine.r[tile] = 0;
      for (int half = 0; half < 2; ++half) {
        int row, column;
        MatrixAccess::place(lane, half, transposed, row, column);
        if constexpr (store)
          rows[row][column] = static_cast<uint16_t>(mine.r[tile] >> 16 * half);
        else
          mine.r[tile] |= uint32_t{rows[row][column]} << 16 * half;
      }
    }
  }
}

template <bool transposed>
void load_matrix(uint32_t (&r)[4], uint32_t address) {
  MatrixAccess mine{address, {}};
  soft_gpu::warp_together(access_matrix<transposed, false>, &mine);
  for (int i = 0; i < 4; ++i) r[i] = mine.r[i];
}

} // namespace soft

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  soft::load_matrix<false>(r, address);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  soft::load_matrix<true>(r, address);
}

} // namespace anyflash
