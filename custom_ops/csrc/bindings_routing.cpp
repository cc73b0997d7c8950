// The routing ops of namespace custom_ops_cuda.
#include "moe_arguments.h"

namespace {

using namespace custom_ops;

constexpr char kSoftmax[] = "topk_softmax";
constexpr char kSigmoid[] = "topk_sigmoid";
constexpr char kGrouped[] = "grouped_topk";

Float float_of(const char* op, const char* name, int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) return Float::float32;
  if (dtype == aoti_torch_dtype_bfloat16()) return Float::bfloat16;
  if (dtype == aoti_torch_dtype_float16()) return Float::float16;
  fail(op, name, " must be float32, bfloat16 or float16");
}

// What a sum of the two is in eager.
Float promoted(Float a, Float b) { return a == b ? a : Float::float32; }

// What the three ops share: `take` fills in what they take before the keywords that all have.
template <typename Take>
void route(const char* op, StableIValue* stack, Take take) {
  MoeArguments arguments(stack);
  Tensor logits = arguments.tensor();
  RoutingArgs p{};
  p.top_k = static_cast<int>(arguments.integer());
  p.num_groups = 1;
  p.group_size = Divisor(1);
  const Tensor bias = take(arguments, p);
  p.renormalize = arguments.flag();
  p.renormalize_eps = arguments.number();
  p.renormalize_min = arguments.number();
  p.scale = arguments.number();
  const bool rounded = arguments.flag();
  const int32_t dtype = arguments.dtype();

  if (logits.device_type() != aoti_torch_device_type_cuda()) fail(op, "logits must be on a CUDA device");
  if (logits.dim() != 2) fail(op, "logits must have 2 dimensions, got ", logits.dim());
  const int32_t device = logits.device();
  const DeviceGuard guard(device);
  const int64_t experts = logits.sizes()[1];
  if (experts > kMostRoutedExperts) fail(op, "takes at most ", kMostRoutedExperts, " experts, got ", experts);
  if (p.top_k < 1 || p.top_k > experts) fail(op, "top_k must be 1 to ", experts, ", got ", p.top_k);
  if (experts > 1 && logits.strides()[1] != 1) logits = contiguous(logits);
  p.tokens = logits.sizes()[0];
  p.experts = static_cast<int>(experts);
  p.logits = logits.data();
  p.row_stride = logits.strides()[0];
  p.logits_type = float_of(op, "logits", logits.dtype());
  p.weights_type = float_of(op, "dtype", dtype);
  p.step_type = rounded ? p.logits_type : Float::float32;
  p.choice_type = p.step_type;
  if (bias.get() != nullptr) {
    check_cuda(op, "correction_bias", bias, device);
    if (bias.dim() != 1 || bias.sizes()[0] != experts) fail(op, "correction_bias must be of shape [", experts, "]");
    p.bias = bias.data();
    p.bias_stride = bias.strides()[0];
    p.bias_type = float_of(op, "correction_bias", bias.dtype());
    p.choice_type = promoted(p.step_type, p.bias_type);
  }
  if (p.topk_groups > 0) {
    if (p.num_groups > kMostGroups) fail(op, "takes at most ", kMostGroups, " groups, got ", p.num_groups);
    if (experts % p.num_groups != 0) fail(op, "num_groups must divide the ", experts, " experts");
    p.group_size = Divisor(static_cast<uint32_t>(experts / p.num_groups));
    if (p.top2 && p.group_size.divisor < 2) fail(op, "group_score 'top2' needs groups of 2 or more experts");
  }
  const std::array<int64_t, 2> sizes{p.tokens, p.top_k};
  const std::array<int64_t, 2> strides{p.top_k, 1};
  Tensor weights = empty(sizes.data(), strides.data(), 2, dtype, device);
  Tensor ids = empty(sizes.data(), strides.data(), 2, aoti_torch_dtype_int64(), device);
  p.weights = weights.data();
  p.ids = static_cast<int64_t*>(ids.data());
  check_launch(op, moe_route(p, current_stream(device)));
  put(stack[0], weights);
  put(stack[1], ids);
}

