// RMSNorm with quantization of its result, one scale for all of it: its launches. Without a given scale two passes: the
// second normalizes again, of many rows with a residual the sums that the first pass wrote.
#pragma once

#include "normalization.cuh"
#include "tensor_quant.cuh"

namespace custom_ops {

// Up to so many rows the second pass adds the residual again, rather than wait for the sums before it begins.
constexpr int64_t kFewSums = 64;

// Of: Symmetric or another.
template <typename T, template <typename> typename Of>
cudaError_t launch_norm_in_passes(const NormArgs& args, const typename Of<T>::Out& out, cudaStream_t stream) {
  using How = Of<T>;
  const auto find = [&](uint32_t& count) {
    const bool one_cell = args.rows > kMostMaxima;
    count = one_cell ? 1 : static_cast<uint32_t>(args.rows);
    if (one_cell) {
      const cudaError_t error = cudaMemsetAsync(out.maxima, 0, How::kFound * sizeof(uint32_t), stream);
      if (error != cudaSuccess) return error;
    }
    return launch_norm<T>(args, FindMaxima<T, How>{out.maxima, one_cell}, stream);
  };
  const auto make = [&](const ToTensor<T, How>& sink) {
    if (out.given != nullptr || args.residual.data == nullptr || args.rows <= kFewSums) {
      return launch_norm<T>(args, sink, stream);
    }
    NormArgs again = args;
    again.x = Matrix{args.residual_out, args.cols};
    again.residual.data = nullptr;
    // What is written while a kernel runs may not be read as constant, and one that begins early runs by then.
    ToTensor<T, How> to = sink;
    to.early = false;
    return launch_norm<T>(again, to, stream);
  };
  return in_two_passes<T, How>(out, args.rows * args.cols, find, make, stream);
}

}  // namespace custom_ops
