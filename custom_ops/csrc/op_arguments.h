// What every op does before it launches: takes its arguments from the stack, checks them, makes its outputs.
//
// Ops are boxed by hand, on tensor handles: TORCH_BOX and torch::stable::Tensor would allocate twice more per
// tensor and once more per string (which 2.11 leaks), and host time is what a small batch waits for.
#pragma once

#include <array>
#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels.h"
#include "tensor.h"

namespace custom_ops {

constexpr int kMaxDims = 8;

template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "custom_ops_cuda::" << op << ": ";
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// ---- arguments ------------------------------------------------------------------------------------------

// The dtype of the first argument, which the others must share. It must be on a GPU: the dispatcher comes here as
// soon as one of them is.
inline Dtype float16_of(const char* op, const char* name, const Tensor& t) {
  if (t.device_type() != aoti_torch_device_type_cuda()) fail(op, name, " must be on a CUDA device");
  const int32_t dtype = t.dtype();
  if (dtype == aoti_torch_dtype_bfloat16()) return Dtype::bfloat16;
  if (dtype == aoti_torch_dtype_float16()) return Dtype::float16;
  fail(op, name, " must be bfloat16 or float16");
}

// The arguments of a call, in the order of the schema.
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : next_(stack) {}
  Tensor tensor() { return take_tensor(*next_++); }
  Tensor tensor_or_none() {
    const auto given = torch::stable::detail::to<std::optional<AtenTensorHandle>>(*next_++);
    return given ? Tensor(*given) : Tensor();
  }
  int64_t integer() { return take_int(*next_++); }
  double number() { return take_double(*next_++); }
  std::string string() { return take_string(*next_++); }
  int32_t dtype() { return take_dtype(*next_++); }

 private:
  StableIValue* next_;
};

// [..., cols] seen as [rows, cols].
struct Rows {
  Tensor keep;  // the tensor, or the contiguous copy that had to be made of it
  Matrix matrix;
  int64_t rows;
  int64_t cols;
};

inline Tensor contiguous(const Tensor& t) {
  AtenTensorHandle again;  // the callee consumes its argument
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(t.get(), &again));
  std::array<StableIValue, 2> stack{torch::stable::detail::from(again),
                                    torch::stable::detail::from(aoti_torch_memory_format_contiguous_format())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::contiguous", "", stack.data(), TORCH_ABI_VERSION));
  return take_tensor(stack[0]);
}

// Describes the rows of [..., cols] by one stride, or by two; false if that cannot be. Columns may be 1 or 2 apart.
inline bool describe_rows(const int64_t* sizes, const int64_t* strides, int64_t dims, int64_t rows, Matrix& m) {
  const int64_t cols = sizes[dims - 1];
  const int64_t col_stride = cols > 1 ? strides[dims - 1] : 1;
  if (col_stride != 1 && col_stride != 2) return false;
  m.col_stride = static_cast<uint32_t>(col_stride);
  m.stride = cols;
  int levels = 0;
  int64_t inner = 1;
  int64_t next = 0;  // the outer stride that the last level goes on with
  for (int64_t d = dims - 2; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (levels == 0 || strides[d] != next) {
      if (++levels > 2) return false;
      (levels == 1 ? m.stride : m.outer_stride) = strides[d];
    }
    next = strides[d] * sizes[d];
    if (levels == 1) inner *= sizes[d];
  }
  if (levels < 2) return true;
  if (rows > INT32_MAX) return false;  // not counted in 31 bits
  m.inner = Divisor(static_cast<uint32_t>(inner));
  return true;
}

// Halves of a packed tensor, interleaved ones, transposed leading dims: all are read in place. Whose rows need three
// strides, or whose columns are further apart, is copied: the only hidden pass over memory here.
inline Rows as_rows(const char* op, const char* name, Tensor t) {
  const int64_t dims = t.dim();
  if (dims < 1 || dims > kMaxDims) fail(op, name, " must have 1 to ", kMaxDims, " dimensions, got ", dims);
  const int64_t* const sizes = t.sizes();
  int64_t rows = 1;
  for (int64_t d = 0; d < dims - 1; ++d) rows *= sizes[d];
  const int64_t cols = sizes[dims - 1];
  Matrix matrix{};
  if (rows * cols > 0 && !describe_rows(sizes, t.strides(), dims, rows, matrix)) {
    t = contiguous(t);
    matrix = Matrix{nullptr, cols};
  }
  matrix.data = t.data();
  return {std::move(t), matrix, rows, cols};
}

