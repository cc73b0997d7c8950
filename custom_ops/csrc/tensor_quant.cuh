// The sinks of a tensor with one scale: one finds the largest magnitude, one makes codes.
#pragma once

#include "row_block.cuh"
#include "rows.cuh"

namespace custom_ops {

// The largest of a number over a block of threads.
__device__ __forceinline__ uint32_t block_max(uint32_t v) {
  __shared__ uint32_t largest[kMaxThreads / kWarp];
  const unsigned thread = threadIdx.x + threadIdx.y * blockDim.x;
  const unsigned lane = thread % kWarp;
  v = __reduce_max_sync(kAllLanes, v);
  if (lane == 0) largest[thread / kWarp] = v;
  __syncthreads();
  return __reduce_max_sync(kAllLanes, lane < blockDim.x * blockDim.y / kWarp ? largest[lane] : 0u);
}

// Finds the largest magnitude of each row: as the bits of T, which order as integers do. Of more rows than there is
// room for, the largest of all, in a cell that was cleared.
template <typename T>
struct FindAmax {
  static constexpr Pass kPass = Pass::first;

  uint32_t* maxima;
  bool one_cell;

  template <int V>
  __device__ __forceinline__ void put(const RowPart& part, const Vec<T> (&v)[V]) const {
    const uint32_t largest = part.exists ? largest_bits(v) : 0u;
    if (one_cell) {
      raise(largest);
    } else {
      put_row(part.row, part.exists, row_max(largest));
    }
  }

  template <typename Value>
  __device__ __forceinline__ void put_long(const LongRow& row, Value value) const {
    uint32_t largest = 0;
#pragma unroll 1
    for (int64_t vec = threadIdx.x; vec < row.padded_vecs(); vec += blockDim.x) {
      const Vec<T> one[1] = {value(vec * kVec)};
      largest = max(largest, largest_bits(one));
    }
    if (one_cell) {
      raise(largest);
    } else {
      put_row(row.row, true, row_max(largest));
    }
  }

 private:
  __device__ __forceinline__ void put_row(int64_t row, bool exists, uint32_t largest) const {
    if (exists && threadIdx.x == 0) store(maxima + row, largest);
  }

  // Most warps find that a larger one was there before them.
  __device__ __forceinline__ void raise(uint32_t bits) const {
    bits = __reduce_max_sync(kAllLanes, bits);
    const unsigned lane = (threadIdx.x + threadIdx.y * blockDim.x) % kWarp;
    if (lane == 0 && bits > *static_cast<volatile uint32_t*>(maxima)) atomicMax(maxima, bits);
  }
};

// The same of what needs no row at once, one maximum to a block: of R vectors of a thread at a time.
template <typename T, int R, bool Aligned, bool Along, typename From>
__global__ void __launch_bounds__(kThreads)
    amax_kernel(const __grid_constant__ From from, uint32_t* maxima, bool again, int64_t rows, int64_t cols,
                const __grid_constant__ RowGrid grid) {
  using S = Step<kVec, Along>;
  let_second_begin();
  uint32_t largest = 0;
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
    largest = max(largest, largest_bits(v));
  }
  largest = block_max(largest);
  if (threadIdx.x != 0) return;
  if (again) largest = max(largest, maxima[blockIdx.x]);
  store(maxima + blockIdx.x, largest);
}

// again: adds to the maxima of rows before these. Returns the number of maxima in `count`.
template <typename T, int R, bool Aligned, bool Along = false, typename From>
cudaError_t launch_amax(const From& from, uint32_t* maxima, bool again, int64_t rows, int64_t cols, uint32_t& count,
                        cudaStream_t stream) {
  const RowGrid grid = Along ? along_grid(rows, cols, kVec, R) : row_grid(rows, cols, kVec, R, nullptr);
  const unsigned blocks = grid.blocks < kMostMaxima ? grid.blocks : kMostMaxima;
  if (!again) count = blocks;
  return launch_kernel(amax_kernel<T, R, Aligned, Along, From>, blocks, kThreads, 0, stream, false, from, maxima,
                       again, rows, cols, grid);
}

// Makes codes with a scale that is given, or that comes of `count` maxima; that one the first thread stores.
template <typename T>
struct ToTensor {
  static constexpr Pass kPass = Pass::second;

  TensorQuantized out;
  uint32_t count = 0;
  bool early = false;
  unsigned resident = 0;  // how many blocks of kThreads the device holds at once

  // Every thread of the block calls it.
  __device__ __forceinline__ float scale() const {
    if (out.given != nullptr) return __ldg(out.given);
    wait_for_first();
    const volatile uint32_t* const maxima = out.maxima;  // not to be read before
    uint32_t bits = 0;
    if (count == 1) {
      bits = maxima[0];
    } else if (count > 1) {
      const uint32_t threads = blockDim.x * blockDim.y;
#pragma unroll 4
      for (uint32_t i = threadIdx.x + threadIdx.y * blockDim.x; i < count; i += threads) bits = max(bits, maxima[i]);
      bits = block_max(bits);
    }
    const float amax = max_nan(from_bits<T>(bits), out.rule.min_amax);
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
    rare_codes(rare, out.rule.code_mode, out.rule.least);
#pragma unroll
    for (int i = 0; i < R; ++i) put(i, rare.codes[i]);
  }

  // How many blocks make so many tiles. To find the scale among the maxima costs a block about as much as a tile, so
  // none does it twice (silu_mul, 16384 x 2048, H100: 106 us instead of 123); with a given scale it costs nothing.
  unsigned blocks_of(unsigned tiles) const { return out.given != nullptr || tiles < resident ? tiles : resident; }

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

// Unless the scale is given, finds maxima with find(count) and then makes codes of `count` of them. make: takes a
// ToTensor.
template <typename T, typename Find, typename Make>
cudaError_t in_two_passes(const TensorQuantized& out, int64_t elements, Find find, Make make, cudaStream_t stream) {
  ToTensor<T> to{out};
  if (out.given == nullptr) {
    if (elements == 0) {
      scale_of_nothing_kernel<T><<<1, 1, 0, stream>>>(to);
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
