// Group quantization of x by the usual rule of int8, in a file of its own for the compiler's sake.
#include "group_quant.cuh"

namespace custom_ops {

cudaError_t usual_group_quant_int8(Dtype dtype, const Source& source, int64_t rows, int64_t cols,
                                   const Quantized& out, cudaStream_t stream) {
  return dtype == Dtype::bfloat16 ? launch_usual<__nv_bfloat16, Usual::int8>(source, rows, cols, out, stream)
                                  : launch_usual<__half, Usual::int8>(source, rows, cols, out, stream);
}

}  // namespace custom_ops
