// Who multiplies what in a grouped product of FP8: tasks, the stages of shared memory and the barriers between warps.
#pragma once

#include "hopper_fp8.cuh"
#include "hopper_stages.cuh"
#include "moe.h"

namespace custom_ops::moe_fp8 {

using namespace hopper;

constexpr int kStages = 3;
constexpr int kRows = 64;    // of a warpgroup that multiplies
constexpr int kBlock = 128;  // pairs of a block of the index, and columns of a sum
constexpr int kSlots = 4;    // tasks that were told and are not all taken
constexpr int kThreads = 512;
constexpr int kFinishers = 4;  // warps
constexpr int kRowsBytes = kRows * kRowBytes;
constexpr int kColumnsBytes = kBlock * kRowBytes;
constexpr int kStageBytes = 2 * kRowsBytes + 2 * kColumnsBytes;
constexpr int kSumRowBytes = kBlock * 2;
constexpr int kSumBytes = kRows * kSumRowBytes;  // of one sum in bfloat16; there are two for each half of a block

struct Shared {
  float row_scales[kStages][kBlock];
  float column_scales[kStages][2];
  uint64_t full[kStages], empty[kStages], told[kSlots], taken[kSlots], done[2], free[2];
  int4 tasks[kSlots];
  uint32_t offsets[kSlots][kBlock];  // of the rows of a block
};
constexpr int kSharedBytes = kStages * kStageBytes + 4 * kSumBytes + static_cast<int>(sizeof(Shared));
static_assert(kSharedBytes <= 227 * 1024, "what a block of Hopper can have");

using Ring = RingOf<kStages>;

// A block of pairs and the column-th tile of its expert's weight; no block: there is nothing left to do. whole: there
// are pairs in the second half too. Where there are none, each warpgroup has one of the two sums of the first half.
struct Task {
  int block, column, expert;
  bool whole;
};

#ifdef CUSTOM_OPS_HOPPER

// These are asked for again and not kept: registers do not suffice for that through the whole of a tile.
__device__ __forceinline__ int this_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread % 128;
}
__device__ __forceinline__ int this_lane() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// Tasks go to whoever is free: a half block takes half the time of a whole one. The first of each block is its own.
__device__ __forceinline__ int take(const Fp8GroupedArgs& p) {
  int blocks;
  asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(blocks));
  return blocks + atomicAdd(p.counter, 1);
}

// The number-th: p.band blocks run together through all columns, so that they find the weight in L2.
__device__ __forceinline__ int4 look_up(const Fp8GroupedArgs& p, int number) {
  const int blocks = *p.num_padded / kBlock;
  if (number >= blocks * p.column_tiles) return make_int4(-1, 0, 0, 0);
  const int of_band = p.band * p.column_tiles;
  const int band = number / of_band, in = number - band * of_band;
  const int height = min(blocks - band * p.band, p.band);
  const int block = band * p.band + in % height;
  return make_int4(block, in / height, p.block_experts[block], p.sorted_ids[block * kBlock + kRows] < p.pairs);
}

// A warp of gate_up has written its rows of a tile.
__device__ __forceinline__ void publish_rows(const Fp8GroupedArgs& p, int block) {
  fence_global();
  __syncwarp();
  if (this_lane() == 0) add_released(p.ready + block, 1);
}

// Until gate_up has written the rows of a block, for whatever this thread then tells of them: the first tiles of down
// begin where no tile of gate_up is left.
__device__ __forceinline__ void await_rows(const Fp8GroupedArgs& p, int block) {
  const uint32_t of_all = static_cast<uint32_t>(p.steps * kFinishers);  // a step of down is a tile of gate_up
  while (load_acquired(p.ready + block) < of_all) __nanosleep(32);
  fence_global();
}

// Of one thread.
__device__ __forceinline__ void tell(Shared& s, int count, int4 task) {
  const int slot = count % kSlots;
  wait(&s.taken[slot], (count / kSlots & 1) ^ 1);
  s.tasks[slot] = task;
  arrive(&s.told[slot]);
}

// The count-th task of this block, for all threads of a warp.
__device__ __forceinline__ Task told(Shared& s, int count) {
  const int slot = count % kSlots;
  wait(&s.told[slot], count / kSlots & 1);
  int4 task;
  asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(task.x), "=r"(task.y), "=r"(task.z), "=r"(task.w)
               : "r"(shared_address(&s.tasks[slot]))
               : "memory");
  __syncwarp();
  if (this_lane() == 0) arrive(&s.taken[slot]);
  return {task.x, task.y, task.z, task.w != 0};
}

#endif

}  // namespace custom_ops::moe_fp8
