// The linear layer with low-rank adapters, for Hopper: launchers, raw pointers only. See custom_ops/lora/ops.py.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels.h"

namespace custom_ops {

constexpr int kMaxSlices = 4;
constexpr int kMaxPrefillOwnRank = 32;  // of the shrink in the prefill kernel

struct LoraSlice {
  const void* b;       // [slots, width, rank], contiguous
  int64_t slot_stride;  // in elements
  int first_column;
};

// x [tokens, channels], weight [columns, channels], out [tokens, columns] contiguous, all of one 16-bit dtype. Pitches
// are in elements and multiples of 8, pointers of 16 bytes.
struct LoraLinear {
  const void* x;
  const void* weight;
  const void* bias;  // or null
  void* out;
  int64_t x_row;
  int64_t weight_row;
  int tokens;
  int columns;
  int channels;
  int rank;  // a multiple of 8
  bool round_each;  // the low-rank product after each of its steps
};

// Few tokens. One adapter for all of them where token_slots is null: then slot 0, rank `rank` and `scaling`.
struct LoraDecode {
  LoraLinear linear;
  const void* a;  // [rank, channels] of x's dtype, one slice, rank up to 64: the shrink is done here; or null, and
  int64_t a_row;
  const float* y;  // [y_splits, slices, tokens, rank], the parts of its sums
  int y_splits;
  int slices;
  LoraSlice slice[kMaxSlices];  // widths are multiples of 128, but of a single slice
  bool b_float32;
  const int32_t* token_slots;
  const int32_t* ranks;
  const float* scalings;
  float scaling;
  int tile_columns;  // of a block: 64 or 128
  int most_blocks;   // that share the channels of a tile: 1 to 4
};

// Many tokens and one adapter. y: [tokens, rank] and b: [columns, rank] of x's dtype, rank a multiple of 8.
struct LoraPrefill {
  LoraLinear linear;
  const void* a;  // [rank, channels] of x's dtype, rank up to kMaxPrefillOwnRank: y is written; or null, and y is given
  int64_t a_row;
  void* y;
  uint32_t* done;  // with a: room for a number per 128 tokens
  const void* b;
  int64_t b_row;
  float scaling;
};

// Tokens of a batch in tiles of 16 of one adapter: {slot, first, count, 0}, as `LoRABatch` has them.
struct LoraTokens {
  const int32_t* tiles;  // [grid_tiles, 4]
  const int32_t* sorted_tokens;
  int grid_tiles;        // that so many tokens can be in, at most
  int tokens;
  int rank;  // of the slots at most: 16, 32 or 64
};

// y[split, slice, token] of x [tokens, channels] and a, [slots, rank, channels] each, all bfloat16.
struct LoraShrink {
  LoraTokens batch;
  const void* x;
  const void* a[kMaxSlices];
  const int32_t* ranks[kMaxSlices];  // of the slots
  float* y;
  int64_t x_row;
  int64_t a_slot;
  int64_t y_split;
  int64_t y_slice;
  int channels;  // a multiple of 8
  int split_channels;  // a multiple of 256
  int slices;
};

// out [tokens, columns] += scaling * y @ b.T, y the sum of its splits.
struct LoraExpand {
  LoraTokens batch;
  void* out;
  const float* y;
  const int32_t* ranks;  // of the slots, as the scalings
  const float* scalings;
  int64_t y_split;
  int64_t y_slice;
  int splits;
  int columns;  // a multiple of 8
  int slices;
  LoraSlice slice[kMaxSlices];  // first columns are multiples of 64
  bool early_base;  // what out holds is there before the kernel before this one has ended
};

cudaError_t lora_shrink(const LoraShrink& args, bool dependent, cudaStream_t stream);
cudaError_t lora_expand(const LoraExpand& args, bool dependent, cudaStream_t stream);
cudaError_t lora_decode(Dtype dtype, const LoraDecode& args, int multiprocessors, cudaStream_t stream);
cudaError_t lora_prefill(Dtype dtype, const LoraPrefill& args, int multiprocessors, cudaStream_t stream);

}  // namespace custom_ops