inline void check_same_shape(const char* op, const char* name, const Tensor& t, const char* like_name,
                             const Tensor& like) {
  const int64_t dims = t.dim();
  bool same = dims == like.dim();
  for (int64_t d = 0; same && d < dims; ++d) same = t.sizes()[d] == like.sizes()[d];
  if (!same) fail(op, name, " must have the shape of ", like_name);
  if (t.dtype() != like.dtype()) fail(op, name, " must have the dtype of ", like_name);
  if (t.device() != like.device()) fail(op, name, " must be on the device of ", like_name);
}

// ---- outputs --------------------------------------------------------------------------------------------

inline Tensor empty(const int64_t* sizes, const int64_t* strides, int64_t dims, int32_t dtype, int32_t device) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cuda(), device, &handle));
  return Tensor(handle);
}

inline Tensor empty_contiguous(const Tensor& like, int32_t dtype) {
  std::array<int64_t, kMaxDims> strides;
  const int64_t* const sizes = like.sizes();
  const int64_t dims = like.dim();
  int64_t stride = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  return empty(sizes, strides.data(), dims, dtype, like.device());
}

// ---- quantization ---------------------------------------------------------------------------------------

enum class Scheme {
  none,
  group,
  token,
  token_asymmetric,
  tensor,
  tensor_asymmetric,
  tensor_static,
  tensor_static_asymmetric
};

// Is its scale an argument?
constexpr bool is_static(Scheme s) { return s == Scheme::tensor_static || s == Scheme::tensor_static_asymmetric; }

// Its codes have a zero point, and are int8.
constexpr bool is_asymmetric(Scheme s) {
  return s == Scheme::token_asymmetric || s == Scheme::tensor_asymmetric || s == Scheme::tensor_static_asymmetric;
}

// The arguments of a scheme, in the order of its schema: `take` the positional ones, then, after the producer's own,
// the keywords.
struct QuantOptions {
  int64_t group_size = 0;
  Tensor given;       // the scale of a static scheme
  Tensor zero_point;  // and its zero point, or none
  std::string layout = "row_major";
  double min_amax = 0;
  int32_t dtype = 0;
  std::string format = "float32";
  double min_scale = 0;
  std::string scale_mode = "divide";
  std::string code_mode;
};

template <Scheme S>
void take_positional(Arguments& arguments, QuantOptions& options) {
  if (S == Scheme::group) options.group_size = arguments.integer();
  if (is_static(S)) options.given = arguments.tensor();
  if (S == Scheme::tensor_static_asymmetric) options.zero_point = arguments.tensor_or_none();
}

template <Scheme S>
void take_keywords(Arguments& arguments, QuantOptions& options) {
  if (S == Scheme::none) return;
  if (S == Scheme::group) options.layout = arguments.string();
  if (!is_static(S) && !is_asymmetric(S)) options.min_amax = arguments.number();
  options.dtype = is_asymmetric(S) ? aoti_torch_dtype_int8() : arguments.dtype();
  if (!is_static(S)) {
    if (!is_asymmetric(S)) options.format = arguments.string();
    options.min_scale = arguments.number();
    options.scale_mode = arguments.string();
  }
  options.code_mode = arguments.string();
}

inline void check_bound(const char* op, const char* name, double value) {
  if (!(value >= 0) || std::isinf(value)) fail(op, name, " must be finite and not negative, got ", value);
}

inline QuantRule quant_rule(const char* op, const QuantOptions& options, Dtype input) {
  QuantRule rule{};
  rule.int8 = options.dtype == aoti_torch_dtype_int8();
  if (!rule.int8 && options.dtype != aoti_torch_dtype_float8_e4m3fn()) {
    fail(op, "dtype must be torch.float8_e4m3fn or torch.int8");
  }
  std::string mode = options.scale_mode;
  const bool full = mode == "divide_full_input" || mode == "reciprocal_full_input";
  if (full && !rule.int8) fail(op, "scale_mode '", mode, "' needs dtype torch.int8");
  if (full) mode = mode == "divide_full_input" ? "divide_input" : "reciprocal_input";
  rule.max = !rule.int8 ? 448.0f : full ? 127.5f : 127.0f;
  rule.max_reciprocal = 1.0f / rule.max;
  rule.least = !rule.int8 ? -448.0f : full ? -128.0f : -127.0f;
  rule.most = rule.int8 ? 127.0f : 448.0f;
  check_bound(op, "min_amax", options.min_amax);
  check_bound(op, "min_scale", options.min_scale);
  rule.min_amax = static_cast<float>(options.min_amax);
  rule.min_scale = static_cast<float>(options.min_scale);

  rule.scale_in_input = mode == "divide_input" || mode == "reciprocal_input";
  rule.or_one = mode == "divide_or_one" || mode == "reciprocal_or_one";
  rule.scale_divides = mode == "divide" || mode == "divide_input" || mode == "divide_or_one";
  if (!rule.scale_divides && !rule.scale_in_input && !rule.or_one && mode != "reciprocal") {
    fail(op, "scale_mode must be 'divide' or 'reciprocal', alone or with '_input', '_full_input' or '_or_one', got '", mode,
         "'");
  }
  if (options.code_mode == "divide") {
    rule.code_mode = CodeMode::divide;
  } else if (options.code_mode == "reciprocal") {
    rule.code_mode = CodeMode::reciprocal;
  } else if (options.code_mode == "reciprocal_input") {
    rule.code_mode = CodeMode::reciprocal_input;
  } else {
    fail(op, "code_mode must be 'divide', 'reciprocal' or 'reciprocal_input', got '", options.code_mode, "'");
  }
  rule.power_of_two = options.format != "float32";
  // As a float16, a scale below 2^-14 or its reciprocal is not normal.
  const bool in_input = rule.scale_in_input || rule.code_mode == CodeMode::reciprocal_input;
  rule.least_quick_scale = input == Dtype::float16 && in_input ? 0x1p-14f : 0x1p-69f;
  return rule;
}

