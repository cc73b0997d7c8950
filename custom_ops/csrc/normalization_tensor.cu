// RMSNorm with quantization of its result, one scale for all of it. Without a given scale two passes: the second
// normalizes again, of a residual what the first pass wrote.
#include "normalization.cuh"
#include "tensor_quant.cuh"

namespace custom_ops {
namespace {

template <typename T>
cudaError_t launch(const NormArgs& args, const TensorQuantized& out, cudaStream_t stream) {
  const auto find = [&](const FindAmax<T>& sink) { return launch_norm<T>(args, sink, stream); };
  const auto make = [&](const ToTensor<T>& sink) {
    NormArgs again = args;
    if (out.given == nullptr && args.residual.data != nullptr) {
      again.x = Matrix{args.residual_out, args.cols};
      again.residual.data = nullptr;
    }
    return launch_norm<T>(again, sink, stream);
  };
  return in_two_passes<T>(out, args.rows * args.cols, find, make, stream);
}

}  // namespace

cudaError_t rms_norm_tensor_quant(Dtype dtype, const NormArgs& args, const TensorQuantized& out,
                                  cudaStream_t stream) {
  return dtype == Dtype::bfloat16 ? launch<__nv_bfloat16>(args, out, stream) : launch<__half>(args, out, stream);
}

}  // namespace custom_ops
