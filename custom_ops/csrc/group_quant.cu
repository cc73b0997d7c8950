// Per-token-group quantization: one pass, 2 bytes read and 1 written per element.
#include "group_quant.cuh"

namespace custom_ops {

cudaError_t group_quant(Dtype dtype, const Source& source, int64_t rows, int64_t cols, const Quantized& out,
                        cudaStream_t stream) {
  if (is_usual(out)) return usual_group_quant(dtype, source, rows, cols, out, stream);
  return dtype == Dtype::bfloat16 ? launch_group_quant<__nv_bfloat16, false>(source, rows, cols, out, stream)
                                  : launch_group_quant<__half, false>(source, rows, cols, out, stream);
}

}  // namespace custom_ops
