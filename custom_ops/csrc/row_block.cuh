// Kernels that need a row at once (a sum, a maximum over it): blockDim.x threads share a row and hold V vectors each,
// in registers, so that memory is passed over once; blockDim.y rows share a block.
//
// A kernel is made of a maker, which fills a thread's vectors (from a source, or a norm of it), and a sink. What is
// misaligned, or too long for registers, takes a way that passes over memory again.
#pragma once

#include "groups.cuh"
#include "passes.cuh"

namespace custom_ops {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr int kMaxThreadsOfFour = 512;
constexpr int kMaxLongThreads = 512;
constexpr int kMaxVecs = 4 * kMaxThreadsOfFour;

// The part of a row that a thread has: vectors first, first + blockDim.x, ...
struct RowPart {
  int64_t row;
  int64_t cols;
  bool exists;  // is there such a row?
  int vecs;     // of the row

  __device__ __forceinline__ int vec(int i) const { return threadIdx.x + i * blockDim.x; }
  __device__ __forceinline__ int64_t col(int i) const { return static_cast<int64_t>(vec(i)) * kVec; }
  __device__ __forceinline__ bool in_row(int i) const { return vec(i) < vecs; }
  __device__ __forceinline__ bool has(int i) const { return exists && in_row(i); }
};

// A row that a whole block passes over, of any alignment and any number of columns.
struct LongRow {
  int64_t row;
  int64_t cols;
  bool aligned;

  __device__ __forceinline__ int64_t vecs() const { return (cols + kVec - 1) / kVec; }
  // Whole warps, for the shuffles; beyond the row, values are zeros.
  __device__ __forceinline__ int64_t padded_vecs() const { return (vecs() + kWarp - 1) / kWarp * kWarp; }
};

template <typename T>
__device__ __forceinline__ Vec<T> load_any(const T* p, int64_t count, bool aligned, uint32_t stride = 1) {
  if (aligned && count >= kVec) return *reinterpret_cast<const Vec<T>*>(p);
  return load_scalar(p, count, stride);
}

template <typename T>
__device__ __forceinline__ void store_any(T* p, const Vec<T>& v, int64_t count, bool aligned) {
  if (aligned && count >= kVec) {
    store_vec(p, v);
  } else {
    store_scalar(p, v, count);
  }
}

__device__ __forceinline__ void store_codes_any(uint8_t* p, const uint2& codes, int64_t count, bool aligned) {
  if (aligned && count >= kVec) {
    store(reinterpret_cast<uint2*>(p), codes);
    return;
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if (i < count) store(p + i, static_cast<uint8_t>((i < 4 ? codes.x : codes.y) >> (8 * (i % 4))));
  }
}

// The largest of each of N numbers over a row's threads (a power of two up to 32, or a multiple of 32). A kernel may
// call it once.
template <int N>
__device__ __forceinline__ void row_max(uint32_t (&v)[N]) {
  __shared__ uint32_t largest[N][kMaxThreads / kWarp];
  const int threads = blockDim.x;
  if (threads < kWarp) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int o = kWarp / 4; o > 0; o /= 2) {
        const uint32_t other = __shfl_xor_sync(kAllLanes, v[n], 2 * o);
        if (2 * o < threads) v[n] = max(v[n], other);
      }
      const uint32_t other = __shfl_xor_sync(kAllLanes, v[n], 1);
      if (threads > 1) v[n] = max(v[n], other);
    }
    return;
  }
#pragma unroll
  for (int n = 0; n < N; ++n) v[n] = __reduce_max_sync(kAllLanes, v[n]);
  if (threads == kWarp) return;
  const int warps = threads / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int first = threadIdx.y * warps;
  if (lane == 0) {
#pragma unroll
    for (int n = 0; n < N; ++n) largest[n][first + threadIdx.x / kWarp] = v[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) v[n] = __reduce_max_sync(kAllLanes, lane < warps ? largest[n][first + lane] : 0u);
}

__device__ __forceinline__ uint32_t row_max(uint32_t v) {
  uint32_t one[1] = {v};
  row_max(one);
  return one[0];
}

// ---- sinks --------------------------------------------------------------------------------------------------------

template <typename T>
struct RowStore {
  static constexpr Pass kPass = Pass::only;

  T* out;

  template <int V>
  __device__ __forceinline__ void put(const RowPart& part, const Vec<T> (&v)[V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (part.has(i)) store_vec(out + part.row * part.cols + part.col(i), v[i]);
    }
  }

  template <typename Value>
  __device__ __forceinline__ void put_long(const LongRow& row, Value value) const {
#pragma unroll 1
    for (int64_t vec = threadIdx.x; vec < row.padded_vecs(); vec += blockDim.x) {
      const int64_t col = vec * kVec;
      store_any(out + row.row * row.cols + col, value(col), row.cols - col, row.aligned);
    }
  }
};

