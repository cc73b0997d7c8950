// RMSNorm alone.
#include "normalization.cuh"

namespace custom_ops {

cudaError_t rms_norm(Dtype dtype, const NormArgs& args, void* out, cudaStream_t stream) {
  if (dtype == Dtype::bfloat16) {
    return launch_norm<__nv_bfloat16>(args, RowStore<__nv_bfloat16>{static_cast<__nv_bfloat16*>(out)}, stream);
  }
  return launch_norm<__half>(args, RowStore<__half>{static_cast<__half*>(out)}, stream);
}

}  // namespace custom_ops
