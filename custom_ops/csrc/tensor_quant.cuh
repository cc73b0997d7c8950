// The sinks of a tensor with one scale: one finds what it comes of, such as the largest magnitude, one makes codes. How,
// a policy says: Symmetric here, Asymmetric in tensor_asymmetric.cuh.
#pragma once

#include "row_block.cuh"
#include "rows.cuh"

namespace custom_ops {

// The largest of each of N numbers over a block of threads. A kernel may call it once.
template <int N>
__device__ __forceinline__ void block_max(uint32_t (&v)[N]) {
  __shared__ uint32_t largest[N][kMaxThreads / kWarp];
  const unsigned thread = threadIdx.x + threadIdx.y * blockDim.x;
  const unsigned lane = thread % kWarp;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    v[n] = __reduce_max_sync(kAllLanes, v[n]);
    if (lane == 0) largest[n][thread / kWarp] = v[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    v[n] = __reduce_max_sync(kAllLanes, lane < blockDim.x * blockDim.y / kWarp ? largest[n][lane] : 0u);
  }
}

// What is found of all values are kFound numbers, the largest of each of which counts; At is what codes are made with.
template <typename T>
struct Symmetric {
  using Out = TensorQuantized;
  using At = float;
  static constexpr int kFound = 1;

  // The largest magnitude: as the bits of T, which order as integers do.
  template <int N, int R>
  static __device__ __forceinline__ void find(uint32_t (&found)[kFound], const Vec<T, N> (&v)[R]) {
    found[0] = max(found[0], largest_bits(v));
  }

  static __device__ __forceinline__ At given(const Out& out) { return __ldg(out.given); }
  static __device__ __forceinline__ At of(const Out& out, const uint32_t (&found)[kFound]) {
    return scale_of<false, T>(max_nan(from_bits<T>(found[0]), out.rule.min_amax), out.rule);
  }
  static __device__ __forceinline__ void keep(const Out& out, const At& scale) { store(out.scale, scale); }

  // put(i, codes) for R vectors.
  template <int N, int R, typename Put>
  static __device__ __forceinline__ void codes(const Out& out, const Vec<T, N> (&v)[R], float scale, Put put) {
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
    rare_codes(rare, out.rule.code_mode, out.rule.least);
#pragma unroll
    for (int i = 0; i < R; ++i) put(i, rare.codes[i]);
  }
};

// Finds the numbers of each row. Of more rows than there is room for, the largest of all, in cells that were cleared.
template <typename T, typename How>
struct FindMaxima {
  static constexpr Pass kPass = Pass::first;
  static constexpr int kFound = How::kFound;

  uint32_t* maxima;
  bool one_cell;

  template <int V>
  __device__ __forceinline__ void put(const RowPart& part, const Vec<T> (&v)[V]) const {
    uint32_t found[kFound] = {};
    if (part.exists) How::find(found, v);
    put_found(part.row, part.exists, found);
  }

  template <typename Value>
  __device__ __forceinline__ void put_long(const LongRow& row, Value value) const {
    uint32_t found[kFound] = {};
#pragma unroll 1
    for (int64_t vec = threadIdx.x; vec < row.padded_vecs(); vec += blockDim.x) {
      const Vec<T> one[1] = {value(vec * kVec)};
      How::find(found, one);
    }
    put_found(row.row, true, found);
  }

 private:
  __device__ __forceinline__ void put_found(int64_t row, bool exists, uint32_t (&found)[kFound]) const {
    if (one_cell) {
#pragma unroll
      for (int n = 0; n < kFound; ++n) raise(maxima + n, found[n]);
      return;
    }
    row_max(found);
    if (!exists || threadIdx.x != 0) return;
#pragma unroll
    for (int n = 0; n < kFound; ++n) store(maxima + row * kFound + n, found[n]);
  }

  // Most warps find that a larger one was there before them.
  static __device__ __forceinline__ void raise(uint32_t* cell, uint32_t bits) {
    bits = __reduce_max_sync(kAllLanes, bits);
    const unsigned lane = (threadIdx.x + threadIdx.y * blockDim.x) % kWarp;
    if (lane == 0 && bits > *static_cast<volatile uint32_t*>(cell)) atomicMax(cell, bits);
  }
};

// The same of what needs no row at once, for each block: of R vectors of a thread at a time.
template <typename T, typename How, int R, bool Aligned, bool Along, typename From>
__global__ void __launch_bounds__(kThreads)
    maxima_kernel(const __grid_constant__ From from, uint32_t* maxima, bool again, int64_t rows, int64_t cols,
                  const __grid_constant__ RowGrid grid) {
  using S = Step<kVec, Along>;
  let_second_begin();
  uint32_t found[How::kFound] = {};
#pragma unroll 1
  for (uint32_t block = blockIdx.x; block < grid.blocks; block += gridDim.x) {
    const RowTile at = row_tile<kVec, R, Along>(grid, block, rows, cols);
    typename From::template Raw<kVec> raw[R];
#pragma unroll
    for (int i = 0; i < R; ++i) {
      raw[i] = {};
      if (i < at.left) raw[i] = from.template load<kVec, Aligned>(at.row + i * S::kRows, at.col + i * S::kCols, cols);
    }
    Vec<T> v[R];
    from.make(raw, v);
    How::find(found, v);
  }
  block_max(found);
  if (threadIdx.x != 0) return;
  uint32_t* const cell = maxima + blockIdx.x * How::kFound;
#pragma unroll
  for (int n = 0; n < How::kFound; ++n) {
    if (again) found[n] = max(found[n], cell[n]);
    store(cell + n, found[n]);
  }
}

// again: adds to the maxima of rows before these. Returns how many blocks found some in `count`.
template <typename T, typename How, int R, bool Aligned, bool Along = false, typename From>
cudaError_t launch_maxima(const From& from, uint32_t* maxima, bool again, int64_t rows, int64_t cols, uint32_t& count,
                          cudaStream_t stream) {
  const RowGrid grid = Along ? along_grid(rows, cols, kVec, R) : row_grid(rows, cols, kVec, R, nullptr);
  const unsigned blocks = grid.blocks < kMostMaxima ? grid.blocks : kMostMaxima;
  if (!again) count = blocks;
  return launch_kernel(maxima_kernel<T, How, R, Aligned, Along, From>, blocks, kThreads, 0, stream, false, from,
                       maxima, again, rows, cols, grid);
}

// Makes codes with a scale that is given, or that comes of what `count` blocks or rows found; that one the first thread
// stores.
template <typename T, typename How>
struct ToTensor {
  static constexpr Pass kPass = Pass::second;

