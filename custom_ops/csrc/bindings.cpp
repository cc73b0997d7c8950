// The ops of namespace custom_ops_cuda: schemas and their calls of the launchers. With op_arguments.h and tensor.h all
// that knows Torch, and only its stable C interface: no ATen header, a second to compile.
#include "op_arguments.h"

namespace {

using namespace custom_ops;

// ---- names ----------------------------------------------------------------------------------------------

constexpr const char* scheme_suffix(Scheme scheme) {
  switch (scheme) {
    case Scheme::none:
      return "";
    case Scheme::group:
      return "group_quant";
    case Scheme::token:
      return "token_quant";
    case Scheme::token_asymmetric:
      return "token_quant_asymmetric";
    case Scheme::tensor:
      return "tensor_quant";
    case Scheme::tensor_asymmetric:
      return "tensor_quant_asymmetric";
    case Scheme::tensor_static:
      return "tensor_quant_static";
    case Scheme::tensor_static_asymmetric:
      return "tensor_quant_static_asymmetric";
  }
  return "";
}

constexpr const char* activation_name(Activation activation) {
  switch (activation) {
    case Activation::none:
      return "";
    case Activation::silu:
      return "silu_mul";
    case Activation::gelu_tanh:
      return "gelu_tanh_mul";
    case Activation::clamped_swiglu:
      return "clamped_swiglu";
  }
  return "";
}

std::string joined(const std::string& producer, const std::string& scheme) {
  return producer + (producer.empty() || scheme.empty() ? "" : "_") + scheme;
}

// ---- ops ------------------------------------------------------------------------------------------------

// Quantizes what `launch` produces, and puts codes, scale and zero point on the stack. launch: takes a Quantized, an
// AsymmetricQuantized, a TensorQuantized or a TensorAsymmetric.
template <Scheme S, typename Launch>
void quantize(const char* op, StableIValue* stack, const Rows& x, const QuantOptions& options, Dtype dtype,
              Launch launch) {
  check_quant<S>(op, options, x.keep, x.cols);
  QuantRule rule = quant_rule(op, options, dtype);
  if (is_asymmetric(S)) {
    if (rule.max != 127.0f) fail(op, "scale_mode must be 'divide' or 'reciprocal', alone or with '_input' or '_or_one'");
    rule.max = 255.0f;
    rule.max_reciprocal = 1.0f / rule.max;
  }
  QuantOut out;
  if constexpr (S == Scheme::group || S == Scheme::token) {
    Quantized raw{};
    out = S == Scheme::group ? empty_groups(x, options, rule, raw) : empty_tokens(x, options, rule, raw);
    check_launch(op, launch(raw));
  } else if constexpr (S == Scheme::token_asymmetric) {
    AsymmetricQuantized raw{};
    out = empty_tokens(x, options, rule, raw.tokens);
    Tensor zero_points = empty_per_token(x.keep, aoti_torch_dtype_int8());
    raw.zero_points = zero_points.data();
    check_launch(op, launch(raw));
    put(stack[2], zero_points);
  } else if constexpr (is_asymmetric(S)) {
    TensorAsymmetric raw{};
    Tensor maxima;
    out = empty_tensor(x, options, rule, maxima, raw);
    const int64_t one = 1;
    Tensor made;
    if (!is_static(S)) made = empty(&one, &one, 1, aoti_torch_dtype_int8(), x.keep.device());
    const Tensor& zero_point = is_static(S) ? options.zero_point : made;
    if (zero_point.get() != nullptr) {
      raw.zero_point = zero_point.data();
      raw.wide = zero_point.dtype() == aoti_torch_dtype_int32();
    }
    check_launch(op, launch(raw));
    if (!is_static(S)) put(stack[2], made);
  } else {
    TensorQuantized raw{};
    Tensor maxima;
    out = empty_tensor(x, options, rule, maxima, raw);
    check_launch(op, launch(raw));
  }
  put(stack[0], out.codes);
  if (!is_static(S)) put(stack[1], out.scale);
}

// x | (gate, up) | (gate, up, alpha, limit), then [group_size | scale | scale, zero_point] and the keywords of the scheme
//   -> out | (q, scale) | (q, scale, zero_point) | q
template <Activation A, Scheme S>
void elementwise(StableIValue* stack, uint64_t, uint64_t) {
  static const std::string name = joined(activation_name(A), scheme_suffix(S));
  const char* const op = name.c_str();
  constexpr const char* kFirst = A == Activation::none ? "x" : "gate";
  Arguments arguments(stack);
  Tensor x_tensor = arguments.tensor();
  Tensor up_tensor = A == Activation::none ? Tensor() : arguments.tensor();
  Source source{};
  source.activation = A;
  if (A == Activation::clamped_swiglu) {
    source.alpha = static_cast<float>(arguments.number());
    source.limit = static_cast<float>(arguments.number());
  }
  QuantOptions options;
  take_positional<S>(arguments, options);
  take_keywords<S>(arguments, options);

  const Dtype dtype = float16_of(op, kFirst, x_tensor);
  if (A != Activation::none) check_same_shape(op, "up", up_tensor, "gate", x_tensor);
  if (A == Activation::clamped_swiglu) {
    if (!std::isfinite(source.alpha)) fail(op, "alpha must be finite, got ", source.alpha);
    check_bound(op, "limit", source.limit);
  }
  const int32_t device = x_tensor.device();
  const DeviceGuard guard(device);
  const Rows x = as_rows(op, kFirst, std::move(x_tensor));
  const Rows up = A == Activation::none ? Rows{} : as_rows(op, "up", std::move(up_tensor));
  source.x = x.matrix;
  source.up = up.matrix;
  const cudaStream_t stream = current_stream(device);
  if constexpr (S == Scheme::none) {
    Tensor out = empty_contiguous(x.keep, x.keep.dtype());
    check_launch(op, activation(dtype, source, out.data(), x.rows, x.cols, stream));
    put(stack[0], out);
  } else {
    quantize<S>(op, stack, x, options, dtype, [&](const auto& out) {
      if constexpr (S == Scheme::group) return group_quant(dtype, source, x.rows, x.cols, out, stream);
      if constexpr (S == Scheme::token) return token_quant(dtype, source, x.rows, x.cols, out, stream);
      if constexpr (S == Scheme::token_asymmetric) {
        return token_quant_asymmetric(dtype, source, x.rows, x.cols, out, stream);
      }
      if constexpr (S == Scheme::tensor || S == Scheme::tensor_static) {
        return tensor_quant(dtype, source, x.rows, x.cols, out, stream);
      }
      if constexpr (S == Scheme::tensor_asymmetric || S == Scheme::tensor_static_asymmetric) {
        return tensor_quant_asymmetric(dtype, source, x.rows, x.cols, out, stream);
      }
    });
  }
}

constexpr const char* norm_name(bool add, bool keep) {
  return add ? (keep ? "add_rms_norm_and" : "add_rms_norm") : keep ? "rms_norm_and" : "rms_norm";
}

WeightMode weight_mode(const char* op, const std::string& name) {
  if (name == "rounded") return WeightMode::rounded;
  if (name == "float32") return WeightMode::float32;
  if (name == "float32_plus_one") return WeightMode::float32_plus_one;
  fail(op, "weight_mode must be 'rounded', 'float32' or 'float32_plus_one', got '", name, "'");
}

Weight norm_weight(const char* op, const Tensor& weight, const Tensor& x, int64_t cols, WeightMode mode) {
  if (weight.dim() != 1 || weight.sizes()[0] != cols || (cols > 1 && weight.strides()[0] != 1)) {
    fail(op, "weight must be contiguous of shape [", cols, "]");
  }
  if (weight.device() != x.device()) fail(op, "weight must be on the device of x");
  const bool same = weight.dtype() == x.dtype();
  if (!same && weight.dtype() != aoti_torch_dtype_float32()) {
    fail(op, "weight must have the dtype of x or be float32");
  }
  if (!same && mode == WeightMode::rounded) {
    fail(op, "weight must have the dtype of x for weight_mode 'rounded'");
  }
  return {weight.data(), !same, mode};
}

// (x, [residual,] weight, eps, [group_size | scale | scale, zero_point,] weight_mode, the keywords of the scheme)
//   -> out | (q, scale) | (q, scale, zero_point) | q, then with Keep out, then residual_out
template <bool Add, Scheme S, bool Keep = false>
void norm(StableIValue* stack, uint64_t, uint64_t) {
  static const std::string name = joined(norm_name(Add, Keep), scheme_suffix(S));
  const char* const op = name.c_str();
  Arguments arguments(stack);
  Tensor x_tensor = arguments.tensor();
  Tensor residual_tensor = Add ? arguments.tensor() : Tensor();
  const Tensor weight = arguments.tensor();
  const double eps = arguments.number();
  QuantOptions options;
  take_positional<S>(arguments, options);
  const std::string mode = arguments.string();
  take_keywords<S>(arguments, options);

  const Dtype dtype = float16_of(op, "x", x_tensor);
  if (Add) check_same_shape(op, "residual", residual_tensor, "x", x_tensor);
  const int32_t device = x_tensor.device();
  const DeviceGuard guard(device);
  const Rows x = as_rows(op, "x", std::move(x_tensor));
  NormArgs args{};
  args.x = x.matrix;
  args.weight = norm_weight(op, weight, x.keep, x.cols, weight_mode(op, mode));
  args.eps = static_cast<float>(eps);
  args.rows = x.rows;
  args.cols = x.cols;

  Rows residual{};
  Tensor residual_out;
  if (Add) {
    residual = as_rows(op, "residual", std::move(residual_tensor));
    residual_out = empty_contiguous(x.keep, x.keep.dtype());
    args.residual = residual.matrix;
    args.residual_out = residual_out.data();
  }
  Tensor kept;
  if (Keep) {
    kept = empty_contiguous(x.keep, x.keep.dtype());
    args.out = kept.data();
  }
  const cudaStream_t stream = current_stream(device);
  if constexpr (S == Scheme::none) {
    Tensor out = empty_contiguous(x.keep, x.keep.dtype());
    check_launch(op, rms_norm(dtype, args, out.data(), stream));
    put(stack[0], out);
  } else {
    quantize<S>(op, stack, x, options, dtype, [&](const auto& out) {
      if constexpr (S == Scheme::group && Keep) return rms_norm_and_group_quant(dtype, args, out, stream);
      if constexpr (S == Scheme::token && Keep) return rms_norm_and_token_quant(dtype, args, out, stream);
      if constexpr (S == Scheme::group && !Keep) return rms_norm_group_quant(dtype, args, out, stream);
      if constexpr (S == Scheme::token && !Keep) return rms_norm_token_quant(dtype, args, out, stream);
      if constexpr (S == Scheme::token_asymmetric) return rms_norm_token_quant_asymmetric(dtype, args, out, stream);
      if constexpr (S == Scheme::tensor || S == Scheme::tensor_static) {
        return rms_norm_tensor_quant(dtype, args, out, stream);
      }
      if constexpr (S == Scheme::tensor_asymmetric || S == Scheme::tensor_static_asymmetric) {
        return rms_norm_tensor_quant_asymmetric(dtype, args, out, stream);
      }
    });
  }
  constexpr int kBefore = S == Scheme::none || is_static(S) ? 1 : is_asymmetric(S) ? 3 : 2;
  if (Keep) put(stack[kBefore], kept);
  if (Add) put(stack[kBefore + Keep], residual_out);
}

// ---- schemas --------------------------------------------------------------------------------------------

// The schema of a producer's op with a scheme, as custom_ops has it.
std::string schema(const std::string& producer, const std::string& positional, const std::string& keywords,
                   Scheme scheme, bool residual_out, bool kept = false) {
  const std::string quant = quant_keywords(scheme);
  const std::string all = keywords + (keywords.empty() || quant.empty() ? "" : ", ") + quant;
  const bool one = scheme == Scheme::none || is_static(scheme);
  std::string returned = scheme == Scheme::none ? "Tensor out" : "Tensor q";
  if (!one) returned += ", Tensor scale";
  if (!one && is_asymmetric(scheme)) returned += ", Tensor zero_point";
  if (kept) returned += ", Tensor out";
  if (residual_out) returned += ", Tensor residual_out";
  returned = one && !residual_out ? "Tensor" : "(" + returned + ")";
  return joined(producer, scheme_suffix(scheme)) + "(" + positional +
         (scheme == Scheme::group ? ", int group_size" : is_static(scheme) ? ", Tensor scale" : "") +
         (scheme == Scheme::tensor_static_asymmetric ? ", Tensor? zero_point" : "") +
         (all.empty() ? "" : ", *, " + all) + ") -> " + returned;
}

template <typename Library>
void define_scheme(Library& m, Scheme scheme) {
  const auto define = [&](const std::string& text) { m.def(text.c_str()); };
  const std::string mode = "str weight_mode=\"rounded\"";
  if (scheme != Scheme::none) define(schema("", "Tensor x", "", scheme, false));
  define(schema("silu_mul", "Tensor gate, Tensor up", "", scheme, false));
  define(schema("gelu_tanh_mul", "Tensor gate, Tensor up", "", scheme, false));
  define(schema("clamped_swiglu", "Tensor gate, Tensor up, float alpha, float limit", "", scheme, false));
  for (const bool keep : {false, true}) {
    if (keep && scheme != Scheme::group && scheme != Scheme::token) break;
    define(schema(norm_name(false, keep), "Tensor x, Tensor weight, float eps", mode, scheme, false, keep));
    define(schema(norm_name(true, keep), "Tensor x, Tensor residual, Tensor weight, float eps", mode, scheme, true,
                  keep));
  }
}

template <Scheme S, typename Library>
void implement_scheme(Library& m) {
  const auto name = [](const char* producer) { return joined(producer, scheme_suffix(S)); };
  if constexpr (S != Scheme::none) m.impl(name("").c_str(), &elementwise<Activation::none, S>);
  m.impl(name("silu_mul").c_str(), &elementwise<Activation::silu, S>);
  m.impl(name("gelu_tanh_mul").c_str(), &elementwise<Activation::gelu_tanh, S>);
  m.impl(name("clamped_swiglu").c_str(), &elementwise<Activation::clamped_swiglu, S>);
  m.impl(name("rms_norm").c_str(), &norm<false, S>);
  m.impl(name("add_rms_norm").c_str(), &norm<true, S>);
  if constexpr (S == Scheme::group || S == Scheme::token) {
    m.impl(name(norm_name(false, true)).c_str(), &norm<false, S, true>);
    m.impl(name(norm_name(true, true)).c_str(), &norm<true, S, true>);
  }
}

}  // namespace

// The same schemas as namespace custom_ops, so that a compiled graph may name these ops in place of those.
STABLE_TORCH_LIBRARY_FRAGMENT(custom_ops_cuda, m) {
  define_scheme(m, Scheme::none);
  define_scheme(m, Scheme::group);
  define_scheme(m, Scheme::token);
  define_scheme(m, Scheme::token_asymmetric);
  define_scheme(m, Scheme::tensor);
  define_scheme(m, Scheme::tensor_asymmetric);
  define_scheme(m, Scheme::tensor_static);
  define_scheme(m, Scheme::tensor_static_asymmetric);
}

STABLE_TORCH_LIBRARY_IMPL(custom_ops_cuda, CUDA, m) {
  implement_scheme<Scheme::none>(m);
  implement_scheme<Scheme::group>(m);
  implement_scheme<Scheme::token>(m);
  implement_scheme<Scheme::token_asymmetric>(m);
  implement_scheme<Scheme::tensor>(m);
  implement_scheme<Scheme::tensor_asymmetric>(m);
  implement_scheme<Scheme::tensor_static>(m);
  implement_scheme<Scheme::tensor_static_asymmetric>(m);
}
