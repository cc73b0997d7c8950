// Per-token-group quantization: one pass, 2 bytes read and 1 written per element.
#include "group_quant.cuh"

namespace custom_ops {

cudaError_t group_quant(Dtype dtype, const Source& source, int64_t rows, int64_t cols, const Quantized& out,
                        cudaStream_t stream) {
  const Usual rule = usual(out);
  if (rule == Usual::fp8) return usual_group_quant(dtype, source, rows, cols, out, stream);
  if (rule == Usual::int8 && source.activation == Activation::none) {
    return usual_group_quant_int8(dtype, source, rows, cols, out, stream);
  }
  return dtype == Dtype::bfloat16 ? launch_group_quant<__nv_bfloat16, Usual::no>(source, rows, cols, out, stream)
                                  : launch_group_quant<__half, Usual::no>(source, rows, cols, out, stream);
}

}  // namespace custom_ops
