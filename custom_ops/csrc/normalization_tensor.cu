// RMSNorm with quantization of its result, one scale for all of it.
#include "normalization_tensor.cuh"

namespace custom_ops {

cudaError_t rms_norm_tensor_quant(Dtype dtype, const NormArgs& args, const TensorQuantized& out,
                                  cudaStream_t stream) {
  if (out.given == nullptr && args.rows == 1 && args.cols > 0) {
    return rms_norm_token_quant(dtype, args, as_token(out), stream);
  }
  return dtype == Dtype::bfloat16 ? launch_norm_in_passes<__nv_bfloat16, Symmetric>(args, out, stream)
                                  : launch_norm_in_passes<__half, Symmetric>(args, out, stream);
}

}  // namespace custom_ops
