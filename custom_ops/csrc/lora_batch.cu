// Shrink and expand for the tokens of a batch, each with the adapter of its slot, beside a product of the BLAS.
//
// A warp works on 16 tokens of one adapter by itself: no shared memory but for the sums of the shrink, no barriers in
// the expand. The order of the channels and of the ranks within an instruction of the matrix units is free as long as
// both factors have the same, and the order of the columns is free too; they are such that each thread reads and writes
// whole 16 bytes where memory has them.
#include "hopper.cuh"
#include "lora.h"

namespace custom_ops {
namespace {

using namespace hopper;

constexpr int kTileTokens = 16;
constexpr int kGroup = 32;  // columns that four instructions of eight columns make together
constexpr int kStep = 32;   // channels of two instructions
constexpr int kExpandWarps = 8;
constexpr int kShrinkWarps = 8;

#ifdef CUSTOM_OPS_HOPPER

__device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// What is read once a step: not kept in L1, and the first to leave L2.
__device__ __forceinline__ uint4 read_once(const void* from, uint64_t policy) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from), "l"(policy));
  return v;
}

__device__ __forceinline__ uint2 read_once_8(const void* from, uint64_t policy) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v2.b32 {%0, %1}, [%2], %3;"
               : "=r"(v.x), "=r"(v.y)
               : "l"(from), "l"(policy));
  return v;
}

__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Of a tile: the slot, its rank, where its tokens stand in the order, and how many there are.
struct Tile {
  int slot, first, count, rank;
  // Before the rank is there: the first 16 ranks of a slot may be read whatever it is.
  __device__ __forceinline__ bool used() const { return count > 0 && slot >= 0; }
};

__device__ __forceinline__ Tile tile_of(const LoraTokens& p, const int32_t* ranks, int index) {
  const int4 raw = __ldg(reinterpret_cast<const int4*>(p.tiles) + index);
  return {raw.x, raw.y, raw.z, raw.z > 0 && raw.x >= 0 ? min(__ldg(ranks + raw.x), p.rank) : 0};
}

// The token in a row of a tile, or -1.
__device__ __forceinline__ int token_of(const LoraTokens& p, const Tile& tile, int row) {
  if (row >= tile.count) return -1;
  const int token = __ldg(p.sorted_tokens + tile.first + row);
  return token < p.tokens ? token : -1;
}

#endif

// y[split, slice, token] = x[token, channels of the split] @ A[slice, slot of the token].T
template <int Steps, int kAhead>
__global__ void __launch_bounds__(kShrinkWarps * 32) shrink_kernel(const __grid_constant__ LoraShrink p) {
#ifdef CUSTOM_OPS_HOPPER
  __shared__ float sums[kShrinkWarps][Steps * 16][kTileTokens + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = lane / 4, quarter = lane % 4;
  const int slice = blockIdx.z, split = blockIdx.y;
  const Tile tile = tile_of(p.batch, p.ranks[slice], blockIdx.x);
  if (!tile.used()) {
    wait_for_previous();
    start_next();
    return;
  }
  const int own = p.split_channels / kShrinkWarps;
  const int from = split * p.split_channels + warp * own;
  const int to = min(from + own, p.channels);
  const int tokens[2] = {token_of(p.batch, tile, row), token_of(p.batch, tile, row + 8)};
  const auto* const x = static_cast<const __nv_bfloat16*>(p.x);
  const auto* const a = static_cast<const __nv_bfloat16*>(p.a[slice]) + tile.slot * p.a_slot;
  const uint64_t policy = evict_first();
  float d[Steps * 2][4] = {};
  // A is a weight, which the kernel before this one does not write; x may be what it writes
  bool waited = false;
  for (int k = from; k < to; k += kAhead * kStep) {
    uint4 of_a[kAhead][Steps * 2], of_x[kAhead][2];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = k + i * kStep + quarter * 8;
#pragma unroll
      for (int block = 0; block < Steps * 2; ++block) {
        const int r = block * 8 + row;
        const bool wanted = (block < 2 || r < tile.rank) && at < to;
        of_a[i][block] = wanted ? read_once(a + int64_t(r) * p.channels + at, policy) : uint4{};
      }
    }
    if (!waited) {
      wait_for_previous();
      start_next();
      if (tile.rank == 0) return;
      waited = true;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = k + i * kStep + quarter * 8;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        of_x[i][half] = tokens[half] >= 0 && at < to
                            ? *reinterpret_cast<const uint4*>(x + int64_t(tokens[half]) * p.x_row + at)
                            : uint4{};
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
      for (int block = 0; block < Steps * 2; ++block) {
        multiply(d[block], of_x[i][0].x, of_x[i][1].x, of_x[i][0].y, of_x[i][1].y, of_a[i][block].x, of_a[i][block].y);
        multiply(d[block], of_x[i][0].z, of_x[i][1].z, of_x[i][0].w, of_x[i][1].w, of_a[i][block].z, of_a[i][block].w);
      }
    }
  }
  if (!waited) {
    wait_for_previous();
    start_next();
  }
#pragma unroll
  for (int block = 0; block < Steps * 2; ++block) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[warp][block * 8 + quarter * 2 + i % 2][row + i / 2 * 8] = d[block][i];
  }
  __syncthreads();
  const int rank = p.batch.rank;
  float* const y = p.y + split * p.y_split + slice * p.y_slice;
  for (int i = threadIdx.x; i < kTileTokens * Steps * 16; i += kShrinkWarps * 32) {
    const int r = i % (Steps * 16), of_tile = i / (Steps * 16);
    const int token = token_of(p.batch, tile, of_tile);
    float total = sums[0][r][of_tile];
#pragma unroll
    for (int w = 1; w < kShrinkWarps; ++w) total += sums[w][r][of_tile];
    if (token >= 0) y[int64_t(token) * rank + r] = r < tile.rank ? total : 0.0f;
  }