void softmax_op(StableIValue* stack, uint64_t, uint64_t) {
  route(kSoftmax, stack, [](MoeArguments& arguments, RoutingArgs& p) {
    Tensor bias = arguments.optional_tensor();
    p.softmax_last = !arguments.flag();
    p.by_logits = p.softmax_last;
    p.scoring = p.softmax_last ? Scoring::none : Scoring::softmax;
    return bias;
  });
}

void sigmoid_op(StableIValue* stack, uint64_t, uint64_t) {
  route(kSigmoid, stack, [](MoeArguments& arguments, RoutingArgs& p) {
    Tensor bias = arguments.optional_tensor();
    p.by_logits = arguments.flag();
    p.scoring = Scoring::sigmoid;
    return bias;
  });
}

void grouped_op(StableIValue* stack, uint64_t, uint64_t) {
  route(kGrouped, stack, [](MoeArguments& arguments, RoutingArgs& p) {
    const int64_t groups = arguments.integer();
    const int64_t kept = arguments.integer();
    Tensor bias = arguments.optional_tensor();
    const std::string scoring = arguments.string();
    const std::string score = arguments.string();
    const std::string masked = arguments.string();
    if (groups < 1 || kept < 1 || kept > groups) fail(kGrouped, "topk_groups must be 1 to num_groups, got ", kept);
    p.num_groups = static_cast<int>(groups);
    p.topk_groups = kept < groups ? static_cast<int>(kept) : 0;
    if (scoring == "sigmoid") {
      p.scoring = Scoring::sigmoid;
    } else if (scoring == "softmax") {
      p.scoring = Scoring::softmax;
    } else if (scoring == "sqrt_softplus") {
      p.scoring = Scoring::sqrt_softplus;
    } else {
      fail(kGrouped, "scoring must be 'sigmoid', 'softmax' or 'sqrt_softplus', got '", scoring, "'");
    }
    p.top2 = score == "top2";
    if (!p.top2 && score != "max") fail(kGrouped, "group_score must be 'top2' or 'max', got '", score, "'");
    if (masked == "-inf") {
      p.masked = Masked::infinity;
    } else if (masked == "zero") {
      p.masked = Masked::zero;
    } else if (masked == "zero_weight") {
      p.masked = Masked::zero_weight;
    } else {
      fail(kGrouped, "masked must be '-inf', 'zero' or 'zero_weight', got '", masked, "'");
    }
    return bias;
  });
}

constexpr char kRouterKeywords[] =
    "bool renormalize=False, float renormalize_eps=0.0, float renormalize_min=0.0, float scale=1.0,"
    " bool rounded=False, ScalarType dtype=float32) -> (Tensor weights, Tensor ids)";

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(custom_ops_cuda, m) {
  const std::string keywords = kRouterKeywords;
  m.def(("topk_softmax(Tensor logits, int top_k, *, Tensor? correction_bias=None, bool softmax_first=True, " + keywords)
            .c_str());
  m.def(("topk_sigmoid(Tensor logits, int top_k, *, Tensor? correction_bias=None, bool by_logits=False, " + keywords)
            .c_str());
  m.def(("grouped_topk(Tensor logits, int top_k, int num_groups, int topk_groups, *, Tensor? correction_bias=None,"
         " str scoring=\"sigmoid\", str group_score=\"top2\", str masked=\"-inf\", " +
         keywords)
            .c_str());
}

STABLE_TORCH_LIBRARY_IMPL(custom_ops_cuda, CUDA, m) {
  m.impl(kSoftmax, &softmax_op);
  m.impl(kSigmoid, &sigmoid_op);
  m.impl(kGrouped, &grouped_op);
}
