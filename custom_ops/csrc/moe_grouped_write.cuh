// How the sums of a grouped product, tokens in their columns, become rows of tokens.
#pragma once

#include <cuda_bf16.h>

#include "moe_grouped_tiles.cuh"

namespace custom_ops::grouped {

#ifdef CUSTOM_OPS_HOPPER

// Two numbers in bfloat16, the first one low. A conversion of one alone takes four times as long as that of two.
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ float2 unpack(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

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

__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
  uint32_t both;
  asm("max.u16x2 %0, %1, %2;" : "=r"(both) : "r"(a), "r"(b));
  return both;
}

// v / scale, from a reciprocal of it, correctly rounded for a scale that is not subnormal.
__device__ __forceinline__ float divide(float v, float scale, float reciprocal) {
  const float guess = v * reciprocal;
  return fmaf(fmaf(guess, scale, -v), -reciprocal, guess);
}

// The codes of [128, N] activations, 64 of each of the two warpgroups, columns in pairs, and the scale of each token.
template <int N>
__device__ __forceinline__ void write_codes(const GroupedArgs& p, Shared& s, const uint32_t (&v)[N / 4],
                                            const Place& at) {
  const int thread = static_cast<int>(this_thread());
  const int group = thread / 128;
  const int warp = thread / 32 % kWarps;
  const int lane = thread % 32;
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {  // magnitudes are ordered as their bits are, NaN above all
    uint32_t largest = larger(v[2 * j] & 0x7fff7fffu, v[2 * j + 1] & 0x7fff7fffu);
#pragma unroll
    for (int o = 4; o < 32; o *= 2) largest = larger(largest, __shfl_xor_sync(0xffffffffu, largest, o));
    if (lane < 4) s.amax[group * kWarps + warp][4 * j + lane] = largest;
  }
  sync_threads(1, 128 * kConsumers);
  const int token = thread;
  if (token < N) {
    uint32_t largest = 0;
#pragma unroll
    for (int w = 0; w < kConsumers * kWarps; ++w) largest = larger(largest, s.amax[w][token / 2]);
    const uint32_t bits = token % 2 == 0 ? largest << 16 : largest & 0xffff0000u;
    const uint32_t least = __float_as_uint(p.min_amax);
    const float scale = __fdiv_rn(__uint_as_float(bits > least ? bits : least), 448.0f);
    if (token < at.rows) p.out_scale[at.column * p.padded_rows + at.row + token] = scale;
    // by an infinite one all become 0, but Inf, which becomes NaN
    const bool infinite = scale > 0x1p127f;
    s.scale_and_reciprocal[token] = {infinite ? 0.0f : scale, infinite ? 0.0f : __fdiv_rn(1.0f, scale)};
  }
  sync_threads(1, 128 * kConsumers);
  uint8_t* const out = static_cast<uint8_t*>(p.out) + int64_t{at.row} * p.width + at.column * 128;
#pragma unroll
  for (int begin = 0; begin < N; begin += kCodes) {
    if (begin > 0) sync_threads(1, 128 * kConsumers);
#pragma unroll
    for (int j = begin / 8; j < N / 8 && j < (begin + kCodes) / 8; ++j) {
      const int pair = 8 * j + lane % 4 * 2;
      const float4 of = *reinterpret_cast<const float4*>(&s.scale_and_reciprocal[pair]);
      // As `swizzled`, by pairs of tokens: those of a warp are in different banks.
      uint8_t* const to = s.out + (pair - begin) * kRowBytes + ((group * 4 + warp) ^ lane % 4) * 16 + lane / 4;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float2 of_row = unpack(v[2 * j + r]);
        const float first = divide(of_row.x, of.x, of.y);
        const float second = divide(of_row.y, of.z, of.w);
        uint16_t codes;
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(second), "f"(first));
        to[8 * r] = static_cast<uint8_t>(codes);
        to[8 * r + kRowBytes] = static_cast<uint8_t>(codes >> 8);
      }
    }
    sync_threads(1, 128 * kConsumers);
    const int rows = at.rows - begin < kCodes ? at.rows - begin : kCodes;
    for (int i = thread; i < rows * 8; i += 128 * kConsumers) {
      *reinterpret_cast<uint4*>(out + int64_t{begin + i / 8} * p.width + i % 8 * 16) =
          *reinterpret_cast<const uint4*>(s.out + i / 8 * kRowBytes + (i % 8 ^ i / 16 % 4) * 16);
    }
  }
}

#endif

}  // namespace custom_ops::grouped
