// Tokens to the rows of their experts, as they are or quantized, and the weighted sum of rows back to tokens.
//
// A thread owns 8 columns (16 bytes) of a token and goes through the token's pairs: it reads a token once, however many
// experts that has. The rows of 32 pairs are loaded at once, one by each lane.
#include <cuda_runtime.h>

#include "groups.cuh"
#include "moe_ids.cuh"
#include "passes.cuh"

namespace custom_ops {
namespace {

constexpr int kThreads = 128;
constexpr int kMostTiles = 65535;  // of a row: the limit of a grid's second dimension
// So many elements of rows by pair are read for less than it takes to find out first which of them are somebody's.
constexpr int64_t kReadAtOnce = 1 << 20;

struct Here {
  static constexpr int kRows = 0;
  static constexpr int kCols = 0;
};

// Calls put(row) for the rows of a token's pairs, in order. Written by the kernel ahead, so no read-only load.
template <typename Put>
__device__ __forceinline__ void for_rows(const int32_t* row_of_pair, int top_k, Put put) {
  const int lane = threadIdx.x % 32;
  for (int first = 0; first < top_k; first += 32) {
    const int own = first + lane < top_k ? __ldcg(row_of_pair + first + lane) : -1;
    const int count = top_k - first < 32 ? top_k - first : 32;
    for (int k = 0; k < count; ++k) {
      const int row = __shfl_sync(kAllLanes, own, k);
      if (row >= 0) put(static_cast<int64_t>(row));
    }
  }
}

template <typename T, bool Aligned>
__device__ __forceinline__ Vec<T> load_columns(const T* row, int64_t col, int64_t cols, uint32_t step) {
  return Aligned ? load_const(row + col) : load_scalar(row + col * step, cols - col, step);
}

template <typename T, bool Aligned>
__global__ void __launch_bounds__(kThreads)
    copy_kernel(const __grid_constant__ Matrix x, int64_t cols, const int32_t* row_of_pair, int top_k, T* rows) {
  const int64_t token = blockIdx.x;
  const int64_t col = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kVec;
  Vec<T> v = zero_vec<T>();
  if (col < cols) v = load_columns<T, Aligned>(row_of<T>(x, token), col, cols, x.col_stride);
  wait_for_first();
  for_rows(row_of_pair + token * top_k, top_k, [&](int64_t row) {
    T* const to = rows + row * cols + col;
    if (Aligned) {
      if (col < cols) store_vec(to, v);
    } else {
      store_scalar(to, v, cols - col);
    }
  });
}

template <typename T, bool Aligned>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const __grid_constant__ Matrix x, int64_t cols, const int32_t* row_of_pair, int top_k,
                    const __grid_constant__ Quantized out) {
  const int64_t token = blockIdx.x;
  const int64_t col = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kVec;
  Vec<T> v[1] = {zero_vec<T>()};
  if (col < cols) v[0] = load_columns<T, Aligned>(row_of<T>(x, token), col, cols, x.col_stride);
  float amax[1];
  float scale[1];
  Codes<kVec> codes[1];
  group_amax(v, out.group_size, out.rule.min_amax, amax);
  codes_of<Usual::no>(v, amax, out.rule, codes, scale);
  wait_for_first();
  for_rows(row_of_pair + token * top_k, top_k, [&](int64_t row) {
    if (col < cols) store_quantized<Here>(codes, scale, quantized_at(out, row, col, cols), 1, col, cols, out);
  });
}

// The rows of pairs that lie by pair, those that are here.
__device__ __forceinline__ int64_t row_of_pair_of(const SumArgs& p, int64_t pair) {
  if (p.row_of_pair != nullptr) return __ldcg(p.row_of_pair + pair);
  return p.ids.data == nullptr || expert_of(p.ids, pair) >= 0 ? pair : -1;
}

// As load_columns, of what a kernel wrote that may have run beside this one.
template <typename T, bool Aligned>
__device__ __forceinline__ Vec<T> load_written(const T* row, int64_t col, int64_t cols, uint32_t step) {
  if (!Aligned) return load_scalar(row + col * step, cols - col, step);
  Vec<T> v;
  v.bits() = __ldcg(reinterpret_cast<const typename Vec<T>::Bits*>(row + col));
  return v;
}

__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

// sum += v * weight, the product rounded to T unless weights are float32; never contracted to one rounding.
template <typename T>
__device__ __forceinline__ void add_product(float (&sum)[kVec], const Vec<T>& v, float weight, bool exact) {
#pragma unroll
  for (int i = 0; i < kVec / 2; ++i) {
    float2 f = Packed<T>::to_float(v.pair[i]);
    f.x = __fmul_rn(f.x, weight);
    f.y = __fmul_rn(f.y, weight);
    if (!exact) f = Packed<T>::to_float(Packed<T>::from_float(f.x, f.y));
    sum[2 * i] = __fadd_rn(sum[2 * i], f.x);
    sum[2 * i + 1] = __fadd_rn(sum[2 * i + 1], f.y);
  }
}

// AtOnce: so few rows by pair that they are read before it is known which of them count.
template <typename T, bool Aligned, bool AtOnce>
__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ SumArgs p) {
  constexpr int kBatch = 8;  // loads under way together
  const int lane = threadIdx.x % 32;
  const int64_t token = blockIdx.x;
  const int64_t col = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kVec;
  const bool exists = col < p.cols;
  float sum[kVec] = {};
  wait_for_first();
  for (int first = 0; first < p.top_k; first += 32) {
    const int k = first + lane;
    int64_t own = -1;
    float own_weight = 0.0f;
    if (k < p.top_k) {
      if (!AtOnce) own = row_of_pair_of(p, token * p.top_k + k);
      const int64_t at = token * p.weight_stride + k * p.weight_step;
      own_weight = p.weights_are_float32 ? __ldcg(static_cast<const float*>(p.weights) + at)
                                         : to_float(__ldcg(static_cast<const T*>(p.weights) + at));
    }
    const int count = p.top_k - first < 32 ? p.top_k - first : 32;
    for (int batch = 0; batch < count; batch += kBatch) {
      Vec<T> v[kBatch];
      bool here[kBatch];
      if constexpr (AtOnce) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int64_t row = token * p.top_k + first + batch + i;
          if (batch + i < count && exists) {
            v[i] = load_written<T, Aligned>(row_of<T>(p.rows, row), col, p.cols, p.rows.col_stride);
          }
        }
        if (batch == 0 && k < p.top_k) own = row_of_pair_of(p, token * p.top_k + k);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t row = __shfl_sync(kAllLanes, own, (batch + i) % 32);
        here[i] = batch + i < count && row >= 0 && exists;
        if constexpr (!AtOnce) {
          if (here[i]) v[i] = load_written<T, Aligned>(row_of<T>(p.rows, row), col, p.cols, p.rows.col_stride);
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const float weight = __shfl_sync(kAllLanes, own_weight, (batch + i) % 32);
        if (here[i]) add_product(sum, v[i], weight, p.weights_are_float32);
      }
    }
  }
  Vec<T> out;
