// RMSNorm with group quantization of its result, which is wanted itself too.
#include "normalization.cuh"

namespace custom_ops {

cudaError_t rms_norm_and_group_quant(Dtype dtype, const NormArgs& args, const Quantized& out, cudaStream_t stream) {
  if (usual(out) == Usual::fp8) return usual_rms_norm_and_group_quant(dtype, args, out, stream);
  return dtype == Dtype::bfloat16
             ? launch_norm_and<__nv_bfloat16>(args, RowToGroups<__nv_bfloat16, Usual::no>{out}, stream)
             : launch_norm_and<__half>(args, RowToGroups<__half, Usual::no>{out}, stream);
}

}  // namespace custom_ops
