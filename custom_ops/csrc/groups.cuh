// Group quantization of values in registers: neighbouring lanes hold one group, N (4 or 8) elements each.
#pragma once

#include "codes.cuh"

namespace custom_ops {

constexpr unsigned kAllLanes = 0xffffffffu;

// max over the lanes of a group, in both halves of a pair.
template <int N, typename Pair, int R>
__device__ __forceinline__ void butterfly_max(Pair (&m)[R], int group_size) {
#pragma unroll
  for (int lanes = 64 / N; lanes > 0; lanes /= 2) {
    if (2 * lanes * N > group_size) continue;
#pragma unroll
    for (int i = 0; i < R; ++i) m[i] = __hmax2_nan(m[i], __shfl_xor_sync(kAllLanes, m[i], lanes));
  }
}

// amax of the groups that R vectors of this lane belong to. Every lane of the warp calls it.
template <typename T, int N, int R>
__device__ __forceinline__ void group_amax(const Vec<T, N> (&v)[R], int group_size, float min_amax,
                                           float (&amax)[R]) {
  using Pair = typename Packed<T>::type;
  if (N == 4 && group_size == 128) {
    // The group is the warp, which has a maximum of integers in one instruction, in place of five rounds of
    // shuffles in series.
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const Vec<T, N> one[1] = {v[i]};
      amax[i] = max_nan(from_bits<T>(__reduce_max_sync(kAllLanes, largest_bits(one))), min_amax);
    }
    return;
  }
  if constexpr (R % 2 == 0) {
    // Two vectors to a pair: half the shuffles, of which a multiprocessor has one a cycle.
    Pair both[R / 2];
#pragma unroll
    for (int i = 0; i < R; i += 2) {
      const Pair a = abs_max(v[i]);
      const Pair b = abs_max(v[i + 1]);
      const uint32_t a_bits = *reinterpret_cast<const uint32_t*>(&a);
      const uint32_t b_bits = *reinterpret_cast<const uint32_t*>(&b);
      const uint32_t low = __byte_perm(a_bits, b_bits, 0x5410);
      const uint32_t high = __byte_perm(a_bits, b_bits, 0x7632);
      both[i / 2] = __hmax2_nan(*reinterpret_cast<const Pair*>(&low), *reinterpret_cast<const Pair*>(&high));
    }
    butterfly_max<N>(both, group_size);
#pragma unroll
    for (int i = 0; i < R; i += 2) {
      const float2 f = Packed<T>::to_float(both[i / 2]);
      amax[i] = max_nan(f.x, min_amax);
      amax[i + 1] = max_nan(f.y, min_amax);
    }
  } else {
    Pair m[R];
#pragma unroll
    for (int i = 0; i < R; ++i) m[i] = abs_max(v[i]);
    butterfly_max<N>(m, group_size);
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const float2 f = Packed<T>::to_float(m[i]);
      amax[i] = max_nan(max_nan(f.x, f.y), min_amax);
    }
  }
}

// Is all that a launch may choose as usual? Groups of 128, whose scales stand one by one.
inline Usual usual(const Quantized& out) {
  return out.group_size == 128 && !out.packed ? usual(out.rule) : Usual::no;
}

template <Usual U>
__device__ __forceinline__ Quantized known(const Quantized& given) {
  Quantized out = given;
  if (U != Usual::no) {
    out.group_size = 128;
    out.group_shift = 7;
    out.packed = false;
  }
  return out;
}

// Where a lane stores its codes of one row, and the scale of its group if it is the group's first lane.
struct QuantizedAt {
  uint8_t* codes;
  float* scale;  // nullptr in the group's other lanes
};

__device__ __forceinline__ QuantizedAt quantized_at(const Quantized& out, int64_t row, int64_t col, int64_t cols) {
  QuantizedAt at{static_cast<uint8_t*>(out.codes) + row * cols + col, nullptr};
  if ((col & (out.group_size - 1)) == 0) {
    const int64_t group = (col >> out.group_shift) >> (out.packed ? 2 : 0);
    at.scale = static_cast<float*>(out.scale) + row * out.row_stride + group * out.group_stride;
  }
  return at;
}

// The exponent of a scale that is a power of two, into its byte; the last group clears the rest of its element.
__device__ __forceinline__ void store_exponent(float* scale_at, float scale, int64_t col, int64_t cols,
                                               const Quantized& out) {
  const int group = static_cast<int>(col >> out.group_shift);
  uint8_t* const at = reinterpret_cast<uint8_t*>(scale_at);
  store(at + (group & 3), static_cast<uint8_t>(scale == scale ? __float_as_uint(scale) >> 23 : 255));
  if (col + out.group_size < cols) return;
  for (int i = (group & 3) + 1; i < 4; ++i) store(at + i, static_cast<uint8_t>(0));
}

// Stores what a lane has of R vectors, `left` of which exist; Step is the way from one to the next, the first is at
// column `col`. Column-major scales of consecutive rows are neighbours, and go out together where they are aligned.
template <typename Step, int R, typename C>
__device__ __forceinline__ void store_quantized(const C (&codes)[R], const float (&scale)[R], const QuantizedAt& at,
                                                int64_t left, int64_t col, int64_t cols, const Quantized& out) {
  const int64_t code_step = Step::kRows * cols + Step::kCols;
#pragma unroll
  for (int i = 0; i < R; ++i) {
    if (i < left) store(reinterpret_cast<C*>(at.codes + i * code_step), codes[i]);
  }
  if (at.scale == nullptr) return;
  if (out.packed) {
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const int64_t words = (i * Step::kCols >> out.group_shift) / 4;  // a step is a multiple of four groups
      float* const p = at.scale + i * Step::kRows * out.row_stride + words * out.group_stride;
      if (i < left) store_exponent(p, scale[i], col + i * Step::kCols, cols, out);
    }
    return;
  }
  if (Step::kRows == 1 && R > 1 && out.row_stride == 1 && out.group_stride % R == 0 && R <= left) {
    if constexpr (R == 2) store(reinterpret_cast<float2*>(at.scale), make_float2(scale[0], scale[1]));
    if constexpr (R == 4) {
      store(reinterpret_cast<float4*>(at.scale), make_float4(scale[0], scale[1], scale[2], scale[3]));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const int64_t groups = i * Step::kCols >> out.group_shift;
    if (i < left) store(at.scale + i * Step::kRows * out.row_stride + groups * out.group_stride, scale[i]);
  }
}

}  // namespace custom_ops
