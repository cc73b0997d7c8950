// The sink of rows that become int8 with a zero point.
#pragma once

#include "row_block.cuh"

namespace custom_ops {

// How far a row reaches to either side of zero, as the bits of T; NaN, which is on top, on both sides.
struct Reach {
  uint32_t above = 0;
  uint32_t below = 0;
};

template <typename T, int V>
__device__ __forceinline__ void extend(Reach& reach, const Vec<T> (&v)[V]) {
  auto high = Packed<T>::from_float(0.0f, 0.0f);
  auto low = high;
#pragma unroll
  for (int i = 0; i < V; ++i) {
#pragma unroll
    for (int j = 0; j < kVec / 2; ++j) {
      high = __hmax2_nan(high, v[i].pair[j]);
      low = __hmax2_nan(low, __hneg2(v[i].pair[j]));
    }
  }
  high = __habs2(high);  // a zero may have a sign
  low = __habs2(low);
  const uint32_t high_bits = *reinterpret_cast<const uint32_t*>(&high);
  const uint32_t low_bits = *reinterpret_cast<const uint32_t*>(&low);
  reach.above = max(reach.above, max(high_bits & 0xffffu, high_bits >> 16));
  reach.below = max(reach.below, max(low_bits & 0xffffu, low_bits >> 16));
}

// To the nearest integer, ties to even, from below 2^22.
__device__ __forceinline__ float round_quickly(float v) {
  constexpr float kRound = 0x1.8p23f;
  return (v + kRound) - kRound;
}

// The same of any number, 0 for NaN.
__device__ __forceinline__ float round_any(float v) { return v == v ? rintf(v) : 0.0f; }

__device__ __forceinline__ float clamp_code(float v) { return fminf(fmaxf(v, -128.0f), 127.0f); }

template <typename T>
struct RowAsymmetric {
  static constexpr Pass kPass = Pass::only;

  Quantized out;
  int8_t* zero_points;

  explicit RowAsymmetric(const AsymmetricQuantized& to)
      : out(to.tokens), zero_points(static_cast<int8_t*>(to.zero_points)) {}

  struct Affine {
    float scale;
    float zero_point;
    bool quick;
  };

  template <int V>
  __device__ __forceinline__ void put(const RowPart& part, const Vec<T> (&v)[V]) const {
    Reach reach;
    extend(reach, v);
    const Affine affine = affine_of(reach);
    uint8_t* const to = static_cast<uint8_t*>(out.codes) + part.row * part.cols;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const uint2 codes = codes_of_affine(v[i], affine);
      if (part.has(i)) store(reinterpret_cast<uint2*>(to + part.col(i)), codes);
    }
    if (part.exists) put_affine(part.row, affine);
  }

  template <typename Value>
  __device__ __forceinline__ void put_long(const LongRow& row, Value value) const {
    Reach reach;
#pragma unroll 1
    for (int64_t vec = threadIdx.x; vec < row.padded_vecs(); vec += blockDim.x) {
      const Vec<T> one[1] = {value(vec * kVec)};
      extend(reach, one);
    }
    const Affine affine = affine_of(reach);
    uint8_t* const to = static_cast<uint8_t*>(out.codes) + row.row * row.cols;
#pragma unroll 1
    for (int64_t vec = threadIdx.x; vec < row.padded_vecs(); vec += blockDim.x) {
      const int64_t col = vec * kVec;
      store_codes_any(to + col, codes_of_affine(value(col), affine), row.cols - col, row.aligned);
    }
    put_affine(row.row, affine);
  }

 private:
  // Every thread of the block calls it.
  __device__ __forceinline__ Affine affine_of(const Reach& reach) const {
    const float high = from_bits<T>(row_max<0>(reach.above));
    const float low = -from_bits<T>(row_max<1>(reach.below));
    float extent = high - low;
    if (out.rule.scale_in_input) extent = round_to<T>(extent);
    Affine affine;
    affine.scale = scale_of<false, T>(extent, out.rule);
    float below = __fdiv_rn(low, affine.scale);
    if (out.rule.scale_in_input) below = round_to<T>(below);
    affine.zero_point = clamp_code(-128.0f - round_any(below));
    affine.quick = is_quick<Usual::no>(extent, affine.scale, out.rule);
    return affine;
  }

  __device__ __forceinline__ uint2 codes_of_affine(const Vec<T>& v, const Affine& affine) const {
    float q[kVec];
    if (affine.quick) {
      quick_quotients(v, affine.scale, reciprocal(affine.scale), out.rule, q);
#pragma unroll
      for (int i = 0; i < kVec; ++i) q[i] = clamp_code(round_quickly(q[i]) + affine.zero_point);
    } else {
      any_quotients(v, affine.scale, out.rule.code_mode, q);
#pragma unroll
      for (int i = 0; i < kVec; ++i) q[i] = clamp_code(round_any(q[i]) + affine.zero_point);
    }
    return pack_codes(q, true);
  }

  __device__ __forceinline__ void put_affine(int64_t row, const Affine& affine) const {
    if (threadIdx.x != 0) return;
    store(static_cast<float*>(out.scale) + row, affine.scale);
    store(reinterpret_cast<signed char*>(zero_points) + row, static_cast<signed char>(affine.zero_point));
  }
};

template <typename T>
struct LongThreads<RowAsymmetric<T>> {
  static constexpr int kMost = 256;
};

}  // namespace custom_ops
