// The gated activations alone: one pass over memory.
#include "activations.cuh"

namespace custom_ops {
namespace {

// To memory, as they are.
template <typename T>
struct StoreFlat {
  T* out;

  struct Nothing {};
  __device__ __forceinline__ Nothing ready() const { return {}; }
  template <int N>
  __device__ __forceinline__ void put(const Vec<T, N>& v, uint32_t at, Nothing) const {
    store_vec(out + at, v);
  }
};

template <typename T>
cudaError_t launch(const Source& source, void* out, int64_t rows, int64_t cols, cudaStream_t stream) {
  if (rows == 0 || cols == 0) return cudaSuccess;
  bool flat = false;
  const cudaError_t error = with_activation<T>(source, [&](const auto& from) {
    flat = flat_gates(from, rows, cols);
    return flat ? launch_flat_gates(from, StoreFlat<T>{static_cast<T*>(out)}, rows, cols, stream) : cudaSuccess;
  });
  if (flat || error != cudaSuccess) return error;
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
