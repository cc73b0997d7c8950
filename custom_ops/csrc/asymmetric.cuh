// int8 with a zero point: its arithmetic, and the sink of rows.
#pragma once

#include "row_block.cuh"

namespace custom_ops {

// How far a row reaches to either side of zero, as the bits of T; NaN, which is on top, on both sides.
struct Reach {
  uint32_t above = 0;
  uint32_t below = 0;
};

template <typename T, int N, int V>
__device__ __forceinline__ void extend(Reach& reach, const Vec<T, N> (&v)[V]) {
  auto high = Packed<T>::from_float(0.0f, 0.0f);
  auto low = high;
#pragma unroll
  for (int i = 0; i < V; ++i) {
#pragma unroll
    for (int j = 0; j < N / 2; ++j) {
      high = __hmax2_nan(high, v[i].pair[j]);
      low = __hmin2_nan(low, v[i].pair[j]);
    }
  }
  high = __habs2(high);  // a zero may have a sign
  low = __habs2(low);
  const uint32_t high_bits = *reinterpret_cast<const uint32_t*>(&high);
  const uint32_t low_bits = *reinterpret_cast<const uint32_t*>(&low);
  reach.above = max(reach.above, max(high_bits & 0xffffu, high_bits >> 16));
  reach.below = max(reach.below, max(low_bits & 0xffffu, low_bits >> 16));
}

__device__ __forceinline__ float clamp_code(float v) { return fminf(fmaxf(v, -128.0f), 127.0f); }

// To the nearest integer, ties to even; 0 for NaN.
__device__ __forceinline__ float round_any(float v) { return v == v ? rintf(v) : 0.0f; }

// Two numbers to int8 with saturation, before the two in `upper`.
__device__ __forceinline__ uint32_t saturate_int8x2(int second, int first, uint32_t upper) {
  uint32_t codes;
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(codes) : "r"(second), "r"(first), "r"(upper));
  return codes;
}

// Of quotients below 2^22: adding 1.5 * 2^23 rounds to an integer, ties to even, in the low bits.
template <int N>
__device__ __forceinline__ Codes<N> quick_affine(const float (&q)[N], int zero_point) {
  constexpr float kRound = 0x1.8p23f;
  const int offset = zero_point - __float_as_int(kRound);
  uint32_t words[N / 4];
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    int code[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) code[j] = __float_as_int(q[i + j] + kRound) + offset;
    words[i / 4] = saturate_int8x2(code[1], code[0], saturate_int8x2(code[3], code[2], 0u));
  }
  if constexpr (N == 8) {
    return make_uint2(words[0], words[1]);
  } else {
    return words[0];
  }
}

// V vectors whose scale is not a quick one, out of line as `rare_codes` is.
template <typename T, int N, int V>
__device__ __noinline__ void rare_affine(Rare<T, N, V>& rare, float zero_point, CodeMode mode) {
#pragma unroll 1
  for (int i = 0; i < V; ++i) {
    float q[N];
    any_quotients(rare.v[i], rare.scale[0], mode, q);
#pragma unroll
    for (int j = 0; j < N; ++j) q[j] = clamp_code(round_any(q[j]) + zero_point);
    rare.codes[i] = pack_codes(q, true);
  }
}

struct Affine {
  float scale;
  float zero_point;
  bool quick;
};

// Of values that reach so far to either side of zero.
template <typename T>
__device__ __forceinline__ Affine affine_of(const Reach& reach, const QuantRule& rule) {
  const float high = from_bits<T>(reach.above);
  const float low = -from_bits<T>(reach.below);
  float extent = high - low;
  if (rule.scale_in_input) extent = round_to<T>(extent);
  Affine affine;
  affine.scale = scale_of<false, T>(extent, rule);
  float below = __fdiv_rn(low, affine.scale);
  if (rule.scale_in_input) below = round_to<T>(below);
  affine.zero_point = clamp_code(-128.0f - round_any(below));
  affine.quick = is_quick<Usual::no>(extent, affine.scale, rule);
  return affine;
}

template <typename T>
struct RowAsymmetric {
  static constexpr Pass kPass = Pass::only;

  Quantized out;
  int8_t* zero_points;

  explicit RowAsymmetric(const AsymmetricQuantized& to)
      : out(to.tokens), zero_points(static_cast<int8_t*>(to.zero_points)) {}

  template <int V>
  __device__ __forceinline__ void put(const RowPart& part, const Vec<T> (&v)[V]) const {
    Reach reach;
    extend(reach, v);
    const Affine affine = whole_row(reach);
    uint8_t* const to = static_cast<uint8_t*>(out.codes) + part.row * part.cols;
    codes_of_affine(v, affine, [&](int i, const uint2& codes) {
      if (part.has(i)) store(reinterpret_cast<uint2*>(to + part.col(i)), codes);
    });
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
    const Affine affine = whole_row(reach);
    uint8_t* const to = static_cast<uint8_t*>(out.codes) + row.row * row.cols;
#pragma unroll 1
    for (int64_t vec = threadIdx.x; vec < row.padded_vecs(); vec += blockDim.x) {
      const int64_t col = vec * kVec;
      const Vec<T> one[1] = {value(col)};
      codes_of_affine(one, affine, [&](int, const uint2& codes) {
        store_codes_any(to + col, codes, row.cols - col, row.aligned);
      });
    }
    put_affine(row.row, affine);
  }

 private:
  // Every thread of the block calls it.
  __device__ __forceinline__ Affine whole_row(const Reach& reach) const {
    uint32_t both[2] = {reach.above, reach.below};
    row_max(both);
    return affine_of<T>({both[0], both[1]}, out.rule);
  }

  // put(i, codes) of V vectors, one after the other.
  template <int V, typename Put>
  __device__ __forceinline__ void codes_of_affine(const Vec<T> (&v)[V], const Affine& affine, Put put) const {
    if (affine.quick) {
      const float r = reciprocal(affine.scale);
      const int zero_point = static_cast<int>(affine.zero_point);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        float q[kVec];
        quick_quotients(v[i], affine.scale, r, out.rule, q);
        put(i, quick_affine(q, zero_point));
      }
      return;
    }
    Rare<T, kVec, V> rare;
#pragma unroll
    for (int i = 0; i < V; ++i) rare.v[i] = v[i];
    rare.scale[0] = affine.scale;
    rare_affine(rare, affine.zero_point, out.rule.code_mode);
#pragma unroll
    for (int i = 0; i < V; ++i) put(i, rare.codes[i]);
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
