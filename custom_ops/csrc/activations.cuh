// The gated activations, with every rounding of eager.
#pragma once

#include "rows.cuh"

namespace custom_ops {

// round_T(a * b), packed. A product of two 16-bit floats is exact in float32, so one rounding is what
// round_T(float32(a) * float32(b)) does too.
template <typename T, int N>
__device__ __forceinline__ Vec<T, N> multiply(const Vec<T, N>& a, const Vec<T, N>& b) {
  Vec<T, N> out;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) out.pair[i] = __hmul2(a.pair[i], b.pair[i]);
  return out;
}

// round_T of f of each element.
template <typename T, int N, typename F>
__device__ __forceinline__ Vec<T, N> map(const Vec<T, N>& v, F f) {
  Vec<T, N> out;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const float2 x = Packed<T>::to_float(v.pair[i]);
    out.pair[i] = Packed<T>::from_float(f(x.x), f(x.y));
  }
  return out;
}

// Up to here 1 + exp(-g) is far from the end of float32, where a reciprocal is subnormal; Inf and NaN are beyond.
constexpr float kFastGate = 80.0f;

template <typename T, int N, int R, typename Raw>
__device__ __forceinline__ bool fast_gates(const Raw (&raw)[R]) {
  bool fast = true;
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const float2 largest = Packed<T>::to_float(abs_max(raw[i].gate));
    fast = fast && largest.x <= kFastGate && largest.y <= kFastGate;
  }
  return fast;
}

// numerator / (1 + exp(-g)), |g| <= kFastGate. expf is the accurate one (1 ulp; __expf rounds its argument to base 2,
// which is 45 ulp at |g| = 80), and the division is IEEE-exact up to what one step on its residual leaves, the seed
// being 1 ulp off.
__device__ __forceinline__ float fast_sigmoid(float g, float numerator) {
  const float d = 1.0f + expf(-g);
  return divide_by_reciprocal(numerator, d, reciprocal_approx(d));
}

// The same for any g, out of line (it is rare, and would otherwise be most of the kernel) and on vectors in memory,
// where a call from a kernel full of registers leaves them.
template <bool Silu, typename T, int N, int R>
__device__ __noinline__ void rare_sigmoid(Vec<T, N> (&gate)[R]) {
#pragma unroll 1
  for (int i = 0; i < R; ++i) {
    gate[i] = map(gate[i], [](float g) { return __fdiv_rn(Silu ? g : 1.0f, 1.0f + expf(-g)); });
  }
}

// round_T(round_T(g / (1 + exp(-g))) * up), float32 inside: the expression of eager.
struct Silu {
  Silu() = default;
  explicit Silu(const Source&) {}

  template <typename T, int N, int R, typename Raw>
  __device__ __forceinline__ void operator()(const Raw (&raw)[R], Vec<T, N> (&v)[R]) const {
    const bool fast = fast_gates<T, N>(raw);
    if (R == 1 || fast) {  // as in codes_of: with one vector, without waiting for the check
#pragma unroll
      for (int i = 0; i < R; ++i) {
        v[i] = multiply(map(raw[i].gate, [](float g) { return fast_sigmoid(g, g); }), raw[i].up);
      }
    }
    if (!fast) {
      Vec<T, N> rare[R];
#pragma unroll
      for (int i = 0; i < R; ++i) rare[i] = raw[i].gate;
      rare_sigmoid<true>(rare);
#pragma unroll
      for (int i = 0; i < R; ++i) v[i] = multiply(rare[i], raw[i].up);
    }
  }
};

// round_T(round_T(0.5 g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3)))) * up), spelled as eager's kernel is, so that
// the compiler contracts the same products and sums.
struct GeluTanh {
  explicit GeluTanh(const Source&) {}

  template <typename T, int N, int R, typename Raw>
  __device__ __forceinline__ void operator()(const Raw (&raw)[R], Vec<T, N> (&v)[R]) const {
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const auto gelu = [](float g) {
        const float cube = g * g * g;
        const float inner = 0.79788456080286535588f * (g + 0.044715f * cube);
        return 0.5f * g * (1.0f + tanhf(inner));
      };
      v[i] = multiply(map(raw[i].gate, gelu), raw[i].up);
    }
  }
};

// gpt-oss: g = min(gate, limit), u = clamp(up, -limit, limit), then
// round_T(round_T(u + 1) * round_T(g * round_T(sigmoid(round_T(g * alpha))))). NaN stays.
struct ClampedSwiglu {
  float alpha;
  float limit;

  explicit ClampedSwiglu(const Source& source) : alpha(source.alpha), limit(source.limit) {}

  template <typename T, int N, int R, typename Raw>
  __device__ __forceinline__ void operator()(const Raw (&raw)[R], Vec<T, N> (&v)[R]) const {
    const auto high = Packed<T>::from_float(limit, limit);
    const auto low = __hneg2(high);
    const auto one = Packed<T>::from_float(1.0f, 1.0f);
#pragma unroll
    for (int i = 0; i < R; ++i) {
      Vec<T, N> g;
      Vec<T, N> u;
#pragma unroll
      for (int j = 0; j < N / 2; ++j) {
        g.pair[j] = __hmin2_nan(raw[i].gate.pair[j], high);
        u.pair[j] = __hadd2(__hmin2_nan(__hmax2_nan(raw[i].up.pair[j], low), high), one);
      }
      const Vec<T, N> scaled = map(g, [&](float x) { return x * alpha; });
      struct {
        Vec<T, N> gate;
      } const gates[1] = {{scaled}};
      Vec<T, N> sigmoid;
      if (fast_gates<T, N>(gates)) {
        sigmoid = map(scaled, [](float x) { return fast_sigmoid(x, 1.0f); });
      } else {
        Vec<T, N> rare[1] = {scaled};
        rare_sigmoid<false>(rare);
        sigmoid = rare[0];
      }
      v[i] = multiply(u, multiply(g, sigmoid));
    }
  }
};

