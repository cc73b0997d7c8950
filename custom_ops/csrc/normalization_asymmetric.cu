// RMSNorm with quantization to int8 per token with a zero point of its result.
#include "asymmetric.cuh"
#include "normalization.cuh"

namespace custom_ops {

cudaError_t rms_norm_token_quant_asymmetric(Dtype dtype, const NormArgs& args, const AsymmetricQuantized& out,
                                            cudaStream_t stream) {
  return dtype == Dtype::bfloat16 ? launch_norm<__nv_bfloat16>(args, RowAsymmetric<__nv_bfloat16>(out), stream)
                                  : launch_norm<__half>(args, RowAsymmetric<__half>(out), stream);
}

}  // namespace custom_ops
