// The ops of namespace custom_ops_cuda that bring tokens to experts and back.
#include "moe_arguments.h"

namespace {

using namespace custom_ops;

constexpr char kAlign[] = "moe_align_block_size";
constexpr char kAlignQuant[] = "moe_align_group_quant";
constexpr char kPermute[] = "moe_permute";
constexpr char kPermuteQuant[] = "moe_permute_group_quant";
constexpr char kUnpermute[] = "moe_unpermute";
constexpr char kReduce[] = "moe_reduce";

// ---- pairs by expert ------------------------------------------------------------------------------------

// The ids of pairs, and what has to live as long as they are read.
struct Pairs {
  Tensor ids;
  Tensor map;
  Ids raw;
  int64_t tokens;
  int64_t top_k;
};

Pairs pairs_of(const char* op, Tensor ids, int64_t experts, Tensor map, int32_t device) {
  if (ids.dim() != 2) fail(op, "topk_ids must have 2 dimensions, got ", ids.dim());
  check_cuda(op, "topk_ids", ids, device);
  Ids raw{};
  raw.int64 = ids.dtype() == aoti_torch_dtype_int64();
  if (!raw.int64 && ids.dtype() != aoti_torch_dtype_int32()) fail(op, "topk_ids must be int32 or int64");
  if (experts < 1) fail(op, "num_experts must be 1 or more, got ", experts);
  const int64_t tokens = ids.sizes()[0];
  const int64_t top_k = ids.sizes()[1];
  if (top_k < 1) fail(op, "the last dimension of topk_ids must be 1 or more, got 0");
  const bool dense = (top_k == 1 || ids.strides()[1] == 1) && (tokens <= 1 || ids.strides()[0] == top_k);
  if (!dense) ids = contiguous(ids);
  raw.data = ids.data();
  raw.known = experts;
  raw.experts = static_cast<int>(experts < INT32_MAX ? experts : INT32_MAX);
  if (map.get() != nullptr) {
    check_cuda(op, "expert_map", map, device);
    if (map.dim() != 1 || map.dtype() != aoti_torch_dtype_int32()) fail(op, "expert_map must be int32 of 1 dimension");
    raw.map = static_cast<const int32_t*>(map.data());
    raw.map_stride = map.strides()[0];
    raw.known = map.sizes()[0];
  }
  return {std::move(ids), std::move(map), raw, tokens, top_k};
}

Tensor empty_int32(int64_t size, int32_t device) {
  const int64_t one = 1;
  return empty(&size, &one, 1, aoti_torch_dtype_int32(), device);
}

// As padded_rows in align_reference.py.
AlignArgs align_args(const char* op, const Pairs& pairs, int64_t block_size) {
  constexpr int64_t kMost = int64_t{1} << 30;
  const int64_t count = pairs.tokens * pairs.top_k;
  const int64_t experts = pairs.raw.experts;
  if (experts > kMostAlignedExperts) fail(op, "takes at most ", kMostAlignedExperts, " experts, got ", experts);
  if (block_size < 1 || block_size > kMost) fail(op, "blocks must be of 1 to 2^30 rows, got ", block_size);
  if (count > kMost) fail(op, "takes at most 2^30 pairs, got ", count);
  const int64_t used = count < experts ? count : experts;
  const int64_t rows = (count + used * (block_size - 1)) / block_size * block_size;
  if (rows > INT32_MAX) fail(op, "takes at most 2^31 - 1 rows, got ", rows);
  AlignArgs args{};
  args.ids = pairs.raw;
  args.pairs = static_cast<int32_t>(count);
  args.block_size = static_cast<int32_t>(block_size);
  args.rows = static_cast<int32_t>(rows);
  plan_align(args);
  return args;
}

int32_t* int32s(const Tensor& t) { return static_cast<int32_t*>(t.data()); }

void launch_align(const char* op, AlignArgs& args, int32_t device, cudaStream_t stream) {
  Tensor counts;  // which may go when the kernels are enqueued: its memory is reused in their stream
  if (args.blocks > 1) {
    counts = empty_int32(int64_t{args.blocks} * args.ids.experts, device);
    args.counts = int32s(counts);
  }
  check_launch(op, moe_align(args, stream));
}

struct Blocks {
  Tensor sorted_ids;
  Tensor block_experts;
  Tensor num_padded;
  AlignArgs args;
};

Blocks empty_blocks(const char* op, const Pairs& pairs, int64_t block_size, int32_t device) {
  const AlignArgs args = align_args(op, pairs, block_size);
  Blocks out{empty_int32(args.rows, device), empty_int32(args.rows / block_size, device), empty_int32(1, device), args};
  out.args.slots = int32s(out.sorted_ids);
  out.args.fill = args.pairs;
  out.args.block_experts = int32s(out.block_experts);
  out.args.num_padded = int32s(out.num_padded);
  return out;
}

// (topk_ids, block_size, num_experts, expert_map) -> (sorted_ids, block_experts, num_padded)
void align_op(StableIValue* stack, uint64_t, uint64_t) {
  MoeArguments arguments(stack);
  Tensor ids = arguments.tensor();
  const int64_t block_size = arguments.integer();
  const int64_t experts = arguments.integer();
  Tensor map = arguments.optional_tensor();
  if (ids.device_type() != aoti_torch_device_type_cuda()) fail(kAlign, "topk_ids must be on a CUDA device");
  const int32_t device = ids.device();
  const DeviceGuard guard(device);
  const Pairs pairs = pairs_of(kAlign, std::move(ids), experts, std::move(map), device);
  Blocks out = empty_blocks(kAlign, pairs, block_size, device);
  out.args.next_waits = true;  // the grouped products, which only ask for weights before
  launch_align(kAlign, out.args, device, current_stream(device));
  put(stack[0], out.sorted_ids);
  put(stack[1], out.block_experts);
  put(stack[2], out.num_padded);
}

// ---- tokens to rows and back ----------------------------------------------------------------------------

struct Indices {
  Tensor row_of_pair;
  Tensor row_experts;
  Tensor offsets;
  AlignArgs args;
};

Indices empty_indices(const char* op, const Pairs& pairs, int64_t align, int32_t device) {
  AlignArgs args = align_args(op, pairs, align);
  Indices out{empty_int32(args.pairs, device), empty_int32(args.rows, device),
              empty_int32(int64_t{args.ids.experts} + 1, device), args};
  out.args.slots = int32s(out.row_experts);
  out.args.fill = -1;
  out.args.slots_are_experts = true;
  out.args.row_of_pair = int32s(out.row_of_pair);
  out.args.offsets = int32s(out.offsets);
  return out;
}

Rows tokens_of(const char* op, Tensor x, const Pairs& pairs) {
  if (x.dim() != 2) fail(op, "x must have 2 dimensions, got ", x.dim());
  if (x.sizes()[0] != pairs.tokens) fail(op, "topk_ids must have a row for each of the ", x.sizes()[0], " tokens of x");
  return as_rows(op, "x", std::move(x));
}

// (x, topk_ids, num_experts, align, expert_map) -> (rows, row_of_pair, row_experts, offsets)
void permute_op(StableIValue* stack, uint64_t, uint64_t) {
  MoeArguments arguments(stack);
  Tensor x_tensor = arguments.tensor();
  Tensor ids = arguments.tensor();
  const int64_t experts = arguments.integer();
  const int64_t align = arguments.integer();
  Tensor map = arguments.optional_tensor();
  const Dtype dtype = float16_of(kPermute, "x", x_tensor);
  const int32_t device = x_tensor.device();
  const DeviceGuard guard(device);
  const Pairs pairs = pairs_of(kPermute, std::move(ids), experts, std::move(map), device);
  const Rows x = tokens_of(kPermute, std::move(x_tensor), pairs);
  Indices out = empty_indices(kPermute, pairs, align, device);
  const std::array<int64_t, 2> sizes{out.args.rows, x.cols};
  const std::array<int64_t, 2> strides{x.cols > 0 ? x.cols : 1, 1};
  Tensor rows = empty(sizes.data(), strides.data(), 2, x.keep.dtype(), device);
  const cudaStream_t stream = current_stream(device);
  launch_align(kPermute, out.args, device, stream);
  check_launch(kPermute, moe_copy_rows(dtype, x.matrix, x.rows, x.cols, out.args.row_of_pair,
                                       static_cast<int>(pairs.top_k), rows.data(), stream));
  put(stack[0], rows);
  put(stack[1], out.row_of_pair);
  put(stack[2], out.row_experts);
  put(stack[3], out.offsets);
}

// (x, topk_ids, num_experts, group_size, align, expert_map, the keywords of groups)
// -> (codes, scale, row_of_pair, row_experts, offsets)
void permute_quant_op(StableIValue* stack, uint64_t, uint64_t) {
  MoeArguments arguments(stack);
  Tensor x_tensor = arguments.tensor();
  Tensor ids = arguments.tensor();
  const int64_t experts = arguments.integer();
  QuantOptions options;
  options.group_size = arguments.integer();
  const int64_t align = arguments.integer();
  Tensor map = arguments.optional_tensor();
  Arguments keywords = arguments.rest();
  take_keywords<Scheme::group>(keywords, options);
  const Dtype dtype = float16_of(kPermuteQuant, "x", x_tensor);
  const int32_t device = x_tensor.device();
  const DeviceGuard guard(device);
  const Pairs pairs = pairs_of(kPermuteQuant, std::move(ids), experts, std::move(map), device);
  const Rows x = tokens_of(kPermuteQuant, std::move(x_tensor), pairs);
  check_quant<Scheme::group>(kPermuteQuant, options, x.keep, x.cols);
  Indices out = empty_indices(kPermuteQuant, pairs, align, device);

  Quantized raw{};
  const int64_t groups =
      describe_groups(options, quant_rule(kPermuteQuant, options, dtype), out.args.rows, x.cols, raw);
  const std::array<int64_t, 2> sizes{out.args.rows, x.cols};
  const std::array<int64_t, 2> strides{x.cols > 0 ? x.cols : 1, 1};
  const std::array<int64_t, 2> scale_sizes{out.args.rows, groups};
  const std::array<int64_t, 2> scale_strides{raw.row_stride, raw.group_stride};
  Tensor codes = empty(sizes.data(), strides.data(), 2, options.dtype, device);
  Tensor scale = empty(scale_sizes.data(), scale_strides.data(), 2, scale_dtype(raw), device);
  raw.codes = codes.data();
  raw.scale = scale.data();
  const cudaStream_t stream = current_stream(device);
  launch_align(kPermuteQuant, out.args, device, stream);
  check_launch(kPermuteQuant, moe_quantize_rows(dtype, x.matrix, x.rows, x.cols, out.args.row_of_pair,
                                                static_cast<int>(pairs.top_k), raw, stream));
  put(stack[0], codes);
  put(stack[1], scale);
  put(stack[2], out.row_of_pair);
  put(stack[3], out.row_experts);
  put(stack[4], out.offsets);
}

// (x, topk_ids, block_size, num_experts, group_size, expert_map, the keywords of groups)
// -> (codes, scale, sorted_ids, block_experts, num_padded)
void align_quant_op(StableIValue* stack, uint64_t, uint64_t) {
  MoeArguments arguments(stack);
  Tensor x_tensor = arguments.tensor();
  Tensor ids = arguments.tensor();
  const int64_t block_size = arguments.integer();
  const int64_t experts = arguments.integer();
  QuantOptions options;
  options.group_size = arguments.integer();
  Tensor map = arguments.optional_tensor();
  Arguments keywords = arguments.rest();
  take_keywords<Scheme::group>(keywords, options);
  const Dtype dtype = float16_of(kAlignQuant, "x", x_tensor);
  const int32_t device = x_tensor.device();
  const DeviceGuard guard(device);
  const Pairs pairs = pairs_of(kAlignQuant, std::move(ids), experts, std::move(map), device);
  const Rows x = tokens_of(kAlignQuant, std::move(x_tensor), pairs);
  check_quant<Scheme::group>(kAlignQuant, options, x.keep, x.cols);
  Blocks out = empty_blocks(kAlignQuant, pairs, block_size, device);
  Source source{};
  source.activation = Activation::none;
  source.x = x.matrix;
  Quantized raw{};
  // before the scratch of the sort is made and goes again, in whose memory this would else begin to write
  QuantOut quantized = empty_groups(x, options, quant_rule(kAlignQuant, options, dtype), raw);
  const cudaStream_t stream = current_stream(device);
  launch_align(kAlignQuant, out.args, device, stream);
  raw.beside = true;
  check_launch(kAlignQuant, group_quant(dtype, source, x.rows, x.cols, raw, stream));
  put(stack[0], quantized.codes);
  put(stack[1], quantized.scale);
  put(stack[2], out.sorted_ids);
  put(stack[3], out.block_experts);
  put(stack[4], out.num_padded);
}

// The sum over the pairs of each token, once `p` says which rows they have.
Tensor weighted_sum(const char* op, Dtype dtype, SumArgs& p, const Rows& rows, const Tensor& weights, int64_t pairs) {
  const int32_t device = rows.keep.device();
  check_cuda(op, "topk_weights", weights, device);
  if (weights.dim() != 2) fail(op, "topk_weights must have 2 dimensions, got ", weights.dim());
  p.weights_are_float32 = weights.dtype() == aoti_torch_dtype_float32();
  if (!p.weights_are_float32 && weights.dtype() != rows.keep.dtype()) {
    fail(op, "topk_weights must be float32 or of the dtype of the rows");
  }
  p.tokens = weights.sizes()[0];
  p.top_k = static_cast<int>(weights.sizes()[1]);
  if (p.top_k < 1 || p.tokens * p.top_k != pairs) fail(op, "topk_weights must have one for each of ", pairs, " pairs");
  p.rows = rows.matrix;
  p.cols = rows.cols;
  p.weights = weights.data();
  p.weight_stride = weights.strides()[0];
  p.weight_step = weights.strides()[1];
  const std::array<int64_t, 2> sizes{p.tokens, p.cols};
  const std::array<int64_t, 2> strides{p.cols > 0 ? p.cols : 1, 1};
  Tensor out = empty(sizes.data(), strides.data(), 2, rows.keep.dtype(), device);
  p.out = out.data();
  check_launch(op, moe_sum(dtype, p, current_stream(device)));
  return out;
}

// (rows, row_of_pair, topk_weights) -> out
void unpermute_op(StableIValue* stack, uint64_t, uint64_t) {
  MoeArguments arguments(stack);
  Tensor rows_tensor = arguments.tensor();
  const Tensor row_of_pair = arguments.tensor();
  const Tensor weights = arguments.tensor();
  const Dtype dtype = float16_of(kUnpermute, "rows", rows_tensor);
  if (rows_tensor.dim() != 2) fail(kUnpermute, "rows must have 2 dimensions, got ", rows_tensor.dim());
  const int32_t device = rows_tensor.device();
  const DeviceGuard guard(device);
  check_cuda(kUnpermute, "row_of_pair", row_of_pair, device);
  if (row_of_pair.dim() != 1 || row_of_pair.dtype() != aoti_torch_dtype_int32()) {
    fail(kUnpermute, "row_of_pair must be int32 of 1 dimension");
  }
  if (row_of_pair.sizes()[0] > 1 && row_of_pair.strides()[0] != 1) fail(kUnpermute, "row_of_pair must be contiguous");
  const Rows rows = as_rows(kUnpermute, "rows", std::move(rows_tensor));
  SumArgs p{};
  p.row_of_pair = int32s(row_of_pair);
  Tensor out = weighted_sum(kUnpermute, dtype, p, rows, weights, row_of_pair.sizes()[0]);
  put(stack[0], out);
}

// (y, topk_weights, topk_ids, num_experts, expert_map) -> out
void reduce_op(StableIValue* stack, uint64_t, uint64_t) {
  MoeArguments arguments(stack);
  Tensor y_tensor = arguments.tensor();
  const Tensor weights = arguments.tensor();
  Tensor ids = arguments.optional_tensor();
  const int64_t experts = arguments.integer();
  Tensor map = arguments.optional_tensor();
  const Dtype dtype = float16_of(kReduce, "y", y_tensor);
  if (y_tensor.dim() != 2) fail(kReduce, "y must have 2 dimensions, got ", y_tensor.dim());
  const int32_t device = y_tensor.device();
  const DeviceGuard guard(device);
  SumArgs p{};
  Pairs pairs{};
  if (ids.get() != nullptr) {
    pairs = pairs_of(kReduce, std::move(ids), experts, std::move(map), device);
    if (pairs.tokens * pairs.top_k != y_tensor.sizes()[0]) fail(kReduce, "topk_ids must have an id for each row of y");
    p.ids = pairs.raw;
  }
  const int64_t count = y_tensor.sizes()[0];
  const Rows y = as_rows(kReduce, "y", std::move(y_tensor));
  Tensor out = weighted_sum(kReduce, dtype, p, y, weights, count);
  put(stack[0], out);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(custom_ops_cuda, m) {
  m.def("moe_align_block_size(Tensor topk_ids, int block_size, int num_experts, *, Tensor? expert_map=None)"
        " -> (Tensor sorted_ids, Tensor block_experts, Tensor num_padded)");
  m.def(("moe_align_group_quant(Tensor x, Tensor topk_ids, int block_size, int num_experts, int group_size, *,"
         " Tensor? expert_map=None, " +
         quant_keywords(Scheme::group) +
         ") -> (Tensor codes, Tensor scale, Tensor sorted_ids, Tensor block_experts, Tensor num_padded)")
            .c_str());
  m.def("moe_permute(Tensor x, Tensor topk_ids, int num_experts, *, int align=1, Tensor? expert_map=None)"
        " -> (Tensor rows, Tensor row_of_pair, Tensor row_experts, Tensor offsets)");
  m.def(("moe_permute_group_quant(Tensor x, Tensor topk_ids, int num_experts, int group_size, *, int align=1,"
         " Tensor? expert_map=None, " +
         quant_keywords(Scheme::group) +
         ") -> (Tensor codes, Tensor scale, Tensor row_of_pair, Tensor row_experts, Tensor offsets)")
            .c_str());
  m.def("moe_unpermute(Tensor rows, Tensor row_of_pair, Tensor topk_weights) -> Tensor");
  m.def("moe_reduce(Tensor y, Tensor topk_weights, *, Tensor? topk_ids=None, int num_experts=0,"
        " Tensor? expert_map=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(custom_ops_cuda, CUDA, m) {
  m.impl(kAlign, &align_op);
  m.impl(kAlignQuant, &align_quant_op);
  m.impl(kPermute, &permute_op);
  m.impl(kPermuteQuant, &permute_quant_op);
  m.impl(kUnpermute, &unpermute_op);
  m.impl(kReduce, &reduce_op);
}
