// The ops of namespace custom_ops_cuda that are no producer with a scheme: blocks of weights, masked experts.
#include "op_arguments.h"

namespace {

using namespace custom_ops;

constexpr char kBlockQuant[] = "block_quant";
constexpr char kMasked[] = "silu_mul_group_quant_masked";
constexpr int64_t kBlock = 128;

// (x, the keywords of a scheme without a layout) -> (q, scale)
void block_quant_op(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Tensor x_tensor = arguments.tensor();
  QuantOptions options;
  take_keywords<Scheme::tensor>(arguments, options);
  const Dtype dtype = float16_of(kBlockQuant, "x", x_tensor);
  if (x_tensor.dim() != 2) fail(kBlockQuant, "x must have 2 dimensions, got ", x_tensor.dim());
  const int32_t device = x_tensor.device();
  const DeviceGuard guard(device);
  const Rows x = as_rows(kBlockQuant, "x", std::move(x_tensor));
  check_quant<Scheme::tensor>(kBlockQuant, options, x.keep, x.cols);

  const std::array<int64_t, 2> sizes{(x.rows + kBlock - 1) / kBlock, (x.cols + kBlock - 1) / kBlock};
  const std::array<int64_t, 2> strides{sizes[1] > 0 ? sizes[1] : 1, 1};
  Tensor codes = empty_contiguous(x.keep, options.dtype);
  Tensor scale = empty(sizes.data(), strides.data(), 2, aoti_torch_dtype_float32(), device);
  Quantized out{};
  out.rule = quant_rule(kBlockQuant, options, dtype);
  out.codes = codes.data();
  out.scale = scale.data();
  out.row_stride = strides[0];
  Source source{};
  source.x = x.matrix;
  check_launch(kBlockQuant, block_quant(dtype, source, x.rows, x.cols, out, current_stream(device)));
  put(stack[0], codes);
  put(stack[1], scale);
}

// (gate_up, counts, group_size, the keywords of groups) -> (q, scale)
void masked_op(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Tensor x = arguments.tensor();
  const Tensor counts = arguments.tensor();
  QuantOptions options;
  take_positional<Scheme::group>(arguments, options);
  take_keywords<Scheme::group>(arguments, options);
  const Dtype dtype = float16_of(kMasked, "gate_up", x);
  if (x.dim() != 3) fail(kMasked, "gate_up must have 3 dimensions, got ", x.dim());
  const int64_t experts = x.sizes()[0];
  const int64_t max_tokens = x.sizes()[1];
  const int64_t width = x.sizes()[2];
  if (width % 2 != 0) fail(kMasked, "the last dimension of gate_up must be even, got ", width);
  const int64_t cols = width / 2;
  check_quant<Scheme::group>(kMasked, options, x, cols);
  if (counts.dim() != 1 || counts.sizes()[0] != experts || counts.dtype() != aoti_torch_dtype_int32()) {
    fail(kMasked, "counts must be int32 of shape [", experts, "]");
  }
  if (counts.device_type() != aoti_torch_device_type_cuda() || counts.device() != x.device()) {
    fail(kMasked, "counts must be on the device of gate_up");
  }
  const int32_t device = x.device();
  const DeviceGuard guard(device);
  if (width > 1 && x.strides()[2] != 1) x = contiguous(x);

  MaskedArgs args{};
  const int64_t groups = describe_groups(options, quant_rule(kMasked, options, dtype), max_tokens, cols, args.out);
  const int64_t size = options.layout == "row_major" ? max_tokens : args.out.group_stride;
  args.scale_expert_stride = (size > 0 ? size : 1) * (groups > 0 ? groups : 1);
  const std::array<int64_t, 3> sizes{experts, max_tokens, cols};
  const std::array<int64_t, 3> scale_sizes{experts, max_tokens, groups};
  const std::array<int64_t, 3> scale_strides{args.scale_expert_stride, args.out.row_stride, args.out.group_stride};
  const int64_t row = cols > 0 ? cols : 1;
  const std::array<int64_t, 3> strides{(max_tokens > 0 ? max_tokens : 1) * row, row, 1};
  Tensor codes = empty(sizes.data(), strides.data(), 3, options.dtype, device);
  Tensor scale = empty(scale_sizes.data(), scale_strides.data(), 3, scale_dtype(args.out), device);
  args.out.codes = codes.data();
  args.out.scale = scale.data();
  args.gate_up = x.data();
  args.expert_stride = x.strides()[0];
  args.row_stride = x.strides()[1];
  args.counts = static_cast<const int32_t*>(counts.data());
  args.counts_stride = counts.strides()[0];
  args.experts = experts;
  args.max_tokens = max_tokens;
  args.cols = cols;
  check_launch(kMasked, silu_mul_group_quant_masked(dtype, args, current_stream(device)));
  put(stack[0], codes);
  put(stack[1], scale);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(custom_ops_cuda, m) {
  m.def(("block_quant(Tensor x, *, " + quant_keywords(Scheme::tensor) + ") -> (Tensor q, Tensor scale)").c_str());
  m.def(("silu_mul_group_quant_masked(Tensor gate_up, Tensor counts, int group_size, *, " +
         quant_keywords(Scheme::group, "column_major_tma") + ") -> (Tensor q, Tensor scale)")
            .c_str());
}

STABLE_TORCH_LIBRARY_IMPL(custom_ops_cuda, CUDA, m) {
  m.impl(kBlockQuant, &block_quant_op);
  m.impl(kMasked, &masked_op);
}
