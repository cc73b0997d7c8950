// Quantization with one scale for a tensor, of x or of an activation. Without a given scale two passes: the second
// reads and computes again what the first did, which is fewer bytes than to write it down.
#include "activations.cuh"
#include "tensor_quant.cuh"

namespace custom_ops {
namespace {

template <typename T>
cudaError_t launch(const Source& source, int64_t rows, int64_t cols, const TensorQuantized& out,
                   cudaStream_t stream) {
  const auto pass = [&](auto sink) {
    return for_row_slices(rows, cols, [&](int64_t first, int64_t count) {
      auto to = sink;
      to.skip_rows(first, cols);
      const Source slice = rows_from(source, first);
      if (source.activation == Activation::none) return launch_plain<T>(slice, to, count, cols, stream);
      return launch_activation<T>(slice, to, count, cols, stream);
    });
  };
  return in_two_passes<T>(out, rows * cols, pass, pass, stream);
}

}  // namespace

cudaError_t tensor_quant(Dtype dtype, const Source& source, int64_t rows, int64_t cols, const TensorQuantized& out,
                         cudaStream_t stream) {
  return dtype == Dtype::bfloat16 ? launch<__nv_bfloat16>(source, rows, cols, out, stream)
                                  : launch<__half>(source, rows, cols, out, stream);
}

}  // namespace custom_ops
