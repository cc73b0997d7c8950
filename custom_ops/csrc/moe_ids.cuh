// The expert of a pair, as those count that are here.
#pragma once

#include "moe.h"

namespace custom_ops {

// -1 if it is elsewhere. The kernel that writes the ids may have run beside this one, so they are no read-only loads.
__device__ __forceinline__ int expert_of(const Ids& ids, int64_t pair) {
  int64_t expert = ids.int64 ? __ldcg(static_cast<const long long*>(ids.data) + pair)
                             : __ldcg(static_cast<const int32_t*>(ids.data) + pair);
  if (expert < 0 || expert >= ids.known) return -1;
  if (ids.map != nullptr) expert = __ldcg(ids.map + expert * ids.map_stride);
  return expert >= 0 && expert < ids.experts ? static_cast<int>(expert) : -1;
}

}  // namespace custom_ops
