// Vectors of 16-bit floats in registers, packed two by two, and what is done to all their elements at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "kernels.h"

namespace custom_ops {

constexpr int kVec = 8;  // elements of a vector, usually: 16 bytes, the widest load before sm_100

template <typename T>
struct Packed;  // the two-element type of T, and its conversions
template <>
struct Packed<__nv_bfloat16> {
  using type = __nv_bfloat162;
  // A bfloat16 is the upper half of a float: one instruction each, where __bfloat1622float2 takes three for two.
  static __device__ float2 to_float(type v) {
    const uint32_t bits = *reinterpret_cast<const uint32_t*>(&v);
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
  }
  static __device__ type from_float(float a, float b) { return __floats2bfloat162_rn(a, b); }
};
template <>
struct Packed<__half> {
  using type = __half2;
  static __device__ float2 to_float(type v) { return __half22float2(v); }
  static __device__ type from_float(float a, float b) { return __floats2half2_rn(a, b); }
};

template <typename T, int N = kVec>
struct alignas(2 * N) Vec {
  static_assert(N == 4 || N == 8);
  using Pair = typename Packed<T>::type;
  using Bits = std::conditional_t<N == 8, uint4, uint2>;
  Pair pair[N / 2];
  __device__ Bits& bits() { return *reinterpret_cast<Bits*>(this); }
  __device__ const Bits& bits() const { return *reinterpret_cast<const Bits*>(this); }
};

template <typename T, int N = kVec>
__device__ __forceinline__ Vec<T, N> zero_vec() {
  Vec<T, N> v;
  v.bits() = typename Vec<T, N>::Bits{};
  return v;
}

// From here on the compiler knows nothing of the value.
template <typename T, int N>
__device__ __forceinline__ void hide(Vec<T, N>& v) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) asm volatile("" : "+r"(reinterpret_cast<uint32_t*>(&v)[i]));
}

// For data that nothing writes while the kernel runs. A plain load: with L1::no_allocate, what exceeds L2 takes up to
// 4 % longer.
template <typename T, int N = kVec>
__device__ __forceinline__ Vec<T, N> load_const(const T* p) {
  Vec<T, N> v;
  v.bits() = __ldg(reinterpret_cast<const typename Vec<T, N>::Bits*>(p));
  return v;
}

// A store to global memory. Of a pointer in a struct of parameters the compiler does not know that it is global, and
// would emit the slower store to wherever.
template <typename V>
__device__ __forceinline__ void store(V* p, V v) {
  __stwb(p, v);
}

template <typename T, int N>
__device__ __forceinline__ void store_vec(T* p, const Vec<T, N>& v) {
  store(reinterpret_cast<typename Vec<T, N>::Bits*>(p), v.bits());
}

// The scalar fall-back: any alignment, and only the first `count` elements (the rest reads as zero).
// Deliberately no read-only load: rms_norm reads back what it has written.
template <typename T, int N = kVec>
__device__ __forceinline__ Vec<T, N> load_scalar(const T* p, int64_t count, uint32_t stride = 1) {
  Vec<T, N> v = zero_vec<T, N>();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < count) reinterpret_cast<T*>(&v)[i] = p[i * stride];
  }
  return v;
}

template <typename T, int N>
__device__ __forceinline__ void store_scalar(T* p, const Vec<T, N>& v, int64_t count) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < count) p[i] = reinterpret_cast<const T*>(&v)[i];
  }
}

// Zero from element `count` on.
template <typename T, int N>
__device__ __forceinline__ Vec<T, N> only_first(Vec<T, N> v, int64_t count) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i >= count) reinterpret_cast<T*>(&v)[i] = T(0.0f);
  }
  return v;
}

// max |v| over the vector, in the two halves of a pair. NaN propagates.
template <typename T, int N>
__device__ __forceinline__ typename Packed<T>::type abs_max(const Vec<T, N>& v) {
  auto m = __hmax2_nan(__habs2(v.pair[0]), __habs2(v.pair[1]));
  if constexpr (N == 8) m = __hmax2_nan(m, __hmax2_nan(__habs2(v.pair[2]), __habs2(v.pair[3])));
  return m;
}

// fmaxf drops a NaN; this keeps it.
__device__ __forceinline__ float max_nan(float a, float b) {
  float m;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
  return m;
}

// 1 / x to 1 ulp; 0 and Inf as 1 / x.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// 1 / x correctly rounded, for normal x below 2^126 (__frcp_rn does the same behind a check of the range).
__device__ __forceinline__ float reciprocal(float x) {
  const float r = reciprocal_approx(x);
  return fmaf(fmaf(-x, r, 1.0f), r, r);
}

// x / d from q = x * r, r being a reciprocal of d: one step on its residual. Correctly rounded if r is, and d, r
// and the residual are normal. The residual's sign is chosen so that -0 stays -0: fma(-q, d, x) would be +0.
__device__ __forceinline__ float fix_quotient(float q, float x, float d, float r) {
  return fmaf(-fmaf(q, d, -x), r, q);
}
__device__ __forceinline__ float divide_by_reciprocal(float x, float d, float r) {
  return fix_quotient(x * r, x, d, r);
}

__device__ __forceinline__ uint32_t divide(uint32_t n, const Divisor& by) {
  return __umulhi(2 * n, by.magic) >> by.shift;
}

// Where a row of a matrix starts.
template <typename T>
__device__ __forceinline__ const T* row_of(const Matrix& m, int64_t row) {
  const T* const data = static_cast<const T*>(m.data);
  if (m.inner.divisor == 0) return data + row * m.stride;
  const uint32_t n = static_cast<uint32_t>(row) + m.first;
  const uint32_t outer = divide(n, m.inner);
  return data + outer * m.outer_stride + (n - outer * m.inner.divisor) * m.stride;
}

// The even and the odd elements of 2 N.
template <typename T, int N>
__device__ __forceinline__ void deinterleave(const Vec<T, N>& a, const Vec<T, N>& b, Vec<T, N>& even, Vec<T, N>& odd) {
  const uint32_t* const in[2] = {reinterpret_cast<const uint32_t*>(&a), reinterpret_cast<const uint32_t*>(&b)};
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const uint32_t* const from = in[i / (N / 4)] + 2 * i % (N / 2);
    reinterpret_cast<uint32_t*>(&even)[i] = __byte_perm(from[0], from[1], 0x5410);
    reinterpret_cast<uint32_t*>(&odd)[i] = __byte_perm(from[0], from[1], 0x7632);
  }
}

// May a matrix be read, or a contiguous one of this width be written, as 16-byte vectors?
inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
inline bool vectorizable(const Matrix& m, int64_t cols) {
  return aligned16(m.data) && m.stride % kVec == 0 && m.outer_stride % kVec == 0 && m.col_stride == 1 &&
         cols % kVec == 0;
}

}  // namespace custom_ops
