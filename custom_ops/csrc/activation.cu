// silu(gate) * up, alone or with group quantization. gate and up are usually the halves of one packed
// [rows, 2 * cols] tensor: any row stride.
#include "kernels.h"
#include "rows.cuh"

namespace custom_ops {
namespace {

// Above this, 1 + exp(-g) nears the end of float32, where a reciprocal is subnormal; Inf and NaN too.
constexpr float kFastGate = 80.0f;

// round_T(g / (1 + exp(-g))), float32 inside, |g| <= kFastGate: the expression of eager. expf is the accurate one
// (1 ulp; __expf rounds its argument to base 2, which is 45 ulp at |g| = 80), and the division is IEEE-exact up to
// what one step on its residual leaves, the seed being 1 ulp off.
template <typename T, int N>
__device__ __forceinline__ Vec<T, N> silu_quick(const Vec<T, N>& gate) {
  Vec<T, N> out;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const float2 g = Packed<T>::to_float(gate.pair[i]);
    const float dx = 1.0f + expf(-g.x);
    const float dy = 1.0f + expf(-g.y);
    out.pair[i] = Packed<T>::from_float(divide_by_reciprocal(g.x, dx, reciprocal_approx(dx)),
                                        divide_by_reciprocal(g.y, dy, reciprocal_approx(dy)));
  }
  return out;
}

// The same for any g, out of line: it is rare, and would otherwise be most of the kernel.
template <typename T, int N>
__device__ __noinline__ Vec<T, N> silu_any(Vec<T, N> gate) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const float2 g = Packed<T>::to_float(gate.pair[i]);
    gate.pair[i] = Packed<T>::from_float(__fdiv_rn(g.x, 1.0f + expf(-g.x)), __fdiv_rn(g.y, 1.0f + expf(-g.y)));
  }
  return gate;
}

// round_T(a * b), packed. A product of two 16-bit floats is exact in float32, so one rounding is what
// round_T(float32(a) * float32(b)) does too.
template <typename T, int N>
__device__ __forceinline__ Vec<T, N> multiply(const Vec<T, N>& a, const Vec<T, N>& b) {
  Vec<T, N> out;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) out.pair[i] = __hmul2(a.pair[i], b.pair[i]);
  return out;
}

template <typename T, int N, int R, bool Aligned, bool Quant>
__global__ void __launch_bounds__(kThreads)
    silu_mul_kernel(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, T* out, int64_t rows,
                    int64_t cols, RowGrid grid, Quantized quantized) {
  const RowTile at = row_tile<N, R>(grid, rows);
  Vec<T, N> g[R];
  Vec<T, N> u[R];
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const T* const gate_at = gate + (at.row + i) * gate_stride + at.col;
    const T* const up_at = up + (at.row + i) * up_stride + at.col;
    if (i >= at.left) {
      g[i] = u[i] = zero_vec<T, N>();
    } else {
      g[i] = Aligned ? load_const<T, N>(gate_at) : load_scalar<T, N>(gate_at, cols - at.col);
      u[i] = Aligned ? load_const<T, N>(up_at) : load_scalar<T, N>(up_at, cols - at.col);
    }
  }
  QuantizedAt to{};
  if (Quant) to = early_quantized_at(quantized, at, cols);
  Vec<T, N> product[R];
  bool quick = true;
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const float2 largest = Packed<T>::to_float(abs_max(g[i]));
    quick = quick && largest.x <= kFastGate && largest.y <= kFastGate;
  }
  if (R == 1 || quick) {  // as in group_quantize: with one vector, without waiting for the check
#pragma unroll
    for (int i = 0; i < R; ++i) product[i] = multiply(silu_quick(g[i]), u[i]);
  }
  if (!quick) {
#pragma unroll
    for (int i = 0; i < R; ++i) product[i] = multiply(silu_any(g[i]), u[i]);
  }
  if constexpr (Quant) {
    quantize_rows(product, to, at.left, cols, quantized);
  } else {
#pragma unroll
    for (int i = 0; i < R; ++i) {
      if (i >= at.left) break;
      T* const p = out + (at.row + i) * cols + at.col;
      if constexpr (Aligned) {
        store_vec(p, product[i]);
      } else {
        store_scalar(p, product[i], cols - at.col);
      }
    }
  }
}

template <typename T, int N, int R, bool Aligned, bool Quant>
void launch_kernel(Matrix gate, Matrix up, void* out, int64_t rows, int64_t cols, const Quantized& quantized,
                   cudaStream_t stream) {
  const RowGrid grid = row_grid(rows, cols, N, R, Quant ? &quantized : nullptr);
  silu_mul_kernel<T, N, R, Aligned, Quant><<<grid.blocks, kThreads, 0, stream>>>(
      static_cast<const T*>(gate.data), gate.stride, static_cast<const T*>(up.data), up.stride,
      static_cast<T*>(out), rows, cols, grid, quantized);
}

// Which shape of thread is fastest, measured on an H100; the values do not depend on it. Few elements: more
// threads with less to do. Many: two rows, whose loads are under way together (4096 x 2048: 13.8 us, 14.1 with
// one row, 14.8 with four).
constexpr int64_t kFewElements = int64_t{1} << 18;
constexpr int64_t kManyElements = int64_t{1} << 20;

template <typename T, bool Quant>
cudaError_t launch(Matrix gate, Matrix up, void* out, int64_t rows, int64_t cols, const Quantized& quantized,
                   cudaStream_t stream) {
  if (!vectorizable(gate.data, gate.stride, cols) || !vectorizable(up.data, up.stride, cols)) {
    launch_kernel<T, 8, 1, false, Quant>(gate, up, out, rows, cols, quantized, stream);
  } else if (rows * cols < kFewElements) {
    launch_kernel<T, 4, 1, true, Quant>(gate, up, out, rows, cols, quantized, stream);
  } else if (rows * cols < kManyElements) {
    launch_kernel<T, 8, 1, true, Quant>(gate, up, out, rows, cols, quantized, stream);
  } else {
    launch_kernel<T, 8, 2, true, Quant>(gate, up, out, rows, cols, quantized, stream);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t silu_mul(Dtype dtype, Matrix gate, Matrix up, void* out, int64_t rows, int64_t cols,
                     cudaStream_t stream) {
  return for_row_slices(rows, cols, [&](int64_t first, int64_t count) {
    const Matrix g = rows_from(gate, first);
    const Matrix u = rows_from(up, first);
    void* const to = static_cast<char*>(out) + 2 * first * cols;
    return dtype == Dtype::bfloat16 ? launch<__nv_bfloat16, false>(g, u, to, count, cols, {}, stream)
                                    : launch<__half, false>(g, u, to, count, cols, {}, stream);
  });
}

cudaError_t silu_mul_group_quant(Dtype dtype, Matrix gate, Matrix up, int64_t rows, int64_t cols,
                                 const Quantized& out, cudaStream_t stream) {
  return for_row_slices(rows, cols, [&](int64_t first, int64_t count) {
    const Matrix g = rows_from(gate, first);
    const Matrix u = rows_from(up, first);
    const Quantized to = rows_from(out, first, cols);
    return dtype == Dtype::bfloat16 ? launch<__nv_bfloat16, true>(g, u, nullptr, count, cols, to, stream)
                                    : launch<__half, true>(g, u, nullptr, count, cols, to, stream);
  });
}

}  // namespace custom_ops