// A tensor of one element beside the quantized one.
inline void check_given(const char* op, const char* name, const Tensor& t, const Tensor& x, bool dtype_is_right,
                        const char* dtype) {
  int64_t elements = 1;
  for (int64_t d = 0; d < t.dim(); ++d) elements *= t.sizes()[d];
  if (elements != 1 || !dtype_is_right) fail(op, name, " must be ", dtype, " of one element");
  if (t.device_type() != aoti_torch_device_type_cuda() || t.device() != x.device()) {
    fail(op, name, " must be on the device of the quantized tensor");
  }
}

template <Scheme S>
void check_quant(const char* op, const QuantOptions& options, const Tensor& x, int64_t cols) {
  const bool packed = S == Scheme::group && options.format == "ue8m0_packed";
  if (options.format != "float32" && options.format != "ue8m0" && !packed) {
    fail(op, "scale_format must be 'float32'", S == Scheme::group ? ", 'ue8m0' or 'ue8m0_packed'" : " or 'ue8m0'",
         ", got '", options.format, "'");
  }
  if (S == Scheme::group) {
    if (options.group_size != 32 && options.group_size != 64 && options.group_size != 128) {
      fail(op, "group_size must be 32, 64 or 128, got ", options.group_size);
    }
    if (cols % options.group_size != 0) {
      fail(op, "the last dimension must be a multiple of group_size ", options.group_size, ", got ", cols);
    }
    const std::string& layout = options.layout;
    if (layout != "row_major" && layout != "column_major" && layout != "column_major_tma") {
      fail(op, "scale_layout must be 'row_major', 'column_major' or 'column_major_tma', got '", layout, "'");
    }
    if (packed && layout != "column_major_tma") {
      fail(op, "scale_layout must be 'column_major_tma' for scale_format 'ue8m0_packed', got '", layout, "'");
    }
  }
  if ((S == Scheme::token || S == Scheme::token_asymmetric) && cols == 0) {
    fail(op, "the last dimension must be 1 or more, got 0");
  }
  if (is_static(S)) {
    const Tensor& scale = options.given;
    check_given(op, "scale", scale, x, scale.dtype() == aoti_torch_dtype_float32(), "float32");
  }
  if (S == Scheme::tensor_static_asymmetric && options.zero_point.get() != nullptr) {
    const int32_t dtype = options.zero_point.dtype();
    check_given(op, "zero_point", options.zero_point, x,
                dtype == aoti_torch_dtype_int8() || dtype == aoti_torch_dtype_int32(), "int8 or int32");
  }
}

struct QuantOut {
  Tensor codes;
  Tensor scale;  // none if it is given
};

// The geometry of scales per group of [rows, cols] in the layout asked for: row_major contiguous, column_major with
// tokens adjacent and a pitch of num_tokens (column_major_tma: rounded up to 16 bytes) between groups. Returns the
// number of scales of a row.
inline int64_t describe_groups(const QuantOptions& options, const QuantRule& rule, int64_t rows, int64_t cols,
                               Quantized& raw) {
  raw.packed = options.format == "ue8m0_packed";
  raw.rule = rule;
  raw.group_size = static_cast<int>(options.group_size);
  raw.group_shift = raw.group_size == 128 ? 7 : raw.group_size == 64 ? 6 : 5;
  const int64_t groups = raw.packed ? ((cols >> raw.group_shift) + 3) / 4 : cols >> raw.group_shift;
  const bool row_major = options.layout == "row_major";
  int64_t pitch = rows > 0 ? rows : 1;
  if (options.layout == "column_major_tma") pitch = (pitch + 3) / 4 * 4;
  raw.row_stride = row_major ? (groups > 0 ? groups : 1) : 1;
  raw.group_stride = row_major ? 1 : pitch;
  return groups;
}

