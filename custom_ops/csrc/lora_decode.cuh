// How the decode kernel finishes a tile: y as it is taken, y times the rows of B, and what is written in the end.
//
// The blocks of a cluster share the tile in small pieces, so that any number of them is busy to the end. One 16-bit
// adapter that the kernel shrinks itself: y has 16 bits by definition (each step is rounded), so that the matrix units
// take it, a warp 16 tokens by 16 columns. Any other: a thread four columns of a token, since every token may have
// another B.
#pragma once

#include "hopper.cuh"
#include "lora.h"

namespace custom_ops {
namespace lora_decode_parts {

using namespace hopper;

constexpr int kMaxCluster = 4;  // blocks that share the channels

// Floats from one token's sums to the next: no bank conflicts when they are written.
template <int Columns>
constexpr int kSumPitch = Columns + 4;

__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(v);
  } else {
    return __float2half_rn(v);
  }
}

template <typename T>
__device__ __forceinline__ float rounded(float v) {
  return to_float(from_float<T>(v));
}

#ifdef CUSTOM_OPS_HOPPER

__device__ __forceinline__ float4 sum_of(float4 a, float4 b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// Eight neighbours of a row of B.
template <typename T>
__device__ __forceinline__ void load_eight(const T* from, float (&to)[8]) {
  if constexpr (std::is_same_v<T, float>) {
    const float4 low = __ldg(reinterpret_cast<const float4*>(from));
    const float4 high = __ldg(reinterpret_cast<const float4*>(from) + 1);
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
  } else {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from));
    T values[8];
    memcpy(values, &raw, sizeof(raw));
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = to_float(values[i]);
  }
}

// The low-rank product of a token for four neighbouring columns.
template <typename B>
__device__ __forceinline__ float4 low_rank(const B* b, const float* y, int rank, int pitch) {
  float sums[4] = {};
#pragma unroll 2
  for (int first = 0; first < rank; first += 8) {
    float factor[8];
    *reinterpret_cast<float4*>(factor) = *reinterpret_cast<const float4*>(y + first);
    *reinterpret_cast<float4*>(factor + 4) = *reinterpret_cast<const float4*>(y + first + 4);
#pragma unroll
    for (int column = 0; column < 4; ++column) {
      float row[8];
      load_eight(b + column * pitch + first, row);
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[column] = fmaf(factor[i], row[i], sums[column]);
    }
  }
  return {sums[0], sums[1], sums[2], sums[3]};
}

// Two neighbours of a row of B, asked for here and not where they are used.
__device__ __forceinline__ uint32_t load_now(const void* from) {
  uint32_t word;
  asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(word) : "l"(from));
  return word;
}

template <typename T>
__device__ __forceinline__ uint32_t packed(float low, float high) {
  const T both[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t word;
  memcpy(&word, both, sizeof(word));
  return word;
}

// d [16, 8] of a warp += a [16, 16] @ b [8, 16].T
template <typename T>
__device__ __forceinline__ void multiply_warp(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define CUSTOM_OPS_MMA(TYPE)                                                                       \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                              \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"              \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    CUSTOM_OPS_MMA("bf16");
  } else {
    CUSTOM_OPS_MMA("f16");
  }
#undef CUSTOM_OPS_MMA
}

// Which adapter the tokens of a block have: read while the base product runs, so that nobody waits for them after it.
template <int Tokens>
struct Adapters {
  int slot[Tokens];  // -1: none
  int rank[Tokens];  // 0 without one
  float scaling[Tokens];
};

// A tile, of which a cluster's blocks each multiply a part of the channels and finish a part of the pieces.
template <typename T, int Columns, int Tokens, int Rank>
struct Decode {
  const LoraDecode& p;
  int first_column;
  int first_token;
  int block;
  int blocks;
  int slice;

  // Columns that there are of the tile's.
  __device__ int width() const { return min(Columns, p.linear.columns - first_column); }

  __device__ int tokens() const { return min(Tokens, p.linear.tokens - first_token); }

  __device__ int slot(int token) const { return p.token_slots == nullptr ? 0 : p.token_slots[first_token + token]; }

  // The row of B of the tile's first column.
  __device__ const char* adapter(int slot) const {
    const int bytes = p.b_float32 ? 4 : 2;
    const int64_t row = first_column - p.slice[slice].first_column;
    return static_cast<const char*>(p.slice[slice].b) +
           (slot * p.slice[slice].slot_stride + row * p.linear.rank) * bytes;
  }

  // Brings the rows of B that the cluster will read nearer: they are spread over memory, an adapter a token.
  __device__ void prefetch(int thread, int threads) const {
    const int lines = (width() * p.linear.rank * (p.b_float32 ? 4 : 2) + 127) / 128;
    const int count = p.token_slots == nullptr ? 1 : tokens();
#pragma unroll 1
    for (int i = block * threads + thread; i < count * lines; i += blocks * threads) {
      const int at = slot(i / lines);
      if (at >= 0) prefetch_to_l2(adapter(at) + i % lines * 128);
    }
  }

