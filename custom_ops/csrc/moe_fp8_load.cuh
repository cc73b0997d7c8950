// What the loading warpgroup of a grouped product of FP8 does: weight, rows and the scales of both into the stages.
#pragma once

#include "moe_fp8_tasks.cuh"

namespace custom_ops::moe_fp8 {

#ifdef CUSTOM_OPS_HOPPER

constexpr uint32_t kNowhere = ~0u;  // the place of a row of padding: it is not read, and nobody reads what comes of it
constexpr int kRowsAtOnce = 128 * 16 / kRowBytes;
constexpr int kRowsOfThread = kBlock / kRowsAtOnce;

__device__ __forceinline__ void copy_4(const float* to, const float* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

// Rows of tokens are gathered, which TMA could only do one by one; those of the second product are tiles. The next
// task is asked for while the last step of a tile is loaded, so that its index is there in time.
template <bool GateUp>
__device__ __forceinline__ void load(const CUtensorMap& weight_map, const CUtensorMap& x_map, const Fp8GroupedArgs& p,
                                     uint8_t* stages, Shared& s) {
  const int thread = threadIdx.x % 128, chunk = thread % 8, first_row = thread / 8;
  const uint32_t to = shared_address(stages) + first_row * kRowBytes + (chunk ^ first_row % kAtomRows) * 16;
  const uint8_t* const x = static_cast<const uint8_t*>(p.x);
  Ring ring;
  Task task = told(s, 0);
  int pair = GateUp && task.block >= 0 ? p.sorted_ids[task.block * kBlock + thread] : 0;
  for (int count = 0; task.block >= 0; ++count) {
    const int start = task.block * kBlock;
    const bool whole = task.whole;
    uint32_t from[kRowsOfThread];
    uint32_t row_scale;
    if (GateUp) {
      const bool here = pair < p.pairs;
      const uint32_t token = static_cast<uint32_t>(pair / p.top_k);
      row_scale = here ? token * static_cast<uint32_t>(p.x_scale_row) : kNowhere;
      uint32_t* const offsets = s.offsets[count % kSlots];
      offsets[thread] = here ? token * static_cast<uint32_t>(p.x_pitch) : kNowhere;
      sync_threads(3, 128);
#pragma unroll
      for (int i = 0; i < kRowsOfThread; ++i) {
        const uint32_t offset = offsets[first_row + i * kRowsAtOnce];
        from[i] = offset == kNowhere ? kNowhere : offset + chunk * 16;
      }
    } else {
      row_scale = static_cast<uint32_t>(start + thread) * static_cast<uint32_t>(p.x_scale_row);
    }
    // past the last group there is no column that anyone stores
    const int group = min((task.column * p.columns + thread % 2 * p.second) / kBlock, (p.weight_rows - 1) / kBlock);
    uint32_t column_scale = static_cast<uint32_t>(task.expert * p.weight_scale_expert + group * p.weight_scale_row);
    const int weight_row = task.expert * p.weight_rows + task.column * p.columns;
    for (int step = 0; step < p.steps; ++step) {
      if (step == p.steps - 1) {
        task = told(s, count + 1);
        if (GateUp && task.block >= 0) pair = p.sorted_ids[task.block * kBlock + thread];
      }
      wait(&s.empty[ring.stage], ring.parity ^ 1);
      uint64_t* const full = &s.full[ring.stage];
      uint8_t* const stage = stages + ring.stage * kStageBytes;
      if (thread == 0) {
        // a map counts in 16 bits
        const int col = step * kDepth;
        expect_bytes(full, 2 * kColumnsBytes + (GateUp ? 0 : (whole ? 2 : 1) * kRowsBytes));
        load_tile(&weight_map, full, stage + 2 * kRowsBytes, col, weight_row);
        load_tile(&weight_map, full, stage + 2 * kRowsBytes + kColumnsBytes, col, weight_row + p.second);
        if (!GateUp) {
          load_tile(&x_map, full, stage, col, start);
          if (whole) load_tile(&x_map, full, stage + kRowsBytes, col, start + kRows);
        }
      }
      if (GateUp) {
#pragma unroll
        for (int i = 0; i < kRowsOfThread; ++i) {
          if (from[i] != kNowhere) {
            copy_16(to + ring.stage * kStageBytes + i * kRowsAtOnce * kRowBytes, x + from[i]);
            from[i] += kRowBytes;
          }
        }
      }
      if (row_scale != kNowhere) {
        copy_4(&s.row_scales[ring.stage][thread], p.x_scale + row_scale);
        row_scale += static_cast<uint32_t>(p.x_scale_block);
      }
      if (thread < 2) copy_4(&s.column_scales[ring.stage][thread], p.weight_scale + column_scale);
      column_scale += static_cast<uint32_t>(p.weight_scale_block);
      arrive_with_copies(full);
      ring.next();
    }
  }
}

#endif

}  // namespace custom_ops::moe_fp8
