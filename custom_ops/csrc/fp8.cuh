// Group quantization of values in registers: neighbouring lanes hold one group, N (4 or 8) elements each. The
// contract is custom_ops/scales.py:
//   amax = max(max |x|, min_amax), NaN propagating;  scale = amax / 448;  code = e4m3(x / scale)
// with both divisions IEEE-exact, rounding to nearest even, saturating to +-448.
#pragma once

#include <cuda_fp8.h>

#include "kernels.h"
#include "vec.cuh"

namespace custom_ops {

constexpr float kFp8Max = 448.0f;

// From here up to the largest float, the quick division is exact for every x that the group can hold: the scale
// lies in [2^-69, 2^120), and the residual of a quotient that reaches the smallest code (2^-10) is at least
// 2^-69 * 2^-10 * 2^-48, above the subnormal step 2^-149.
constexpr float kExactAmax = 0x1p-60f;
constexpr float kLift = 0x1p100f;  // brings what is below (and any subnormal) up to where it is exact
constexpr float kLargestFloat = 0x1.fffffep127f;

__device__ __forceinline__ uint32_t to_e4m3x4(float a, float b, float c, float d) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3);
  return low | (high << 16);
}

// amax of the groups that R vectors of this lane belong to. Every lane of the warp calls it.
template <typename T, int N, int R>
__device__ __forceinline__ void group_amax(const Vec<T, N> (&v)[R], int group_size, float min_amax,
                                           float (&amax)[R]) {
  typename Packed<T>::type m[R];
#pragma unroll
  for (int i = 0; i < R; ++i) m[i] = abs_max(v[i]);
  if (N == 4 && group_size == 128) {
    // The group is the warp, which has a maximum of integers in one instruction, in place of five rounds of
    // shuffles in series. Without their signs floats order as integers do, NaN on top.
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const uint32_t bits = *reinterpret_cast<const uint32_t*>(&m[i]);
      const uint32_t largest = __reduce_max_sync(0xffffffffu, max(bits & 0xffffu, bits >> 16));
      const float2 f = Packed<T>::to_float(*reinterpret_cast<const typename Packed<T>::type*>(&largest));
      amax[i] = max_nan(f.x, min_amax);
    }
    return;
  }
#pragma unroll
  for (int lanes = 64 / N; lanes > 0; lanes /= 2) {
    if (lanes == 64 / N && group_size == 64) continue;
#pragma unroll
    for (int i = 0; i < R; ++i) m[i] = __hmax2_nan(m[i], __shfl_xor_sync(0xffffffffu, m[i], lanes));
  }
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const float2 f = Packed<T>::to_float(m[i]);
    amax[i] = max_nan(max_nan(f.x, f.y), min_amax);
  }
}

// N codes, one byte each.
template <int N>
using Codes = std::conditional_t<N == 8, uint2, uint32_t>;

__device__ __forceinline__ uint2 pack_codes(const float (&q)[8]) {
  return make_uint2(to_e4m3x4(q[0], q[1], q[2], q[3]), to_e4m3x4(q[4], q[5], q[6], q[7]));
}
__device__ __forceinline__ uint32_t pack_codes(const float (&q)[4]) { return to_e4m3x4(q[0], q[1], q[2], q[3]); }

// Codes of a vector and the scale of its group. Quick: amax is in the exact range.
template <bool Quick, typename T, int N>
__device__ __forceinline__ Codes<N> quantize(const Vec<T, N>& v, float amax, float& scale) {
  float lift = 1.0f;
  float divisor;
  float r;
  bool exact = true;  // Inf, NaN and 0 take the bare product: Inf -> 0 or NaN, NaN and 0 -> NaN
  if (Quick) {
    divisor = scale = divide_by_reciprocal(amax, kFp8Max, 1.0f / kFp8Max);
    r = reciprocal(divisor);
  } else {
    scale = __fdiv_rn(amax, kFp8Max);
    if (amax < kExactAmax) lift = kLift;
    divisor = scale * lift;
    exact = divisor > 0.0f && divisor <= kLargestFloat;
    r = exact ? reciprocal(divisor) : reciprocal_approx(divisor);
  }
  float q[N];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const float2 f = Packed<T>::to_float(v.pair[i]);
    q[2 * i] = f.x;
    q[2 * i + 1] = f.y;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float x = Quick ? q[i] : q[i] * lift;
    q[i] = Quick || exact ? divide_by_reciprocal(x, divisor, r) : x * r;
  }
  return pack_codes(q);
}

// Group quantization of R vectors of this lane. Every lane of the warp calls it. With one vector, the quick way is
// taken before it is known to be right: small launches have one, and need not wait for the check. With more,
// that would cost registers.
template <typename T, int N, int R>
__device__ __forceinline__ void group_quantize(const Vec<T, N> (&v)[R], int group_size, float min_amax,
                                               Codes<N> (&codes)[R], float (&scale)[R]) {
  float amax[R];
  group_amax(v, group_size, min_amax, amax);
  bool quick = true;
#pragma unroll
  for (int i = 0; i < R; ++i) quick = quick && amax[i] >= kExactAmax && amax[i] <= kLargestFloat;
  if (R == 1 || quick) {
#pragma unroll
    for (int i = 0; i < R; ++i) codes[i] = quantize<true>(v[i], amax[i], scale[i]);
  }
  if (!quick) {
#pragma unroll
    for (int i = 0; i < R; ++i) codes[i] = quantize<false>(v[i], amax[i], scale[i]);
  }
}

// Where a lane stores its codes of one row, and the scale of its group if it is the group's first lane.
struct QuantizedAt {
  uint8_t* codes;
  float* scale;  // nullptr in the group's other lanes
};

__device__ __forceinline__ QuantizedAt quantized_at(const Quantized& out, int64_t row, int64_t col, int64_t cols) {
  QuantizedAt at{out.codes + row * cols + col, nullptr};
  if ((col & (out.group_size - 1)) == 0) {
    const int64_t group = col >> (out.group_size == 128 ? 7 : 6);
    at.scale = out.scale + row * out.row_stride + group * out.group_stride;
  }
  return at;
}

// Stores what a lane has of R consecutive rows, `left` of which exist. Column-major scales of consecutive rows are
// neighbours, and go out together where they are aligned.
template <int R, typename C>
__device__ __forceinline__ void store_quantized(const C (&codes)[R], const float (&scale)[R], const QuantizedAt& at,
                                                int64_t left, int64_t cols, const Quantized& out) {
#pragma unroll
  for (int i = 0; i < R; ++i) {
    if (i < left) *reinterpret_cast<C*>(at.codes + i * cols) = codes[i];
  }
  if (at.scale == nullptr) return;
  if (R > 1 && out.row_stride == 1 && out.group_stride % R == 0 && R <= left) {
    if constexpr (R == 2) *reinterpret_cast<float2*>(at.scale) = make_float2(scale[0], scale[1]);
    if constexpr (R == 4) *reinterpret_cast<float4*>(at.scale) = make_float4(scale[0], scale[1], scale[2], scale[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < R; ++i) {
    if (i < left) at.scale[i * out.row_stride] = scale[i];
  }
}

}  // namespace custom_ops