// ---- few gates ------------------------------------------------------------------------------------------------------
// A launch begins by reading its parameters, a line of constants at a time, and then waits for its only loads: few
// parameters, all in one line, a row of blocks to a row, and nothing to divide. Inductor's kernels are no longer.

constexpr int64_t kFlatGates = int64_t{1} << 22;
constexpr int64_t kMostFlatRows = 65535;

// Gates of [rows, vecs of N], from rows `stride` apart. To: ready() loads what put() needs beside the values.
template <typename T, int N, typename Function, bool Interleaved, typename To>
__global__ void __launch_bounds__(kThreads)
    flat_gates_kernel(const T* gate, const T* up, To to, uint32_t stride, uint32_t vecs, Function function) {
  const uint32_t vec = blockIdx.x * static_cast<uint32_t>(kThreads) + threadIdx.x;
  if (vec >= vecs) return;
  typename Gated<T, Function, Interleaved>::template Raw<N> raw[1];
  const uint32_t row = blockIdx.y * stride;
  if constexpr (Interleaved) {
    const T* const p = gate + row + vec * (2 * N);
    deinterleave(load_const<T, N>(p), load_const<T, N>(p + N), raw[0].gate, raw[0].up);
  } else {
    raw[0].gate = load_const<T, N>(gate + row + vec * N);
    raw[0].up = load_const<T, N>(up + row + vec * N);
  }
  const auto ready = to.ready();
  Vec<T, N> v[1];
  function(raw, v);
  to.put(v[0], (blockIdx.y * vecs + vec) * N, ready);
}

// Are there few enough gates, all of whose rows are equally far apart?
template <typename From>
bool flat_gates(const From& from, int64_t rows, int64_t cols) {
  return rows * cols < kFlatGates && rows <= kMostFlatRows && from.vectorizable(cols) &&
         from.gate.inner.divisor == 0 && from.up.inner.divisor == 0 && from.gate.stride == from.up.stride &&
         from.gate.stride >= 0 && rows * from.gate.stride < INT32_MAX;
}

template <typename T, int N, typename Function, bool Interleaved, typename To>
cudaError_t launch_flat_gates_of(const Gated<T, Function, Interleaved>& from, const To& to, int64_t rows, int64_t cols,
                                 cudaStream_t stream) {
  const uint32_t vecs = static_cast<uint32_t>(cols / N);
  const dim3 grid((vecs + kThreads - 1) / kThreads, static_cast<unsigned>(rows));
  flat_gates_kernel<T, N, Function, Interleaved, To><<<grid, kThreads, 0, stream>>>(
      static_cast<const T*>(from.gate.data), static_cast<const T*>(from.up.data), to,
      static_cast<uint32_t>(from.gate.stride), vecs, from.function);
  return cudaGetLastError();
}

// Which shape of thread is fastest, measured on an H100 with silu; the values do not depend on it. Few elements: more
// threads with less to do. Many: two rows, whose loads are under way together (4096 x 2048: 13.8 us, 14.1 with
// one row, 14.8 with four).
constexpr int64_t kFewGates = int64_t{1} << 18;
constexpr int64_t kManyGates = int64_t{1} << 20;

template <typename T, typename Function, bool Interleaved, typename To>
cudaError_t launch_flat_gates(const Gated<T, Function, Interleaved>& from, const To& to, int64_t rows, int64_t cols,
                              cudaStream_t stream) {
  return rows * cols < kFewGates ? launch_flat_gates_of<T, 4>(from, to, rows, cols, stream)
                                 : launch_flat_gates_of<T, 8>(from, to, rows, cols, stream);
}

template <typename T, typename From, typename To>
cudaError_t launch_gated(const From& from, const To& to, int64_t rows, int64_t cols, cudaStream_t stream) {
  if (!from.vectorizable(cols)) return launch_rows<T, 8, 1, false>(from, to, rows, cols, stream);
  if (rows * cols < kFewGates) return launch_rows<T, 4, 1, true>(from, to, rows, cols, stream);
  if (rows * cols < kManyGates) return launch_rows<T, 8, 1, true>(from, to, rows, cols, stream);
  return launch_rows<T, 8, 2, true>(from, to, rows, cols, stream);
}

// gate and up as the even and the odd columns of one tensor?
inline bool interleaved(const Source& s) {
  return s.x.col_stride == 2 && s.up.col_stride == 2 && s.x.stride == s.up.stride &&
         s.x.outer_stride == s.up.outer_stride && s.x.inner.divisor == s.up.inner.divisor &&
         static_cast<const char*>(s.up.data) - static_cast<const char*>(s.x.data) == 2;
}

// Calls launch(a source of T) for the activation.
template <typename T, typename Launch>
cudaError_t with_activation(const Source& source, Launch launch) {
  switch (source.activation) {
    case Activation::silu:
      return launch(Gated<T, Silu>(source));
    case Activation::gelu_tanh:
      return launch(Gated<T, GeluTanh>(source));
    case Activation::clamped_swiglu:
      return interleaved(source) ? launch(Gated<T, ClampedSwiglu, true>(source))
                                 : launch(Gated<T, ClampedSwiglu>(source));
    case Activation::none:
      break;
  }
  return cudaErrorInvalidValue;
}

template <typename T, typename To>
cudaError_t launch_activation(const Source& source, const To& to, int64_t rows, int64_t cols, cudaStream_t stream) {
  return with_activation<T>(source,
                            [&](const auto& from) { return launch_gated<T>(from, to, rows, cols, stream); });
}

}  // namespace custom_ops
