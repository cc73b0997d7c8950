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

// ---- few values and a given scale: as few_groups_kernel and flat_gates_kernel, little before the loads --------------

// x / scale is not mended by its residual from here on, where every code is the largest: it may be infinite, and
// the residual NaN.
constexpr float kSaturated = 512.0f;

// Codes by a given scale, to contiguous memory.
template <typename T, bool Int8, CodeMode Mode>
struct CodesFlat {
  uint8_t* out;
  const float* scale;

  __device__ __forceinline__ float ready() const { return __ldg(scale); }

  template <int N>
  __device__ __forceinline__ void put(const Vec<T, N>& v, uint32_t at, float s) const {
    Codes<N> codes;
    if (s >= 0x1p-69f && s <= kLargestQuickScale) {  // least_quick_scale of these modes
      codes = quick(v, s);
    } else {
      Rare<T, N, 1> rare;
      rare.v[0] = v;
      rare.scale[0] = s;
      rare_codes(rare, Mode, Int8 ? -127.0f : -448.0f);
      codes = rare.codes[0];
    }
    store(reinterpret_cast<Codes<N>*>(out + at), codes);
  }

 private:
  template <int N>
  __device__ __forceinline__ Codes<N> quick(const Vec<T, N>& v, float s) const {
    const float r = reciprocal(s);
    float q[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float2 pair = Packed<T>::to_float(v.pair[i / 2]);
      const float x = i % 2 == 0 ? pair.x : pair.y;
      q[i] = x * r;
      if (Mode == CodeMode::divide) {
        const float mended = fix_quotient(q[i], x, s, r);
        q[i] = fabsf(q[i]) < kSaturated ? mended : q[i];
      }
      if (Int8) q[i] = q[i] == q[i] ? fminf(fmaxf(q[i], -127.0f), 127.0f) : 0.0f;
    }
    return pack_codes(q, Int8);
  }
};

template <typename T, int N, typename To>
__global__ void __launch_bounds__(kThreads) flat_values_kernel(const T* x, To to, uint32_t vecs) {
  const uint32_t vec = blockIdx.x * static_cast<uint32_t>(kThreads) + threadIdx.x;
  if (vec >= vecs) return;
  const Vec<T, N> v = load_const<T, N>(x + vec * N);
  to.put(v, vec * N, to.ready());
}

template <typename T, int N, typename To>
cudaError_t launch_flat_values(const void* x, const To& to, int64_t elements, cudaStream_t stream) {
  const uint32_t vecs = static_cast<uint32_t>(elements / N);
  flat_values_kernel<T, N, To>
      <<<(vecs + kThreads - 1) / kThreads, kThreads, 0, stream>>>(static_cast<const T*>(x), to, vecs);
  return cudaGetLastError();
}

constexpr int64_t kFewValues = int64_t{1} << 17;
constexpr int64_t kFlatValues = int64_t{1} << 20;

template <typename T, bool Int8, CodeMode Mode>
cudaError_t launch_flat(const Source& source, int64_t elements, const TensorQuantized& out, cudaStream_t stream) {
  const CodesFlat<T, Int8, Mode> to{static_cast<uint8_t*>(out.codes), out.given};
  return elements < kFewValues ? launch_flat_values<T, 4>(source.x.data, to, elements, stream)
                               : launch_flat_values<T, 8>(source.x.data, to, elements, stream);
}

// Launches it if there are few values that lie as one row, or few gates, and the rule is one of these. `served`: did
// it?
template <typename T>
cudaError_t launch_if_flat(const Source& source, int64_t rows, int64_t cols, const TensorQuantized& out, bool& served,
                           cudaStream_t stream) {
  const QuantRule& rule = out.rule;
  const bool divides = rule.code_mode == CodeMode::divide;
  const int64_t elements = rows * cols;
  served = false;
  if (elements == 0 || out.given == nullptr) return cudaSuccess;
  if (source.activation == Activation::none) {
    served = elements < kFlatValues && is_flat(source, rows, cols) && Plain<T>(source).vectorizable(elements) &&
             rule.code_mode != CodeMode::reciprocal_input;
    if (!served) return cudaSuccess;
    if (rule.int8) {
      return divides ? launch_flat<T, true, CodeMode::divide>(source, elements, out, stream)
                     : launch_flat<T, true, CodeMode::reciprocal>(source, elements, out, stream);
    }
    return divides ? launch_flat<T, false, CodeMode::divide>(source, elements, out, stream)
                   : launch_flat<T, false, CodeMode::reciprocal>(source, elements, out, stream);
  }
  if (rule.int8 || !divides) return cudaSuccess;
  return with_activation<T>(source, [&](const auto& from) {
    served = flat_gates(from, rows, cols);
    const CodesFlat<T, false, CodeMode::divide> to{static_cast<uint8_t*>(out.codes), out.given};
    return served ? launch_flat_gates(from, to, rows, cols, stream) : cudaSuccess;
  });
}

template <typename T>
cudaError_t launch(const Source& source, int64_t rows, int64_t cols, const TensorQuantized& out,
                   cudaStream_t stream) {
  bool served;
  const cudaError_t error = launch_if_flat<T>(source, rows, cols, out, served, stream);
  if (served || error != cudaSuccess) return error;
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
