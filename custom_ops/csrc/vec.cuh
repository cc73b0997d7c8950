// Eight 16-bit floats as one 16-byte vector in registers, and what is done to all eight at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace custom_ops {

constexpr int kVec = 8;  // elements per vector: 16 bytes, the widest load before sm_100

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

template <typename T>
struct alignas(16) Vec {
  using Pair = typename Packed<T>::type;
  Pair pair[kVec / 2];
};

template <typename T>
__device__ __forceinline__ Vec<T> zero_vec() {
  Vec<T> v;
  *reinterpret_cast<uint4*>(&v) = make_uint4(0, 0, 0, 0);
  return v;
}

// Inputs are read once: they pass L1 by, which leaves it to the norm weights that all rows share.
template <typename T>
__device__ __forceinline__ Vec<T> load_streaming(const T* p) {
  Vec<T> v;
  uint4& u = *reinterpret_cast<uint4*>(&v);
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(u.x), "=r"(u.y), "=r"(u.z), "=r"(u.w)
               : "l"(p));
  return v;
}

template <typename T>
__device__ __forceinline__ void store_vec(T* p, const Vec<T>& v) {
  *reinterpret_cast<uint4*>(p) = *reinterpret_cast<const uint4*>(&v);
}

// The scalar fall-back: any alignment, and only the first `count` elements (the rest reads as zero).
// Deliberately no read-only load: rms_norm reads back what it has written.
template <typename T>
__device__ __forceinline__ Vec<T> load_scalar(const T* p, int64_t count) {
  Vec<T> v = zero_vec<T>();
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if (i < count) reinterpret_cast<T*>(&v)[i] = p[i];
  }
  return v;
}

template <typename T>
__device__ __forceinline__ void store_scalar(T* p, const Vec<T>& v, int64_t count) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if (i < count) p[i] = reinterpret_cast<const T*>(&v)[i];
  }
}

// max |v| over the vector, in the two halves of a pair. NaN propagates.
template <typename T>
__device__ __forceinline__ typename Vec<T>::Pair abs_max(const Vec<T>& v) {
  return __hmax2_nan(__hmax2_nan(__habs2(v.pair[0]), __habs2(v.pair[1])),
                     __hmax2_nan(__habs2(v.pair[2]), __habs2(v.pair[3])));
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

// x / d by a reciprocal r of d: a product, and one step on its residual. Correctly rounded if r is, and d, r
// and the residual are normal. The residual's sign is chosen so that -0 stays -0: fma(-q, d, x) would be +0.
__device__ __forceinline__ float divide_by_reciprocal(float x, float d, float r) {
  const float q = x * r;
  return fmaf(-fmaf(q, d, -x), r, q);
}

// May a matrix be read and written as 16-byte vectors?
inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
inline bool vectorizable(const void* p, int64_t stride, int64_t cols) {
  return aligned16(p) && stride % kVec == 0 && cols % kVec == 0;
}

}  // namespace custom_ops
