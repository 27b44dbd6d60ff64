// cuda/ptx/mma.h in software.
#pragma once

#include "cuda/ptx/types.h"

namespace anyflash {

namespace soft {

struct Mma {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
  const float* c;
};

template <class T>
void multiply(void* const* lanes) {
  float a[16][16], b[16][8], d[16][8];
  const auto at = [&](int lane) -> const Mma& { return *static_cast<const Mma*>(lanes[lane]); };
  const auto half = [](uint32_t pair, int i) {
    return soft_gpu::to_float(static_cast<uint16_t>(pair >> 16 * i), same<T, bf16>);
  };
  for (int lane = 0; lane < warp_size; ++lane) {
    if (!lanes[lane]) soft_gpu::fault("mma without all lanes");
    const Mma& mine = at(lane);
    const int row = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 2; ++i) {
      for (int e = 0; e < 4; ++e) a[row + e % 2 * 8][column + e / 2 * 8 + i] = half(mine.a[e], i);
      for (int e = 0; e < 2; ++e) b[column + e * 8 + i][row] = half(mine.b[e], i);
      for (int e = 0; e < 2; ++e) d[row + e * 8][column + i] = mine.c[2 * e + i];
    }
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < warp_size; ++lane)
    for (int e = 0; e < 4; ++e) at(lane).d[e] = d[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2];
}

} // namespace soft

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  const float (&c)[4]) {
  soft::Mma mine{d, a, {b0, b1}, c};
  soft_gpu::warp_together(soft::multiply<T>, &mine);
}
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_m16n8k16<T>(d, a, b0, b1, d);
}

} // namespace anyflash
