// Pairs of tokens and experts in the order of a stable sort by expert, each expert padded to whole blocks.
//
// A counting sort: of a tile of pairs every warp counts its own, experts are scanned over warps and then among
// themselves, and a pair's row is what lies before its expert, its warp, and it within the warp. Up to
// kPairsOfOneBlock pairs one block does it all, or the blocks of a cluster where the device has them; of more, one kernel
// counts and a second one places, both with a block for each chunk of pairs. Nothing is added atomically: the order is
// always the same.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "groups.cuh"
#include "moe_ids.cuh"
#include "passes.cuh"

namespace custom_ops {
namespace {

constexpr int kMostWarps = 32;

enum class Step { only, cluster, count, place };

struct Shared {
  // How many pairs of an expert each warp has; after the scan, how many the warps before it have.
  uint16_t counts[kMostWarps * kMostAlignedExperts];
  int32_t tile[kMostAlignedExperts];  // pairs of each expert in the tile
  int32_t base[kMostAlignedExperts];  // the row of an expert's next pair
  int32_t offsets[kMostAlignedExperts + 1];
  int32_t warp_sums[kMostWarps];
};

__device__ __forceinline__ int32_t whole_blocks(int32_t n, int32_t size) { return (n + size - 1) / size * size; }

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
      const unsigned same = __match_any_sync(kAllLanes, expert[i]);
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

// Every slot as padding, and the blocks past the last expert's: before anything else is written.
__device__ __forceinline__ void fill(const AlignArgs& p) {
  const int threads = gridDim.x * blockDim.x;
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  const int4 four = make_int4(p.fill, p.fill, p.fill, p.fill);
  for (int i = thread; i < p.rows / 4; i += threads) reinterpret_cast<int4*>(p.slots)[i] = four;
  for (int i = p.rows / 4 * 4 + thread; i < p.rows; i += threads) p.slots[i] = p.fill;
}

// From the pairs of each expert in shared.tile: where experts begin. Every thread of the block calls it.
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

// What there is one of per expert, or per block of rows, each by one warp of all blocks.
__device__ __forceinline__ void describe(const AlignArgs& p, const Shared& shared) {
  const int experts = p.ids.experts;
  const int threads = gridDim.x * blockDim.x;
  const int thread = blockIdx.x * blockDim.x + threadIdx.x;
  const int used = shared.offsets[experts];
  if (p.offsets != nullptr) {
    for (int e = thread; e <= experts; e += threads) p.offsets[e] = shared.offsets[e];
  }
  if (p.num_padded != nullptr && thread == 0) *p.num_padded = used;
  if (p.block_experts == nullptr) return;
  for (int e = thread / 32; e < experts; e += threads / 32) {
    const int end = shared.offsets[e + 1] / p.block_size;
    for (int b = shared.offsets[e] / p.block_size + thread % 32; b < end; b += 32) p.block_experts[b] = e;
  }
  for (int b = used / p.block_size + thread; b < p.rows / p.block_size; b += threads) p.block_experts[b] = -1;
}

// Of the pairs of expert e: how many the cluster has, and how many the blocks before this one. Every thread calls it.
__device__ __forceinline__ void count_cluster(const Shared& shared, int e, int experts, int& all, int& before) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  namespace cg = cooperative_groups;
  const auto cluster = cg::this_cluster();
  cluster.sync();  // all have counted, and what is padding is written
  if (e < experts) {
    int counts[kAlignCluster];
#pragma unroll
    for (int b = 0; b < kAlignCluster; ++b) counts[b] = *cluster.map_shared_rank(&shared.tile[e], b);
#pragma unroll
    for (int b = 0; b < kAlignCluster; ++b) {
      all += counts[b];
      if (b < static_cast<int>(blockIdx.x)) before += counts[b];
    }
  }
  cluster.sync();  // nobody reads here any more, so a block may end
#endif
}

template <Step S, int Items>
__global__ void __launch_bounds__(kMostWarps * 32, 1) align_kernel(const __grid_constant__ AlignArgs p) {
  __shared__ Shared shared;
  const int experts = p.ids.experts;
  const int e = threadIdx.x;  // there are at least as many threads
  const int tile_pairs = blockDim.x * Items;
  const int first = static_cast<int>(blockIdx.x) * p.chunk;
  const int end = p.pairs - first < p.chunk ? p.pairs : first + p.chunk;
  Tile<Items> tile;
  // What comes next may rely on all that is ahead of this kernel, so it begins after this wait, unless it waits itself.
  constexpr bool kAlone = S == Step::only || S == Step::cluster;
  if (kAlone && p.next_waits) let_second_begin();
  if constexpr (S != Step::place) wait_for_first();
  let_second_begin();
  tile.load(p, first, end);
  if (S != Step::place) fill(p);
  tile.count(p, shared);

  if constexpr (S == Step::count) {
    int all = e < experts ? shared.tile[e] : 0;
    for (int at = first + tile_pairs; at < end; at += tile_pairs) {
      tile.load(p, at, end);
      __syncthreads();  // before the counts are written again
      tile.count(p, shared);
      if (e < experts) all += shared.tile[e];
    }
    if (e < experts) p.counts[static_cast<int64_t>(blockIdx.x) * experts + e] = all;
    return;
  }

  int all = 0;
  int before = 0;
  if constexpr (S == Step::only) {
    if (e < experts) all = shared.tile[e];
  } else if constexpr (S == Step::cluster) {
    count_cluster(shared, e, experts, all, before);
  } else {
    wait_for_first();
    if (e < experts) {
#pragma unroll 8
      for (int b = 0; b < p.blocks; ++b) {
        const int n = __ldcg(p.counts + static_cast<int64_t>(b) * experts + e);
        all += n;
        if (b < static_cast<int>(blockIdx.x)) before += n;
      }
    }
  }
  scan_experts(p, shared, all);
  if (e < experts) shared.base[e] = shared.offsets[e] + before;
  __syncthreads();
  tile.place(p, shared, first, end);
  describe(p, shared);
  if constexpr (S == Step::place) {
    for (int at = first + tile_pairs; at < end; at += tile_pairs) {
      __syncthreads();  // before base is moved on
      if (e < experts) shared.base[e] += shared.tile[e];
      tile.load(p, at, end);
      __syncthreads();
      tile.count(p, shared);
      tile.place(p, shared, at, end);
    }
  }
}

template <int Items>
cudaError_t launch_only(const AlignArgs& p, int threads, bool early, cudaStream_t stream) {
  return launch_kernel(align_kernel<Step::only, Items>, 1, threads, 0, stream, early, p);
}

template <int Items>
cudaError_t launch_cluster(const AlignArgs& p, int threads, cudaStream_t stream) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {kAlignCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kAlignCluster);
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, align_kernel<Step::cluster, Items>, p);
}

