// The ops of namespace custom_ops_cuda: schemas, argument checks, output tensors, launch. With tensor.h all that
// knows Torch, and only its stable C interface: no ATen header, a second to compile.
//
// Functions are boxed by hand, on tensor handles: TORCH_BOX and torch::stable::Tensor would allocate twice more per
// tensor and once more per string (which 2.11 leaks), and host time is what a small batch waits for.
#include <array>
#include <cmath>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels.h"
#include "tensor.h"

namespace {

using custom_ops::Dtype;
using custom_ops::Matrix;
using custom_ops::take_double;
using custom_ops::take_int;
using custom_ops::take_string;
using custom_ops::take_tensor;
using custom_ops::Tensor;

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
Dtype float16_of(const char* op, const char* name, const Tensor& t) {
  if (t.device_type() != aoti_torch_device_type_cuda()) fail(op, name, " must be on a CUDA device");
  const int32_t dtype = t.dtype();
  if (dtype == aoti_torch_dtype_bfloat16()) return Dtype::bfloat16;
  if (dtype == aoti_torch_dtype_float16()) return Dtype::float16;
  fail(op, name, " must be bfloat16 or float16");
}

// [..., cols] seen as [rows, cols] with one stride between rows.
struct Rows {
  Tensor keep;  // the tensor, or the contiguous copy that had to be made of it
  Matrix matrix;
  int64_t rows;
  int64_t cols;
};

// The stride between rows if one describes the leading dims, -1 otherwise.
int64_t row_stride(const int64_t* sizes, const int64_t* strides, int64_t dims) {
  if (sizes[dims - 1] > 1 && strides[dims - 1] != 1) return -1;
  int64_t stride = sizes[dims - 1];
  int64_t next = -1;  // what the next outer stride must be
  for (int64_t d = dims - 2; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (next == -1) {
      stride = strides[d];
    } else if (strides[d] != next) {
      return -1;
    }
    next = strides[d] * sizes[d];
  }
  return stride;
}

Tensor contiguous(const Tensor& t) {
  AtenTensorHandle again;  // the callee consumes its argument
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(t.get(), &again));
  std::array<StableIValue, 2> stack{torch::stable::detail::from(again),
                                    torch::stable::detail::from(aoti_torch_memory_format_contiguous_format())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::contiguous", "", stack.data(), TORCH_ABI_VERSION));
  return take_tensor(stack[0]);
}

// A tensor whose leading dims have no common stride (a transposed one), or whose columns are not adjacent,
// is copied: the only hidden pass over memory here. The halves of a packed tensor are not.
Rows as_rows(const char* op, const char* name, Tensor t) {
  const int64_t dims = t.dim();
  if (dims < 1 || dims > kMaxDims) fail(op, name, " must have 1 to ", kMaxDims, " dimensions, got ", dims);
  const int64_t* const sizes = t.sizes();
  int64_t rows = 1;
  for (int64_t d = 0; d < dims - 1; ++d) rows *= sizes[d];
  const int64_t cols = sizes[dims - 1];
  int64_t stride = row_stride(sizes, t.strides(), dims);
  if (stride < 0 && rows * cols > 0) {
    t = contiguous(t);
    stride = cols;
  }
  const void* data = t.data();
  return {std::move(t), {data, stride}, rows, cols};
}

void check_same_shape(const char* op, const char* name, const Tensor& t, const char* like_name, const Tensor& like) {
  const int64_t dims = t.dim();
  bool same = dims == like.dim();
  for (int64_t d = 0; same && d < dims; ++d) same = t.sizes()[d] == like.sizes()[d];
  if (!same) fail(op, name, " must have the shape of ", like_name);
  if (t.dtype() != like.dtype()) fail(op, name, " must have the dtype of ", like_name);
  if (t.device() != like.device()) fail(op, name, " must be on the device of ", like_name);
}

// ---- outputs --------------------------------------------------------------------------------------------

Tensor empty(const int64_t* sizes, const int64_t* strides, int64_t dims, int32_t dtype, int32_t device) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cuda(), device, &handle));
  return Tensor(handle);
}