  typename How::Out out;
  uint32_t count = 0;
  bool early = false;
  unsigned resident = 0;  // how many blocks of kThreads the device holds at once

  using At = typename How::At;

  // Every thread of the block calls it.
  __device__ __forceinline__ At at() const {
    if (out.given != nullptr) return How::given(out);
    wait_for_first();
    constexpr int kFound = How::kFound;
    const volatile uint32_t* const maxima = out.maxima;  // not to be read before
    uint32_t found[kFound] = {};
    if (count == 1) {
#pragma unroll
      for (int n = 0; n < kFound; ++n) found[n] = maxima[n];
    } else if (count > 1) {
      const uint32_t threads = blockDim.x * blockDim.y;
#pragma unroll 4
      for (uint32_t i = threadIdx.x + threadIdx.y * blockDim.x; i < count; i += threads) {
#pragma unroll
        for (int n = 0; n < kFound; ++n) found[n] = max(found[n], maxima[i * kFound + n]);
      }
      block_max(found);
    }
    const At at = How::of(out, found);
    if (out.scale != nullptr && blockIdx.x == 0 && threadIdx.x == 0 && threadIdx.y == 0) How::keep(out, at);
    return at;
  }

  // How many blocks make so many tiles. To find the scale among the maxima costs a block about as much as a tile, so
  // none does it twice (silu_mul, 16384 x 2048, H100: 106 us instead of 123); with a given scale it costs nothing.
  unsigned blocks_of(unsigned tiles) const { return out.given != nullptr || tiles < resident ? tiles : resident; }

  __device__ __forceinline__ At prepare(const RowTile&, int64_t) const { return at(); }
  const Quantized* scales() const { return nullptr; }
  bool flat(int64_t) const { return true; }
  void skip_rows(int64_t first, int64_t cols) { out.codes = static_cast<uint8_t*>(out.codes) + first * cols; }

  template <typename S, bool Aligned, int N, int R>
  __device__ __forceinline__ void put(const Vec<T, N> (&v)[R], const At& made, const RowTile& at,
                                      int64_t cols) const {
    uint8_t* const to = static_cast<uint8_t*>(out.codes) + at.row * cols + at.col;
    How::codes(out, v, made, [&](int i, const Codes<N>& c) {
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
    How::codes(out, v, at(), [&](int i, const uint2& c) {
      if (part.has(i)) store(reinterpret_cast<uint2*>(to + part.col(i)), c);
    });
  }

  template <typename Value>
  __device__ __forceinline__ void put_long(const LongRow& row, Value value) const {
    uint8_t* const to = static_cast<uint8_t*>(out.codes) + row.row * row.cols;
    const At made = at();
#pragma unroll 1
    for (int64_t vec = threadIdx.x; vec < row.padded_vecs(); vec += blockDim.x) {
      const int64_t col = vec * kVec;
      const Vec<T> one[1] = {value(col)};
      How::codes(out, one, made, [&](int, const uint2& c) {
        store_codes_any(to + col, c, row.cols - col, row.aligned);
      });
    }
  }
};

// The scale of a tensor without elements.
template <typename T, typename How>
__global__ void scale_of_nothing_kernel(const __grid_constant__ ToTensor<T, How> to) {
  to.at();
}

// Unless the scale is given, finds maxima with find(count) and then makes codes of `count` of them. make: takes a
// ToTensor.
template <typename T, typename How, typename Find, typename Make>
cudaError_t in_two_passes(const typename How::Out& out, int64_t elements, Find find, Make make, cudaStream_t stream) {
  ToTensor<T, How> to{out};
  if (out.given == nullptr) {
    if (elements == 0) {
      scale_of_nothing_kernel<T, How><<<1, 1, 0, stream>>>(to);
      return cudaGetLastError();
    }
    cudaError_t error = can_begin_early(to.early);
    if (error != cudaSuccess) return error;
    error = resident_blocks(kThreads, to.resident);
    if (error != cudaSuccess) return error;
    error = find(to.count);
    if (error != cudaSuccess) return error;
  }
  return elements == 0 ? cudaSuccess : make(to);
}

// The scale of a tensor that is one row, as its only token.
inline Quantized as_token(const TensorQuantized& out) {
  Quantized token{};
  token.codes = out.codes;
  token.scale = out.scale;
  token.rule = out.rule;
  return token;
}

}  // namespace custom_ops
