// RMSNorm with group quantization of its result.
#include "normalization.cuh"

namespace custom_ops {

namespace {

template <typename T>
cudaError_t launch(const NormArgs& args, const Quantized& out, cudaStream_t stream) {
  return with_usual(out, [&](auto usual) {
    return launch_norm<T>(args, RowToGroups<T, decltype(usual)::value>{out}, stream);
  });
}

}  // namespace

cudaError_t rms_norm_group_quant(Dtype dtype, const NormArgs& args, const Quantized& out, cudaStream_t stream) {
  return dtype == Dtype::bfloat16 ? launch<__nv_bfloat16>(args, out, stream) : launch<__half>(args, out, stream);
}

}  // namespace custom_ops
