// What the host may ask of the device: one launcher per op, raw pointers only, no Torch.
//
// Every matrix is [rows, cols], unit stride along cols, any `stride` (in elements) between rows.
// A launcher returns the launch's error and launches nothing when there is nothing to do.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace custom_ops {

enum class Dtype { bfloat16, float16 };

// How RMSNorm applies its weight; see normalization.cu. plus_one is 1 for Gemma's (1 + weight).
enum class WeightMode { rounded, float32, float32_plus_one };

struct Matrix {
  const void* data;
  int64_t stride;
};

struct Weight {
  const void* data;
  bool is_float32;  // otherwise the dtype of x
  WeightMode mode;
};

// Group quantization of [rows, cols]: codes are contiguous float8_e4m3fn, the scale of group g of row r
// stands at scale[r * row_stride + g * group_stride]. That covers all three scale layouts.
struct Quantized {
  uint8_t* codes;
  float* scale;
  int64_t row_stride;
  int64_t group_stride;
  int group_size;  // 64 or 128; divides cols
  float min_amax;
};

cudaError_t group_quant(Dtype dtype, Matrix x, int64_t rows, int64_t cols, const Quantized& out,
                        cudaStream_t stream);

cudaError_t silu_mul(Dtype dtype, Matrix gate, Matrix up, void* out, int64_t rows, int64_t cols,
                     cudaStream_t stream);

cudaError_t silu_mul_group_quant(Dtype dtype, Matrix gate, Matrix up, int64_t rows, int64_t cols,
                                 const Quantized& out, cudaStream_t stream);

struct NormArgs {
  Matrix x;
  Matrix residual;     // data == nullptr: no residual is added
  void* residual_out;  // contiguous, written if there is a residual
  Weight weight;
  float eps;
  void* out;  // contiguous; nullptr: the result is quantized into `quantized` instead
  Quantized quantized;
  int64_t rows;
  int64_t cols;
};

cudaError_t rms_norm(Dtype dtype, const NormArgs& args, cudaStream_t stream);

}  // namespace custom_ops
