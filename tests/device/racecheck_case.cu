// The smallest case of what racecheck of compute-sanitizer reports on the Hopper kernels
// (tests/README.md, "What racecheck reports"). One thread fills a slot in shared memory, a warp
// reads it and gives it back, round after round. The two programs differ in who arrives for the
// warp:
//
//   nvcc -std=c++20 -arch=sm_90a -lineinfo -I src -o one_lane tests/device/racecheck_case.cu
//   nvcc ... -DANYFLASH_EVERY_THREAD_ARRIVES -o every_thread tests/device/racecheck_case.cu
//   compute-sanitizer --tool racecheck ./one_lane; compute-sanitizer --tool racecheck
//   ./every_thread
#include <cstdio>
#include <cstring>

#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/tma.h"
#include "cuda/sm90/warp_arrival.h"

using namespace anyflash;
using namespace anyflash::sm90;

constexpr int rounds = 4;
enum class Way { stored, copied, relayed }; // relayed: stored, and another warp gives the slot back

/// Warp 0 fills, warp 1 reads, warp 2 relays.
template <Way way>
__global__ void hand_over(const int* numbers, int* sums) {
  __shared__ alignas(16) int slot[warp_size];
  __shared__ uint64_t barriers[3];
  const uint32_t full = shared_address(barriers), empty = full + 8, read = full + 16;
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(empty, warp_arrivals);
    mbarrier_init(read, warp_arrivals);
    fence_barrier_init();
  }
  __syncthreads();
  const int warp = warp_index();
  if (warp == 0) {
    ROLLED
    for (int round = 0; round < rounds; ++round, numbers += warp_size) {
      mbarrier_wait(empty, round % 2 ^ 1);
      if (lane_index() != 0) continue;
      if (way == Way::copied) {
        mbarrier_arrive_expect(full, sizeof slot);
        bulk_load(shared_address(slot), numbers, sizeof slot, full);
      } else {
        for (int i = 0; i < warp_size; ++i) slot[i] = numbers[i];
        mbarrier_arrive(full);
      }
    }
  } else if (warp == 1) {
    int sum = 0;
    ROLLED
    for (int round = 0; round < rounds; ++round) {
      mbarrier_wait(full, round % 2);
      sum += slot[lane_index()];
      warp_arrive(way == Way::relayed ? read : empty);
    }
    sums[lane_index()] = sum;
  } else if (warp == 2 && way == Way::relayed) {
    ROLLED
    for (int round = 0; round < rounds; ++round) {
      mbarrier_wait(read, round % 2);
      warp_arrive(empty);
    }
  }
}

template <Way way>
bool right() {
  int *numbers, *sums, expected[warp_size] = {};
  if (cudaMallocManaged(&numbers, rounds * sizeof expected)) return false;
  if (cudaMallocManaged(&sums, sizeof expected)) return false;
  for (int i = 0; i < warp_size * rounds; ++i) expected[i % warp_size] += numbers[i] = 3 * i + 1;
  hand_over<way><<<1, 3 * warp_size>>>(numbers, sums);
  return !cudaDeviceSynchronize() && std::memcmp(sums, expected, sizeof expected) == 0;
}

int main() {
  const bool all = right<Way::stored>() && right<Way::copied>() && right<Way::relayed>();
  std::printf("%d arrivals of a warp: %s\n", warp_arrivals, all ? "right" : "wrong");
  return all ? 0 : 1;
}
