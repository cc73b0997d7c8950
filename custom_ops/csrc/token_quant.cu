// Quantization per token, of x or of an activation: a row stays in registers between its maximum and its codes.
#include "activations.cuh"
#include "sourced_rows.cuh"

namespace custom_ops {
namespace {

// Few short rows: a vector to a thread, and few parameters, as in few_groups_kernel.
constexpr int64_t kFewElementsOfTokens = int64_t{1} << 19;

// Which of the usual rules of tokens: those of groups, or torchao's.
Usual usual_of_tokens(const QuantRule& rule) {
  QuantRule as_it_comes = rule;
  as_it_comes.scale_in_input = false;
  if (rule.scale_in_input) as_it_comes.scale_divides = true;
  const Usual found = usual(as_it_comes);
  if (found != Usual::fp8) return Usual::no;
  return rule.scale_in_input ? Usual::fp8_in_input : found;
}

template <typename T, Usual U>
__global__ void __launch_bounds__(kMaxThreads)
    few_tokens_kernel(const T* x, uint8_t* codes, float* scale, uint32_t rows, uint32_t vecs,
                      const __grid_constant__ QuantRule rule) {
  const uint32_t row = blockIdx.x * blockDim.y + threadIdx.y;
  const bool has = row < rows && threadIdx.x < vecs;
  const uint32_t vec = row * vecs + threadIdx.x;
  const Vec<T> v[1] = {has ? load_const(x + vec * kVec) : zero_vec<T>()};
  uint2* code_at = reinterpret_cast<uint2*>(codes) + vec;
  float* scale_at = scale + row;
  asm volatile("" : "+l"(code_at), "+l"(scale_at));  // as in ToGroups
  const float amax[1] = {max_nan(from_bits<T>(row_max(largest_bits(v))), rule.min_amax)};
  float scales[1];
  uint2 code[1];
  codes_of<U>(v, amax, rule, code, scales);
  if (has) store(code_at, code[0]);
  if (row < rows && threadIdx.x == 0) store(scale_at, scales[0]);
}

template <typename T>
bool few(const Source& source, int64_t rows, int64_t cols) {
  const Plain<T> from(source);
  return rows * cols > 0 && rows * cols <= kFewElementsOfTokens && cols <= kMaxThreads * kVec &&
         (rows == 1 || (from.x.stride == cols && from.x.inner.divisor == 0)) && from.vectorizable(cols);
}

template <typename T, Usual U>
cudaError_t launch_few(const Source& source, int64_t rows, int64_t cols, const Quantized& out, cudaStream_t stream) {
  const unsigned vecs = static_cast<unsigned>(cols / kVec);
  unsigned threads = (vecs + kWarp - 1) / kWarp * kWarp;
  while (threads <= kWarp && threads / 2 >= vecs) threads /= 2;  // several rows per warp
  const unsigned rows_per_block = threads >= 128 ? 1 : 128 / threads;
  const unsigned blocks = static_cast<unsigned>((rows + rows_per_block - 1) / rows_per_block);
  few_tokens_kernel<T, U><<<blocks, dim3(threads, rows_per_block), 0, stream>>>(
      static_cast<const T*>(source.x.data), static_cast<uint8_t*>(out.codes), static_cast<float*>(out.scale),
      static_cast<uint32_t>(rows), vecs, out.rule);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const Source& source, int64_t rows, int64_t cols, const Quantized& out, cudaStream_t stream) {
  const RowToToken<T> to{out};
  if (source.activation == Activation::none) {
    const Usual rule = few<T>(source, rows, cols) ? usual_of_tokens(out.rule) : Usual::no;
    if (rule == Usual::fp8) return launch_few<T, Usual::fp8>(source, rows, cols, out, stream);
    if (rule == Usual::fp8_in_input) return launch_few<T, Usual::fp8_in_input>(source, rows, cols, out, stream);
    return launch_by_row<T>(Sourced<T, Plain<T>>{Plain<T>(source)}, to, rows, cols, 0, stream);
  }
  return with_activation<T>(source, [&](const auto& from) {
    using From = std::decay_t<decltype(from)>;
    return launch_by_row<T>(Sourced<T, From>{from}, to, rows, cols, kManyVecs, stream);
  });
}

}  // namespace

cudaError_t token_quant(Dtype dtype, const Source& source, int64_t rows, int64_t cols, const Quantized& out,
                        cudaStream_t stream) {
  return dtype == Dtype::bfloat16 ? launch<__nv_bfloat16>(source, rows, cols, out, stream)
                                  : launch<__half>(source, rows, cols, out, stream);
}

}  // namespace custom_ops
