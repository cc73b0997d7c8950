// RMSNorm, with an optional residual added first and an optional group quantization of the result. Memory is
// passed over once: a row stays in registers between its sum of squares and its use.
//
// The same row gives the same bits whatever the launch, so that batch, threads per row and alignment may
// choose freely. The order of the sum is fixed by cols alone:
//   vector   eight squares, as a fixed tree
//   chunk    32 vectors, by a butterfly (a narrower one adds only zeros less)
//   row      lane l of 32 adds chunks l, l + 32, ... in turn, then the same butterfly
#include "fp8.cuh"
#include "kernels.h"

namespace custom_ops {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
// Without a residual a row brings half the bytes, and with two vectors each too few rows fit on a multiprocessor to
// hide the latency: 16384 x 7168 with quantization took 183 us, at 1.9 of 3.0 TB/s. So four vectors each there (without
// quantization that would spill).
constexpr int kFourVecsThreads = 256;
constexpr int kMaxSharedFloats = 12288;  // 48 KiB, what every launch may have: one float per 256 columns

__device__ __forceinline__ float butterfly_sum(float v, int lanes) {
  for (int o = lanes / 2; o > 0; o /= 2) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}

template <typename T>
__device__ __forceinline__ float sum_of_squares(const Vec<T>& v) {
  float s[kVec / 2];
#pragma unroll
  for (int i = 0; i < kVec / 2; ++i) {
    const float2 f = Packed<T>::to_float(v.pair[i]);
    s[i] = fmaf(f.x, f.x, f.y * f.y);
  }
  return (s[0] + s[1]) + (s[2] + s[3]);
}

// round_T(a + b). One rounding of the exact sum equals rounding by way of float32, which has more than twice
// the digits of either type.
template <typename T>
__device__ __forceinline__ Vec<T> add(const Vec<T>& a, const Vec<T>& b) {
  Vec<T> out;
#pragma unroll
  for (int i = 0; i < kVec / 2; ++i) out.pair[i] = __hadd2(a.pair[i], b.pair[i]);
  return out;
}

// The weights of one vector, as they are in memory: 16 bytes of T, or 32 of float32.
template <typename T>
struct WeightVec {
  Vec<T> narrow;
  float4 wide[2];
};

template <typename T, bool Float32>
__device__ __forceinline__ WeightVec<T> load_weight(const Weight& weight, int64_t col) {
  WeightVec<T> w;
  if (Float32 && weight.is_float32) {
    const float4* const p = reinterpret_cast<const float4*>(static_cast<const float*>(weight.data) + col);
    w.wide[0] = __ldg(p);
    w.wide[1] = __ldg(p + 1);
  } else {
    const uint4 u = __ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(weight.data) + col));
    w.narrow = *reinterpret_cast<const Vec<T>*>(&u);
  }
  return w;
}

template <typename T>
__device__ __forceinline__ WeightVec<T> load_weight_scalar(const Weight& weight, int64_t col, int64_t count) {
  WeightVec<T> w;
  if (weight.is_float32) {
    const float* const p = static_cast<const float*>(weight.data) + col;
#pragma unroll
    for (int i = 0; i < kVec; ++i) reinterpret_cast<float*>(w.wide)[i] = i < count ? p[i] : 0.0f;
  } else {
    w.narrow = load_scalar(static_cast<const T*>(weight.data) + col, count);
  }
  return w;
}