constexpr int kItems = 4;  // of several blocks
constexpr int kTilePairs = kMostWarps * 32 * kItems;

}  // namespace

cudaError_t plan_align(AlignArgs& p) {
  p.blocks = 1;
  p.chunk = p.pairs;
  p.cluster = false;
  if (p.pairs <= kPairsOfOneOfCluster) return cudaSuccess;
  if (p.pairs <= kPairsOfCluster) {
    const cudaError_t error = can_begin_early(p.cluster);  // such devices have clusters
    if (error != cudaSuccess) return error;
  }
  if (p.cluster) {
    p.blocks = kAlignCluster;
    p.chunk = (p.pairs + kAlignCluster - 1) / kAlignCluster;
  } else if (p.pairs > kPairsOfOneBlock) {
    const int64_t tiles = (int64_t{p.pairs} + kTilePairs - 1) / kTilePairs;
    const int64_t tiles_of_block = (tiles + kMostAlignBlocks - 1) / kMostAlignBlocks;
    p.chunk = static_cast<int32_t>(tiles_of_block * kTilePairs);
    p.blocks = static_cast<int32_t>((tiles + tiles_of_block - 1) / tiles_of_block);
  }
  return cudaSuccess;
}

cudaError_t moe_align(const AlignArgs& p, cudaStream_t stream) {
  if (p.ids.experts < 1 || p.ids.experts > kMostAlignedExperts) return cudaErrorInvalidValue;
  bool early;
  const cudaError_t error = can_begin_early(early);
  if (error != cudaSuccess) return error;
  if (p.cluster) {
    const int least = p.ids.experts < 128 ? 128 : (p.ids.experts + 31) / 32 * 32;
    int threads = p.chunk < kMostWarps * 32 ? (p.chunk + 31) / 32 * 32 : kMostWarps * 32;
    if (threads < least) threads = least;
    if (p.chunk <= threads) return launch_cluster<1>(p, threads, stream);
    if (p.chunk <= 2 * threads) return launch_cluster<2>(p, threads, stream);
    return launch_cluster<4>(p, threads, stream);
  }
  if (p.blocks == 1) {
    // Few pairs: few warps to count and to wait for. A thread for each expert.
    int threads = p.pairs < 1024 ? (p.pairs + 31) / 32 * 32 : 1024;
    const int least = p.ids.experts < 128 ? 128 : (p.ids.experts + 31) / 32 * 32;
    if (threads < least) threads = least;
    if (p.pairs <= threads) return launch_only<1>(p, threads, early, stream);
    if (p.pairs <= 2 * threads) return launch_only<2>(p, threads, early, stream);
    if (p.pairs <= 4 * threads) return launch_only<4>(p, threads, early, stream);
    return launch_only<8>(p, threads, early, stream);
  }
  const cudaError_t counted =
      launch_kernel(align_kernel<Step::count, kItems>, p.blocks, kMostWarps * 32, 0, stream, early, p);
  if (counted != cudaSuccess) return counted;
  return launch_kernel(align_kernel<Step::place, kItems>, p.blocks, kMostWarps * 32, 0, stream, early, p);
}

}  // namespace custom_ops
