// Per-token-group quantization to float8_e4m3fn: one pass, 2 bytes read and 1 written per element.
#include "kernels.h"
#include "rows.cuh"

namespace custom_ops {
namespace {

template <typename T, int R, bool Aligned>
__global__ void __launch_bounds__(kThreads)
    group_quant_kernel(const T* x, int64_t stride, int64_t rows, int64_t cols, RowGrid grid, Quantized out) {
  const RowTile at = row_tile<R>(grid, rows);
  Vec<T> v[R];
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const T* const p = x + (at.row + i) * stride + at.col;
    if (at.row + i >= rows) {
      v[i] = zero_vec<T>();
    } else {
      v[i] = Aligned ? load_streaming(p) : load_scalar(p, kVec);
    }
  }
  quantize_rows<T, R>(v, at, rows, cols, out);
}

template <typename T>
cudaError_t launch(Matrix m, int64_t rows, int64_t cols, const Quantized& out, cudaStream_t stream) {
  const bool aligned = vectorizable(m.data, m.stride, cols);
  const int rows_per_thread = !aligned || rows * cols < kManyElements ? 1 : 4;
  const auto kernel = !aligned              ? group_quant_kernel<T, 1, false>
                      : rows_per_thread == 1 ? group_quant_kernel<T, 1, true>
                                             : group_quant_kernel<T, 4, true>;
  const RowGrid grid = row_grid(rows, cols, rows_per_thread);
  kernel<<<grid.blocks, kThreads, 0, stream>>>(static_cast<const T*>(m.data), m.stride, rows, cols, grid, out);
  return cudaGetLastError();
}

}  // namespace

cudaError_t group_quant(Dtype dtype, Matrix x, int64_t rows, int64_t cols, const Quantized& out,
                        cudaStream_t stream) {
  if (rows == 0 || cols == 0) return cudaSuccess;
  return dtype == Dtype::bfloat16 ? launch<__nv_bfloat16>(x, rows, cols, out, stream)
                                  : launch<__half>(x, rows, cols, out, stream);
}

}  // namespace custom_ops
