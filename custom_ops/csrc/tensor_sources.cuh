// One scale for a tensor, of x or of an activation: its launches. Without a given scale two passes: the second reads and
// computes again what the first did, which is fewer bytes than to write it down.
#pragma once

#include "activations.cuh"
#include "tensor_quant.cuh"

namespace custom_ops {

// Do x (of activations gate and up) lie as one row?
inline bool is_flat(const Source& s, int64_t rows, int64_t cols) {
  const auto flat = [&](const Matrix& m) {
    return m.col_stride == 1 && (rows == 1 || (m.inner.divisor == 0 && m.stride == cols));
  };
  return flat(s.x) && (s.activation == Activation::none || flat(s.up));
}

template <typename T, typename How>
cudaError_t find_maxima(const Source& source, uint32_t* maxima, bool again, int64_t rows, int64_t cols, uint32_t& count,
                        cudaStream_t stream) {
  if (source.activation == Activation::none) {
    const Plain<T> from(source);
    const int64_t elements = rows * cols;
    if (is_flat(source, rows, cols) && from.vectorizable(elements)) {
      return launch_maxima<T, How, 4, true, true>(from, maxima, again, 1, elements, count, stream);
    }
    if (from.vectorizable(cols)) return launch_maxima<T, How, 4, true>(from, maxima, again, rows, cols, count, stream);
    return launch_maxima<T, How, 1, false>(from, maxima, again, rows, cols, count, stream);
  }
  return with_activation<T>(source, [&](const auto& from) {
    if (!from.vectorizable(cols)) return launch_maxima<T, How, 1, false>(from, maxima, again, rows, cols, count, stream);
    if (rows * cols < kManyGates) return launch_maxima<T, How, 1, true>(from, maxima, again, rows, cols, count, stream);
    return launch_maxima<T, How, 2, true>(from, maxima, again, rows, cols, count, stream);
  });
}

template <typename T, typename How>
cudaError_t launch_in_passes(const Source& source, int64_t rows, int64_t cols, const typename How::Out& out,
                             cudaStream_t stream) {
  const auto find = [&](uint32_t& count) {
    return for_row_slices(rows, cols, [&](int64_t first, int64_t slice) {
      return find_maxima<T, How>(rows_from(source, first), out.maxima, first > 0, slice, cols, count, stream);
    });
  };
  const auto make = [&](const ToTensor<T, How>& sink) {
    return for_row_slices(rows, cols, [&](int64_t first, int64_t count) {
      ToTensor<T, How> to = sink;
      to.skip_rows(first, cols);
      const Source slice = rows_from(source, first);
      if (source.activation == Activation::none) return launch_plain<T>(slice, to, count, cols, stream);
      return launch_activation<T>(slice, to, count, cols, stream);
    });
  };
  return in_two_passes<T, How>(out, rows * cols, find, make, stream);
}

// ---- few values and a given scale: as few_groups_kernel and flat_gates_kernel, little before the loads --------------

// x / scale is not mended by its residual from here on, where every code is the largest: it may be infinite, and
// the residual NaN.
constexpr float kSaturated = 512.0f;

template <typename T, int N, typename To>
__global__ void __launch_bounds__(kThreads) flat_values_kernel(const T* x, To to, uint32_t vecs) {
  const uint32_t vec = blockIdx.x * static_cast<uint32_t>(kThreads) + threadIdx.x;
  if (vec >= vecs) return;
  const Vec<T, N> v = load_const<T, N>(x + vec * N);
  to.put(v, vec * N, to.ready());
}

template <typename T, int N, typename To>
cudaError_t launch_flat_values_of(const void* x, const To& to, int64_t elements, cudaStream_t stream) {
  const uint32_t vecs = static_cast<uint32_t>(elements / N);
  flat_values_kernel<T, N, To>
      <<<(vecs + kThreads - 1) / kThreads, kThreads, 0, stream>>>(static_cast<const T*>(x), to, vecs);
  return cudaGetLastError();
}

constexpr int64_t kFewValues = int64_t{1} << 17;
constexpr int64_t kFlatValues = int64_t{1} << 20;

template <typename T>
bool few_flat_values(const Source& source, int64_t rows, int64_t cols) {
  return rows * cols < kFlatValues && is_flat(source, rows, cols) && Plain<T>(source).vectorizable(rows * cols);
}

template <typename T, typename To>
cudaError_t launch_flat_values(const void* x, const To& to, int64_t elements, cudaStream_t stream) {
  return elements < kFewValues ? launch_flat_values_of<T, 4>(x, to, elements, stream)
                               : launch_flat_values_of<T, 8>(x, to, elements, stream);
}

}  // namespace custom_ops