  __device__ void load_adapters(Adapters<Tokens>& adapters, int thread, int threads) const {
    for (int token = thread; token < Tokens; token += threads) {
      const int at = token < tokens() ? slot(token) : -1;
      const bool batched = p.token_slots != nullptr;
      adapters.slot[token] = at;
      adapters.rank[token] = at < 0 ? 0 : batched ? min(p.ranks[at], p.linear.rank) : p.linear.rank;
      adapters.scaling[token] = at < 0 ? 0.0f : batched ? p.scalings[at] : p.scaling;
    }
  }

  __device__ float4 as_factor(float4 sum) const {
    if (!p.linear.round_each) return sum;
    return {rounded<T>(sum.x), rounded<T>(sum.y), rounded<T>(sum.z), rounded<T>(sum.w)};
  }

  // y, the sum of its parts, as the expand takes it.
  __device__ void load_y(float* y, int thread, int threads) const {
    const int rank = p.linear.rank;
    const int vectors = rank / 4;
    const int64_t part = static_cast<int64_t>(p.slices) * p.linear.tokens * rank;
    const float* const from = p.y + (static_cast<int64_t>(slice) * p.linear.tokens + first_token) * rank;
#pragma unroll 1
    for (int i = thread; i < tokens() * vectors; i += threads) {
      float4 sum = *reinterpret_cast<const float4*>(from + 4 * i);
#pragma unroll 4
      for (int split = 1; split < p.y_splits; ++split) {
        sum = sum_of(sum, *reinterpret_cast<const float4*>(from + split * part + 4 * i));
      }
      *reinterpret_cast<float4*>(y + i / vectors * (rank + 4) + i % vectors * 4) = as_factor(sum);
    }
  }

  // The sum of the blocks' parts, in their order.
  __device__ float4 gather(const float* part) const {
    float4 parts[kMaxCluster];
#pragma unroll
    for (int from = 0; from < kMaxCluster; ++from) {
      if (from < blocks) parts[from] = load_from_block(part, from);
    }
    float4 sum = parts[0];
#pragma unroll
    for (int from = 1; from < kMaxCluster; ++from) {
      if (from < blocks) sum = sum_of(sum, parts[from]);
    }
    return sum;
  }

  // The base's sums of a token for four neighbouring columns.
  __device__ float4 gather_base(const float* sums, int token, int column) const {
    return gather(sums + token * kSumPitch<Columns> + column);
  }

  // Four columns of a token: the sums, the bias, the low-rank product.
  __device__ __forceinline__ void write(int token, int within, float4 sum, float4 low_rank, float scaling,
                                        bool adapted) const {
    const int column = first_column + within;
    if (first_token + token >= p.linear.tokens || column >= p.linear.columns) return;
    float base[4] = {sum.x, sum.y, sum.z, sum.w};
    float product[4] = {low_rank.x, low_rank.y, low_rank.z, low_rank.w};
    T out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (p.linear.bias != nullptr) base[i] += to_float(static_cast<const T*>(p.linear.bias)[column + i]);
      base[i] = rounded<T>(base[i]);
      if (p.linear.round_each) product[i] = rounded<T>(product[i]);
      product[i] = __fmul_rn(product[i], scaling);
      if (p.linear.round_each) product[i] = rounded<T>(product[i]);
      out[i] = from_float<T>(adapted ? __fadd_rn(base[i], product[i]) : base[i]);
    }
    T* const to = static_cast<T*>(p.linear.out) + static_cast<int64_t>(first_token + token) * p.linear.columns + column;
    *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(out);
  }

  // A token that may have another adapter than its neighbours. There may be fewer tokens, and columns, than in a tile.
  __device__ __forceinline__ void finish(int token, int column, float4 sum, const float* y,
                                         const Adapters<Tokens>& adapters) const {
    if (token >= tokens() || column >= width()) return;
    const int at = adapters.slot[token];
    float4 product{};
    if (at >= 0) {
      const float* const factor = y + token * (p.linear.rank + 4);
      const char* const b = adapter(at) + column * p.linear.rank * (p.b_float32 ? 4 : 2);
      const int rank = adapters.rank[token];
      product = p.b_float32 ? low_rank(reinterpret_cast<const float*>(b), factor, rank, p.linear.rank)
                            : low_rank(reinterpret_cast<const T*>(b), factor, rank, p.linear.rank);
    }
    write(token, column, sum, product, adapters.scaling[token], at >= 0);
  }

  // All of this block's: a thread has four columns of a token at a time, and the next sums are under way meanwhile.
  __device__ void finish_all(const float* sums, const float* y, const Adapters<Tokens>& adapters, int thread,
                             int threads) const {
    constexpr int kGroups = Columns / 4;
    int at = block * threads + thread;
    float4 sum{};
    if (at < Tokens * kGroups) sum = gather_base(sums, at / kGroups, at % kGroups * 4);
#pragma unroll 1
    while (at < Tokens * kGroups) {
      const int next = at + blocks * threads;
      float4 after{};
      if (next < Tokens * kGroups) after = gather_base(sums, next / kGroups, next % kGroups * 4);
      finish(at / kGroups, at % kGroups * 4, sum, y, adapters);
      at = next;
      sum = after;
    }
  }
};

