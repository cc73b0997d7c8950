// Quantization to int8 with one scale and one zero point for a tensor, of x or of an activation.
#include "tensor_asymmetric.cuh"
#include "tensor_sources.cuh"

namespace custom_ops {
namespace {

// Codes by a given scale and zero point, to contiguous memory.
template <typename T>
struct AffineFlat {
  uint8_t* out;
  const float* scale;
  const void* zero_point;
  bool wide;
  bool divides;

  struct Ready {
    float scale;
    float zero_point;
  };
  __device__ __forceinline__ Ready ready() const { return {__ldg(scale), given_zero_point(zero_point, wide)}; }

  template <int N>
  __device__ __forceinline__ void put(const Vec<T, N>& v, uint32_t at, const Ready& by) const {
    Codes<N> codes;
    // least_quick_scale of these modes
    if (by.scale >= 0x1p-69f && by.scale <= kLargestQuickScale && clamp_code(by.zero_point) == by.zero_point) {
      const float r = reciprocal(by.scale);
      float q[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float2 pair = Packed<T>::to_float(v.pair[i / 2]);
        const float x = i % 2 == 0 ? pair.x : pair.y;
        q[i] = x * r;
        if (divides) {
          const float mended = fix_quotient(q[i], x, by.scale, r);
          q[i] = fabsf(q[i]) < kSaturated ? mended : q[i];
        }
        q[i] = q[i] == q[i] ? near_codes(q[i]) : 0.0f;
      }
      codes = quick_affine(q, static_cast<int>(by.zero_point));
    } else {
      Rare<T, N, 1> rare;
      rare.v[0] = v;
      rare.scale[0] = by.scale;
      rare_affine(rare, by.zero_point, divides ? CodeMode::divide : CodeMode::reciprocal);
      codes = rare.codes[0];
    }
    store(reinterpret_cast<Codes<N>*>(out + at), codes);
  }
};

template <typename T>
cudaError_t launch(const Source& source, int64_t rows, int64_t cols, const TensorAsymmetric& out,
                   cudaStream_t stream) {
  if (rows * cols > 0 && out.given != nullptr && out.rule.code_mode != CodeMode::reciprocal_input) {
    const AffineFlat<T> to{static_cast<uint8_t*>(out.codes), out.given, out.zero_point, out.wide,
                           out.rule.code_mode == CodeMode::divide};
    if (source.activation == Activation::none) {
      if (few_flat_values<T>(source, rows, cols)) {
        return launch_flat_values<T>(source.x.data, to, rows * cols, stream);
      }
    } else {
      bool served = false;
      const cudaError_t error = with_activation<T>(source, [&](const auto& from) {
        served = flat_gates(from, rows, cols);
        return served ? launch_flat_gates(from, to, rows, cols, stream) : cudaSuccess;
      });
      if (served || error != cudaSuccess) return error;
    }
  }
  return launch_in_passes<T, Asymmetric<T>>(source, rows, cols, out, stream);
}

}  // namespace

cudaError_t tensor_quant_asymmetric(Dtype dtype, const Source& source, int64_t rows, int64_t cols,
                                    const TensorAsymmetric& out, cudaStream_t stream) {
  const int64_t elements = rows * cols;
  if (out.given == nullptr && elements > 0 && elements <= kMaxVecs * kVec && is_flat(source, rows, cols)) {
    return token_quant_asymmetric(dtype, source, 1, elements, {as_token(out), out.zero_point}, stream);
  }
  return dtype == Dtype::bfloat16 ? launch<__nv_bfloat16>(source, rows, cols, out, stream)
                                  : launch<__half>(source, rows, cols, out, stream);
}

}  // namespace custom_ops
