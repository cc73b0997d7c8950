// RMSNorm, with an optional residual added first, for any sink of a row.
//
// The same row gives the same bits whatever the launch, so that batch, threads per row and alignment may
// choose freely. The order of the sum is fixed by cols alone:
//   vector   eight squares, as a fixed tree
//   chunk    32 vectors, by a butterfly (a narrower one adds only zeros less)
//   row      lane l of 32 adds chunks l, l + 32, ... in turn, then the same butterfly
#pragma once

#include "row_block.cuh"

namespace custom_ops {

struct Floats {
  float2 pair[kVec / 2];
};

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

__device__ __forceinline__ float shuffle_sum(float v, int lanes) {
  return v + __shfl_xor_sync(kAllLanes, v, lanes);
}

// Lanes with the bit keep b, the others a; each adds what its partner has of the same: one shuffle for both sums.
__device__ __forceinline__ float split_sum(float a, float b, int bit) {
  const bool upper = threadIdx.x & bit;
  return (upper ? b : a) + __shfl_xor_sync(kAllLanes, upper ? a : b, bit);
}

// The butterflies of V chunks. Lane l has the sum of chunk l * V / 32.
template <int V>
__device__ __forceinline__ float chunk_sums(const float (&s)[V], int threads) {
  static_assert(V == 1 || V == 2 || V == 4);
  float v;
  if constexpr (V == 1) {
    v = s[0];
#pragma unroll
    for (int o = kWarp / 2; o > 0; o /= 2) {
      if (o < threads) v = shuffle_sum(v, o);
    }
    return v;
  } else if constexpr (V == 2) {
    v = shuffle_sum(split_sum(s[0], s[1], 16), 8);
  } else {
    v = split_sum(split_sum(s[0], s[2], 16), split_sum(s[1], s[3], 16), 8);
  }
  return shuffle_sum(shuffle_sum(shuffle_sum(v, 4), 2), 1);
}

// The sum of a row from those of its chunks, in every lane of a warp.
__device__ __forceinline__ float sum_of_chunks(const float* chunks, int count) {
  const int lane = threadIdx.x % kWarp;
  float v = lane < count ? chunks[lane] : 0.0f;
#pragma unroll 1
  for (int c = lane + kWarp; c < count; c += kWarp) v += chunks[c];
#pragma unroll
  for (int o = kWarp / 2; o > 0; o /= 2) v = shuffle_sum(v, o);
  return v;
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

// The weights of one vector: T as in memory, or as the float32 that they are used as.
template <typename T, bool Float32>
using WeightVec = std::conditional_t<Float32, Floats, Vec<T>>;

template <typename T>
__device__ __forceinline__ Floats to_floats(const Vec<T>& v) {
  Floats out;
#pragma unroll
  for (int i = 0; i < kVec / 2; ++i) out.pair[i] = Packed<T>::to_float(v.pair[i]);
  return out;
}

// Of a float32 weight, 1 is added or -0, which changes nothing, -0 included.
__device__ __forceinline__ Floats offset(const Floats& w, WeightMode mode) {
  const float by = mode == WeightMode::float32_plus_one ? 1.0f : -0.0f;
  Floats out;
#pragma unroll
  for (int i = 0; i < kVec / 2; ++i) out.pair[i] = make_float2(__fadd_rn(by, w.pair[i].x), __fadd_rn(by, w.pair[i].y));
  return out;
}

template <typename T, bool Float32>
__device__ __forceinline__ WeightVec<T, Float32> load_weight(const Weight& weight, int64_t col) {
  if constexpr (Float32) {
    if (!weight.is_float32) return offset(to_floats(load_const(static_cast<const T*>(weight.data) + col)), weight.mode);
    const float4* const p = reinterpret_cast<const float4*>(static_cast<const float*>(weight.data) + col);
    const float4 low = __ldg(p);
    const float4 high = __ldg(p + 1);
    return offset({{{low.x, low.y}, {low.z, low.w}, {high.x, high.y}, {high.z, high.w}}}, weight.mode);
  } else {
    return load_const(static_cast<const T*>(weight.data) + col);
  }
}

template <typename T, bool Float32>
__device__ __forceinline__ WeightVec<T, Float32> load_weight_scalar(const Weight& weight, int64_t col,
                                                                    int64_t count) {
  if constexpr (Float32) {
    if (!weight.is_float32) {
      return offset(to_floats(load_scalar(static_cast<const T*>(weight.data) + col, count)), weight.mode);
    }
    const float* const p = static_cast<const float*>(weight.data) + col;
    Floats w;
#pragma unroll
    for (int i = 0; i < kVec / 2; ++i) {
      w.pair[i] = make_float2(2 * i < count ? p[2 * i] : 0.0f, 2 * i + 1 < count ? p[2 * i + 1] : 0.0f);
    }
    return offset(w, weight.mode);
  } else {
    return load_scalar(static_cast<const T*>(weight.data) + col, count);
  }
}

// The normalized vector in T.
//   rounded           round_T(weight * round_T(x * rstd))
//   float32           round_T((x * rstd) * weight)
//   float32_plus_one  round_T((x * rstd) * (1 + weight))
template <typename T, bool Float32>
__device__ __forceinline__ Vec<T> normalize(const Vec<T>& x, float rstd, const WeightVec<T, Float32>& w) {
  Vec<T> out;
#pragma unroll
  for (int i = 0; i < kVec / 2; ++i) {
    const float2 f = Packed<T>::to_float(x.pair[i]);
    const float a = f.x * rstd;
    const float b = f.y * rstd;
    if constexpr (Float32) {
      out.pair[i] = Packed<T>::from_float(a * w.pair[i].x, b * w.pair[i].y);
    } else {
      out.pair[i] = __hmul2(Packed<T>::from_float(a, b), w.pair[i]);
    }
  }
  return out;
}

// Correctly rounded throughout: CUDA's rsqrtf is up to 2 ulp off, and this is once per row.
__device__ __forceinline__ float reciprocal_rms(float sum, float cols, float eps) {
  return __frsqrt_rn(__fadd_rn(__fdiv_rn(sum, cols), eps));
}

// Makes the normalized row; with Add of x + residual, which it stores.
template <typename T, bool Add, bool Float32>
struct Norm {
  NormArgs args;
  float cols;  // as a float: of the device, a slow conversion

  explicit Norm(const NormArgs& given) : args(given), cols(static_cast<float>(given.cols)) {}

  bool vectorizable(int64_t width) const {
    return custom_ops::vectorizable(args.x, width) && aligned16(args.weight.data) &&
           (!Add || custom_ops::vectorizable(args.residual, width));
  }
  static size_t shared_bytes(int64_t vecs) { return (vecs + kWarp - 1) / kWarp * sizeof(float); }

  template <int V>
  __device__ __forceinline__ void fill(const RowPart& part, Vec<T> (&h)[V]) const {
    // Early, to be there when the sum is; of four vectors when its shuffles are over. Those that may be float32 are
    // too many registers to be early.
    constexpr bool kEarlyWeight = !Float32 && V < 4;
    constexpr bool kLateWeight = Float32;
    __shared__ float chunks[(V == 4 ? kMaxThreadsOfFour : kMaxThreads) / kWarp * V];
    Vec<T> residual[V];
    WeightVec<T, Float32> w[V];
    const int64_t row = part.exists ? part.row : 0;
    const T* const x = row_of<T>(args.x, row);
    const T* const residual_row = Add ? row_of<T>(args.residual, row) : nullptr;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      h[i] = part.has(i) ? load_const(x + part.col(i)) : zero_vec<T>();
      if (Add) residual[i] = part.has(i) ? load_const(residual_row + part.col(i)) : zero_vec<T>();
    }
    if (kEarlyWeight) load_weights(part, w);
    if (Add) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        h[i] = add(h[i], residual[i]);
        if (part.has(i)) store_vec(static_cast<T*>(args.residual_out) + row * part.cols + part.col(i), h[i]);
      }
    }

