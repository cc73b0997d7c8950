// What the host may ask of the device: one launcher per op, raw pointers only, no Torch.
//
// A launcher returns the launch's error and launches nothing when there is nothing to do.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace custom_ops {

enum class Dtype { bfloat16, float16 };

// n / divisor for n < 2^31 as a product and a shift: a division would cost a thread some 20 instructions in series
// before its first load.
struct Divisor {
  uint32_t divisor = 0;
  uint32_t magic = 0;
  uint32_t shift = 0;

  Divisor() = default;
  explicit Divisor(uint32_t d) : divisor(d) {
    while ((uint64_t{1} << shift) < d) ++shift;
    // ceil(2^(31 + shift) / d), in [2^31, 2^32) because 2^(shift - 1) < d <= 2^shift.
    magic = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + d - 1) / d);
  }
};

// [rows, cols] of 16-bit floats, with any stride (in elements) between rows. Rows may be strided twice, as those of
// a transposed [B, S, K] are: row r then starts at (r / inner) * outer_stride + (r % inner) * stride.
struct Matrix {
  const void* data;
  int64_t stride;
  int64_t outer_stride = 0;
  Divisor inner{};         // divisor 0: one stride describes all rows
  uint32_t first = 0;      // the row that counts as row 0, where rows are strided twice
  uint32_t col_stride = 1;  // 2 for a half of an interleaved tensor
};

// How RMSNorm applies its weight; see normalization.cuh. plus_one is 1 for Gemma's (1 + weight).
enum class WeightMode { rounded, float32, float32_plus_one };

struct Weight {
  const void* data;
  bool is_float32;  // otherwise the dtype of x
  WeightMode mode;
};

enum class CodeMode : int { divide, reciprocal, reciprocal_input };

// How scales and codes come about: the keywords of a quantizing op, see custom_ops/scales.py. The same for all
// threads of a launch, so a branch on it costs next to nothing.
struct QuantRule {
  float max;             // what a scale is amax by: 448, or 127, or 127.5 for all codes of int8
  float max_reciprocal;  // rounded to float32
  float least;           // of a code: -448, or -127, or -128 where all codes are used
  float most;            // of a code: 448 or 127
  float min_amax;
  float min_scale;
  float least_quick_scale;  // from here on the quick arithmetic is exact; see codes.cuh
  CodeMode code_mode;
  bool int8;
  bool scale_divides;   // by max; otherwise multiplies with max_reciprocal
  bool scale_in_input;  // rounds scales to the dtype of x
  bool or_one;          // an amax that is not above 0 counts as 1
  bool power_of_two;
};

// Where codes (contiguous) and scales of [rows, cols] go. The scale of group g of row r stands at element
// r * row_stride + g * group_stride, which covers every layout; packed, at byte g % 4 of the element of g / 4.
struct Quantized {
  void* codes;
  void* scale;
  int64_t row_stride;
  int64_t group_stride;
  int group_size;   // 32, 64 or 128; divides cols
  int group_shift;  // its logarithm
  bool packed;      // exponents, four to an element
  QuantRule rule;
  // Of group_quant: the kernel ahead may run beside it, which lets it begin when all before that one is done, and shares
  // no memory with it. It ends after that one, for what comes next.
  bool beside = false;
};

// Codes (contiguous) of a tensor with one scale. It is either given, or comes of `maxima`, a place on the device for
// kMostMaxima magnitudes (with zero points, pairs of them) of which the largest counts, and goes to `scale`.
constexpr int kMostMaxima = 1024;
struct TensorQuantized {
  void* codes;
  const float* given;
  float* scale;
  uint32_t* maxima;
  QuantRule rule;
};

// The same to int8 with a zero point: int8, and given or written as the scale is; or given as int32, if `wide`; or null,
// beside a given scale, which stands for 0. The rule's max is 255.
struct TensorAsymmetric : TensorQuantized {
  void* zero_point;
  bool wide;
};

enum class Activation { none, silu, gelu_tanh, clamped_swiglu };

// What is quantized, row by row: x, or an activation of gate and up.
struct Source {
  Activation activation;
  Matrix x;   // or gate
  Matrix up;  // of activations
  float alpha;  // of clamped_swiglu, as is limit
  float limit;
};

