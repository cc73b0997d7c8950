// Which tiles a grouped product has, and whose rows they are: from the index of `moe_align`, in blocks of 8 rows.
#pragma once

#include "hopper_columns.cuh"
#include "hopper_stages.cuh"
#include "moe.h"

namespace custom_ops::grouped {

using namespace hopper;

// A cluster of two blocks multiplies kWeightRows rows of a weight with up to 2 * kTokens rows of one expert: each block
// has half of these, and of the weight it loads half for both.
constexpr int kCluster = 2;
constexpr int kWeightRows = 256;
constexpr int kTokens = 160;
constexpr int kRowBlock = 8;
constexpr int kMostRowBlocks = kCluster * kTokens / kRowBlock;
constexpr int kStages = 4;
constexpr int kWeightBytes = kWeightRows * kRowBytes;
constexpr int kStageBytes = kWeightBytes + kTokens * kRowBytes;
constexpr int kConsumers = 2;  // warpgroups that multiply; a third one loads
constexpr int kThreads = 128 * (kConsumers + 1);
constexpr int kWarps = 4;              // of a warpgroup
constexpr int kPart = 16;              // tokens on their way out together
constexpr int kPartBytes = kPart * kRowBytes;
constexpr int kBox = 32;               // rows that TMA copies at once; more than there are of an expert do no harm
static_assert(kTokens % kBox == 0);

// What is in shared memory behind the stages.
struct Shared {
  alignas(kRowBytes) uint8_t out[2 * kConsumers * kPartBytes];  // two parts for each consumer
  int32_t pairs[2][kConsumers][kTokens];                        // of the second product
  int32_t first_tile[kMostGroupedExperts + 1];
  int32_t first_block[kMostGroupedExperts];  // of 8 rows
  int32_t end_block[kMostGroupedExperts];
  uint64_t full[kStages], empty[kStages];
};

constexpr int kSharedBytes = kStages * kStageBytes + static_cast<int>(sizeof(Shared));
static_assert(kSharedBytes <= 227 * 1024, "what a block of Hopper can have");

using Ring = RingOf<kStages>;

#ifdef CUSTOM_OPS_HOPPER

// This thread. What is computed of it would else be kept in registers through the whole of a tile, for which they do
// not suffice, and not be computed where it is needed.
__device__ __forceinline__ unsigned this_thread() {
  unsigned thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  return thread;
}

// The blocks of rows and the first tile of each expert. All threads call it; the last step is theirs to wait for.
__device__ __forceinline__ void find_tiles(const GroupedArgs& p, Shared& s) {
  const int used = *p.num_padded / kRowBlock;
  for (int block = threadIdx.x; block < used; block += kThreads) {
    const int expert = p.block_experts[block];
    if (block == 0 || p.block_experts[block - 1] != expert) s.first_block[expert] = block;
    if (block + 1 == used || p.block_experts[block + 1] != expert) s.end_block[expert] = block + 1;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    int before = 0;
    for (int first = 0; first < p.experts; first += 32) {
      const int expert = first + lane;
      const int blocks = expert < p.experts ? s.end_block[expert] - s.first_block[expert] : 0;
      const int own = (blocks + kMostRowBlocks - 1) / kMostRowBlocks;
      int end = own;
#pragma unroll
      for (int o = 1; o < 32; o *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, end, o);
        if (lane >= o) end += other;
      }
      if (expert < p.experts) s.first_tile[expert] = before + end - own;
      before += __shfl_sync(0xffffffffu, end, 31);
    }
    if (lane == 0) s.first_tile[p.experts] = before;
  }
  __syncthreads();
}

// One block's part of a tile: `rows` rows from `row` on, and the column-th 256 rows of an expert's weight.
struct Place {
  int expert;
  int column;
  int row;
  int rows;
};

// Tiles of an expert come one after the other, and those that share rows of the weight run together.
__device__ __forceinline__ Place place(const GroupedArgs& p, const Shared& s, int tile, int rank) {
  int low = 0, high = p.experts - 1;  // the last expert whose first tile is not after this one has it
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (s.first_tile[middle] * p.column_tiles <= tile) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int tiles = s.first_tile[low + 1] - s.first_tile[low];
  const int in = tile - s.first_tile[low] * p.column_tiles;
  const int blocks = s.end_block[low] - s.first_block[low];
  const int begin = in % tiles * blocks / tiles;
  const int end = (in % tiles + 1) * blocks / tiles;
  const int half = (end - begin + 1) / 2;
  return {low, in / tiles, (s.first_block[low] + begin + (rank == 0 ? 0 : half)) * kRowBlock,
          (rank == 0 ? half : end - begin - half) * kRowBlock};
}

#endif

}  // namespace custom_ops::grouped
