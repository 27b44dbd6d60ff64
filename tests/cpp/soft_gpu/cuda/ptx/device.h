// The language of the device in plain C++, and cuda/ptx/device.h in software.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "cuda/params.h"
#include "machine.h"

#define DEVICE
#define UNROLL
#define ROLLED

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ thread_local // a block runs on one thread of the processor

#define threadIdx (soft_gpu::thread_index())
#define blockIdx (soft_gpu::block_index())
#define gridDim (soft_gpu::grid_size())

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
  return static_cast<std::common_type_t<A, B>>(b) < static_cast<std::common_type_t<A, B>>(a) ? b
                                                                                             : a;
}
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
  return static_cast<std::common_type_t<A, B>>(a) < static_cast<std::common_type_t<A, B>>(b) ? b
                                                                                             : a;
}

inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float x, float y) { return x / y; }

inline void __syncthreads() { soft_gpu::block_barrier(0, 0, true); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int atomicAdd(int* target, int x) { return __atomic_fetch_add(target, x, __ATOMIC_RELAXED); }

inline void __syncwarp() {
  soft_gpu::warp_together([](void* const*) {}, nullptr);
}

namespace soft_gpu {

/// What a lane brings to an exchange, and what it takes.
template <class T>
struct Exchange {
  T value;
  int from; // lane
  T result;
};
template <class T>
T exchange(T value, int from) {
  Exchange<T> mine{value, from, value};
  warp_together(
      [](void* const* lanes) {
        for (int i = 0; i < warp_lanes; ++i) {
          if (!lanes[i]) continue;
          auto& lane = *static_cast<Exchange<T>*>(lanes[i]);
          if (!lanes[lane.from]) fault("a shuffle from a lane that is over");
          lane.result = static_cast<const Exchange<T>*>(lanes[lane.from])->value;
        }
      },
      &mine);
  return mine.result;
}

inline unsigned ballot(bool vote) {
  struct Vote {
    bool mine;
    unsigned all;
  } vote_{vote, 0};
  warp_together(
      [](void* const* lanes) {
        unsigned all = 0;
        for (int i = 0; i < warp_lanes; ++i)
          if (lanes[i] && static_cast<const Vote*>(lanes[i])->mine) all |= 1u << i;
        for (int i = 0; i < warp_lanes; ++i)
          if (lanes[i]) static_cast<Vote*>(lanes[i])->all = all;
      },
      &vote_);
  return vote_.all;
}

} // namespace soft_gpu

template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  return soft_gpu::exchange(x, lane % soft_gpu::warp_lanes);
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return soft_gpu::exchange(x, static_cast<int>(threadIdx.x % soft_gpu::warp_lanes) ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T x, int distance) {
  const int lane = static_cast<int>(threadIdx.x % soft_gpu::warp_lanes);
  return soft_gpu::exchange(x, lane < distance ? lane : lane - distance);
}
inline unsigned __ballot_sync(unsigned, bool vote) { return soft_gpu::ballot(vote); }
inline bool __any_sync(unsigned, bool vote) { return soft_gpu::ballot(vote) != 0; }

namespace anyflash {

constexpr int warp_size = 32;

inline int lane_index() { return static_cast<int>(threadIdx.x % warp_size); }
inline int warp_index() { return static_cast<int>(threadIdx.x / warp_size); }
inline float infinity() { return HUGE_VALF; }
inline void needed_if_negative(uint32_t) {}
inline uint32_t recomputed(uint32_t x) { return x; }
inline int64_t recomputed_64(int64_t x) { return x; }

} // namespace anyflash