#pragma unroll
  for (int i = 0; i < kVec / 2; ++i) out.pair[i] = Packed<T>::from_float(sum[2 * i], sum[2 * i + 1]);
  T* const to = static_cast<T*>(p.out) + token * p.cols + col;
  if (Aligned) {
    if (exists) store_vec(to, out);
  } else {
    store_scalar(to, out, p.cols - col);
  }
}

// A token to a row of blocks, of as many warps as its columns need.
struct Grid {
  dim3 blocks;
  unsigned threads;
  bool fits;
};

Grid grid_of(int64_t tokens, int64_t cols) {
  const int64_t vecs = (cols + kVec - 1) / kVec;
  Grid grid{};
  grid.threads = vecs < kThreads ? static_cast<unsigned>((vecs + 31) / 32 * 32) : kThreads;
  const int64_t tiles = (vecs + grid.threads - 1) / grid.threads;
  grid.fits = tokens <= INT32_MAX && tiles <= kMostTiles;
  if (grid.fits) grid.blocks = dim3(static_cast<unsigned>(tokens), static_cast<unsigned>(tiles));
  return grid;
}

template <typename T>
cudaError_t copy(const Matrix& x, int64_t tokens, int64_t cols, const int32_t* row_of_pair, int top_k, void* rows,
                 cudaStream_t stream) {
  const Grid grid = grid_of(tokens, cols);
  if (!grid.fits) return cudaErrorInvalidValue;
  bool early;
  const cudaError_t error = can_begin_early(early);
  if (error != cudaSuccess) return error;
  T* const to = static_cast<T*>(rows);
  const auto kernel = vectorizable(x, cols) ? copy_kernel<T, true> : copy_kernel<T, false>;
  return launch_kernel(kernel, grid.blocks, grid.threads, 0, stream, early, x, cols, row_of_pair, top_k, to);
}

