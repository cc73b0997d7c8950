// The gated activations alone: one pass over memory.
#include "activations.cuh"

namespace custom_ops {
namespace {

template <typename T>
cudaError_t launch(const Source& source, void* out, int64_t rows, int64_t cols, cudaStream_t stream) {
  return for_row_slices(rows, cols, [&](int64_t first, int64_t count) {
    Store<T> to{static_cast<T*>(out)};
    to.skip_rows(first, cols);
    return launch_activation<T>(rows_from(source, first), to, count, cols, stream);
  });
}

}  // namespace

cudaError_t activation(Dtype dtype, const Source& source, void* out, int64_t rows, int64_t cols,
                       cudaStream_t stream) {
  return dtype == Dtype::bfloat16 ? launch<__nv_bfloat16>(source, out, rows, cols, stream)
                                  : launch<__half>(source, out, rows, cols, stream);
}

}  // namespace custom_ops