// Where the values go themselves, and to what besides.
template <typename T, typename Sink>
struct RowStoreAnd {
  static constexpr Pass kPass = Sink::kPass;

  RowStore<T> values;
  Sink sink;

  template <int V>
  __device__ __forceinline__ void put(const RowPart& part, const Vec<T> (&v)[V]) const {
    values.put(part, v);
    sink.put(part, v);
  }

  // Some sinks ask for a value twice, and it is stored twice.
  template <typename Value>
  __device__ __forceinline__ void put_long(const LongRow& row, Value value) const {
    sink.put_long(row, [&](int64_t col) {
      const Vec<T> v = value(col);
      if (col < row.cols) store_any(values.out + row.row * row.cols + col, v, row.cols - col, row.aligned);
      return v;
    });
  }
};

template <typename T, Usual U>
struct RowToGroups {
  static constexpr Pass kPass = Pass::only;

  Quantized out;

  struct Here {
    static constexpr int kRows = 0;
    static constexpr int kCols = 0;
  };

  template <int V>
  __device__ __forceinline__ void put(const RowPart& part, const Vec<T> (&v)[V]) const {
    float amax[V];
    float scale[V];
    uint2 codes[V];
    const Quantized to = known<U>(out);
    group_amax(v, to.group_size, to.rule.min_amax, amax);
    codes_of<U>(v, amax, out.rule, codes, scale);
    if constexpr (U != Usual::no) {
      // Whole warps wherever there is more than one vector: the steps between them are the same number of groups.
      QuantizedAt at = quantized_at(to, part.row, part.col(0), part.cols);
      const uint32_t step = blockDim.x * kVec;
      const int64_t scale_step = (step >> to.group_shift) * to.group_stride;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (!part.has(i)) break;
        store(reinterpret_cast<uint2*>(at.codes + i * step), codes[i]);
        if (at.scale != nullptr) store(at.scale + i * scale_step, scale[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (part.has(i)) put_one(part.row, part.col(i), part.cols, codes[i], scale[i]);
      }
    }
  }

  template <typename Value>
  __device__ __forceinline__ void put_long(const LongRow& row, Value value) const {
#pragma unroll 1
    for (int64_t vec = threadIdx.x; vec < row.padded_vecs(); vec += blockDim.x) {
      const Vec<T> one[1] = {value(vec * kVec)};
      float amax[1];
      float scale[1];
      uint2 codes[1];
      group_amax(one, out.group_size, out.rule.min_amax, amax);
      codes_of<Usual::no>(one, amax, out.rule, codes, scale);
      if (vec < row.vecs()) put_one(row.row, vec * kVec, row.cols, codes[0], scale[0]);
    }
  }

 private:
  __device__ __forceinline__ void put_one(int64_t row, int64_t col, int64_t cols, uint2 codes, float scale) const {
    const uint2 code[1] = {codes};
    const float one[1] = {scale};
    store_quantized<Here>(code, one, quantized_at(out, row, col, cols), 1, col, cols, out);
  }
};

// One scale for the row.
template <typename T>
struct RowToToken {
  static constexpr Pass kPass = Pass::only;

  Quantized out;

  template <int V>
  __device__ __forceinline__ void put(const RowPart& part, const Vec<T> (&v)[V]) const {
    const float amax = max_nan(from_bits<T>(row_max(largest_bits(v))), out.rule.min_amax);
    uint8_t* const to = static_cast<uint8_t*>(out.codes) + part.row * part.cols;
    const float scale = codes_of_shared(v, amax, out.rule, [&](int i, const uint2& codes) {
      if (part.has(i)) store(reinterpret_cast<uint2*>(to + part.col(i)), codes);
    });
    if (part.exists && threadIdx.x == 0) store(static_cast<float*>(out.scale) + part.row, scale);
  }

