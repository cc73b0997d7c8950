// What the finishing warpgroup of a grouped product of FP8 does while the others are at the next tile: of gate_up, the
// activation and its codes; of down, rows to the places of their pairs. It also takes the tasks.
#pragma once

#include "moe_fp8_tasks.cuh"

namespace custom_ops::moe_fp8 {

#ifdef CUSTOM_OPS_HOPPER

__device__ __forceinline__ float fast_inverse(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
}

// silu of a bfloat16, exact once it is rounded to bfloat16: none of all gates comes out other than by exact steps. A
// quarter of 1 + exp(-gate) is inverted, so that no inverse is subnormal, which the fast one would make zero; the factor
// is log2(e), one bit less.
__device__ __forceinline__ float silu(float gate) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(gate * __uint_as_float(0xBFB8AA3Au)));
  return gate * 0.25f * fast_inverse(fmaf(power, 0.25f, 0.25f));
}

// round(round(silu(gate)) * up), of two bfloat16 in a word.
__device__ __forceinline__ uint32_t silu_mul(uint32_t gates, uint32_t ups) {
  const float2 gate = unpack(gates);
  uint32_t both, product;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(silu(gate.y)), "f"(silu(gate.x)));
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(both), "r"(ups));
  return product;
}

// value / scale, correctly rounded, by the correctly rounded inverse.
__device__ __forceinline__ float divided(float value, float scale, float inverse) {
  const float guess = value * inverse;
  return fmaf(fmaf(guess, scale, -value), -inverse, guess);
}

__device__ __forceinline__ uint32_t two_codes(uint32_t values, float scale, float inverse) {
  const float2 v = unpack(values);
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
      : "=h"(codes)
      : "f"(divided(v.y, scale, inverse)), "f"(divided(v.x, scale, inverse)));
  return codes;
}

// 16 bytes of a sum, of the eight columns from 8 * chunk on, as `store_sum` has put them.
__device__ __forceinline__ uint4 columns_of(uint32_t sum, int row, int chunk) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(sum + row * kSumRowBytes + (chunk ^ row % 8) * 16)
               : "memory");
  return v;
}

// Of half a block: codes and scales of its rows. Eight threads share a row, of which each has columns 8 * c and
// 64 + 8 * c; its 128 columns are one group.
__device__ __forceinline__ void finish_gates(const Fp8GroupedArgs& p, uint32_t sums, int start, int column) {
  constexpr float kMost = 448.0f;
  const int lane = this_lane(), chunk = lane % 8, first = this_thread() / 32 * 16 + lane / 8;
  uint8_t* to = static_cast<uint8_t*>(p.out) + int64_t{start + first} * p.width + column * kBlock + chunk * 8;
  float* to_scale = p.out_scale + int64_t{start + first} * (p.width / kBlock) + column;
#pragma unroll 1
  for (int row = first; row < first + 16; row += 4) {
    uint32_t values[8];
    uint32_t most = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 gate = columns_of(sums, row, 8 * half + chunk);
      const uint4 up = columns_of(sums + kSumBytes, row, 8 * half + chunk);
      const uint32_t gates[4] = {gate.x, gate.y, gate.z, gate.w}, ups[4] = {up.x, up.y, up.z, up.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t v = silu_mul(gates[i], ups[i]);
        values[4 * half + i] = v;
        most = __vmaxu2(most, v & 0x7fff7fffu);  // magnitudes are ordered as their bits, and NaN is the largest
      }
    }
    int largest = static_cast<int>(max(most << 16, most & 0xffff0000u));
#pragma unroll
    for (int o = 4; o > 0; o /= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, o));
    const float amax = __int_as_float(max(largest, __float_as_int(p.min_amax)));
    // amax / 448 and its inverse, correctly rounded: min_amax makes neither subnormal
    const float guess = amax * (1.0f / kMost);
    float scale = fmaf(fmaf(guess, -kMost, amax), 1.0f / kMost, guess);
    const float near = fast_inverse(scale);
    float inverse = fmaf(fmaf(-scale, near, 1.0f), near, near);
    const bool endless = largest == 0x7f800000;
    if (chunk == 0) *to_scale = endless ? amax : scale;
    // times 0, a number is 0, and others are none, as if divided by a scale without end
    if (endless) scale = inverse = 0.0f;
    uint32_t codes[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      codes[i] = two_codes(values[2 * i], scale, inverse) | two_codes(values[2 * i + 1], scale, inverse) << 16;
    }
    *reinterpret_cast<uint2*>(to) = make_uint2(codes[0], codes[1]);
    *reinterpret_cast<uint2*>(to + 64) = make_uint2(codes[2], codes[3]);
    to += int64_t{4} * p.width;
    to_scale += 4 * (p.width / kBlock);
  }
}

// Of half a block: its rows, 256 columns each, to the places of their pairs. 16 threads share a row.
__device__ __forceinline__ void finish_pairs(const Fp8GroupedArgs& p, uint32_t sums, int start, int column) {
  constexpr int kAtOnce = 2;
  const int lane = this_lane(), chunk = lane % 16, warp_row = this_thread() / 32 * 16;
  const int own_pair = p.sorted_ids[start + warp_row + chunk];
  const int first = column * p.columns + chunk * 8;
#pragma unroll 1
  for (int i = 0; i < 16; i += 2 * kAtOnce) {
    uint4 values[kAtOnce][2];
    int pair[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int row = i + 2 * k + lane / 16;
      pair[k] = __shfl_sync(~0u, own_pair, row);
      values[k][0] = columns_of(sums, warp_row + row, chunk);
      values[k][1] = columns_of(sums + kSumBytes, warp_row + row, chunk);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (pair[k] >= p.pairs) continue;
      uint16_t* const to = static_cast<uint16_t*>(p.out) + int64_t{pair[k]} * p.width + first;
      if (first < p.width) *reinterpret_cast<uint4*>(to) = values[k][0];
      if (first + kBlock < p.width) *reinterpret_cast<uint4*>(to + kBlock) = values[k][1];
    }
  }
}

template <bool GateUp>
__device__ __forceinline__ void finish_all(const Fp8GroupedArgs& p, uint32_t sums, Shared& s) {
  bool over = threadIdx.x % 128 != 0;  // one thread takes tasks
  int known = 0;
  const auto tell_next = [&] {
    if (over) return;
    const int4 task = look_up(p, known == 0 ? static_cast<int>(blockIdx.x) : take(p));
    if (!GateUp && task.x >= 0) await_rows(p, task.x);
    tell(s, known++, task);
    over = task.x < 0;
  };
  tell_next();
  if (!GateUp) tell_next();
  for (int count = 0;; ++count) {
    __syncwarp();
    const Task task = told(s, count);
    if (task.block < 0) break;
    tell_next();
    __syncwarp();
    const auto finish = [&](int half) {
      const uint32_t here = sums + half * 2 * kSumBytes;
      const int start = task.block * kBlock + half * kRows;
      if constexpr (GateUp) {
        finish_gates(p, here, start, task.column);
      } else {
        finish_pairs(p, here, start, task.column);
      }
    };
    const auto free = [&](int group) {
      __syncwarp();
      if (this_lane() == 0) arrive(&s.free[group]);
    };
    wait(&s.done[0], count & 1);
    if (!task.whole) wait(&s.done[1], count & 1);
    finish(0);
    free(0);
    if (task.whole) {
      wait(&s.done[1], count & 1);
      finish(1);
    }
    free(1);
    if (GateUp) publish_rows(p, task.block);
  }
}

#endif

}  // namespace custom_ops::moe_fp8
