// What the host may ask of the device for mixtures of experts, as in kernels.h: routing, and tokens by expert.
#pragma once

#include "kernels.h"

namespace custom_ops {

enum class Float : int { float32, bfloat16, float16 };

// ---- routing --------------------------------------------------------------------------------------------

enum class Scoring : int { none, softmax, sigmoid, sqrt_softplus };
enum class Masked : int { infinity, zero, zero_weight };

constexpr int kMostRoutedExperts = 512;  // which a warp holds in registers
constexpr int kMostGroups = 32;          // a lane each

struct RoutingArgs {
  const void* logits;  // [tokens, experts], columns next to each other
  const void* bias;    // nullptr: none
  void* weights;       // [tokens, top_k], contiguous, as are ids
  int64_t* ids;
  int64_t tokens;
  int64_t row_stride;
  int64_t bias_stride;
  int experts;
  int top_k;
  Float logits_type;
  Float bias_type;
  Float weights_type;
  Float step_type;    // what every step is rounded to
  Float choice_type;  // what scores with their bias are rounded to
  Scoring scoring;
  bool by_logits;     // chosen by logits, and not by scores
  bool softmax_last;  // of the chosen logits
  bool renormalize;
  float renormalize_eps;
  float renormalize_min;
  float scale;
  int topk_groups;  // 0: all stay
  int num_groups;
  Divisor group_size;
  bool top2;
  Masked masked;
};

cudaError_t moe_route(const RoutingArgs& args, cudaStream_t stream);

// ---- pairs by expert ------------------------------------------------------------------------------------

// Expert ids, contiguous, one for each pair of a token and one of its experts.
struct Ids {
  const void* data;
  bool int64;
  const int32_t* map;  // nullptr: none
  int64_t map_stride;
  int64_t known;  // ids are below, and indices of the map if there is one
  int experts;    // that are here
};

constexpr int kMostAlignedExperts = 512;
// Blocks that share the pairs; each has a count per expert in the scratch.
constexpr int kMostAlignBlocks = 128;
constexpr int kPairsOfOneBlock = 512;  // up to here there is one, and no scratch

struct AlignArgs {
  Ids ids;
  int32_t pairs;
  int32_t block_size;
  int32_t rows;       // entries of slots, whole blocks
  int32_t* slots;     // a row's pair, or its expert if slots_are_experts; otherwise `fill`
  int32_t fill;
  bool slots_are_experts;
  int32_t* block_experts;  // these may be nullptr
  int32_t* num_padded;
  int32_t* row_of_pair;
  int32_t* offsets;  // [experts + 1]
  int32_t* counts;   // the scratch, [blocks, experts]
  int32_t blocks;
  int32_t threads;  // of a block
  int32_t chunk;    // pairs of a block
  // A kernel behind this one that may begin early reads and writes nothing before it has waited, but for what no kernel
  // writes (weights): then it may begin with this one, and not only when all that is ahead of this one is done.
  bool next_waits;
};

// Divides the pairs among blocks. The caller then makes the scratch if there is more than one.
void plan_align(AlignArgs& args);
cudaError_t moe_align(const AlignArgs& args, cudaStream_t stream);

// ---- tokens to rows and back ----------------------------------------------------------------------------

// Directly after moe_align, which writes row_of_pair.
cudaError_t moe_copy_rows(Dtype dtype, const Matrix& x, int64_t tokens, int64_t cols, const int32_t* row_of_pair,
                          int top_k, void* rows, cudaStream_t stream);
cudaError_t moe_quantize_rows(Dtype dtype, const Matrix& x, int64_t tokens, int64_t cols, const int32_t* row_of_pair,
                              int top_k, const Quantized& out, cudaStream_t stream);

struct SumArgs {
  Matrix rows;
  const int32_t* row_of_pair;  // nullptr: the row of a pair is its number
  Ids ids;                     // data == nullptr: every pair counts
  const void* weights;
  bool weights_are_float32;  // otherwise of the dtype of rows
  int64_t weight_stride;     // from a token to the next
  int64_t weight_step;
  void* out;
  int64_t tokens;
  int64_t cols;
  int top_k;
};

cudaError_t moe_sum(Dtype dtype, const SumArgs& args, cudaStream_t stream);

// ---- grouped products on Hopper -------------------------------------------------------------------------

constexpr int kMostGroupedExperts = 256;
constexpr int kGroupedRows = 8;  // of the blocks of the index

// All in bfloat16. Rows of the first product are tokens, in the order of the index; those of the second are the results
// of the first, and its results are pairs.
struct GroupedArgs {
  const void* x;
  int64_t x_rows;
  int64_t x_pitch;  // elements
  const void* weight;  // [experts, weight_rows, channels], contiguous
  const void* up;  // of the first product: the rows that gate is multiplied with, as far apart as the weight's
  const int32_t* sorted_ids;
  const int32_t* block_experts;
  const int32_t* num_padded;
  void* out;  // [padded_rows, width] of the first, [pairs, width] of the second, contiguous
  int64_t padded_rows;
  int pairs;
  int top_k;
  int experts;
  int channels;
  int weight_rows;
  int column_tiles;  // of 128 gates and as many ups, or of 256 columns
  int width;
};

cudaError_t moe_grouped_gate_up(const GroupedArgs& args, int multiprocessors, cudaStream_t stream);
cudaError_t moe_grouped_down(const GroupedArgs& args, int multiprocessors, cudaStream_t stream);

constexpr int kFp8GroupedRows = 128;  // of the blocks of the index, and of the groups and blocks of scales

// Codes in FP8 with float32 scales, of x for each row and 128 channels, of the weight for each block of 128 x 128; the
// results of the second product are in bfloat16. Rows as in GroupedArgs. Distances are elements, and what they lead to
// is counted in 32 bits.
struct Fp8GroupedArgs {
  const void* x;
  int64_t x_pitch;
  const float* x_scale;
  int64_t x_scale_row;
  int64_t x_scale_block;
  const void* weight;  // [experts, weight_rows, channels], contiguous
  const float* weight_scale;
  int64_t weight_scale_expert;
  int64_t weight_scale_row;
  int64_t weight_scale_block;
  const int32_t* sorted_ids;
  const int32_t* block_experts;
  const int32_t* num_padded;
  int32_t* counter;  // 0: of the tiles that were taken
  uint32_t* ready;   // of each block, 0 before gate_up, which adds 1 for each warp that is done with a tile of it
  void* out;         // [padded_rows, width] codes of the first, [pairs, width] of the second, contiguous
  float* out_scale;  // [padded_rows, width / 128] of the first, contiguous
  int64_t padded_rows;
  int pairs;
  int top_k;
  int experts;
  int weight_rows;
  int steps;         // of 128 channels
  int column_tiles;  // of 128 gates and as many ups, or of 256 columns
  int columns;       // from a tile to the next
  int second;        // from the first columns of a tile to its others
  int width;
  int band;          // blocks that run together through all columns
  float min_amax;
};

cudaError_t moe_fp8_gate_up(const Fp8GroupedArgs& args, int multiprocessors, cudaStream_t stream);
cudaError_t moe_fp8_down(const Fp8GroupedArgs& args, int multiprocessors, cudaStream_t stream);

}  // namespace custom_ops
