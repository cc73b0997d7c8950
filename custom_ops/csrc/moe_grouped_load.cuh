// What the loading warpgroup of a grouped product does: weight and rows into the stages of shared memory.
#pragma once

#include <cuda_bf16.h>

#include "moe_grouped_tiles.cuh"

namespace custom_ops::grouped {

#ifdef CUSTOM_OPS_HOPPER

// Channels of a stage: 128 bytes.
__device__ __forceinline__ int steps_of(const GroupedArgs& p) {
  return p.channels * static_cast<int>(sizeof(__nv_bfloat16)) / kRowBytes;
}

// The token of a row of the first product; rows of padding read the first one, and nobody reads what comes of them.
__device__ __forceinline__ int token_of(const GroupedArgs& p, int row) {
  const int pair = p.sorted_ids[row];
  return pair < p.pairs ? pair / p.top_k : 0;
}

constexpr int kRowsAtOnce = 128 * 16 / kRowBytes;  // of a copy by each thread
constexpr int kRowsOfThread = kTokens / kRowsAtOnce;

// Threads that load, of gate_up a warpgroup, of down a warp. The first of them also arrives with the bytes.
template <bool GateUp>
constexpr int kLoaders = GateUp ? 128 : 32;

// This block's half of the weight, for both; of gate_up, one half is of the gate and one of what it is multiplied with,
// which has a map of its own.
template <bool GateUp>
__device__ __forceinline__ int weight_row_of(const GroupedArgs& p, const Place& at, int rank) {
  return at.expert * p.weight_rows + (GateUp ? at.column * 128 : at.column * kWeightRows + rank * 128);
}

// To be evicted first: nobody else reads it, and L2 then keeps what the next kernel reads.
__device__ __forceinline__ uint64_t read_once() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Into both blocks.
__device__ __forceinline__ void load_weight(const CUtensorMap& map, uint64_t* full, uint8_t* stage, int rank, int step,
                                            int row, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
      " [%0], [%1, {%4, %5}], [%2], %3, %6;" ::"r"(shared_address(stage + rank * (kWeightBytes / kCluster))),
      "l"(&map), "r"(shared_address(full)), "h"(static_cast<uint16_t>((1 << kCluster) - 1)), "r"(step * kDepth),
      "r"(row), "l"(policy)
      : "memory");
}

// For gate_up, by four warps: rows of tokens are gathered, which TMA could only do one by one.
__device__ __forceinline__ void load_gathered(const GroupedArgs& p, uint8_t* stages, Shared& s,
                                              const CUtensorMap& weight_map, int rank, int tiles) {
  const int thread = threadIdx.x % 128;
  const int steps = steps_of(p);
  const uint4* const x = static_cast<const uint4*>(p.x);
  const int pitch = static_cast<int>(p.x_pitch * sizeof(__nv_bfloat16) / 16);
  const int first = thread / 8;
  const int to = first * kRowBytes + (thread % 8 ^ first % kAtomRows) * 16;
  const uint64_t policy = read_once();
  Ring ring;
  for (int tile = blockIdx.x / kCluster; tile < tiles; tile += gridDim.x / kCluster) {
    const Place at = place(p, s, tile, rank);
    uint32_t from[kRowsOfThread];
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      const int row = first + i * kRowsAtOnce;
      from[i] = row < at.rows ? static_cast<uint32_t>(token_of(p, at.row + row)) * pitch + thread % 8 : 0;
    }
    const int weight_row = weight_row_of<true>(p, at, rank);
    for (int step = 0; step < steps; ++step) {
      // both blocks must have read a stage before either writes it
      wait(&s.empty[ring.stage], ring.parity ^ 1);
      uint8_t* const stage = stages + ring.stage * kStageBytes;
      uint64_t* const full = &s.full[ring.stage];
      if (thread == 0) {
        expect_bytes(full, kWeightBytes);
        load_weight(weight_map, full, stage, rank, step, weight_row, policy);
      }
#pragma unroll
      for (int i = 0; i < kRowsOfThread; ++i) {
        if (first + i * kRowsAtOnce < at.rows) {
          copy_16(shared_address(stage + kWeightBytes + to + i * kRowsAtOnce * kRowBytes), x + from[i]);
          from[i] += kRowBytes / 16;
        }
      }
      arrive_with_copies(full);
      ring.next();
    }
  }
}

// For down, by a warp: rows lie in the order of the index. The weight of the first stages is asked for while gate_up
// still runs.
__device__ __forceinline__ void load_rows(const GroupedArgs& p, uint8_t* stages, Shared& s, const CUtensorMap& x_map,
                                          const CUtensorMap& weight_map, int rank, int tiles) {
  const int lane = threadIdx.x % 32;
  const int steps = steps_of(p);
  Ring ring;
  bool waited = false;
  for (int tile = blockIdx.x / kCluster; tile < tiles; tile += gridDim.x / kCluster) {
    const Place at = place(p, s, tile, rank);
    const int boxes = (at.rows + kBox - 1) / kBox;
    const int bytes = kWeightBytes + boxes * kBox * kRowBytes;
    const int weight_row = weight_row_of<false>(p, at, rank);
    int ahead = 0;
    if (!waited) {
      ahead = steps < kStages ? steps : kStages;
      for (int step = 0; step < ahead && lane == 0; ++step) {  // all stages are empty
        expect_bytes(&s.full[step], bytes);
        load_weight(weight_map, &s.full[step], stages + step * kStageBytes, rank, step, weight_row, read_once());
      }
      wait_for_previous();
      waited = true;
    }
    for (int step = 0; step < steps; ++step) {
      wait(&s.empty[ring.stage], ring.parity ^ 1);
      uint8_t* const stage = stages + ring.stage * kStageBytes;
      uint64_t* const full = &s.full[ring.stage];
      if (lane == 0) {
        if (step >= ahead) {
          expect_bytes(full, bytes);
          load_weight(weight_map, full, stage, rank, step, weight_row, read_once());
        }
        for (int box = 0; box < boxes; ++box) {
          load_tile(&x_map, full, stage + kWeightBytes + box * kBox * kRowBytes, step * kDepth, at.row + box * kBox);
        }
      }
      __syncwarp();
      arrive_with_copies(full);
      ring.next();
    }
  }
  if (!waited) wait_for_previous();  // what comes next relies on all before
}

#endif

}  // namespace custom_ops::grouped
