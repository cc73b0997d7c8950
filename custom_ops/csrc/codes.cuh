// Scales and codes of values in registers, FP8 and int8. The contract is custom_ops/scales.py; a QuantRule says which
// of its arithmetics.
//
// There are two ways to the same bits: a quick one for scales whose reciprocal and residuals are normal floats, which
// is nearly all of them, and one for any scale, out of line, since it would otherwise be most of a kernel.
#pragma once

#include <cuda_fp8.h>

#include <cfloat>

#include "kernels.h"
#include "vec.cuh"

namespace custom_ops {

// From this amax on, amax / 448 and amax / 127 are exact the quick way; and from a scale of 2^-69 (kernels.h's
// least_quick_scale) up to kLargestQuickScale, so is every quotient that reaches the smallest code (2^-10): its
// residual is at least 2^-69 * 2^-10 * 2^-48, above the subnormal step 2^-149.
constexpr float kExactAmax = 0x1p-60f;
constexpr float kLargestQuickScale = 0x1p125f;

// N codes, one byte each.
template <int N>
using Codes = std::conditional_t<N == 8, uint2, uint32_t>;

template <typename T>
__device__ __forceinline__ float round_to(float v) {
  return Packed<T>::to_float(Packed<T>::from_float(v, v)).x;
}

// The least power of two from 2^-127 up that is not below scale, from its bits; Inf and NaN stay.
__device__ __forceinline__ float power_of_two(float scale) {
  const uint32_t bits = __float_as_uint(scale);
  if (bits > 0x7f800000u) return scale;
  return bits <= 0x400000u ? __uint_as_float(0x400000u) : __uint_as_float((bits + 0x7fffffu) & 0x7f800000u);
}

// The rules of nearly every launch: scale amax / 448, or / 127 for int8, as it comes, and codes x / scale. With
// fp8_in_input the scale is rounded to the dtype of x, as torchao's is, and may come of a product.
enum class Usual { no, fp8, int8, fp8_in_input };

inline Usual usual(const QuantRule& r) {
  const bool plain = r.code_mode == CodeMode::divide && r.scale_divides && !r.scale_in_input && !r.or_one &&
                     !r.power_of_two && r.min_scale == 0.0f;
  return !plain ? Usual::no : r.int8 ? Usual::int8 : Usual::fp8;
}

// The rule of a launch, with what a usual one is known to hold as constants. A branch that all threads take alike is
// cheap, but not free: four vectors a thread are then a third more instructions, and a small launch waits for each.
template <Usual U>
__device__ __forceinline__ QuantRule known(const QuantRule& given) {
  QuantRule rule = given;
  if (U != Usual::no) {
    rule.max = U == Usual::int8 ? 127.0f : 448.0f;
    rule.max_reciprocal = U == Usual::int8 ? 1.0f / 127.0f : 1.0f / 448.0f;
    rule.most = rule.max;
    rule.least = -rule.max;
    rule.min_scale = 0.0f;
    rule.code_mode = CodeMode::divide;
    rule.int8 = U == Usual::int8;
    if (U != Usual::fp8_in_input) rule.scale_divides = true;
    rule.scale_in_input = U == Usual::fp8_in_input;
    rule.or_one = false;
    rule.power_of_two = false;
  }
  return rule;
}

template <bool Quick, typename T>
__device__ __forceinline__ float scale_of(float amax, const QuantRule& rule) {
  if (rule.or_one) amax = amax > 0.0f ? amax : 1.0f;
  float scale = amax * rule.max_reciprocal;
  if (rule.scale_divides) {
    scale = Quick ? divide_by_reciprocal(amax, rule.max, rule.max_reciprocal) : __fdiv_rn(amax, rule.max);
  }
  if (rule.scale_in_input) scale = round_to<T>(scale);
  if (rule.min_scale > 0.0f) scale = max_nan(scale, rule.min_scale);
  if (rule.scale_in_input) scale = round_to<T>(scale);
  if (rule.power_of_two) scale = power_of_two(scale);
  return scale;
}

template <Usual U>
__device__ __forceinline__ bool is_quick(float amax, float scale, const QuantRule& rule) {
  // A usual scale is quick with its amax, which is there earlier, if no float16 can have rounded it to a subnormal.
  if (U == Usual::fp8 || U == Usual::int8) return amax >= kExactAmax && amax <= FLT_MAX;
  return amax >= kExactAmax && scale >= rule.least_quick_scale && scale <= kLargestQuickScale;
}

__device__ __forceinline__ uint32_t to_e4m3x4(float a, float b, float c, float d) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3);
  return low | (high << 16);
}