#endif
}

// out[token] += scaling * y[slice, token] @ B[slice, slot of the token].T, in place.
template <int Steps, int Groups>
__global__ void __launch_bounds__(kExpandWarps * 32) expand_kernel(const __grid_constant__ LoraExpand p) {
#ifdef CUSTOM_OPS_HOPPER
  start_next();
  const int lane = threadIdx.x % 32;
  const int row = lane / 4, quarter = lane % 4;
  const Tile tile = tile_of(p.batch, p.ranks, blockIdx.x);
  const int first = (blockIdx.y * kExpandWarps + threadIdx.x / 32) * Groups * kGroup;
  if (!tile.used() || first >= p.columns) {
    wait_for_previous();  // or the next kernel could start before what it reads is there
    return;
  }
  int slice = 0;
  while (slice + 1 < p.slices && first >= p.slice[slice + 1].first_column) ++slice;
  const int rank = p.batch.rank;
  const int end = slice + 1 < p.slices ? p.slice[slice + 1].first_column : p.columns;
  const auto* const b = static_cast<const __nv_bfloat16*>(p.slice[slice].b) + tile.slot * p.slice[slice].slot_stride -
                        int64_t(p.slice[slice].first_column) * rank;
  const uint64_t policy = evict_first();
  uint2 of_b[Groups][4][Steps];
#pragma unroll
  for (int group = 0; group < Groups; ++group) {
#pragma unroll
    for (int block = 0; block < 4; ++block) {
      const int column = first + group * kGroup + row / 2 * 8 + block * 2 + row % 2;
#pragma unroll
      for (int step = 0; step < Steps; ++step) {
        of_b[group][block][step] = column < end && (step == 0 || step * 16 < tile.rank)
                                       ? read_once_8(b + int64_t(column) * rank + step * 16 + quarter * 4, policy)
                                       : uint2{};
      }
    }
  }
  const int tokens[2] = {token_of(p.batch, tile, row), token_of(p.batch, tile, row + 8)};
  const float scaling = __ldg(p.scalings + tile.slot);
  auto* const out = static_cast<__nv_bfloat16*>(p.out);
  uint4 base[Groups][2];
  const auto load_base = [&] {
#pragma unroll
    for (int group = 0; group < Groups; ++group) {
      const int column = first + group * kGroup + quarter * 8;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (tokens[half] >= 0 && column < end) {
          base[group][half] = *reinterpret_cast<const uint4*>(out + int64_t(tokens[half]) * p.columns + column);
        }
      }
    }
  };
  if (p.early_base) load_base();
  wait_for_previous();
  if (tile.rank == 0) return;
  if (!p.early_base) load_base();

  uint32_t high[Steps][4], low[Steps][4];