// The normalized vector in T.
//   rounded           round_T(weight * round_T(x * rstd))
//   float32           round_T((x * rstd) * weight)
//   float32_plus_one  round_T((x * rstd) * (1 + weight))
// float32 adds -0 to the weight, which changes nothing, -0 included.
template <typename T, bool Float32>
__device__ __forceinline__ Vec<T> normalize(const Vec<T>& x, float rstd, const WeightVec<T>& w,
                                            const Weight& weight) {
  const float offset = weight.mode == WeightMode::float32_plus_one ? 1.0f : -0.0f;
  Vec<T> out;
#pragma unroll
  for (int i = 0; i < kVec / 2; ++i) {
    const float2 f = Packed<T>::to_float(x.pair[i]);
    const float a = f.x * rstd;
    const float b = f.y * rstd;
    if (Float32) {
      float2 m = Packed<T>::to_float(w.narrow.pair[i]);
      if (weight.is_float32) {
        m = make_float2(reinterpret_cast<const float*>(w.wide)[2 * i],
                        reinterpret_cast<const float*>(w.wide)[2 * i + 1]);
      }
      out.pair[i] = Packed<T>::from_float(a * __fadd_rn(offset, m.x), b * __fadd_rn(offset, m.y));
    } else {
      out.pair[i] = __hmul2(Packed<T>::from_float(a, b), w.narrow.pair[i]);
    }
  }
  return out;
}

// Correctly rounded throughout: CUDA's rsqrtf is up to 2 ulp off, and this is once per row.
__device__ __forceinline__ float reciprocal_rms(float sum, int64_t cols, float eps) {
  return __frsqrt_rn(__fadd_rn(__fdiv_rn(sum, static_cast<float>(cols)), eps));
}

// blockDim.x threads (a power of two up to 32, or a multiple of 32) share a row and hold V vectors each;
// blockDim.y rows share a block.
template <typename T, int V, bool Add, bool Quant, bool Float32>
__global__ void __launch_bounds__(V == 4 ? kFourVecsThreads : kMaxThreads, V == 4 ? 5 : 1) norm_kernel(NormArgs p) {
  static_assert(V == 1 || V == 2 || V == 4);
  // Early, to be there when the sum is; float32 weights and those of four vectors are too many registers.
  constexpr bool kEarlyWeight = !Float32 && V < 4;
  __shared__ float chunks[kMaxThreads / kWarp * V];
  const int threads = blockDim.x;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int vecs = static_cast<int>(p.cols / kVec);

  Vec<T> h[V];
  Vec<T> residual[V];
  WeightVec<T> w[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int vec = threadIdx.x + i * threads;
    const bool active = row < p.rows && vec < vecs;
    const int64_t col = static_cast<int64_t>(vec) * kVec;
    h[i] = active ? load_const(static_cast<const T*>(p.x.data) + row * p.x.stride + col) : zero_vec<T>();
    if (Add) {
      residual[i] = active ? load_const(static_cast<const T*>(p.residual.data) + row * p.residual.stride + col)
                           : zero_vec<T>();
    }
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int vec = threadIdx.x + i * threads;
    if (kEarlyWeight && vec < vecs) w[i] = load_weight<T, Float32>(p.weight, static_cast<int64_t>(vec) * kVec);
  }
  if (Add) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int vec = threadIdx.x + i * threads;
      h[i] = add(h[i], residual[i]);
      if (row < p.rows && vec < vecs) {
        store_vec(static_cast<T*>(p.residual_out) + row * p.cols + static_cast<int64_t>(vec) * kVec, h[i]);
      }
    }
  }

  float sum[V];
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] = butterfly_sum(sum_of_squares(h[i]), min(threads, kWarp));
  float total;
  if (V < 4 && threads <= kWarp) {
    total = V == 1 ? sum[0] : sum[0] + sum[V - 1];  // what the row's butterfly makes of one or two chunks
  } else {
    const int warps = threads / kWarp;
    const int lane = threadIdx.x % kWarp;
    const int num_chunks = (vecs + kWarp - 1) / kWarp;
    float* const mine = chunks + threadIdx.y * V * warps;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (lane == 0) mine[i * warps + threadIdx.x / kWarp] = sum[i];
    }
    __syncthreads();
    total = 0.0f;
    for (int c = lane; c < num_chunks; c += kWarp) total += mine[c];
    total = butterfly_sum(total, kWarp);
  }
  const float rstd = reciprocal_rms(total, p.cols, p.eps);