// Values within +-127.5: adding 1.5 * 2^23 rounds to an integer, ties to even, whose low byte is the code.
__device__ __forceinline__ uint32_t to_int8x4(float a, float b, float c, float d) {
  constexpr float kRound = 0x1.8p23f;
  const uint32_t low = __byte_perm(__float_as_uint(a + kRound), __float_as_uint(b + kRound), 0x0040);
  const uint32_t high = __byte_perm(__float_as_uint(c + kRound), __float_as_uint(d + kRound), 0x0040);
  return __byte_perm(low, high, 0x5410);
}

template <int N>
__device__ __forceinline__ Codes<N> pack_codes(const float (&q)[N], bool int8) {
  uint32_t words[N / 4];
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    words[i / 4] = int8 ? to_int8x4(q[i], q[i + 1], q[i + 2], q[i + 3]) : to_e4m3x4(q[i], q[i + 1], q[i + 2], q[i + 3]);
  }
  if constexpr (N == 8) {
    return make_uint2(words[0], words[1]);
  } else {
    return words[0];
  }
}

// x / scale for a quick scale, by the code mode. The products in T are clamped: only they can round an int8 to 128, if
// no |x| is above the amax that made the scale, for the quotients of the other modes are then off by at most 0.3.
template <typename T, int N>
__device__ __forceinline__ void quick_quotients(const Vec<T, N>& v, float scale, float r, const QuantRule& rule,
                                                float (&q)[N]) {
  if (rule.code_mode == CodeMode::reciprocal_input) {
    const auto factor = Packed<T>::from_float(r, r);
    const auto largest = Packed<T>::from_float(rule.max, rule.max);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const auto product = __hmin2(__hmax2(__hmul2(v.pair[i], factor), __hneg2(largest)), largest);
      const float2 f = Packed<T>::to_float(product);
      q[2 * i] = f.x;
      q[2 * i + 1] = f.y;
    }
    return;
  }
  float x[N];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const float2 f = Packed<T>::to_float(v.pair[i]);
    x[2 * i] = f.x;
    x[2 * i + 1] = f.y;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) q[i] = x[i] * r;
  if (rule.code_mode == CodeMode::divide) {
#pragma unroll
    for (int i = 0; i < N; ++i) q[i] = fix_quotient(q[i], x[i], scale, r);
  }
}

// Codes for a quick scale. Unless Clamp, no |x| may be above the amax that made the scale; with Clamp, x / scale may
// be up to 2^100.
template <bool Clamp, Usual U = Usual::no, typename T, int N>
__device__ __forceinline__ Codes<N> quick_codes(const Vec<T, N>& v, float scale, float r, const QuantRule& rule) {
  float q[N];
  quick_quotients(v, scale, r, rule, q);
  if (Clamp && rule.int8) {
#pragma unroll
    for (int i = 0; i < N; ++i) q[i] = fminf(fmaxf(q[i], rule.least), rule.most);
  }
  if (!Clamp && U == Usual::no) {  // by 127.5 the largest value would round up to 128
#pragma unroll
    for (int i = 0; i < N; ++i) q[i] = fminf(q[i], rule.most);
  }
  return pack_codes(q, rule.int8);
}

// x / scale for any scale and any x.
template <typename T, int N>
__device__ __forceinline__ void any_quotients(const Vec<T, N>& v, float scale, CodeMode mode, float (&q)[N]) {
  const float r = __frcp_rn(scale);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const float2 f = Packed<T>::to_float(v.pair[i]);
    const float2 in_input = Packed<T>::to_float(__hmul2(v.pair[i], Packed<T>::from_float(r, r)));
    q[2 * i] = mode == CodeMode::divide ? __fdiv_rn(f.x, scale) : mode == CodeMode::reciprocal ? f.x * r : in_input.x;
    q[2 * i + 1] =
        mode == CodeMode::divide ? __fdiv_rn(f.y, scale) : mode == CodeMode::reciprocal ? f.y * r : in_input.y;
  }
}

