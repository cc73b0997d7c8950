// How a tensor becomes int8 with one scale and one zero point: both are given, or come of how far its values reach to
// either side of zero.
#pragma once

#include "asymmetric.cuh"
#include "tensor_quant.cuh"

namespace custom_ops {

// Is |v| < 2^22 after this, and the code of it still that of v? For zero points of int8.
__device__ __forceinline__ float near_codes(float v) { return fminf(fmaxf(v, -1024.0f), 1024.0f); }

__device__ __forceinline__ float given_zero_point(const void* zero_point, bool wide) {
  if (zero_point == nullptr) return 0.0f;
  return wide ? static_cast<float>(__ldg(static_cast<const int32_t*>(zero_point)))
              : static_cast<float>(__ldg(static_cast<const signed char*>(zero_point)));
}

template <typename T>
struct Asymmetric {
  using Out = TensorAsymmetric;
  using At = Affine;
  static constexpr int kFound = 2;

  template <int N, int R>
  static __device__ __forceinline__ void find(uint32_t (&found)[kFound], const Vec<T, N> (&v)[R]) {
    Reach reach{found[0], found[1]};
    extend(reach, v);
    found[0] = reach.above;
    found[1] = reach.below;
  }

  static __device__ __forceinline__ At given(const Out& out) {
    const float scale = __ldg(out.given);
    const float zero_point = given_zero_point(out.zero_point, out.wide);
    return {scale, zero_point,
            scale >= out.rule.least_quick_scale && scale <= kLargestQuickScale && clamp_code(zero_point) == zero_point};
  }
  static __device__ __forceinline__ At of(const Out& out, const uint32_t (&found)[kFound]) {
    return affine_of<T>({found[0], found[1]}, out.rule);
  }
  static __device__ __forceinline__ void keep(const Out& out, const At& affine) {
    store(out.scale, affine.scale);
    store(static_cast<signed char*>(out.zero_point), static_cast<signed char>(affine.zero_point));
  }

  // put(i, codes) for R vectors.
  template <int N, int R, typename Put>
  static __device__ __forceinline__ void codes(const Out& out, const Vec<T, N> (&v)[R], const At& affine, Put put) {
    const float r = reciprocal(affine.scale);
    const float largest = from_bits<T>(largest_bits(v));
    if (affine.quick && largest * r <= 0x1p100f) {
      const int zero_point = static_cast<int>(affine.zero_point);
#pragma unroll
      for (int i = 0; i < R; ++i) {
        float q[N];
        quick_quotients(v[i], affine.scale, r, out.rule, q);
#pragma unroll
        for (int j = 0; j < N; ++j) q[j] = near_codes(q[j]);
        put(i, quick_affine(q, zero_point));
      }
      return;
    }
    Rare<T, N, R> rare;
#pragma unroll
    for (int i = 0; i < R; ++i) rare.v[i] = v[i];
    rare.scale[0] = affine.scale;
    rare_affine(rare, affine.zero_point, out.rule.code_mode);
#pragma unroll
    for (int i = 0; i < R; ++i) put(i, rare.codes[i]);
  }
};

}  // namespace custom_ops
