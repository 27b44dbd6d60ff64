#include "core/plan_cache.h"

#include <array>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "core/plan.h"
#include "core/tensor_maps.h"

namespace anyflash {
namespace {

/// Everything that a plan depends on, as numbers.
using Key = std::array<int64_t, 22>;

Key key_of(const Problem& p, const anyflash_device& device) {
  return {p.op, static_cast<int64_t>(p.dtype), p.packed, p.batch, p.heads, p.heads_k, p.seqlen_q,
          p.seqlen_k, p.total_q, p.total_k, p.d, p.dv, p.mask.left, p.mask.right,
          // flags
          (p.softcap != 0) | p.alibi << 1 | p.aligned << 2 | p.want_lse << 3 |
              (p.seqused_q != nullptr) << 4 | (p.seqused_k != nullptr) << 5 | (p.scale <= 0) << 6 |
              p.deterministic << 7 | p.has_dlse << 8 | why_not_tensor_maps(p).empty() << 9 |
              (p.op == ANYFLASH_BACKWARD && free_order()) << 10,
          device.type, device.index, device.compute_capability, device.multiprocessors,
          device.shared_bytes, device.driver, device.struct_size};
}

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 0;
    for (const int64_t value : key) {
      hash = (hash ^ static_cast<uint64_t>(value)) * 0x9E3779B97F4A7C15u;
      hash ^= hash >> 29;
    }
    return hash;
  }
};

std::shared_mutex mutex;
std::unordered_map<Key, anyflash_plan, Hash>& plans() {
  static auto* map = new std::unordered_map<Key, anyflash_plan, Hash>; // outlives every thread
  return *map;
}

/// Programs repeat one shape many times: the last plan of a thread needs no lock.
struct Last {
  Key key{};
  anyflash_plan plan{};
};
thread_local Last last;

} // namespace

anyflash_plan cached_plan(const Problem& problem, const anyflash_device& device,
                          const std::function<anyflash_plan()>& make) {
  const Key key = key_of(problem, device);
  if (last.plan.struct_size != 0 && last.key == key) return last.plan;
  {
    const std::shared_lock lock(mutex);
    const auto found = plans().find(key);
    if (found != plans().end()) {
      last = {key, found->second};
      return found->second;
    }
  }
  const anyflash_plan plan = make();
  {
    const std::unique_lock lock(mutex);
    if (plans().size() >= plan_cache_limit) plans().clear();
    plans().emplace(key, plan);
  }
  last = {key, plan};
  return plan;
}

size_t plan_cache_size() {
  const std::shared_lock lock(mutex);
  return plans().size();
}

} // namespace anyflash
