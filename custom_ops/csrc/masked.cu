// silu(gate) * up with group quantization, of the first counts[e] rows of each expert. The counts are read on the
// device: each expert has a few blocks, which go over as many rows as there are.
#include "activations.cuh"

namespace custom_ops {
namespace {

// A block of threads takes eight rows of 128 columns at a time: whole 32-byte sectors of column-major scales.
constexpr int kTileRows = 8;
constexpr int kTileCols = kThreads / kTileRows * kVec;
constexpr int kBlocksPerMultiprocessor = 8;

struct Here {
  static constexpr int kRows = 0;
  static constexpr int kCols = 0;
};

template <typename T, bool Aligned>
__global__ void __launch_bounds__(kThreads)
    masked_kernel(const __grid_constant__ MaskedArgs p, const __grid_constant__ Divisor col_tiles) {
  const int64_t expert = blockIdx.y;
  const int64_t given = p.counts[expert * p.counts_stride];
  const uint32_t count = static_cast<uint32_t>(given < 0 ? 0 : given < p.max_tokens ? given : p.max_tokens);
  const T* const gate = static_cast<const T*>(p.gate_up) + expert * p.expert_stride;
  Quantized out = p.out;
  out.codes = static_cast<uint8_t*>(out.codes) + expert * p.max_tokens * p.cols;
  out.scale = static_cast<float*>(out.scale) + expert * p.scale_expert_stride;

  const uint32_t tiles = (count + kTileRows - 1) / kTileRows * col_tiles.divisor;
  for (uint32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const uint32_t row_tile = divide(tile, col_tiles);
    const uint32_t row = row_tile * kTileRows + threadIdx.x / (kTileCols / kVec);
    const int64_t col = static_cast<int64_t>(tile - row_tile * col_tiles.divisor) * kTileCols +
                        threadIdx.x % (kTileCols / kVec) * kVec;
    const bool valid = row < count && col < p.cols;
    typename Gated<T, Silu>::template Raw<kVec> raw[1] = {};
    if (valid) {
      const T* const at = gate + row * p.row_stride + col;
      raw[0].gate = Aligned ? load_const(at) : load_scalar(at, kVec);
      raw[0].up = Aligned ? load_const(at + p.cols) : load_scalar(at + p.cols, kVec);
    }
    Vec<T> v[1];
    Silu{}(raw, v);
    float amax[1];
    float scale[1];
    uint2 codes[1];
    group_amax(v, out.group_size, out.rule.min_amax, amax);
    codes_of(v, amax, out.rule, codes, scale);
    if (valid) store_quantized<Here>(codes, scale, quantized_at(out, row, col, p.cols), 1, col, p.cols, out);
  }
}

template <typename T>
cudaError_t launch(const MaskedArgs& p, cudaStream_t stream) {
  if (p.experts == 0 || p.max_tokens == 0 || p.cols == 0) return cudaSuccess;
  const int64_t col_tiles = (p.cols + kTileCols - 1) / kTileCols;
  const int64_t tiles = (p.max_tokens + kTileRows - 1) / kTileRows * col_tiles;
  if (p.experts > 65535 || tiles > INT32_MAX) return cudaErrorInvalidValue;
  int device;
  int multiprocessors;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  // Enough to fill the device, whichever expert has the rows.
  const int64_t most = int64_t{multiprocessors} * kBlocksPerMultiprocessor;
  const dim3 grid(static_cast<unsigned>(tiles < most ? tiles : most), static_cast<unsigned>(p.experts));
  const Divisor by(static_cast<uint32_t>(col_tiles));
  const bool aligned = aligned16(p.gate_up) && p.expert_stride % kVec == 0 && p.row_stride % kVec == 0;
  if (aligned) {
    masked_kernel<T, true><<<grid, kThreads, 0, stream>>>(p, by);
  } else {
    masked_kernel<T, false><<<grid, kThreads, 0, stream>>>(p, by);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t silu_mul_group_quant_masked(Dtype dtype, const MaskedArgs& args, cudaStream_t stream) {
  return dtype == Dtype::bfloat16 ? launch<__nv_bfloat16>(args, stream) : launch<__half>(args, stream);
}

}  // namespace custom_ops
