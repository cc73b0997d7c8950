// Quantization of weights with a scale per block of 128 x 128: a block of threads holds one in registers.
#include "row_block.cuh"
#include "sources.cuh"

namespace custom_ops {
namespace {

constexpr int kBlock = 128;
constexpr int kBlockThreads = 512;
constexpr int kRowThreads = kBlock / kVec;                // of a row of the block
constexpr int kRowStep = kBlockThreads / kRowThreads;     // rows at a time
constexpr int kVecsOfThread = kBlock / kRowStep;

template <typename T, bool Aligned>
__global__ void __launch_bounds__(kBlockThreads)
    block_quant_kernel(const __grid_constant__ Plain<T> from, const __grid_constant__ Quantized out, int64_t rows,
                       int64_t cols) {
  const int64_t row = static_cast<int64_t>(blockIdx.y) * kBlock + threadIdx.x / kRowThreads;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x % kRowThreads * kVec;
  Vec<T> v[kVecsOfThread];
#pragma unroll
  for (int i = 0; i < kVecsOfThread; ++i) {
    v[i] = zero_vec<T>();
    if (row + i * kRowStep < rows && col < cols) {
      v[i] = from.template load<kVec, Aligned>(row + i * kRowStep, col, cols).x;
    }
  }
  const float amax = max_nan(from_bits<T>(row_max(largest_bits(v))), out.rule.min_amax);
  const float scale = codes_of_shared(v, amax, out.rule, [&](int i, const uint2& codes) {
    const int64_t at = row + i * kRowStep;
    if (at < rows && col < cols) {
      store_codes_any(static_cast<uint8_t*>(out.codes) + at * cols + col, codes, cols - col, Aligned);
    }
  });
  if (threadIdx.x == 0) store(static_cast<float*>(out.scale) + blockIdx.y * out.row_stride + blockIdx.x, scale);
}

template <typename T>
cudaError_t launch(const Source& source, int64_t rows, int64_t cols, const Quantized& out, cudaStream_t stream) {
  if (rows == 0 || cols == 0) return cudaSuccess;
  const int64_t row_blocks = (rows + kBlock - 1) / kBlock;
  const int64_t col_blocks = (cols + kBlock - 1) / kBlock;
  if (row_blocks > 65535 || col_blocks > INT32_MAX) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(col_blocks), static_cast<unsigned>(row_blocks));
  const Plain<T> from(source);
  if (from.vectorizable(cols)) {
    block_quant_kernel<T, true><<<grid, kBlockThreads, 0, stream>>>(from, out, rows, cols);
  } else {
    block_quant_kernel<T, false><<<grid, kBlockThreads, 0, stream>>>(from, out, rows, cols);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t block_quant(Dtype dtype, const Source& source, int64_t rows, int64_t cols, const Quantized& out,
                        cudaStream_t stream) {
  return dtype == Dtype::bfloat16 ? launch<__nv_bfloat16>(source, rows, cols, out, stream)
                                  : launch<__half>(source, rows, cols, out, stream);
}

}  // namespace custom_ops
