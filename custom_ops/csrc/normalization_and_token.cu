// RMSNorm with quantization per token of its result, which is wanted itself too.
#include "normalization.cuh"

namespace custom_ops {

cudaError_t rms_norm_and_token_quant(Dtype dtype, const NormArgs& args, const Quantized& out, cudaStream_t stream) {
  return dtype == Dtype::bfloat16 ? launch_norm_and<__nv_bfloat16>(args, RowToToken<__nv_bfloat16>{out}, stream)
                                  : launch_norm_and<__half>(args, RowToToken<__half>{out}, stream);
}

}  // namespace custom_ops