Tensor empty_contiguous(const Tensor& like, int32_t dtype) {
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

struct QuantOptions {
  int64_t group_size;
  std::string layout;
  double min_amax;
};

struct QuantOut {
  Tensor codes;
  Tensor scale;
  custom_ops::Quantized raw;
};

void check_quant(const char* op, const QuantOptions& options, int64_t cols) {
  if (options.group_size != 64 && options.group_size != 128) {
    fail(op, "group_size must be 64 or 128, got ", options.group_size);
  }
  if (cols % options.group_size != 0) {
    fail(op, "the last dimension must be a multiple of group_size ", options.group_size, ", got ", cols);
  }
  if (options.layout != "row_major" && options.layout != "column_major" && options.layout != "column_major_tma") {
    fail(op, "scale_layout must be 'row_major', 'column_major' or 'column_major_tma', got '", options.layout, "'");
  }
  if (!(options.min_amax >= 0) || std::isinf(options.min_amax)) {
    fail(op, "min_amax must be finite and not negative, got ", options.min_amax);
  }
}

// Codes like x, and scales in the layout asked for: row_major contiguous, column_major with tokens adjacent and
// a pitch of num_tokens (column_major_tma: rounded up to 16 bytes) between groups.
QuantOut empty_quantized(const Rows& x, const QuantOptions& options) {
  const int64_t* const x_sizes = x.keep.sizes();
  const int64_t dims = x.keep.dim();
  const int64_t groups = x.cols / options.group_size;
  const bool row_major = options.layout == "row_major";
  int64_t pitch = x.rows > 0 ? x.rows : 1;
  if (options.layout == "column_major_tma") pitch = (pitch + 3) / 4 * 4;

  std::array<int64_t, kMaxDims> sizes;
  std::array<int64_t, kMaxDims> strides;
  sizes[dims - 1] = groups;
  strides[dims - 1] = row_major ? 1 : pitch;
  int64_t stride = row_major ? (groups > 0 ? groups : 1) : 1;
  for (int64_t d = dims - 2; d >= 0; --d) {
    sizes[d] = x_sizes[d];
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  QuantOut out{empty_contiguous(x.keep, aoti_torch_dtype_float8_e4m3fn()),
               empty(sizes.data(), strides.data(), dims, aoti_torch_dtype_float32(), x.keep.device()),
               {}};
  out.raw.codes = static_cast<uint8_t*>(out.codes.data());
  out.raw.scale = static_cast<float*>(out.scale.data());
  out.raw.row_stride = row_major ? groups : 1;
  out.raw.group_stride = row_major ? 1 : pitch;
  out.raw.group_size = static_cast<int>(options.group_size);
  out.raw.min_amax = static_cast<float>(options.min_amax);
  return out;
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

cudaStream_t current_stream(int32_t device) {
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("custom_ops_cuda::") + op + ": launch failed: " + cudaGetErrorString(error));
}

void put(StableIValue& slot, Tensor& t) { slot = torch::stable::detail::from(t.release()); }

// ---- ops ------------------------------------------------------------------------------------------------

constexpr char kGroupQuant[] = "group_quant";
constexpr char kSiluMul[] = "silu_mul";
constexpr char kSiluMulGroupQuant[] = "silu_mul_group_quant";
constexpr char kRmsNorm[] = "rms_norm";
constexpr char kAddRmsNorm[] = "add_rms_norm";
constexpr char kRmsNormGroupQuant[] = "rms_norm_group_quant";
constexpr char kAddRmsNormGroupQuant[] = "add_rms_norm_group_quant";

// (x, group_size, scale_layout, min_amax) -> (q, scale)
void group_quant(StableIValue* stack, uint64_t, uint64_t) {
  const Rows x = as_rows(kGroupQuant, "x", take_tensor(stack[0]));
  const QuantOptions options{take_int(stack[1]), take_string(stack[2]), take_double(stack[3])};
  const Dtype dtype = float16_of(kGroupQuant, "x", x.keep);
  check_quant(kGroupQuant, options, x.cols);
  const int32_t device = x.keep.device();
  const DeviceGuard guard(device);
  QuantOut out = empty_quantized(x, options);
  check_launch(kGroupQuant,
               custom_ops::group_quant(dtype, x.matrix, x.rows, x.cols, out.raw, current_stream(device)));
  put(stack[0], out.codes);
  put(stack[1], out.scale);
}

// (gate, up) -> out, and (gate, up, group_size, scale_layout, min_amax) -> (q, scale)
template <bool Quant>
void silu_mul(StableIValue* stack, uint64_t, uint64_t) {
  const char* const op = Quant ? kSiluMulGroupQuant : kSiluMul;
  Tensor gate_tensor = take_tensor(stack[0]);
  Tensor up_tensor = take_tensor(stack[1]);
  QuantOptions options{};
  if (Quant) options = {take_int(stack[2]), take_string(stack[3]), take_double(stack[4])};
  const Dtype dtype = float16_of(op, "gate", gate_tensor);
  check_same_shape(op, "up", up_tensor, "gate", gate_tensor);
  const int32_t device = gate_tensor.device();
  const DeviceGuard guard(device);
  const Rows gate = as_rows(op, "gate", std::move(gate_tensor));
  const Rows up = as_rows(op, "up", std::move(up_tensor));
  if (Quant) {
    check_quant(op, options, gate.cols);
    QuantOut out = empty_quantized(gate, options);
    check_launch(op, custom_ops::silu_mul_group_quant(dtype, gate.matrix, up.matrix, gate.rows, gate.cols, out.raw,
                                                      current_stream(device)));
    put(stack[0], out.codes);
    put(stack[1], out.scale);
  } else {
    Tensor out = empty_contiguous(gate.keep, gate.keep.dtype());
    check_launch(op, custom_ops::silu_mul(dtype, gate.matrix, up.matrix, out.data(), gate.rows,
                                          gate.cols, current_stream(device)));
    put(stack[0], out);
  }
}

custom_ops::WeightMode weight_mode(const char* op, const std::string& name) {
  if (name == "rounded") return custom_ops::WeightMode::rounded;
  if (name == "float32") return custom_ops::WeightMode::float32;
  if (name == "float32_plus_one") return custom_ops::WeightMode::float32_plus_one;
  fail(op, "weight_mode must be 'rounded', 'float32' or 'float32_plus_one', got '", name, "'");
}

custom_ops::Weight norm_weight(const char* op, const Tensor& weight, const Tensor& x, int64_t cols,
                               custom_ops::WeightMode mode) {
  if (weight.dim() != 1 || weight.sizes()[0] != cols || (cols > 1 && weight.strides()[0] != 1)) {
    fail(op, "weight must be contiguous of shape [", cols, "]");
  }
  if (weight.device() != x.device()) fail(op, "weight must be on the device of x");
  const bool same = weight.dtype() == x.dtype();
  if (!same && weight.dtype() != aoti_torch_dtype_float32()) {
    fail(op, "weight must have the dtype of x or be float32");
  }
  if (!same && mode == custom_ops::WeightMode::rounded) {
    fail(op, "weight must have the dtype of x for weight_mode 'rounded'");
  }
  return {weight.data(), !same, mode};
}

// (x, [residual,] weight, eps, [group_size,] weight_mode, [scale_layout, min_amax])
//   -> out | (out, residual_out) | (q, scale) | (q, scale, residual_out)
template <bool Add, bool Quant>
void rms_norm(StableIValue* stack, uint64_t, uint64_t) {
  const char* const op =
      Add ? (Quant ? kAddRmsNormGroupQuant : kAddRmsNorm) : (Quant ? kRmsNormGroupQuant : kRmsNorm);
  int next = 0;
  Tensor x_tensor = take_tensor(stack[next++]);
  Tensor residual_tensor = Add ? take_tensor(stack[next++]) : Tensor();
  const Tensor weight = take_tensor(stack[next++]);
  const double eps = take_double(stack[next++]);
  QuantOptions options{};
  if (Quant) options.group_size = take_int(stack[next++]);
  const std::string mode = take_string(stack[next++]);
  if (Quant) {
    options.layout = take_string(stack[next++]);
    options.min_amax = take_double(stack[next++]);
  }

  const Dtype dtype = float16_of(op, "x", x_tensor);
  if (Add) check_same_shape(op, "residual", residual_tensor, "x", x_tensor);
  const int32_t device = x_tensor.device();
  const DeviceGuard guard(device);
  const Rows x = as_rows(op, "x", std::move(x_tensor));
  custom_ops::NormArgs args{};
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
  if (Quant) {
    check_quant(op, options, x.cols);
    QuantOut out = empty_quantized(x, options);
    args.quantized = out.raw;
    check_launch(op, custom_ops::rms_norm(dtype, args, current_stream(device)));
    put(stack[0], out.codes);
    put(stack[1], out.scale);
  } else {
    Tensor out = empty_contiguous(x.keep, x.keep.dtype());
    args.out = out.data();
    check_launch(op, custom_ops::rms_norm(dtype, args, current_stream(device)));
    put(stack[0], out);
  }
  if (Add) put(stack[Quant ? 2 : 1], residual_out);
}

}  // namespace

// The same schemas as namespace custom_ops, so that a compiled graph may name these ops in place of those.
STABLE_TORCH_LIBRARY_FRAGMENT(custom_ops_cuda, m) {
  m.def("group_quant(Tensor x, int group_size, *, str scale_layout=\"row_major\", float min_amax=1e-10)"
        " -> (Tensor q, Tensor scale)");
  m.def("silu_mul(Tensor gate, Tensor up) -> Tensor");
  m.def("silu_mul_group_quant(Tensor gate, Tensor up, int group_size, *, str scale_layout=\"row_major\","
        " float min_amax=1e-10) -> (Tensor q, Tensor scale)");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, *, str weight_mode=\"rounded\") -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, *, str weight_mode=\"rounded\")"
        " -> (Tensor out, Tensor residual_out)");
  m.def("rms_norm_group_quant(Tensor x, Tensor weight, float eps, int group_size, *,"
        " str weight_mode=\"rounded\", str scale_layout=\"row_major\", float min_amax=1e-10)"
        " -> (Tensor q, Tensor scale)");
  m.def("add_rms_norm_group_quant(Tensor x, Tensor residual, Tensor weight, float eps, int group_size, *,"
        " str weight_mode=\"rounded\", str scale_layout=\"row_major\", float min_amax=1e-10)"
        " -> (Tensor q, Tensor scale, Tensor residual_out)");
}

STABLE_TORCH_LIBRARY_IMPL(custom_ops_cuda, CUDA, m) {
  m.impl(kGroupQuant, &group_quant);
  m.impl(kSiluMul, &silu_mul<false>);
  m.impl(kSiluMulGroupQuant, &silu_mul<true>);
  m.impl(kRmsNorm, &rms_norm<false, false>);
  m.impl(kAddRmsNorm, &rms_norm<true, false>);
  m.impl(kRmsNormGroupQuant, &rms_norm<false, true>);
  m.impl(kAddRmsNormGroupQuant, &rms_norm<true, true>);
}