inline int32_t scale_dtype(const Quantized& raw) {
  return raw.packed ? aoti_torch_dtype_int32() : aoti_torch_dtype_float32();
}

inline QuantOut empty_groups(const Rows& x, const QuantOptions& options, const QuantRule& rule, Quantized& raw) {
  const int64_t dims = x.keep.dim();
  std::array<int64_t, kMaxDims> sizes;
  std::array<int64_t, kMaxDims> strides;
  sizes[dims - 1] = describe_groups(options, rule, x.rows, x.cols, raw);
  strides[dims - 1] = raw.group_stride;
  int64_t stride = raw.row_stride;
  for (int64_t d = dims - 2; d >= 0; --d) {
    sizes[d] = x.keep.sizes()[d];
    const bool batch_of_one = sizes[d] == 1 && d < dims - 2 && options.layout != "row_major";  // see scales.py
    strides[d] = batch_of_one ? raw.group_stride * (sizes[dims - 1] > 0 ? sizes[dims - 1] : 1) : stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  QuantOut out{empty_contiguous(x.keep, options.dtype),
               empty(sizes.data(), strides.data(), dims, scale_dtype(raw), x.keep.device())};
  raw.codes = out.codes.data();
  raw.scale = out.scale.data();
  return out;
}

// [..., 1], contiguous.
inline Tensor empty_per_token(const Tensor& x, int32_t dtype) {
  std::array<int64_t, kMaxDims> sizes;
  std::array<int64_t, kMaxDims> strides;
  const int64_t dims = x.dim();
  int64_t stride = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    sizes[d] = d == dims - 1 ? 1 : x.sizes()[d];
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  return empty(sizes.data(), strides.data(), dims, dtype, x.device());
}

inline QuantOut empty_tokens(const Rows& x, const QuantOptions& options, const QuantRule& rule, Quantized& raw) {
  raw.rule = rule;
  QuantOut out{empty_contiguous(x.keep, options.dtype), empty_per_token(x.keep, aoti_torch_dtype_float32())};
  raw.codes = out.codes.data();
  raw.scale = out.scale.data();
  return out;
}

// maxima: where the scratch is kept, until the kernels that use it are enqueued.
inline QuantOut empty_tensor(const Rows& x, const QuantOptions& options, const QuantRule& rule, Tensor& maxima,
                             TensorQuantized& raw) {
  raw.rule = rule;
  const int64_t one = 1;
  const int32_t device = x.keep.device();
  QuantOut out{empty_contiguous(x.keep, options.dtype), Tensor()};
  raw.codes = out.codes.data();
  if (options.given.get() != nullptr) {
    raw.given = static_cast<const float*>(options.given.data());
  } else {
    out.scale = empty(&one, &one, 1, aoti_torch_dtype_float32(), device);
    const int64_t most = 2 * kMostMaxima;  // of the pairs of zero points
    maxima = empty(&most, &one, 1, aoti_torch_dtype_int32(), device);
    raw.scale = static_cast<float*>(out.scale.data());
    raw.maxima = static_cast<uint32_t*>(maxima.data());
  }
  return out;
}

// ---- schemas --------------------------------------------------------------------------------------------

// The keywords of a scheme, as custom_ops has them.
inline std::string quant_keywords(Scheme scheme, const std::string& layout = "row_major") {
  if (scheme == Scheme::none) return "";
  const std::string code_mode = "str code_mode=\"divide\"";
  const std::string scale_mode = "float min_scale=0.0, str scale_mode=\"divide\", ";
  if (scheme == Scheme::tensor_static_asymmetric) return code_mode;
  if (is_asymmetric(scheme)) return scale_mode + code_mode;
  const std::string dtype = "ScalarType dtype=float8_e4m3fn, ";
  if (scheme == Scheme::tensor_static) return dtype + code_mode;
  return (scheme == Scheme::group ? "str scale_layout=\"" + layout + "\", " : "") + ("float min_amax=1e-10, " + dtype) +
         "str scale_format=\"float32\", " + scale_mode + code_mode;
}

// ---- launching ------------------------------------------------------------------------------------------

// Makes the tensor's device current for as long as it lives; nothing to do where it is already.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device) {
    int32_t current;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_device_index(&current));
    if (current != device) TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(device, &guard_));
  }
  ~DeviceGuard() {
    if (guard_ != nullptr) aoti_torch_delete_cuda_guard(guard_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  CUDAGuardHandle guard_ = nullptr;
};

inline cudaStream_t current_stream(int32_t device) {
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("custom_ops_cuda::") + op + ": launch failed: " + cudaGetErrorString(error));
}

inline void put(StableIValue& slot, Tensor& t) { slot = torch::stable::detail::from(t.release()); }

}  // namespace custom_ops