template <typename T>
cudaError_t quantize(const Matrix& x, int64_t tokens, int64_t cols, const int32_t* row_of_pair, int top_k,
                     const Quantized& out, cudaStream_t stream) {
  const Grid grid = grid_of(tokens, cols);
  if (!grid.fits) return cudaErrorInvalidValue;
  bool early;
  const cudaError_t error = can_begin_early(early);
  if (error != cudaSuccess) return error;
  const auto kernel = vectorizable(x, cols) ? quantize_kernel<T, true> : quantize_kernel<T, false>;
  return launch_kernel(kernel, grid.blocks, grid.threads, 0, stream, early, x, cols, row_of_pair, top_k, out);
}

template <typename T>
cudaError_t sum(const SumArgs& p, cudaStream_t stream) {
  const Grid grid = grid_of(p.tokens, p.cols);
  if (!grid.fits) return cudaErrorInvalidValue;
  bool early;
  const cudaError_t error = can_begin_early(early);
  if (error != cudaSuccess) return error;
  const bool at_once = p.row_of_pair == nullptr && p.tokens * p.top_k * p.cols <= kReadAtOnce;
  const auto kernel = !vectorizable(p.rows, p.cols) ? sum_kernel<T, false, false>
                      : at_once                     ? sum_kernel<T, true, true>
                                                    : sum_kernel<T, true, false>;
  return launch_kernel(kernel, grid.blocks, grid.threads, 0, stream, early, p);
}

}  // namespace

cudaError_t moe_copy_rows(Dtype dtype, const Matrix& x, int64_t tokens, int64_t cols, const int32_t* row_of_pair,
                          int top_k, void* rows, cudaStream_t stream) {
  if (tokens == 0 || cols == 0) return cudaSuccess;
  return dtype == Dtype::bfloat16 ? copy<__nv_bfloat16>(x, tokens, cols, row_of_pair, top_k, rows, stream)
                                  : copy<__half>(x, tokens, cols, row_of_pair, top_k, rows, stream);
}

cudaError_t moe_quantize_rows(Dtype dtype, const Matrix& x, int64_t tokens, int64_t cols, const int32_t* row_of_pair,
                              int top_k, const Quantized& out, cudaStream_t stream) {
  if (tokens == 0 || cols == 0) return cudaSuccess;
  return dtype == Dtype::bfloat16 ? quantize<__nv_bfloat16>(x, tokens, cols, row_of_pair, top_k, out, stream)
                                  : quantize<__half>(x, tokens, cols, row_of_pair, top_k, out, stream);
}

cudaError_t moe_sum(Dtype dtype, const SumArgs& args, cudaStream_t stream) {
  if (args.tokens == 0 || args.cols == 0) return cudaSuccess;
  return dtype == Dtype::bfloat16 ? sum<__nv_bfloat16>(args, stream) : sum<__half>(args, stream);
}

}  // namespace custom_ops
