// Per-token-group quantization: one pass, 2 bytes read and 1 written per element.
#include "activations.cuh"
#include "rows.cuh"

namespace custom_ops {
namespace {

template <typename T>
cudaError_t launch_slices(const Source& source, int64_t rows, int64_t cols, const Quantized& out,
                          cudaStream_t stream) {
  return for_row_slices(rows, cols, [&](int64_t first, int64_t count) {
    ToGroups<T> to{out};
    to.skip_rows(first, cols);
    const Source slice = rows_from(source, first);
    if (source.activation == Activation::none) return launch_plain<T>(slice, to, count, cols, stream);
    return launch_activation<T>(slice, to, count, cols, stream);
  });
}

}  // namespace

cudaError_t group_quant(Dtype dtype, const Source& source, int64_t rows, int64_t cols, const Quantized& out,
                        cudaStream_t stream) {
  return dtype == Dtype::bfloat16 ? launch_slices<__nv_bfloat16>(source, rows, cols, out, stream)
                                  : launch_slices<__half>(source, rows, cols, out, stream);
}

}  // namespace custom_ops
