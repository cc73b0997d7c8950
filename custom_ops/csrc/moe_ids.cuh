// The expert of a pair, as those count that are here.
#pragma once

#include "moe.h"

namespace custom_ops {

// -1 if it is elsewhere.
__device__ __forceinline__ int expert_of(const Ids& ids, int64_t pair) {
  int64_t expert = ids.int64 ? __ldg(static_cast<const long long*>(ids.data) + pair)
                             : __ldg(static_cast<const int32_t*>(ids.data) + pair);
  if (expert < 0 || expert >= ids.known) return -1;
  if (ids.map != nullptr) expert = __ldg(ids.map + expert * ids.map_stride);
  return expert >= 0 && expert < ids.experts ? static_cast<int>(expert) : -1;
}

}  // namespace custom_ops
