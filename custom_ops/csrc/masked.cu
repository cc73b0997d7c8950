// silu(gate) * up with group quantization, of the first counts[e] rows of each expert. The counts are read on the
// device: as many blocks as it holds at once share the tiles that there are, whichever expert's they are.
#include "activations.cuh"

namespace custom_ops {
namespace {

// A block of threads takes eight rows of 128 columns at a time: whole 32-byte sectors of column-major scales.
constexpr int kTileRows = 8;
constexpr int kTileVecs = kThreads / kTileRows;
constexpr int kTileCols = kTileVecs * kVec;
constexpr int kBlocksPerMultiprocessor = 8;

struct Here {
  static constexpr int kRows = 0;
  static constexpr int kCols = 0;
};

// A thread's vector of a tile.
struct Place {
  int64_t expert;
  uint32_t row;
  int64_t col;
  bool exists;
};

template <typename T, bool Aligned>
struct Masked {
  using Raw = typename Gated<T, Silu>::template Raw<kVec>;

  MaskedArgs p;
  Divisor col_tiles;

  __device__ __forceinline__ uint32_t count(int64_t expert) const {
    const int64_t given = p.counts[expert * p.counts_stride];
    return static_cast<uint32_t>(given < 0 ? 0 : given < p.max_tokens ? given : p.max_tokens);
  }

  __device__ __forceinline__ uint32_t tiles(uint32_t rows) const {
    return (rows + kTileRows - 1) / kTileRows * col_tiles.divisor;
  }

  __device__ __forceinline__ Place place(int64_t expert, uint32_t rows, uint32_t tile) const {
    const uint32_t row_tile = divide(tile, col_tiles);
    Place at;
    at.expert = expert;
    at.row = row_tile * kTileRows + threadIdx.x / kTileVecs;
    at.col = static_cast<int64_t>(tile - row_tile * col_tiles.divisor) * kTileCols + threadIdx.x % kTileVecs * kVec;
    at.exists = at.row < rows && at.col < p.cols;
    return at;
  }

  __device__ __forceinline__ Raw load(const Place& at) const {
    Raw raw = {};
    if (at.exists) {
      const T* const gate = static_cast<const T*>(p.gate_up) + at.expert * p.expert_stride + at.row * p.row_stride +
                            at.col;
      raw.gate = Aligned ? load_const(gate) : load_scalar(gate, kVec);
      raw.up = Aligned ? load_const(gate + p.cols) : load_scalar(gate + p.cols, kVec);
    }
    return raw;
  }

  __device__ __forceinline__ void put(const Place& at, const Raw& raw) const {
    const Raw one[1] = {raw};
    Vec<T> v[1];
    Silu{}(one, v);
    float amax[1];
    float scale[1];
    uint2 codes[1];
    group_amax(v, p.out.group_size, p.out.rule.min_amax, amax);
    codes_of<Usual::no>(v, amax, p.out.rule, codes, scale);
    if (!at.exists) return;
    QuantizedAt to = quantized_at(p.out, at.row, at.col, p.cols);
    to.codes += at.expert * p.max_tokens * p.cols;
    if (to.scale != nullptr) to.scale += at.expert * p.scale_expert_stride;
    store_quantized<Here>(codes, scale, to, 1, at.col, p.cols, p.out);
  }
};

// Of kThreads experts at a time the blocks count the tiles, and take them in turn. A tile is loaded while the one
// before it is computed.
template <typename T, bool Aligned>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    masked_kernel(const __grid_constant__ Masked<T, Aligned> masked) {
  __shared__ uint32_t rows_of[kThreads];
  __shared__ uint32_t end_of[kThreads];  // the tiles of an expert and of those before it
  __shared__ uint32_t warp_tiles[kThreads / 32];
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t warp = threadIdx.x / 32;
#pragma unroll 1
  for (int64_t first = 0; first < masked.p.experts; first += kThreads) {
    const uint32_t rows = first + threadIdx.x < masked.p.experts ? masked.count(first + threadIdx.x) : 0;
    uint32_t end = masked.tiles(rows);
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
      const uint32_t before = __shfl_up_sync(kAllLanes, end, o);
      if (lane >= o) end += before;
    }
    if (lane == 31) warp_tiles[warp] = end;
    __syncthreads();
    uint32_t all = 0;
#pragma unroll
    for (uint32_t w = 0; w < kThreads / 32; ++w) {
      if (w < warp) end += warp_tiles[w];
      all += warp_tiles[w];
    }
    rows_of[threadIdx.x] = rows;
    end_of[threadIdx.x] = end;
    __syncthreads();

    int expert = 0;
    const auto place = [&](uint32_t tile) {
      while (tile >= end_of[expert]) ++expert;
      return masked.place(first + expert, rows_of[expert], tile - (expert > 0 ? end_of[expert - 1] : 0));
    };
    uint32_t tile = blockIdx.x;
    Place at{};
    typename Masked<T, Aligned>::Raw raw = {};
    if (tile < all) {
      at = place(tile);
      raw = masked.load(at);
    }
#pragma unroll 1
    while (tile < all) {
      const Place now = at;
      const auto loaded = raw;
      tile += gridDim.x;
      if (tile < all) {
        at = place(tile);
        raw = masked.load(at);
      }
      masked.put(now, loaded);
    }
    __syncthreads();  // before the counts are overwritten
  }
}

template <typename T>
cudaError_t launch(const MaskedArgs& p, cudaStream_t stream) {
  if (p.experts == 0 || p.max_tokens == 0 || p.cols == 0) return cudaSuccess;
  const int64_t col_tiles = (p.cols + kTileCols - 1) / kTileCols;
  const int64_t tiles = (p.max_tokens + kTileRows - 1) / kTileRows * col_tiles;
  // Tiles of kThreads experts are counted in 31 bits.
  if (tiles > INT32_MAX / (p.experts < kThreads ? p.experts : kThreads)) return cudaErrorInvalidValue;
  int device;
  int multiprocessors;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const int64_t most = int64_t{multiprocessors} * kBlocksPerMultiprocessor;
  const unsigned blocks = static_cast<unsigned>(tiles * p.experts < most ? tiles * p.experts : most);
  const Divisor by(static_cast<uint32_t>(col_tiles));
  const bool aligned = aligned16(p.gate_up) && p.expert_stride % kVec == 0 && p.row_stride % kVec == 0;
  if (aligned) {
    masked_kernel<T, true><<<blocks, kThreads, 0, stream>>>(Masked<T, true>{p, by});
  } else {
    masked_kernel<T, false><<<blocks, kThreads, 0, stream>>>(Masked<T, false>{p, by});
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t silu_mul_group_quant_masked(Dtype dtype, const MaskedArgs& args, cudaStream_t stream) {
  return dtype == Dtype::bfloat16 ? launch<__nv_bfloat16>(args, stream) : launch<__half>(args, stream);
}

}  // namespace custom_ops
