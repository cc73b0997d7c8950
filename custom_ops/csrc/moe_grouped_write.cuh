// How the sums of a grouped product, tokens in their columns, become rows of tokens.
#pragma once

#include <cuda_bf16.h>

#include "moe_grouped_tiles.cuh"

namespace custom_ops::grouped {

#ifdef CUSTOM_OPS_HOPPER

// g / (1 + exp(-g)), a few units of float32 off: what comes of it is rounded to bfloat16.
__device__ __forceinline__ float silu(float g) {
  float power, reciprocal;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(g * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(1.0f + power));
  return g * reciprocal;
}

// round(round(silu(g)) * u) of rounded g and u, as eager has them, of two columns.
__device__ __forceinline__ uint32_t silu_mul(float g0, float g1, float u0, float u1) {
  const float2 g = unpack(pack(g0, g1));
  const uint32_t gate = pack(silu(g.x), silu(g.y));
  const uint32_t up = pack(u0, u1);
  const __nv_bfloat162 product =
      __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&gate), *reinterpret_cast<const __nv_bfloat162*>(&up));
  return *reinterpret_cast<const uint32_t*>(&product);
}

// The place of a chunk of 16 bytes of a token's row on its way out: a warp writes and reads without conflicts.
__device__ __forceinline__ int swizzled(int token, int chunk) { return token * kRowBytes + (chunk ^ token % 8) * 16; }

// [64, N] of a warpgroup, columns in pairs, to rows: row_of(token) is where the 64 values of a token go, or nullptr.
// parts: two of kPartBytes, of which `part` is written next; the warpgroup has read what was there.
template <int N, typename RowOf>
__device__ __forceinline__ void write_rows(const uint32_t (&v)[N / 4], uint8_t* parts, int& part, int group, int rows,
                                           RowOf row_of) {
  const int thread = static_cast<int>(this_thread()) % 128;
  const int lane = thread % 32;
  const int to = swizzled(lane / 16 * 8 + lane % 8, thread / 32 * 2 + lane / 8 % 2);
  const int from = swizzled(thread / 8, thread % 8);
#pragma unroll
  for (int first = 0; first < N; first += kPart) {
    uint8_t* const tile = parts + part * kPartBytes;
    part ^= 1;
    const int i = first / 4;
    if (first + 8 < N) {
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                       shared_address(tile + to)),
                   "r"(v[i]), "r"(v[i + 1]), "r"(v[i + 2]), "r"(v[i + 3])
                   : "memory");
    } else {
      asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(tile + to)),
                   "r"(v[i]), "r"(v[i + 1])
                   : "memory");
    }
    // with two parts one wait is enough: before a part is written again, all have passed the next wait
    sync_threads(2 + group, 128);
    const int token = first + thread / 8;
    uint8_t* const row = token < rows ? row_of(token) : nullptr;
    if (row != nullptr) {
      *reinterpret_cast<uint4*>(row + thread % 8 * 16) = *reinterpret_cast<const uint4*>(tile + from);
    }
  }
}

#endif

}  // namespace custom_ops::grouped
