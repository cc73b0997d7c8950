// Pairs of tokens and experts in the order of a stable sort by expert, each expert padded to whole blocks.
//
// A counting sort: of a tile of pairs every warp counts its own, experts are scanned over warps and then among
// themselves, and a pair's row is what lies before its expert, its warp, and it within the warp. Up to kPairsOfOneBlock
// pairs one block does it all; of more, each has a chunk, whose experts a kernel ahead has counted for all the others.
// Nothing depends on an order of atomics: the result is always the same.
#include <cuda_runtime.h>

#include "groups.cuh"
#include "moe_ids.cuh"
#include "passes.cuh"

namespace custom_ops {
namespace {

constexpr int kMostWarps = 32;
// Threads of one block of several: of few pairs more blocks are faster, of many fewer, for each reads what all counted.
constexpr int kFewThreads = 512;
constexpr int kManyThreads = 1024;
constexpr int kManyPairs = 32768;  // from here on
static_assert(kFewThreads >= kMostAlignedExperts && kManyThreads <= kMostWarps * 32);

struct Shared {
  // How many pairs of an expert each warp has; after the scan, how many the warps before it have.
  uint16_t counts[kMostWarps * kMostAlignedExperts];
  int32_t tile[kMostAlignedExperts];    // pairs of each expert in the tile
  int32_t all[kMostAlignedExperts];     // of all blocks
  int32_t before[kMostAlignedExperts];  // of the blocks before this one
  int32_t base[kMostAlignedExperts];    // the row of an expert's next pair
  int32_t offsets[kMostAlignedExperts + 1];
  int32_t warp_sums[kMostWarps];
};

__device__ __forceinline__ int32_t whole_blocks(int32_t n, int32_t size) { return (n + size - 1) / size * size; }

// The lanes whose expert is that of this one. An instruction does it too, and takes its time for each value there is.
__device__ __forceinline__ unsigned lanes_of(int expert, int experts) {
  const int bits = 32 - __clz(experts);  // with all of them set, -1 is no expert
  unsigned same = kAllLanes;
  for (int bit = 0; bit < bits; ++bit) {
    const bool set = expert >> bit & 1;
    const unsigned lanes = __ballot_sync(kAllLanes, set);
    same &= set ? lanes : ~lanes;
  }
  return same;
}

// Items pairs of a thread: their experts, and how many of the expert's pairs the warp has before each.
template <int Items>
struct Tile {
  int expert[Items];
  int rank[Items];

  // Those of a warp are neighbours, and so are those of a step.
  static __device__ __forceinline__ int pair_of(int first, int i) {
    return first + static_cast<int>(threadIdx.x / 32) * 32 * Items + i * 32 + static_cast<int>(threadIdx.x % 32);
  }

  __device__ __forceinline__ void load(const AlignArgs& p, int first, int end) {
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      const int pair = pair_of(first, i);
      expert[i] = pair < end ? expert_of(p.ids, pair) : -1;
    }
  }

  // Every thread of the block calls it. The ranks, and in shared memory counts and tile.
  __device__ __forceinline__ void count(const AlignArgs& p, Shared& shared) {
    const int experts = p.ids.experts;
    const int warps = blockDim.x / 32;
    const unsigned lane = threadIdx.x % 32;
    for (int i = threadIdx.x; i < warps * experts; i += blockDim.x) shared.counts[i] = 0;
    __syncthreads();
    uint16_t* const mine = shared.counts + threadIdx.x / 32 * experts;
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      const unsigned same = lanes_of(expert[i], experts);
      const bool here = expert[i] >= 0;
      const int before = here ? mine[expert[i]] : 0;
      rank[i] = before + __popc(same & ((1u << lane) - 1));
      __syncwarp();
      if (here && (same >> lane) == 1) mine[expert[i]] = static_cast<uint16_t>(rank[i] + 1);  // the last of them
      __syncwarp();
    }
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += blockDim.x) {
      int before = 0;
#pragma unroll 8
      for (int w = 0; w < warps; ++w) {
        const int n = shared.counts[w * experts + e];
        shared.counts[w * experts + e] = static_cast<uint16_t>(before);
        before += n;
      }
      shared.tile[e] = before;
    }
    __syncthreads();
  }

  __device__ __forceinline__ void place(const AlignArgs& p, const Shared& shared, int first, int end) const {
    const uint16_t* const before = shared.counts + threadIdx.x / 32 * p.ids.experts;
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      const int pair = pair_of(first, i);
      if (pair >= end) continue;
      const int e = expert[i];
      const int row = e < 0 ? -1 : shared.base[e] + before[e] + rank[i];
      if (p.row_of_pair != nullptr) p.row_of_pair[pair] = row;
      if (e >= 0) p.slots[row] = p.slots_are_experts ? e : pair;
    }
  }
};