// A warp's 16 tokens by 16 columns with the product by the matrix units. A lane has two tokens, 8 apart, and four
// neighbouring columns: so column n of instruction j stands for column n / 2 * 4 + 2 * j + n % 2.
template <typename T, int Columns, int Tokens, int Rank>
struct WarpTile {
  static constexpr int kSteps = Rank > 0 ? Rank / 16 : 1;
  static constexpr int kCount = Tokens / 16 * (Columns / 16);

  const Decode<T, Columns, Tokens, Rank>& here;
  const int lane = static_cast<int>(threadIdx.x % 32);
  uint32_t b[kSteps][2][2];

  __device__ int first_column(int tile) const { return tile % (Columns / 16) * 16; }
  __device__ int token(int tile) const { return tile / (Columns / 16) * 16 + lane / 4; }
  __device__ int column(int tile) const { return first_column(tile) + lane % 4 * 4; }

  __device__ __forceinline__ void load_b(int tile) {
    const int rank = here.p.linear.rank;
    const int n = lane / 4;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int at = first_column(tile) + n / 2 * 4 + 2 * j + n % 2;
      const T* const row = reinterpret_cast<const T*>(here.adapter(0)) + at * rank + lane % 4 * 2;
#pragma unroll
      for (int half = 0; half < 2 * kSteps; ++half) {
        b[half / 2][j][half % 2] =
            at < here.width() && half * 8 < rank ? load_now(row + half * 8) : 0u;
      }
    }
  }

  __device__ __forceinline__ void finish(int tile, const float* y, float4 first, float4 second) const {
    const float* const factor = y + token(tile) * (Rank + 4) + lane % 4 * 2;
    float d[2][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = *reinterpret_cast<const float2*>(factor + i % 2 * 8 * (Rank + 4) + step * 16 + i / 2 * 8);
        a[i] = packed<T>(pair.x, pair.y);
      }
      multiply_warp<T>(d[0], a, b[step][0]);
      multiply_warp<T>(d[1], a, b[step][1]);
    }
    here.write(token(tile), column(tile), first, {d[0][0], d[0][1], d[1][0], d[1][1]}, here.p.scaling, true);
    here.write(token(tile) + 8, column(tile), second, {d[0][2], d[0][3], d[1][2], d[1][3]}, here.p.scaling, true);
  }
};

// The parts that the blocks of a cluster have of four numbers: all asked for before the first is used.
template <int Blocks>
struct Parts {
  float4 part[Blocks];

  __device__ __forceinline__ void load(const float* at) {
#pragma unroll
    for (int block = 0; block < Blocks; ++block) part[block] = load_from_block(at, block);
  }

  // In the order of the blocks.
  __device__ __forceinline__ float4 sum() const {
    float4 total = part[0];
#pragma unroll
    for (int block = 1; block < Blocks; ++block) total = sum_of(total, part[block]);
    return total;
  }
};

// What is left when every block has its sums: y from its parts, for all, and this warp's tiles, from the one at `at`
// on, whose B has been loaded. For all threads of a block, of which the first `Finishers` have tiles.
template <int Blocks, int Finishers, typename T, int Columns, int Tokens, int Rank>
__device__ __forceinline__ void finish_tiles(WarpTile<T, Columns, Tokens, Rank>& tile, const float* sums,
                                             const float* y_parts, float* y, int at) {
  constexpr int kVectors = Rank / 4;
  const int thread = static_cast<int>(threadIdx.x);
  const bool finishes = thread < Finishers;
  const bool first = finishes && at < tile.kCount;
  Parts<Blocks> of_y, low, high;
  const auto load = [&] {
    low.load(sums + tile.token(at) * kSumPitch<Columns> + tile.column(at));
    high.load(sums + (tile.token(at) + 8) * kSumPitch<Columns> + tile.column(at));
  };
  const auto y_at = [](int i) { return i / kVectors * (Rank + 4) + i % kVectors * 4; };
  int i = finishes ? thread : Tokens * kVectors;
  if (i < Tokens * kVectors) of_y.load(y_parts + y_at(i));
  if (first) load();
#pragma unroll 1
  while (i < Tokens * kVectors) {
    *reinterpret_cast<float4*>(y + y_at(i)) = tile.here.as_factor(of_y.sum());
    i += Finishers;
    if (i < Tokens * kVectors) of_y.load(y_parts + y_at(i));
  }
  __syncthreads();
  if (!first) return;
  tile.finish(at, y, low.sum(), high.sum());
#pragma unroll 1
  for (at += Finishers / 32 * Blocks; at < tile.kCount; at += Finishers / 32 * Blocks) {
    tile.load_b(at);
    load();
    tile.finish(at, y, low.sum(), high.sum());
  }
}

#endif

}  // namespace lora_decode_parts
}  // namespace custom_ops
