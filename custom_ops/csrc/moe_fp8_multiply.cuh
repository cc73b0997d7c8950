// What the two multiplying warpgroups of a grouped product of FP8 do: products of 128 channels, scaled and added up.
#pragma once

#include "moe_fp8_tasks.cuh"

namespace custom_ops::moe_fp8 {

#ifdef CUSTOM_OPS_HOPPER

// d [64, 128] = 128 channels of the rows and of the columns, begun.
__device__ __forceinline__ void begin_tile(float (&d)[64], uint32_t rows, uint32_t columns) {
  const uint32_t a = low_of_tile(rows), b = low_of_tile(columns);
  begin_product();
  multiply_fp8<false>(d, tile_of_low(a), tile_of_low(b));
  multiply_fp8<true>(d, tile_of_low(a + 2), tile_of_low(b + 2));
  multiply_fp8<true>(d, tile_of_low(a + 4), tile_of_low(b + 4));
  multiply_fp8<true>(d, tile_of_low(a + 6), tile_of_low(b + 6));
  commit_product();
}

// scale0 and scale8: of this thread's rows, which are 8 apart.
__device__ __forceinline__ void add_scaled(float (&sum)[64], const float (&product)[64], float scale0, float scale8) {
#pragma unroll
  for (int i = 0; i < 64; i += 4) {
    sum[i] = fmaf(product[i], scale0, sum[i]);
    sum[i + 1] = fmaf(product[i + 1], scale0, sum[i + 1]);
    sum[i + 2] = fmaf(product[i + 2], scale8, sum[i + 2]);
    sum[i + 3] = fmaf(product[i + 3], scale8, sum[i + 3]);
  }
}

// In bfloat16, a row after the other, whose 16 bytes stand in an order of their own: see `place_of`.
__device__ __forceinline__ void store_sum(const float (&d)[64], uint32_t to) {
  const int lane = this_lane(), row = this_thread() / 32 * 16 + lane % 16;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     to + row * kSumRowBytes + ((2 * j + lane / 16) ^ lane % 8) * 16),
                 "r"(pack(d[8 * j], d[8 * j + 1])), "r"(pack(d[8 * j + 2], d[8 * j + 3])),
                 "r"(pack(d[8 * j + 4], d[8 * j + 5])), "r"(pack(d[8 * j + 6], d[8 * j + 7]))
                 : "memory");
  }
}

// The group-th warpgroup. While one adds up, the other multiplies; turns at the matrix units make no difference.
template <bool GateUp, int group>
__device__ __forceinline__ void multiply_all(const Fp8GroupedArgs& p, uint8_t* stages, uint32_t sums, Shared& s) {
  const auto own_row = [] { return this_thread() / 32 * 16 + this_lane() / 4; };
  const auto full = [&](Ring ring) {
    wait(&s.full[ring.stage], ring.parity);
    if (GateUp) fence_shared();  // rows that threads copied, for the matrix units
    // the same for all threads, which the compiler then need not find out again for every instruction
    return __shfl_sync(~0u, shared_address(stages) + ring.stage * kStageBytes, 0);
  };
  const auto release = [&](int stage) {
    if (this_lane() == 0) arrive(&s.empty[stage]);
  };
  Ring ring;
  for (int count = 0;; ++count) {
    const Task task = told(s, count);
    if (task.block < 0) break;
    if (task.whole) {
      float sum0[64], sum1[64];
#pragma unroll
      for (int i = 0; i < 64; ++i) sum0[i] = sum1[i] = 0.0f;
      uint32_t tile = full(ring);
#pragma unroll 1
      for (int step = p.steps; step > 0; --step) {
        float product[64];
        begin_tile(product, tile + group * kRowsBytes, tile + 2 * kRowsBytes);
        const float* const row_scale = &s.row_scales[ring.stage][group * kRows + own_row()];
        const float of_row0 = row_scale[0], of_row8 = row_scale[8];
        const float of_column0 = s.column_scales[ring.stage][0], of_column1 = s.column_scales[ring.stage][1];
        wait_for_product<0>();
        hold(product);
        add_scaled(sum0, product, __fmul_rn(of_row0, of_column0), __fmul_rn(of_row8, of_column0));
        begin_tile(product, tile + group * kRowsBytes, tile + 2 * kRowsBytes + kColumnsBytes);
        const float scale0 = __fmul_rn(of_row0, of_column1), scale8 = __fmul_rn(of_row8, of_column1);
        const int stage = ring.stage;
        ring.next();
        if (step > 1) tile = full(ring);  // while the product is under way
        wait_for_product<0>();
        hold(product);
        release(stage);
        add_scaled(sum1, product, scale0, scale8);
      }
      wait(&s.free[group], (count & 1) ^ 1);
      store_sum(sum0, sums + group * 2 * kSumBytes);
      store_sum(sum1, sums + (group * 2 + 1) * kSumBytes);
    } else {
      float sum[64];
#pragma unroll
      for (int i = 0; i < 64; ++i) sum[i] = 0.0f;
      uint32_t tile = full(ring);
#pragma unroll 1
      for (int step = p.steps; step > 0; --step) {
        float product[64];
        begin_tile(product, tile, tile + 2 * kRowsBytes + group * kColumnsBytes);
        const float* const row_scale = &s.row_scales[ring.stage][own_row()];
        const float of_row0 = row_scale[0], of_row8 = row_scale[8];
        const float of_column = s.column_scales[ring.stage][group];
        const int stage = ring.stage;
        ring.next();
        if (step > 1) tile = full(ring);
        wait_for_product<0>();
        hold(product);
        release(stage);
        add_scaled(sum, product, __fmul_rn(of_row0, of_column), __fmul_rn(of_row8, of_column));
      }
      wait(&s.free[group], (count & 1) ^ 1);
      store_sum(sum, sums + group * kSumBytes);
    }
    __syncwarp();
    if (this_lane() == 0) arrive(&s.done[group]);
  }
}

#endif

}  // namespace custom_ops::moe_fp8