    float squares[V];
#pragma unroll
    for (int i = 0; i < V; ++i) squares[i] = sum_of_squares(h[i]);
    // Or the compiler keeps each element as the float that was squared too.
    if (V == 4) {
#pragma unroll
      for (int i = 0; i < V; ++i) hide(h[i]);
    }
    const int threads = blockDim.x;
    float total = chunk_sums(squares, threads);
    if (threads > kWarp) {
      const int warps = threads / kWarp;
      const int lane = threadIdx.x % kWarp;
      float* const mine = chunks + threadIdx.y * V * warps;
      if (lane % (kWarp / V) == 0) mine[lane * V / kWarp * warps + threadIdx.x / kWarp] = total;
      if (!kEarlyWeight && !kLateWeight) load_weights(part, w);
      __syncthreads();
      total = sum_of_chunks(mine, (part.vecs + kWarp - 1) / kWarp);
    } else {
      if (!kEarlyWeight && !kLateWeight) load_weights(part, w);
#pragma unroll
      for (int o = kWarp / 2; o >= kWarp / V; o /= 2) total = shuffle_sum(total, o);
    }
    const float rstd = reciprocal_rms(total, cols, args.eps);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (kLateWeight) w[i] = weight(part, i);
      // Zeros beyond the row stay zeros, also by an rstd of Inf or NaN: a sink may take the maximum of all.
      h[i] = normalize<T, Float32>(h[i], part.in_row(i) ? rstd : 0.0f, w[i]);
    }
  }

  // ---- the long way ----

  __device__ __forceinline__ float begin(const LongRow& row) const {
    extern __shared__ float long_chunks[];
    const T* const x = row_of<T>(args.x, row.row);
    const T* const residual = Add ? row_of<T>(args.residual, row.row) : nullptr;
#pragma unroll 1
    for (int64_t vec = threadIdx.x; vec < row.padded_vecs(); vec += blockDim.x) {
      const int64_t col = vec * kVec;
      const int64_t count = row.cols - col;
      Vec<T> h = load_any(x + col * args.x.col_stride, count, row.aligned, args.x.col_stride);
      if (Add) {
        h = add(h, load_any(residual + col * args.residual.col_stride, count, row.aligned, args.residual.col_stride));
        store_any(static_cast<T*>(args.residual_out) + row.row * row.cols + col, h, count, row.aligned);
      }
      const float squares[1] = {sum_of_squares(h)};
      const float sum = chunk_sums(squares, kWarp);
      if (threadIdx.x % kWarp == 0) long_chunks[vec / kWarp] = sum;
    }
    __syncthreads();
    return reciprocal_rms(sum_of_chunks(long_chunks, static_cast<int>(row.padded_vecs() / kWarp)), cols, args.eps);
  }

  __device__ __forceinline__ Vec<T> value(const LongRow& row, float rstd, int64_t col) const {
    const int64_t count = row.cols - col;
    // Of a residual, each thread reads what it wrote.
    const T* const from = Add ? static_cast<const T*>(args.residual_out) + row.row * row.cols + col
                              : row_of<T>(args.x, row.row) + col * args.x.col_stride;
    const Vec<T> h = load_any(from, count, row.aligned, Add ? 1 : args.x.col_stride);
    return only_first(normalize<T, Float32>(h, rstd, load_weight_scalar<T, Float32>(args.weight, col, count)), count);
  }

 private:
  // Zeros beyond the row, so that what is normalized there is zero too.
  __device__ __forceinline__ WeightVec<T, Float32> weight(const RowPart& part, int i) const {
    WeightVec<T, Float32> w = {};
    if (part.in_row(i)) w = load_weight<T, Float32>(args.weight, part.col(i));
    return w;
  }

  template <int V>
  __device__ __forceinline__ void load_weights(const RowPart& part, WeightVec<T, Float32> (&w)[V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) w[i] = weight(part, i);
  }
};

// With a residual two vectors are faster, of however many rows: 272 instead of 278 us at 16384 rows of 7168 columns.
template <typename T, bool Add, typename Sink>
cudaError_t launch_norm(const NormArgs& args, const Sink& sink, cudaStream_t stream) {
  constexpr int64_t kFours = Add ? INT64_MAX : 0;
  if (args.weight.mode == WeightMode::rounded) {
    return launch_by_row<T>(Norm<T, Add, false>(args), sink, args.rows, args.cols, kFours, stream);
  }
  return launch_by_row<T>(Norm<T, Add, true>(args), sink, args.rows, args.cols, kFours, stream);
}

template <typename T, typename Sink>
cudaError_t launch_norm(const NormArgs& args, const Sink& sink, cudaStream_t stream) {
  return args.residual.data != nullptr ? launch_norm<T, true>(args, sink, stream)
                                       : launch_norm<T, false>(args, sink, stream);
}

// The norm to args.out, and to a sink.
template <typename T, typename Sink>
cudaError_t launch_norm_and(const NormArgs& args, const Sink& sink, cudaStream_t stream) {
  return launch_norm<T>(args, RowStoreAnd<T, Sink>{{static_cast<T*>(args.out)}, sink}, stream);
}

}  // namespace custom_ops
