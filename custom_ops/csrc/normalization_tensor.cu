// RMSNorm with quantization of its result, one scale for all of it. Without a given scale two passes: the second
// normalizes again, of many rows with a residual the sums that the first pass wrote.
#include "normalization.cuh"
#include "tensor_quant.cuh"

namespace custom_ops {
namespace {

// Up to so many rows the second pass adds the residual again, rather than wait for the sums before it begins.
constexpr int64_t kFewSums = 64;

template <typename T>
cudaError_t launch(const NormArgs& args, const TensorQuantized& out, cudaStream_t stream) {
  const auto find = [&](uint32_t& count) {
    const bool one_cell = args.rows > kMostMaxima;
    count = one_cell ? 1 : static_cast<uint32_t>(args.rows);
    if (one_cell) {
      const cudaError_t error = cudaMemsetAsync(out.maxima, 0, sizeof(uint32_t), stream);
      if (error != cudaSuccess) return error;
    }
    return launch_norm<T>(args, FindAmax<T>{out.maxima, one_cell}, stream);
  };
  const auto make = [&](const ToTensor<T>& sink) {
    if (out.given != nullptr || args.residual.data == nullptr || args.rows <= kFewSums) {
      return launch_norm<T>(args, sink, stream);
    }
    NormArgs again = args;
    again.x = Matrix{args.residual_out, args.cols};
    again.residual.data = nullptr;
    // What is written while a kernel runs may not be read as constant, and one that begins early runs by then.
    ToTensor<T> to = sink;
    to.early = false;
    return launch_norm<T>(again, to, stream);
  };
  return in_two_passes<T>(out, args.rows * args.cols, find, make, stream);
}

}  // namespace

cudaError_t rms_norm_tensor_quant(Dtype dtype, const NormArgs& args, const TensorQuantized& out,
                                  cudaStream_t stream) {
  if (out.given == nullptr && args.rows == 1 && args.cols > 0) {
    return rms_norm_token_quant(dtype, args, as_token(out), stream);
  }
  return dtype == Dtype::bfloat16 ? launch<__nv_bfloat16>(args, out, stream) : launch<__half>(args, out, stream);
}

}  // namespace custom_ops
