// The best experts of each token and their weights: a warp to a token, whose scores stay in registers.
//
// Lane l owns the experts l, l + 32, ... as in eager's softmax of up to 1024 columns, and the sums are taken in its
// order, so that the bits are eager's too. No product is ever contracted with a sum.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "groups.cuh"
#include "moe.h"
#include "passes.cuh"

namespace custom_ops {
namespace {

constexpr int kWarps = 4;
constexpr uint32_t kRemoved = 0;  // below the key of every float

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

// Those of lane's own experts, where there are any. All loads are under way together, which they are not where each of
// them asks for its dtype. No read-only loads: the kernel that writes the logits may have run beside this one.
template <typename T, int Items>
__device__ __forceinline__ void load_typed(float (&v)[Items], const void* p, int64_t first, int64_t step, int count) {
  T raw[Items];
#pragma unroll
  for (int i = 0; i < Items; ++i) {
    if (i * 32 < count) raw[i] = __ldcg(static_cast<const T*>(p) + first + i * 32 * step);
  }
#pragma unroll
  for (int i = 0; i < Items; ++i) {
    if (i * 32 < count) v[i] = to_float(raw[i]);
  }
}

template <int Items>
__device__ __forceinline__ void load_floats(float (&v)[Items], const void* p, Float type, int64_t first, int64_t step,
                                            int count) {
  if (type == Float::float32) {
    load_typed<float>(v, p, first, step, count);
  } else if (type == Float::bfloat16) {
    load_typed<__nv_bfloat16>(v, p, first, step, count);
  } else {
    load_typed<__half>(v, p, first, step, count);
  }
}

__device__ __forceinline__ void store_float(void* p, Float type, int64_t i, float v) {
  if (type == Float::float32) {
    static_cast<float*>(p)[i] = v;
  } else if (type == Float::bfloat16) {
    static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16_rn(v);
  } else {
    static_cast<__half*>(p)[i] = __float2half_rn(v);
  }
}

__device__ __forceinline__ float rounded(float v, Float type) {
  if (type == Float::float32) return v;
  return type == Float::bfloat16 ? __bfloat162float(__float2bfloat16_rn(v)) : __half2float(__float2half_rn(v));
}

// Integers that compare as the floats do: -0 as 0, NaN above all, whatever its sign.
__device__ __forceinline__ uint32_t key_of(float v) {
  if (v != v) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(v + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

__device__ __forceinline__ float sigmoid(float v) { return __fdiv_rn(1.0f, __fadd_rn(1.0f, expf(-v))); }
__device__ __forceinline__ float softplus(float v) { return v > 20.0f ? v : log1pf(expf(v)); }

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o > 0; o /= 2) v = __fadd_rn(v, __shfl_xor_sync(kAllLanes, v, o));
  return v;
}
__device__ __forceinline__ float warp_max(float v) { return value_of(__reduce_max_sync(kAllLanes, key_of(v))); }

// The owner of the largest key, the lowest index among equals.
__device__ __forceinline__ int winner(uint32_t key, int index) {
  const uint32_t best = __reduce_max_sync(kAllLanes, key);
  return static_cast<int>(__reduce_min_sync(kAllLanes, key == best ? static_cast<uint32_t>(index) : ~0u));
}

// The groups that stay, a bit each. choice: the keys of all experts, in shared memory.
__device__ __forceinline__ uint32_t best_groups(const RoutingArgs& p, const uint32_t* choice, int lane) {
  uint32_t mine = kRemoved;
  if (lane < p.num_groups) {
    const int size = static_cast<int>(p.group_size.divisor);
    uint32_t first = 0;
    uint32_t second = 0;
    int at = lane % size;  // each lane begins elsewhere, so that they meet in no bank
    for (int i = 0; i < size; ++i) {
      const uint32_t key = choice[lane * size + at];
      second = max(second, min(first, key));
      first = max(first, key);
      at = at + 1 == size ? 0 : at + 1;
    }
    mine = first;
    if (p.top2) mine = key_of(rounded(__fadd_rn(value_of(first), value_of(second)), p.choice_type));
  }
  uint32_t kept = 0;
  for (int i = 0; i < p.topk_groups; ++i) {
    const int group = winner(mine, lane);
    kept |= 1u << group;
    if (lane == group) mine = kRemoved;
  }
  return kept;
}

// Of the weights in shared memory, lane's own, lane's plus 32, ...: softmax, renormalization, scale, and out.
__device__ __forceinline__ void finish(const RoutingArgs& p, float* chosen, int64_t token, int lane) {
  const Float step = p.step_type;
  if (p.softmax_last) {
    float largest = -INFINITY;
    bool nan = false;
    for (int k = lane; k < p.top_k; k += 32) {
      largest = fmaxf(largest, chosen[k]);
      nan |= chosen[k] != chosen[k];
    }
    largest = warp_max(nan ? NAN : largest);
    float sum = 0.0f;
    for (int k = lane; k < p.top_k; k += 32) {
      chosen[k] = expf(chosen[k] - largest);
      sum = __fadd_rn(sum, chosen[k]);
    }
    sum = warp_sum(sum);
    for (int k = lane; k < p.top_k; k += 32) chosen[k] = rounded(__fdiv_rn(chosen[k], sum), step);
  }
  float total = 1.0f;
  if (p.renormalize) {
    // As eager's sum: so many threads as the largest power of two in top_k, then halves (torch 2.11).
    const int threads = p.top_k >= 32 ? 32 : 1 << (31 - __clz(p.top_k));
    float part = 0.0f;
    __syncwarp();
    if (lane < threads) {
      for (int k = lane; k < p.top_k; k += threads) part = __fadd_rn(part, chosen[k]);
    }
#pragma unroll 1
    for (int o = threads >> 1; o > 0; o >>= 1) part = __fadd_rn(part, __shfl_down_sync(kAllLanes, part, o));
    total = rounded(__shfl_sync(kAllLanes, part, 0), step);
    if (total < p.renormalize_min) total = rounded(p.renormalize_min, step);  // NaN is not below, and stays
    total = rounded(__fadd_rn(total, p.renormalize_eps), step);
  }
  for (int k = lane; k < p.top_k; k += 32) {
    float weight = chosen[k];
    if (p.renormalize) weight = rounded(__fdiv_rn(weight, total), step);
    weight = rounded(__fmul_rn(weight, p.scale), step);
    store_float(p.weights, p.weights_type, token * p.top_k + k, weight);
  }
}

// Four blocks at a time: without it the compiler spills at 256 experts and more.
template <int Items>
__global__ void __launch_bounds__(kWarps * 32, 4) route_kernel(const __grid_constant__ RoutingArgs p) {
  __shared__ uint32_t scratch[kWarps][32 * Items];
  const int lane = threadIdx.x % 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  wait_for_first();  // before what comes next begins: it may rely on all that is ahead of this kernel
  let_second_begin();
  if (token >= p.tokens) return;  // all lanes of the warp

  float score[Items];
  float bias[Items];
#pragma unroll
  for (int i = 0; i < Items; ++i) {
    score[i] = -INFINITY;
    bias[i] = 0.0f;
  }
  const int count = p.experts - lane;
  load_floats(score, p.logits, p.logits_type, token * p.row_stride + lane, 1, count);
  if (p.bias != nullptr) load_floats(bias, p.bias, p.bias_type, lane * p.bias_stride, p.bias_stride, count);

  uint32_t key[Items];
  if (p.by_logits) {
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      key[i] = key_of(p.bias != nullptr ? rounded(__fadd_rn(score[i], bias[i]), p.choice_type) : score[i]);
    }
  }
  if (p.scoring == Scoring::softmax) {
    uint32_t best = kRemoved;
#pragma unroll
    for (int i = 0; i < Items; ++i) best = max(best, key_of(score[i]));
    const float largest = value_of(__reduce_max_sync(kAllLanes, best));
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      score[i] = expf(score[i] - largest);
      if (i * 32 + lane < p.experts) sum = __fadd_rn(sum, score[i]);
    }
    sum = warp_sum(sum);
#pragma unroll
    for (int i = 0; i < Items; ++i) score[i] = __fdiv_rn(score[i], sum);
  } else if (p.scoring == Scoring::sigmoid) {
#pragma unroll
    for (int i = 0; i < Items; ++i) score[i] = sigmoid(score[i]);
  } else if (p.scoring == Scoring::sqrt_softplus) {
#pragma unroll
    for (int i = 0; i < Items; ++i) score[i] = __fsqrt_rn(rounded(softplus(score[i]), p.step_type));
  }
#pragma unroll
  for (int i = 0; i < Items; ++i) {
    score[i] = rounded(score[i], p.step_type);
    if (!p.by_logits) {
      key[i] = key_of(p.bias != nullptr ? rounded(__fadd_rn(score[i], bias[i]), p.choice_type) : score[i]);
    }
    if (i * 32 + lane >= p.experts) key[i] = kRemoved;
  }