#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int vec = threadIdx.x + i * threads;
    if (!kEarlyWeight && vec < vecs) w[i] = load_weight<T, Float32>(p.weight, static_cast<int64_t>(vec) * kVec);
    h[i] = normalize<T, Float32>(h[i], rstd, w[i], p.weight);
  }
  uint2 codes[V];
  float scale[V];
  if (Quant) group_quantize(h, p.quantized.group_size, p.quantized.min_amax, codes, scale);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int vec = threadIdx.x + i * threads;
    const int64_t col = static_cast<int64_t>(vec) * kVec;
    if (row >= p.rows || vec >= vecs) continue;
    if (Quant) {
      const uint2 code[1] = {codes[i]};
      const float one[1] = {scale[i]};
      store_quantized(code, one, quantized_at(p.quantized, row, col, p.cols), 1, p.cols, p.quantized);
    } else {
      store_vec(static_cast<T*>(p.out) + row * p.cols + col, h[i]);
    }
  }
}

// Any alignment and any number of columns, a block per row, two passes over memory. Same order of the sum.
template <typename T>
__device__ __forceinline__ Vec<T> load_any(const T* p, int64_t count, bool aligned) {
  if (aligned && count >= kVec) return *reinterpret_cast<const Vec<T>*>(p);
  return load_scalar(p, count);
}