cudaError_t activation(Dtype dtype, const Source& source, void* out, int64_t rows, int64_t cols, cudaStream_t stream);

cudaError_t group_quant(Dtype dtype, const Source& source, int64_t rows, int64_t cols, const Quantized& out,
                        cudaStream_t stream);

// The same, of what is usual (see groups.cuh): float8, or int8 of x.
cudaError_t usual_group_quant(Dtype dtype, const Source& source, int64_t rows, int64_t cols, const Quantized& out,
                              cudaStream_t stream);
cudaError_t usual_group_quant_int8(Dtype dtype, const Source& source, int64_t rows, int64_t cols,
                                   const Quantized& out, cudaStream_t stream);

cudaError_t token_quant(Dtype dtype, const Source& source, int64_t rows, int64_t cols, const Quantized& out,
                        cudaStream_t stream);

// To int8 with a scale and a zero point (int8, contiguous) per token. The rule's max is 255.
struct AsymmetricQuantized {
  Quantized tokens;
  void* zero_points;
};

cudaError_t token_quant_asymmetric(Dtype dtype, const Source& source, int64_t rows, int64_t cols,
                                   const AsymmetricQuantized& out, cudaStream_t stream);

// One pass over memory if the scale is given, else two.
cudaError_t tensor_quant(Dtype dtype, const Source& source, int64_t rows, int64_t cols, const TensorQuantized& out,
                         cudaStream_t stream);

cudaError_t tensor_quant_asymmetric(Dtype dtype, const Source& source, int64_t rows, int64_t cols,
                                    const TensorAsymmetric& out, cudaStream_t stream);

// A scale per block of 128 x 128, which stands at element (row / 128) * row_stride + column / 128.
cudaError_t block_quant(Dtype dtype, const Source& source, int64_t rows, int64_t cols, const Quantized& out,
                        cudaStream_t stream);

// gate_up: [experts, max_tokens, 2 * cols], gate first. Of expert e the first counts[e] rows are read and written;
// `out` is that of expert 0.
struct MaskedArgs {
  const void* gate_up;
  int64_t expert_stride;
  int64_t row_stride;
  const int32_t* counts;
  int64_t counts_stride;
  int64_t experts;
  int64_t max_tokens;
  int64_t cols;
  Quantized out;
  int64_t scale_expert_stride;
};

cudaError_t silu_mul_group_quant_masked(Dtype dtype, const MaskedArgs& args, cudaStream_t stream);

struct NormArgs {
  Matrix x;
  Matrix residual;     // data == nullptr: no residual is added
  void* residual_out;  // contiguous, written if there is a residual
  void* out;           // contiguous: where a quantizing norm puts its values besides, or nullptr
  Weight weight;
  float eps;
  int64_t rows;
  int64_t cols;
};

cudaError_t rms_norm(Dtype dtype, const NormArgs& args, void* out, cudaStream_t stream);
cudaError_t rms_norm_group_quant(Dtype dtype, const NormArgs& args, const Quantized& out, cudaStream_t stream);
cudaError_t usual_rms_norm_group_quant(Dtype dtype, const NormArgs& args, const Quantized& out, cudaStream_t stream);
cudaError_t rms_norm_token_quant(Dtype dtype, const NormArgs& args, const Quantized& out, cudaStream_t stream);
// With args.out.
cudaError_t rms_norm_and_group_quant(Dtype dtype, const NormArgs& args, const Quantized& out, cudaStream_t stream);
cudaError_t usual_rms_norm_and_group_quant(Dtype dtype, const NormArgs& args, const Quantized& out,
                                           cudaStream_t stream);
cudaError_t rms_norm_and_token_quant(Dtype dtype, const NormArgs& args, const Quantized& out, cudaStream_t stream);
cudaError_t rms_norm_token_quant_asymmetric(Dtype dtype, const NormArgs& args, const AsymmetricQuantized& out,
                                            cudaStream_t stream);
cudaError_t rms_norm_tensor_quant(Dtype dtype, const NormArgs& args, const TensorQuantized& out, cudaStream_t stream);
cudaError_t rms_norm_tensor_quant_asymmetric(Dtype dtype, const NormArgs& args, const TensorAsymmetric& out,
                                             cudaStream_t stream);

}  // namespace custom_ops