  if (p.topk_groups > 0) {
#pragma unroll
    for (int i = 0; i < Items; ++i) scratch[threadIdx.x / 32][i * 32 + lane] = key[i];
    __syncwarp();
    const uint32_t kept = best_groups(p, scratch[threadIdx.x / 32], lane);
    const uint32_t masked = key_of(p.masked == Masked::infinity ? -INFINITY : 0.0f);
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      const int expert = i * 32 + lane;
      if (expert >= p.experts || kept >> divide(expert, p.group_size) & 1) continue;
      key[i] = masked;
      if (p.masked == Masked::zero_weight) score[i] = 0.0f;
    }
    __syncwarp();  // before the scratch is written again
  }

  float* const chosen = reinterpret_cast<float*>(scratch[threadIdx.x / 32]);
  uint32_t best = key[0];
  int index = lane;
#pragma unroll
  for (int i = 1; i < Items; ++i) {
    if (key[i] > best) {
      best = key[i];
      index = i * 32 + lane;
    }
  }
  int64_t* const ids = p.ids + token * p.top_k;
  for (int k = 0; k < p.top_k; ++k) {
    const int expert = winner(best, index);
    if (expert % 32 == lane) {
      best = kRemoved;
#pragma unroll
      for (int i = 0; i < Items; ++i) {
        if (i == expert / 32) {
          chosen[k] = score[i];
          key[i] = kRemoved;
        }
        if (key[i] > best || i == 0) {
          best = key[i];
          index = i * 32 + lane;
        }
      }
      ids[k] = expert;
    }
  }
  __syncwarp();
  finish(p, chosen, token, lane);
}

}  // namespace

cudaError_t moe_route(const RoutingArgs& args, cudaStream_t stream) {
  if (args.tokens == 0) return cudaSuccess;
  if (args.tokens > int64_t{kWarps} * INT32_MAX) return cudaErrorInvalidValue;
  const unsigned blocks = static_cast<unsigned>((args.tokens + kWarps - 1) / kWarps);
  bool early;
  const cudaError_t error = can_begin_early(early);
  if (error != cudaSuccess) return error;
  const auto kernel = args.experts <= 32    ? route_kernel<1>
                      : args.experts <= 64  ? route_kernel<2>
                      : args.experts <= 128 ? route_kernel<4>
                      : args.experts <= 256 ? route_kernel<8>
                                            : route_kernel<16>;
  return launch_kernel(kernel, blocks, kWarps * 32, 0, stream, early, args);
}

}  // namespace custom_ops
