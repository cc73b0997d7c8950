// Quantization with one scale for a tensor, of x or of an activation.
#include "tensor_sources.cuh"

namespace custom_ops {
namespace {

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

template <typename T, bool Int8, CodeMode Mode>
cudaError_t launch_flat(const Source& source, int64_t elements, const TensorQuantized& out, cudaStream_t stream) {
  const CodesFlat<T, Int8, Mode> to{static_cast<uint8_t*>(out.codes), out.given};
  return launch_flat_values<T>(source.x.data, to, elements, stream);
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
    served = few_flat_values<T>(source, rows, cols) && rule.code_mode != CodeMode::reciprocal_input;
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
  return launch_in_passes<T, Symmetric<T>>(source, rows, cols, out, stream);
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