  template <typename Value>
  __device__ __forceinline__ void put_long(const LongRow& row, Value value) const {
    uint32_t largest = 0;
#pragma unroll 1
    for (int64_t vec = threadIdx.x; vec < row.padded_vecs(); vec += blockDim.x) {
      const Vec<T> one[1] = {value(vec * kVec)};
      largest = max(largest, largest_bits(one));
    }
    const float amax = max_nan(from_bits<T>(row_max(largest)), out.rule.min_amax);
    uint8_t* const to = static_cast<uint8_t*>(out.codes) + row.row * row.cols;
    float scale;
#pragma unroll 1
    for (int64_t vec = threadIdx.x; vec < row.padded_vecs(); vec += blockDim.x) {
      const int64_t col = vec * kVec;
      const Vec<T> one[1] = {value(col)};
      scale = codes_of_shared(one, amax, out.rule, [&](int, const uint2& codes) {
        store_codes_any(to + col, codes, row.cols - col, row.aligned);
      });
    }
    if (threadIdx.x == 0) store(static_cast<float*>(out.scale) + row.row, scale);
  }
};

// ---- kernels ------------------------------------------------------------------------------------------------------

template <typename T, int V, typename Maker, typename Sink>
__global__ void __launch_bounds__(V == 4 ? kMaxThreadsOfFour : kMaxThreads, V == 4 ? 2 : 1)
    row_kernel(const __grid_constant__ Maker maker, const __grid_constant__ Sink sink, int64_t rows, int64_t cols) {
  if (Sink::kPass == Pass::first) let_second_begin();
  if (Sink::kPass == Pass::second) wait_for_first();
  const int64_t row = static_cast<int64_t>(block_of<Sink::kPass>()) * blockDim.y + threadIdx.y;
  const RowPart part{row, cols, row < rows, static_cast<int>(cols / kVec)};
  Vec<T> v[V];
  maker.fill(part, v);
  sink.put(part, v);
}

// How many threads a sink has for a long row: fewer where it needs more registers than so many leave it.
template <typename Sink>
struct LongThreads {
  static constexpr int kMost = kMaxLongThreads;
};

template <typename T, typename Maker, typename Sink>
__global__ void __launch_bounds__(LongThreads<Sink>::kMost)
    long_row_kernel(const __grid_constant__ Maker maker, const __grid_constant__ Sink sink, int64_t cols,
                    bool aligned) {
  if (Sink::kPass == Pass::first) let_second_begin();
  if (Sink::kPass == Pass::second) wait_for_first();
  const LongRow row{block_of<Sink::kPass>(), cols, aligned};
  const auto state = maker.begin(row);
  sink.put_long(row, [&](int64_t col) { return maker.value(row, state, col); });
}

// Rows from which fewer threads with more vectors each are faster: 7168 columns on an H100 take 275 instead of
// 281 us at 16384 rows, but 3.3 instead of 3.1 us at 16.
constexpr int64_t kManyRows = 256;
// Vectors in all up to which a thread has one: a gate on 256 rows of 2048 columns takes 2.7 instead of 2.8 us.
constexpr int64_t kFewVecs = 1 << 16;
// Vectors in all from which a thread has four: a gate takes 11.8 instead of 13.8 us on 1024 rows of 7168 columns, but
// 4.7 instead of 4.5 us on 256.
constexpr int64_t kManyVecs = 1 << 19;

// fours: the vectors in all from which many rows ask for four of a thread.
template <typename T, typename Maker, typename Sink>
cudaError_t launch_by_row(const Maker& maker, const Sink& sink, int64_t rows, int64_t cols, int64_t fours,
                          cudaStream_t stream) {
  if (rows == 0 || cols == 0) return cudaSuccess;
  if (rows > INT32_MAX) return cudaErrorInvalidValue;
  const auto whole_warps = [](int64_t n) { return static_cast<unsigned>((n + kWarp - 1) / kWarp * kWarp); };
  const int64_t vecs = (cols + kVec - 1) / kVec;
  const bool aligned = maker.vectorizable(cols);
  if (!aligned || vecs > kMaxVecs) {
    constexpr int kMost = LongThreads<Sink>::kMost;
    const unsigned threads = vecs < kMost ? whole_warps(vecs) : kMost;
    const size_t shared = maker.shared_bytes(vecs);
    if (shared > 48 * 1024) return cudaErrorInvalidValue;  // what every launch may have
    return launch_kernel(long_row_kernel<T, Maker, Sink>, static_cast<unsigned>(rows), threads, shared, stream,
                         begins_early(sink), maker, sink, cols, aligned);
  }
  const int64_t all = rows * vecs;
  int v = vecs > kMaxThreads ? 2 : 1;
  if (rows >= kManyRows && vecs >= 2 * kWarp && all > kFewVecs) {
    v = vecs > kMaxThreads || (vecs >= 4 * kWarp && all >= fours) ? 4 : 2;
  }
  unsigned threads = whole_warps((vecs + v - 1) / v);
  while (threads <= kWarp && threads / 2 >= vecs) threads /= 2;  // several rows per warp
  const unsigned rows_per_block = threads >= 128 ? 1 : 128 / threads;
  const dim3 grid(static_cast<unsigned>((rows + rows_per_block - 1) / rows_per_block));
  const dim3 block(threads, rows_per_block);
  const auto launch = [&](auto kernel) {
    return launch_kernel(kernel, grid, block, 0, stream, begins_early(sink), maker, sink, rows, cols);
  };
  if (v == 4) return launch(row_kernel<T, 4, Maker, Sink>);
  if (v == 2) return launch(row_kernel<T, 2, Maker, Sink>);
  return launch(row_kernel<T, 1, Maker, Sink>);
}

}  // namespace custom_ops
