// RMSNorm with group quantization by the usual rule, in a file of its own for the compiler's sake.
#include "normalization.cuh"

namespace custom_ops {

cudaError_t usual_rms_norm_group_quant(Dtype dtype, const NormArgs& args, const Quantized& out, cudaStream_t stream) {
  return dtype == Dtype::bfloat16 ? launch_norm<__nv_bfloat16>(args, RowToGroups<__nv_bfloat16, Usual::fp8>{out}, stream)
                                  : launch_norm<__half>(args, RowToGroups<__half, Usual::fp8>{out}, stream);
}

}  // namespace custom_ops