// Of one block: every slot as padding, before anything else is written. Of several, describe() finds what is padding.
__device__ __forceinline__ void fill(const AlignArgs& p) {
  const int4 four = make_int4(p.fill, p.fill, p.fill, p.fill);
  const int thread = threadIdx.x;
  const int threads = blockDim.x;
  for (int i = thread; i < p.rows / 4; i += threads) reinterpret_cast<int4*>(p.slots)[i] = four;
  for (int i = p.rows / 4 * 4 + thread; i < p.rows; i += threads) p.slots[i] = p.fill;
}

// From the pairs of each expert: where experts begin. Every thread of the block calls it.
__device__ __forceinline__ void scan_experts(const AlignArgs& p, Shared& shared, int pairs_of_expert) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned warp = threadIdx.x / 32;
  const int own = static_cast<int>(threadIdx.x) < p.ids.experts ? whole_blocks(pairs_of_expert, p.block_size) : 0;
  int end = own;
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    const int before = __shfl_up_sync(kAllLanes, end, o);
    if (lane >= o) end += before;
  }
  if (lane == 31) shared.warp_sums[warp] = end;
  __syncthreads();
  for (unsigned w = 0; w < warp; ++w) end += shared.warp_sums[w];
  if (static_cast<int>(threadIdx.x) < p.ids.experts) {
    shared.offsets[threadIdx.x] = end - own;
    if (static_cast<int>(threadIdx.x) == p.ids.experts - 1) shared.offsets[p.ids.experts] = end;
  }
  __syncthreads();
}

// Padding, and what there is one of per expert, or per block of rows, each by one warp of all blocks.
__device__ __forceinline__ void describe(const AlignArgs& p, const Shared& shared) {
  const int experts = p.ids.experts;
  const int threads = gridDim.x * blockDim.x;
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  const int lane = thread % 32;
  const int used = shared.offsets[experts];
  if (p.offsets != nullptr) {
    for (int e = thread; e <= experts; e += threads) p.offsets[e] = shared.offsets[e];
  }
  if (p.num_padded != nullptr && thread == 0) *p.num_padded = used;
  if (gridDim.x > 1) {
    for (int e = thread / 32; e < experts; e += threads / 32) {
      const int end = shared.offsets[e + 1];
      for (int row = shared.offsets[e] + shared.all[e] + lane; row < end; row += 32) p.slots[row] = p.fill;
    }
    for (int row = used + thread; row < p.rows; row += threads) p.slots[row] = p.fill;
  }
  if (p.block_experts == nullptr) return;
  for (int e = thread / 32; e < experts; e += threads / 32) {
    const int end = shared.offsets[e + 1] / p.block_size;
    for (int b = shared.offsets[e] / p.block_size + lane; b < end; b += 32) p.block_experts[b] = e;
  }
  for (int b = used / p.block_size + thread; b < p.rows / p.block_size; b += threads) p.block_experts[b] = -1;
}

// From what the kernel ahead counted: all pairs, and those of the blocks before this one, of each expert, into
// shared.all and shared.before, which are 0. Threads share the blocks of an expert.
__device__ __forceinline__ void add_up(const AlignArgs& p, Shared& shared) {
  const int experts = p.ids.experts;
  const int width = (experts + 31) / 32 * 32;
  const int shares = blockDim.x / width;
  const int e = threadIdx.x % width;
  const int share = threadIdx.x / width;
  if (e >= experts || share >= shares) return;
  int all = 0;
  int before = 0;
#pragma unroll 16
  for (int b = share; b < p.blocks; b += shares) {
    const int n = __ldcg(p.counts + static_cast<int64_t>(b) * experts + e);
    all += n;
    if (b < static_cast<int>(blockIdx.x)) before += n;
  }
  atomicAdd(&shared.all[e], all);
  atomicAdd(&shared.before[e], before);
}

