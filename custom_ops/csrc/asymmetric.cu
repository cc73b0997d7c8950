// Quantization to int8 per token with a zero point, of x or of an activation.
#include "activations.cuh"
#include "asymmetric.cuh"
#include "sourced_rows.cuh"

namespace custom_ops {
namespace {

template <typename T>
cudaError_t launch(const Source& source, int64_t rows, int64_t cols, const AsymmetricQuantized& out,
                   cudaStream_t stream) {
  const RowAsymmetric<T> to(out);
  if (source.activation == Activation::none) {
    return launch_by_row<T>(Sourced<T, Plain<T>>{Plain<T>(source)}, to, rows, cols, 0, stream);
  }
  return with_activation<T>(source, [&](const auto& from) {
    using From = std::decay_t<decltype(from)>;
    return launch_by_row<T>(Sourced<T, From>{from}, to, rows, cols, kManyVecs, stream);
  });
}

}  // namespace

cudaError_t token_quant_asymmetric(Dtype dtype, const Source& source, int64_t rows, int64_t cols,
                                   const AsymmetricQuantized& out, cudaStream_t stream) {
  return dtype == Dtype::bfloat16 ? launch<__nv_bfloat16>(source, rows, cols, out, stream)
                                  : launch<__half>(source, rows, cols, out, stream);
}

}  // namespace custom_ops