template <typename T>
__device__ __forceinline__ void store_any(T* p, const Vec<T>& v, int64_t count, bool aligned) {
  if (aligned && count >= kVec) {
    store_vec(p, v);
  } else {
    store_scalar(p, v, count);
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) norm_any_kernel(NormArgs p, bool aligned) {
  extern __shared__ float chunks[];
  const int64_t row = blockIdx.x;
  const int64_t vecs = (p.cols + kVec - 1) / kVec;
  const int64_t padded = (vecs + kWarp - 1) / kWarp * kWarp;  // whole warps, for the shuffles
  const int lane = threadIdx.x % kWarp;
  const T* const x = static_cast<const T*>(p.x.data) + row * p.x.stride;
  const T* const residual = static_cast<const T*>(p.residual.data) + row * p.residual.stride;
  T* const residual_out = static_cast<T*>(p.residual_out) + row * p.cols;

  for (int64_t vec = threadIdx.x; vec < padded; vec += blockDim.x) {
    const int64_t col = vec * kVec;
    Vec<T> h = load_any(x + col, p.cols - col, aligned);
    if (p.residual.data != nullptr) {
      h = add(h, load_any(residual + col, p.cols - col, aligned));
      store_any(residual_out + col, h, p.cols - col, aligned);
    }
    const float sum = butterfly_sum(sum_of_squares(h), kWarp);
    if (lane == 0) chunks[vec / kWarp] = sum;
  }
  __syncthreads();
  float total = 0.0f;
  for (int64_t c = lane; c < padded / kWarp; c += kWarp) total += chunks[c];
  const float rstd = reciprocal_rms(butterfly_sum(total, kWarp), p.cols, p.eps);

  const T* const again = p.residual.data != nullptr ? residual_out : x;  // each thread reads what it wrote
  for (int64_t vec = threadIdx.x; vec < padded; vec += blockDim.x) {
    const int64_t col = vec * kVec;
    const Vec<T> h = load_any(again + col, p.cols - col, aligned);
    const WeightVec<T> w = load_weight_scalar<T>(p.weight, col, p.cols - col);
    const Vec<T> y = p.weight.mode == WeightMode::rounded ? normalize<T, false>(h, rstd, w, p.weight)
                                                          : normalize<T, true>(h, rstd, w, p.weight);
    if (p.out == nullptr) {
      const Vec<T> one[1] = {y};
      uint2 codes[1];
      float scale[1];
      group_quantize(one, p.quantized.group_size, p.quantized.min_amax, codes, scale);
      if (vec >= vecs) continue;
      store_quantized(codes, scale, quantized_at(p.quantized, row, col, p.cols), 1, p.cols, p.quantized);
    } else {
      store_any(static_cast<T*>(p.out) + row * p.cols + col, y, p.cols - col, aligned);
    }
  }
}

template <typename T, int V, bool Add, bool Quant>
void launch_weight(const NormArgs& p, dim3 grid, dim3 block, cudaStream_t stream) {
  if (p.weight.mode == WeightMode::rounded) {
    norm_kernel<T, V, Add, Quant, false><<<grid, block, 0, stream>>>(p);
  } else {
    norm_kernel<T, V, Add, Quant, true><<<grid, block, 0, stream>>>(p);
  }
}

template <typename T, int V>
void launch_vecs(const NormArgs& p, dim3 grid, dim3 block, cudaStream_t stream) {
  const bool quant = p.out == nullptr;
  if constexpr (V == 4) {
    launch_weight<T, V, false, true>(p, grid, block, stream);
  } else if (p.residual.data != nullptr) {
    quant ? launch_weight<T, V, true, true>(p, grid, block, stream)
          : launch_weight<T, V, true, false>(p, grid, block, stream);
  } else {
    quant ? launch_weight<T, V, false, true>(p, grid, block, stream)
          : launch_weight<T, V, false, false>(p, grid, block, stream);
  }
}

// Rows from which half the threads, with two vectors each, are faster: 7168 columns on an H100 take 275 instead of
// 281 us at 16384 rows, but 3.3 instead of 3.1 us at 16.
constexpr int64_t kManyRows = 256;

template <typename T>
cudaError_t launch(const NormArgs& p, cudaStream_t stream) {
  const int64_t vecs = (p.cols + kVec - 1) / kVec;
  const bool aligned = vectorizable(p.x.data, p.x.stride, p.cols) && aligned16(p.weight.data) &&
                       (p.residual.data == nullptr || vectorizable(p.residual.data, p.residual.stride, p.cols));
  const auto whole_warps = [](int64_t n) { return static_cast<unsigned>((n + kWarp - 1) / kWarp * kWarp); };
  if (!aligned || vecs > 2 * kMaxThreads) {
    const int64_t chunks = (vecs + kWarp - 1) / kWarp;
    if (chunks > kMaxSharedFloats) return cudaErrorInvalidValue;
    const unsigned threads = vecs < kMaxThreads ? whole_warps(vecs) : kMaxThreads;
    norm_any_kernel<T><<<static_cast<unsigned>(p.rows), threads, chunks * sizeof(float), stream>>>(p, aligned);
    return cudaGetLastError();
  }
  const bool two = vecs > kMaxThreads || (p.rows >= kManyRows && vecs >= 2 * kWarp);
  const bool quant_only = p.residual.data == nullptr && p.out == nullptr;
  const bool four = two && quant_only && vecs >= 8 * kWarp && vecs <= 4 * kFourVecsThreads;
  unsigned threads = whole_warps(four ? (vecs + 3) / 4 : two ? (vecs + 1) / 2 : vecs);
  while (threads <= kWarp && threads / 2 >= vecs) threads /= 2;  // several rows per warp
  const unsigned rows_per_block = threads >= 128 ? 1 : 128 / threads;
  const dim3 grid(static_cast<unsigned>((p.rows + rows_per_block - 1) / rows_per_block));
  const dim3 block(threads, rows_per_block);
  if (four) {
    launch_vecs<T, 4>(p, grid, block, stream);
  } else if (two) {
    launch_vecs<T, 2>(p, grid, block, stream);
  } else {
    launch_vecs<T, 1>(p, grid, block, stream);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t rms_norm(Dtype dtype, const NormArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.cols == 0) return cudaSuccess;
  return dtype == Dtype::bfloat16 ? launch<__nv_bfloat16>(args, stream) : launch<__half>(args, stream);
}

}  // namespace custom_ops
