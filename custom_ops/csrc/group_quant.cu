// Per-token-group quantization to float8_e4m3fn: one pass, 2 bytes read and 1 written per element.
#include "kernels.h"
#include "rows.cuh"

namespace custom_ops {
namespace {

// Which shape of thread is fastest, measured on an H100; the values do not depend on it. Few elements: more
// threads with less to do. More than the L2 cache holds: a thread with one row, for DRAM likes neighbouring
// blocks to read neighbouring memory (4096 x 7168: 31.0 us, and 32.0 with four rows). Between: four rows,
// whose loads are under way together (1024 x 7168: 5.2 us, and 6.7 with one).
constexpr int64_t kFewElements = int64_t{1} << 16;
constexpr int64_t kManyElements = int64_t{1} << 20;
constexpr int64_t kMoreThanL2 = int64_t{1} << 24;

template <typename T, int N, int R, bool Aligned>
__global__ void __launch_bounds__(kThreads)
    group_quant_kernel(const T* x, int64_t stride, int64_t rows, int64_t cols, RowGrid grid, Quantized out) {
  const RowTile at = row_tile<N, R>(grid, rows);
  Vec<T, N> v[R];
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const T* const p = x + (at.row + i) * stride + at.col;
    if (i >= at.left) {
      v[i] = zero_vec<T, N>();
    } else {
      v[i] = Aligned ? load_const<T, N>(p) : load_scalar<T, N>(p, N);
    }
  }
  const QuantizedAt to = early_quantized_at(out, at, cols);
  quantize_rows(v, to, at.left, cols, out);
}

template <typename T, int N, int R, bool Aligned>
void launch_kernel(Matrix x, int64_t rows, int64_t cols, const Quantized& out, cudaStream_t stream) {
  const RowGrid grid = row_grid(rows, cols, N, R, &out);
  group_quant_kernel<T, N, R, Aligned><<<grid.blocks, kThreads, 0, stream>>>(
      static_cast<const T*>(x.data), x.stride, rows, cols, grid, out);
}

template <typename T>
cudaError_t launch(Matrix x, int64_t rows, int64_t cols, const Quantized& out, cudaStream_t stream) {
  const int64_t elements = rows * cols;
  if (!vectorizable(x.data, x.stride, cols)) {
    launch_kernel<T, 8, 1, false>(x, rows, cols, out, stream);
  } else if (elements < kFewElements) {
    launch_kernel<T, 4, 1, true>(x, rows, cols, out, stream);
  } else if (elements < kManyElements || elements >= kMoreThanL2) {
    launch_kernel<T, 8, 1, true>(x, rows, cols, out, stream);
  } else {
    launch_kernel<T, 8, 4, true>(x, rows, cols, out, stream);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t group_quant(Dtype dtype, Matrix x, int64_t rows, int64_t cols, const Quantized& out,
                        cudaStream_t stream) {
  return for_row_slices(rows, cols, [&](int64_t first, int64_t count) {
    const Matrix slice = rows_from(x, first);
    const Quantized to = rows_from(out, first, cols);
    return dtype == Dtype::bfloat16 ? launch<__nv_bfloat16>(slice, count, cols, to, stream)
                                    : launch<__half>(slice, count, cols, to, stream);
  });
}

}  // namespace custom_ops
