// The sinks of a tensor with one scale: one finds the largest magnitude, one makes codes.
#pragma once

#include "row_block.cuh"
#include "rows.cuh"

namespace custom_ops {

// Finds the largest magnitude: as the bits of T, which order as integers do.
template <typename T>
struct FindAmax {
  uint32_t* amax;

  // Every lane of the warp calls it. Most warps find that a larger one was there before them.
  __device__ __forceinline__ void raise(uint32_t bits) const {
    bits = __reduce_max_sync(kAllLanes, bits);
    const unsigned lane = (threadIdx.x + threadIdx.y * blockDim.x) % kWarp;
    if (lane == 0 && bits > *static_cast<volatile uint32_t*>(amax)) atomicMax(amax, bits);
  }

  struct At {};
  __device__ __forceinline__ At prepare(const RowTile&, int64_t) const { return {}; }
  const Quantized* scales() const { return nullptr; }
  bool flat(int64_t) const { return true; }
  void skip_rows(int64_t, int64_t) {}

  template <typename S, bool Aligned, int N, int R>
  __device__ __forceinline__ void put(const Vec<T, N> (&v)[R], const At&, const RowTile&, int64_t) const {
    raise(largest_bits(v));
  }

  template <int V>
  __device__ __forceinline__ void put(const RowPart& part, const Vec<T> (&v)[V]) const {
    raise(part.exists ? largest_bits(v) : 0u);
  }

  template <typename Value>
  __device__ __forceinline__ void put_long(const LongRow& row, Value value) const {
    uint32_t largest = 0;
#pragma unroll 1
    for (int64_t vec = threadIdx.x; vec < row.padded_vecs(); vec += blockDim.x) {
      const Vec<T> one[1] = {value(vec * kVec)};
      largest = max(largest, largest_bits(one));
    }
    raise(largest);
  }
};

// Makes codes with a scale that is given, or that comes of an amax; that one the first thread stores.
template <typename T>
struct ToTensor {
  TensorQuantized out;

  __device__ __forceinline__ float scale() const {
    if (out.given != nullptr) return __ldg(out.given);
    const float amax = max_nan(from_bits<T>(__ldg(out.amax)), out.rule.min_amax);
    const float scale = scale_of<false, T>(amax, out.rule);
    if (out.scale != nullptr && blockIdx.x == 0 && threadIdx.x == 0 && threadIdx.y == 0) store(out.scale, scale);
    return scale;
  }

  // put(i, codes) for R vectors.
  template <int N, int R, typename Put>
  __device__ __forceinline__ void codes(const Vec<T, N> (&v)[R], float scale, Put put) const {
    const float r = reciprocal(scale);
    const float largest = from_bits<T>(largest_bits(v));
    if (scale >= out.rule.least_quick_scale && scale <= kLargestQuickScale && largest * r <= 0x1p100f) {
#pragma unroll
      for (int i = 0; i < R; ++i) put(i, quick_codes<true>(v[i], scale, r, out.rule));
      return;
    }
    Rare<T, N, R> rare;
#pragma unroll
    for (int i = 0; i < R; ++i) {
      rare.v[i] = v[i];
      rare.scale[i] = scale;
    }
    rare_codes(rare, out.rule.code_mode, out.rule.int8);
#pragma unroll
    for (int i = 0; i < R; ++i) put(i, rare.codes[i]);
  }

  using At = float;
  __device__ __forceinline__ At prepare(const RowTile&, int64_t) const { return scale(); }
  const Quantized* scales() const { return nullptr; }
  bool flat(int64_t) const { return true; }
  void skip_rows(int64_t first, int64_t cols) { out.codes = static_cast<uint8_t*>(out.codes) + first * cols; }

  template <typename S, bool Aligned, int N, int R>
  __device__ __forceinline__ void put(const Vec<T, N> (&v)[R], const At& scale, const RowTile& at,
                                      int64_t cols) const {
    uint8_t* const to = static_cast<uint8_t*>(out.codes) + at.row * cols + at.col;
    codes(v, scale, [&](int i, const Codes<N>& c) {
      if (i >= at.left) return;
      uint8_t* const p = to + i * (S::kRows * cols + S::kCols);
      if constexpr (Aligned) {
        store(reinterpret_cast<Codes<N>*>(p), c);
      } else {
        store_codes_any(p, c, cols - at.col, false);
      }
    });
  }

  template <int V>
  __device__ __forceinline__ void put(const RowPart& part, const Vec<T> (&v)[V]) const {
    uint8_t* const to = static_cast<uint8_t*>(out.codes) + part.row * part.cols;
    codes(v, scale(), [&](int i, const uint2& c) {
      if (part.has(i)) store(reinterpret_cast<uint2*>(to + part.col(i)), c);
    });
  }

  template <typename Value>
  __device__ __forceinline__ void put_long(const LongRow& row, Value value) const {
    uint8_t* const to = static_cast<uint8_t*>(out.codes) + row.row * row.cols;
    const float the_scale = scale();
#pragma unroll 1
    for (int64_t vec = threadIdx.x; vec < row.padded_vecs(); vec += blockDim.x) {
      const int64_t col = vec * kVec;
      const Vec<T> one[1] = {value(col)};
      codes(one, the_scale, [&](int, const uint2& c) { store_codes_any(to + col, c, row.cols - col, row.aligned); });
    }
  }
};

// The scale of a tensor without elements.
template <typename T>
__global__ void scale_of_nothing_kernel(const __grid_constant__ ToTensor<T> to) {
  to.scale();
}

// Finds amax with find(FindAmax) where the scale is not given, then makes codes with make(ToTensor).
template <typename T, typename Find, typename Make>
cudaError_t in_two_passes(const TensorQuantized& out, int64_t elements, Find find, Make make, cudaStream_t stream) {
  const ToTensor<T> to{out};
  if (out.given == nullptr) {
    cudaError_t error = cudaMemsetAsync(out.amax, 0, sizeof(uint32_t), stream);
    if (error != cudaSuccess) return error;
    if (elements == 0) {
      scale_of_nothing_kernel<T><<<1, 1, 0, stream>>>(to);
      return cudaGetLastError();
    }
    error = find(FindAmax<T>{out.amax});
    if (error != cudaSuccess) return error;
  }
  return elements == 0 ? cudaSuccess : make(to);
}

}  // namespace custom_ops
