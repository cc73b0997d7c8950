// Group quantization of values in registers: 8 (group of 64) or 16 (group of 128) neighbouring lanes hold one
// group, eight elements each. The contract is custom_ops/scales.py:
//   amax = max(max |x|, min_amax), NaN propagating;  scale = amax / 448;  code = e4m3(x / scale)
// with both divisions IEEE-exact, rounding to nearest even, saturating to +-448.
#pragma once

#include <cuda_fp8.h>

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
template <typename T, int R>
__device__ __forceinline__ void group_amax(const Vec<T> (&v)[R], int group_size, float min_amax, float (&amax)[R]) {
  typename Vec<T>::Pair m[R];
#pragma unroll
  for (int i = 0; i < R; ++i) m[i] = abs_max(v[i]);
  if (group_size == 128) {
#pragma unroll
    for (int i = 0; i < R; ++i) m[i] = __hmax2_nan(m[i], __shfl_xor_sync(0xffffffffu, m[i], 8));
  }
#pragma unroll
  for (int lanes = 4; lanes > 0; lanes /= 2) {
#pragma unroll
    for (int i = 0; i < R; ++i) m[i] = __hmax2_nan(m[i], __shfl_xor_sync(0xffffffffu, m[i], lanes));
  }
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const float2 f = Packed<T>::to_float(m[i]);
    amax[i] = max_nan(max_nan(f.x, f.y), min_amax);
  }
}

// Codes of eight elements and the scale of their group, for any amax. Quick: it is in the exact range.
template <typename T, bool Quick>
__device__ __forceinline__ uint2 quantize(const Vec<T>& v, float amax, float& scale) {
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
  float q[kVec];
#pragma unroll
  for (int i = 0; i < kVec / 2; ++i) {
    const float2 f = Packed<T>::to_float(v.pair[i]);
    q[2 * i] = f.x;
    q[2 * i + 1] = f.y;
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const float x = Quick ? q[i] : q[i] * lift;
    q[i] = Quick || exact ? divide_by_reciprocal(x, divisor, r) : x * r;
  }
  return make_uint2(to_e4m3x4(q[0], q[1], q[2], q[3]), to_e4m3x4(q[4], q[5], q[6], q[7]));
}

// Group quantization of R vectors of this lane, in one branch-free piece unless one of them is extreme.
// Every lane of the warp calls it.
template <typename T, int R>
__device__ __forceinline__ void group_quantize(const Vec<T> (&v)[R], int group_size, float min_amax,
                                               uint2 (&codes)[R], float (&scale)[R]) {
  float amax[R];
  group_amax<T, R>(v, group_size, min_amax, amax);
  bool quick = true;
#pragma unroll
  for (int i = 0; i < R; ++i) quick = quick && amax[i] >= kExactAmax && amax[i] <= kLargestFloat;
  if (quick) {
#pragma unroll
    for (int i = 0; i < R; ++i) codes[i] = quantize<T, true>(v[i], amax[i], scale[i]);
  } else {
#pragma unroll
    for (int i = 0; i < R; ++i) codes[i] = quantize<T, false>(v[i], amax[i], scale[i]);
  }
}

}  // namespace custom_ops
