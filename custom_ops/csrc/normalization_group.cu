// RMSNorm with group quantization of its result.
#include "normalization.cuh"

namespace custom_ops {

cudaError_t rms_norm_group_quant(Dtype dtype, const NormArgs& args, const Quantized& out, cudaStream_t stream) {
  if (is_usual(out)) return usual_rms_norm_group_quant(dtype, args, out, stream);
  return dtype == Dtype::bfloat16 ? launch_norm<__nv_bfloat16>(args, RowToGroups<__nv_bfloat16, false>{out}, stream)
                                  : launch_norm<__half>(args, RowToGroups<__half, false>{out}, stream);
}

}  // namespace custom_ops