#pragma unroll
  for (int step = 0; step < Steps; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float4 sum{};
      if (tokens[half] >= 0 && step * 16 < tile.rank) {
        const float* from = p.y + slice * p.y_slice + int64_t(tokens[half]) * rank + step * 16 + quarter * 4;
        sum = *reinterpret_cast<const float4*>(from);
#pragma unroll 3
        for (int split = 1; split < p.splits; ++split) {
          from += p.y_split;
          const float4 more = *reinterpret_cast<const float4*>(from);
          sum = {sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w};
        }
      }
      const float v[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const __nv_bfloat162 top = __floats2bfloat162_rn(v[pair * 2], v[pair * 2 + 1]);
        const __nv_bfloat162 rest = __floats2bfloat162_rn(v[pair * 2] - __low2float(top),
                                                          v[pair * 2 + 1] - __high2float(top));
        memcpy(&high[step][pair * 2 + half], &top, 4);
        memcpy(&low[step][pair * 2 + half], &rest, 4);
      }
    }
  }
#pragma unroll
  for (int group = 0; group < Groups; ++group) {
    float d[4][4] = {};
#pragma unroll
    for (int block = 0; block < 4; ++block) {
#pragma unroll
      for (int step = 0; step < Steps; ++step) {
        multiply(d[block], high[step][0], high[step][1], high[step][2], high[step][3], of_b[group][block][step].x,
                 of_b[group][block][step].y);
      }
#pragma unroll
      for (int step = 0; step < Steps; ++step) {
        multiply(d[block], low[step][0], low[step][1], low[step][2], low[step][3], of_b[group][block][step].x,
                 of_b[group][block][step].y);
      }
    }
    const int column = first + group * kGroup + quarter * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (tokens[half] < 0 || column >= end) continue;
      uint32_t words[4] = {base[group][half].x, base[group][half].y, base[group][half].z, base[group][half].w};
#pragma unroll
      for (int block = 0; block < 4; ++block) {
        __nv_bfloat162 pair;
        memcpy(&pair, &words[block], 4);
        pair = __floats2bfloat162_rn(__fadd_rn(__low2float(pair), __fmul_rn(d[block][half * 2], scaling)),
                                     __fadd_rn(__high2float(pair), __fmul_rn(d[block][half * 2 + 1], scaling)));
        memcpy(&words[block], &pair, 4);
      }
      *reinterpret_cast<uint4*>(out + int64_t(tokens[half]) * p.columns + column) =
          uint4{words[0], words[1], words[2], words[3]};
    }
  }
#endif
}

template <typename Args>
cudaError_t launch(void (*kernel)(Args), const Args& args, dim3 grid, int threads, bool dependent, cudaStream_t stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace

cudaError_t lora_shrink(const LoraShrink& args, bool dependent, cudaStream_t stream) {
  if (args.batch.grid_tiles == 0 || args.channels == 0) return cudaSuccess;
  const int splits = (args.channels + args.split_channels - 1) / args.split_channels;
  const dim3 grid(args.batch.grid_tiles, splits, args.slices);
  const int threads = kShrinkWarps * 32;
  if (args.batch.rank == 16) return launch(shrink_kernel<1, 4>, args, grid, threads, dependent, stream);
  if (args.batch.rank == 32) return launch(shrink_kernel<2, 2>, args, grid, threads, dependent, stream);
  if (args.batch.rank == 64) return launch(shrink_kernel<4, 1>, args, grid, threads, dependent, stream);
  return cudaErrorInvalidValue;
}

// Groups: as many as the registers hold of B. Columns of a warp are in one slice, whose first is a multiple of 64.
template <int Steps, int Groups>
cudaError_t launch_expand(const LoraExpand& args, bool dependent, cudaStream_t stream) {
  constexpr int kColumns = kExpandWarps * Groups * kGroup;
  const dim3 grid(args.batch.grid_tiles, (args.columns + kColumns - 1) / kColumns);
  return launch(expand_kernel<Steps, Groups>, args, grid, kExpandWarps * 32, dependent, stream);
}

cudaError_t lora_expand(const LoraExpand& args, bool dependent, cudaStream_t stream) {
  if (args.batch.grid_tiles == 0 || args.columns == 0) return cudaSuccess;
  bool wide = true;
  for (int i = 1; i < args.slices; ++i) wide = wide && args.slice[i].first_column % (4 * kGroup) == 0;
  if (args.batch.rank == 16 && wide) return launch_expand<1, 4>(args, dependent, stream);
  if (args.batch.rank == 16) return launch_expand<1, 2>(args, dependent, stream);
  if (args.batch.rank == 32) return launch_expand<2, 2>(args, dependent, stream);
  if (args.batch.rank == 64) return launch_expand<4, 1>(args, dependent, stream);
  return cudaErrorInvalidValue;
}

}  // namespace custom_ops