template <typename T, int N>
__device__ __forceinline__ Codes<N> any_codes(const Vec<T, N>& v, float scale, CodeMode mode, float least) {
  const bool int8 = least > -448.0f;
  float q[N];
  any_quotients(v, scale, mode, q);
  if (int8) {
#pragma unroll
    for (int i = 0; i < N; ++i) q[i] = q[i] == q[i] ? fminf(fmaxf(q[i], least), 127.0f) : 0.0f;
  }
  return pack_codes(q, int8);
}

// R vectors and the scale of each, in memory, where a call from a kernel full of registers leaves them.
template <typename T, int N, int R>
struct Rare {
  Vec<T, N> v[R];
  Codes<N> codes[R];
  float scale[R];
};

// Codes for any scale and any values; least: of a code, which tells int8 from FP8.
template <typename T, int N, int R>
__device__ __noinline__ void rare_codes(Rare<T, N, R>& rare, CodeMode mode, float least) {
#pragma unroll 1
  for (int i = 0; i < R; ++i) rare.codes[i] = any_codes(rare.v[i], rare.scale[i], mode, least);
}

// The same of amax instead of scales, which it replaces by them.
template <typename T, int N, int R>
__device__ __noinline__ void rare_codes_of_amax(Rare<T, N, R>& rare, const QuantRule& rule) {
#pragma unroll 1
  for (int i = 0; i < R; ++i) {
    rare.scale[i] = scale_of<false, T>(rare.scale[i], rule);
    rare.codes[i] = any_codes(rare.v[i], rare.scale[i], rule.code_mode, rule.least);
  }
}

// Codes of R vectors, each with its amax, and the scales. With one vector, the quick way is taken before it is known
// to be right: small launches have one, and need not wait for the check. With more, that would cost registers.
template <Usual U, typename T, int N, int R>
__device__ __forceinline__ void codes_of(const Vec<T, N> (&v)[R], const float (&amax)[R], const QuantRule& given,
                                         Codes<N> (&codes)[R], float (&scale)[R]) {
  const QuantRule rule = known<U>(given);
  bool quick = true;
#pragma unroll
  for (int i = 0; i < R; ++i) {
    scale[i] = scale_of<true, T>(amax[i], rule);
    quick = quick && is_quick<U>(amax[i], scale[i], rule);
  }
  if (R == 1 || quick) {
#pragma unroll
    for (int i = 0; i < R; ++i) codes[i] = quick_codes<false, U>(v[i], scale[i], reciprocal(scale[i]), rule);
  }
  if (!quick) {
    Rare<T, N, R> rare;
#pragma unroll
    for (int i = 0; i < R; ++i) {
      rare.v[i] = v[i];
      rare.scale[i] = amax[i];
    }
    rare_codes_of_amax(rare, given);
#pragma unroll
    for (int i = 0; i < R; ++i) {
      codes[i] = rare.codes[i];
      scale[i] = rare.scale[i];
    }
  }
}

// Codes of V vectors that share an amax, put(i, codes) one after the other, and their scale.
template <typename T, int N, int V, typename Put>
__device__ __forceinline__ float codes_of_shared(const Vec<T, N> (&v)[V], float amax, const QuantRule& rule, Put put) {
  const float scale = scale_of<true, T>(amax, rule);
  if (is_quick<Usual::no>(amax, scale, rule)) {
    const float r = reciprocal(scale);
#pragma unroll
    for (int i = 0; i < V; ++i) put(i, quick_codes<false>(v[i], scale, r, rule));
    return scale;
  }
  Rare<T, N, V> rare;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    rare.v[i] = v[i];
    rare.scale[i] = amax;
  }
  rare_codes_of_amax(rare, rule);
#pragma unroll
  for (int i = 0; i < V; ++i) put(i, rare.codes[i]);
  return rare.scale[0];
}

// max |v| of R vectors, as the bits of T: without their signs floats order as integers do, NaN on top.
template <typename T, int N, int R>
__device__ __forceinline__ uint32_t largest_bits(const Vec<T, N> (&v)[R]) {
  auto m = abs_max(v[0]);
#pragma unroll
  for (int i = 1; i < R; ++i) m = __hmax2_nan(m, abs_max(v[i]));
  const uint32_t bits = *reinterpret_cast<const uint32_t*>(&m);
  return max(bits & 0xffffu, bits >> 16);
}

template <typename T>
__device__ __forceinline__ float from_bits(uint32_t bits) {
  return Packed<T>::to_float(*reinterpret_cast<const typename Packed<T>::type*>(&bits)).x;
}

}  // namespace custom_ops
