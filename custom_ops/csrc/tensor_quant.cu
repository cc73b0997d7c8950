// Quantization with one scale for a tensor, of x or of an activation. Without a given scale two passes: the second
// reads and computes again what the first did, which is fewer bytes than to write it down.
#include "activations.cuh"
#include "tensor_quant.cuh"

namespace custom_ops {
namespace {

// Do x (of activations gate and up) lie as one row?
bool is_flat(const Source& s, int64_t rows, int64_t cols) {
  const auto flat = [&](const Matrix& m) {
    return m.col_stride == 1 && (rows == 1 || (m.inner.divisor == 0 && m.stride == cols));
  };
  return flat(s.x) && (s.activation == Activation::none || flat(s.up));
}

template <typename T>
cudaError_t find_amax(const Source& source, uint32_t* maxima, bool again, int64_t rows, int64_t cols, uint32_t& count,
                      cudaStream_t stream) {
  if (source.activation == Activation::none) {
    const Plain<T> from(source);
    const int64_t elements = rows * cols;
    if (is_flat(source, rows, cols) && from.vectorizable(elements)) {
      return launch_amax<T, 4, true, true>(from, maxima, again, 1, elements, count, stream);
    }
    if (from.vectorizable(cols)) return launch_amax<T, 4, true>(from, maxima, again, rows, cols, count, stream);
    return launch_amax<T, 1, false>(from, maxima, again, rows, cols, count, stream);
  }
  return with_activation<T>(source, [&](const auto& from) {
    if (!from.vectorizable(cols)) return launch_amax<T, 1, false>(from, maxima, again, rows, cols, count, stream);
    if (rows * cols < kManyGates) return launch_amax<T, 1, true>(from, maxima, again, rows, cols, count, stream);
    return launch_amax<T, 2, true>(from, maxima, again, rows, cols, count, stream);
  });
}

template <typename T>
cudaError_t launch(const Source& source, int64_t rows, int64_t cols, const TensorQuantized& out,
                   cudaStream_t stream) {
  const auto find = [&](uint32_t& count) {
    return for_row_slices(rows, cols, [&](int64_t first, int64_t slice) {
      return find_amax<T>(rows_from(source, first), out.maxima, first > 0, slice, cols, count, stream);
    });
  };
  const auto make = [&](const ToTensor<T>& sink) {
    return for_row_slices(rows, cols, [&](int64_t first, int64_t count) {
      ToTensor<T> to = sink;
      to.skip_rows(first, cols);
      const Source slice = rows_from(source, first);
      if (source.activation == Activation::none) return launch_plain<T>(slice, to, count, cols, stream);
      return launch_activation<T>(slice, to, count, cols, stream);
    });
  };
  return in_two_passes<T>(out, rows * cols, find, make, stream);
}

}  // namespace

cudaError_t tensor_quant(Dtype dtype, const Source& source, int64_t rows, int64_t cols, const TensorQuantized& out,
                         cudaStream_t stream) {
  const int64_t elements = rows * cols;
  if (out.given == nullptr && elements > 0 && elements <= kMaxVecs * kVec && is_flat(source, rows, cols)) {
    return token_quant(dtype, source, 1, elements, as_token(out), stream);
  }
  return dtype == Dtype::bfloat16 ? launch<__nv_bfloat16>(source, rows, cols, out, stream)
                                  : launch<__half>(source, rows, cols, out, stream);
}

}  // namespace custom_ops
