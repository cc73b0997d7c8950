// RMSNorm with quantization of its result to int8, one scale and one zero point for all of it.
#include "normalization_tensor.cuh"
#include "tensor_asymmetric.cuh"

namespace custom_ops {

cudaError_t rms_norm_tensor_quant_asymmetric(Dtype dtype, const NormArgs& args, const TensorAsymmetric& out,
                                             cudaStream_t stream) {
  if (out.given == nullptr && args.rows == 1 && args.cols > 0) {
    return rms_norm_token_quant_asymmetric(dtype, args, {as_token(out), out.zero_point}, stream);
  }
  return dtype == Dtype::bfloat16 ? launch_norm_in_passes<__nv_bfloat16, Asymmetric>(args, out, stream)
                                  : launch_norm_in_passes<__half, Asymmetric>(args, out, stream);
}

}  // namespace custom_ops