// How many pairs of each expert are in the chunk of each block.
__global__ void __launch_bounds__(kManyThreads) count_kernel(const __grid_constant__ AlignArgs p) {
  __shared__ int32_t counts[kMostAlignedExperts];
  const int e = threadIdx.x;  // there are at least as many threads
  const int first = static_cast<int>(blockIdx.x) * p.chunk;
  const int end = p.pairs - first < p.chunk ? p.pairs : first + p.chunk;
  if (e < p.ids.experts) counts[e] = 0;
  wait_for_first();  // before what comes next begins: it reads the ids at once
  let_second_begin();
  __syncthreads();
#pragma unroll 4
  for (int pair = first + e; pair < end; pair += blockDim.x) {
    const int expert = expert_of(p.ids, pair);
    if (expert >= 0) atomicAdd(&counts[expert], 1);
  }
  __syncthreads();
  if (e < p.ids.experts) p.counts[static_cast<int64_t>(blockIdx.x) * p.ids.experts + e] = counts[e];
}

template <bool Counted, int Items>
__global__ void __launch_bounds__(kMostWarps * 32, 1) align_kernel(const __grid_constant__ AlignArgs p) {
  __shared__ Shared shared;
  const int experts = p.ids.experts;
  const int e = threadIdx.x;  // there are at least as many threads
  const int tile_pairs = blockDim.x * Items;
  const int first = static_cast<int>(blockIdx.x) * p.chunk;
  const int end = p.pairs - first < p.chunk ? p.pairs : first + p.chunk;
  Tile<Items> tile;
  if (e < experts) shared.all[e] = shared.before[e] = 0;
  // What comes next may rely on all that is ahead of this kernel, so it begins after this wait, unless it waits itself.
  if (!Counted && p.next_waits) let_second_begin();
  if constexpr (!Counted) wait_for_first();
  let_second_begin();
  tile.load(p, first, end);
  if constexpr (!Counted) fill(p);
  tile.count(p, shared);

  if constexpr (Counted) {
    wait_for_first();
    add_up(p, shared);
    __syncthreads();
  } else if (e < experts) {
    shared.all[e] = shared.tile[e];
  }
  scan_experts(p, shared, e < experts ? shared.all[e] : 0);
  if (e < experts) shared.base[e] = shared.offsets[e] + shared.before[e];
  __syncthreads();
  tile.place(p, shared, first, end);
  describe(p, shared);
  for (int at = first + tile_pairs; at < end; at += tile_pairs) {
    __syncthreads();  // before base is moved on
    if (e < experts) shared.base[e] += shared.tile[e];
    tile.load(p, at, end);
    __syncthreads();
    tile.count(p, shared);
    tile.place(p, shared, at, end);
  }
}

}  // namespace

void plan_align(AlignArgs& p) {
  if (p.pairs <= kPairsOfOneBlock) {
    // Few warps to count and to wait for. A thread for each expert.
    const int pairs = (p.pairs + 31) / 32 * 32;
    const int least = p.ids.experts < 128 ? 128 : (p.ids.experts + 31) / 32 * 32;
    p.threads = pairs < least ? least : pairs;
    p.blocks = 1;
  } else {
    p.threads = p.pairs < kManyPairs ? kFewThreads : kManyThreads;
    const int tiles = (p.pairs + p.threads - 1) / p.threads;
    p.blocks = tiles < kMostAlignBlocks ? tiles : kMostAlignBlocks;
  }
  p.chunk = (p.pairs + p.blocks - 1) / p.blocks;
}

cudaError_t moe_align(const AlignArgs& p, cudaStream_t stream) {
  if (p.ids.experts < 1 || p.ids.experts > kMostAlignedExperts) return cudaErrorInvalidValue;
  bool early;
  const cudaError_t error = can_begin_early(early);
  if (error != cudaSuccess) return error;
  if (p.blocks == 1) return launch_kernel(align_kernel<false, 1>, 1, p.threads, 0, stream, early, p);
  const cudaError_t counted = launch_kernel(count_kernel, p.blocks, p.threads, 0, stream, early, p);
  if (counted != cudaSuccess) return counted;
  const auto place = p.chunk <= p.threads ? align_kernel<true, 1> : align_kernel<true, 4>;
  return launch_kernel(place, p.blocks, p.threads, 0, stream, early, p);
}

}  // namespace custom_ops
