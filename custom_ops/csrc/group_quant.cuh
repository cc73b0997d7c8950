// The launches of group quantization, of a usual rule or of any.
#pragma once

#include "activations.cuh"
#include "rows.cuh"

namespace custom_ops {

template <typename T, Usual U>
cudaError_t launch_group_quant(const Source& source, int64_t rows, int64_t cols, const Quantized& out,
                               cudaStream_t stream) {
  return for_row_slices(rows, cols, [&](int64_t first, int64_t count) {
    ToGroups<T, U> to{out};
    to.skip_rows(first, cols);
    const Source slice = rows_from(source, first);
    // To int8 activations are quantized by any rule: there a branch or two are no part of the time.
    if constexpr (U != Usual::int8) {
      if (source.activation != Activation::none) return launch_activation<T>(slice, to, count, cols, stream);
    }
    return launch_plain<T>(slice, to, count, cols, stream);
  });
}

// Few groups: a warp to each, and nothing in the way of its only load. The parameters that are read are few too, and
// come first, for a launch begins by reading them, a line of constants at a time.
constexpr int64_t kFewGrouped = int64_t{1} << 17;
constexpr int kFew = 4;  // elements of a thread

template <typename T, Usual U>
__global__ void __launch_bounds__(kThreads)
    few_groups_kernel(const T* x, uint8_t* codes, float* scale, uint32_t groups, uint32_t group_stride,
                      const __grid_constant__ QuantRule rule) {
  const uint32_t vec = blockIdx.x * static_cast<uint32_t>(kThreads) + threadIdx.x;
  const uint32_t group = vec / 32;
  if (group >= groups) return;
  const Vec<T, kFew> v[1] = {load_const<T, kFew>(x + vec * kFew)};
  uint32_t* code_at = reinterpret_cast<uint32_t*>(codes) + vec;
  float* scale_at = scale + group * group_stride;
  asm volatile("" : "+l"(code_at), "+l"(scale_at));  // as in ToGroups
  float amax[1];
  float scales[1];
  Codes<kFew> code[1];
  group_amax(v, 32 * kFew, rule.min_amax, amax);
  codes_of<U>(v, amax, rule, code, scales);
  store(code_at, code[0]);
  if (threadIdx.x % 32 == 0) store(scale_at, scales[0]);
}

// Does it serve? One row, or rows that can be taken as one.
template <typename T, Usual U>
bool few(const Source& source, int64_t rows, int64_t cols, const ToGroups<T, U>& to) {
  const Plain<T> from(source);
  const bool flat = from.x.stride == cols && from.x.inner.divisor == 0 && to.flat(cols);
  return source.activation == Activation::none && rows * cols > 0 && rows * cols < kFewGrouped &&
         (rows == 1 || flat) && from.vectorizable(cols);
}

template <typename T, Usual U>
cudaError_t launch_few(const Source& source, int64_t rows, int64_t cols, const Quantized& out, cudaStream_t stream) {
  const uint32_t groups = static_cast<uint32_t>(rows * cols >> out.group_shift);
  constexpr uint32_t kGroups = kThreads / 32;  // of a block
  few_groups_kernel<T, U><<<(groups + kGroups - 1) / kGroups, kThreads, 0, stream>>>(
      static_cast<const T*>(source.x.data), static_cast<uint8_t*>(out.codes), static_cast<float*>(out.scale), groups,
      static_cast<uint32_t>(out.group_stride), out.rule);
  return cudaGetLastError();
}

template <typename T, Usual U>
cudaError_t launch_usual(const Source& source, int64_t rows, int64_t cols, const Quantized& out,
                         cudaStream_t stream) {
  if (few<T, U>(source, rows, cols, {out})) return launch_few<T, U>(source, rows, cols, out, stream);
  return launch_group_quant<T, U>(source, rows, cols, out, stream);
}

}  // namespace custom_ops
