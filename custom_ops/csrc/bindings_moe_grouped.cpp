// The grouped products of experts on Hopper as ops of namespace custom_ops_cuda: what custom_ops/moe/experts_hopper.py
// calls where it has seen that they take a problem. They check again what a wrong address would come of.
#include "moe_arguments.h"

namespace {

using namespace custom_ops;

constexpr char kGateUp[] = "moe_grouped_gate_up";
constexpr char kDown[] = "moe_grouped_down";
constexpr int64_t kGroup = 128;

bool there(const Tensor& t) { return t.get() != nullptr; }

void check(const char* op, bool good, const char* what) {
  if (!good) fail(op, what);
}

bool on_16_bytes(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

const float* scales_of(const char* op, const char* name, const Tensor& t, int64_t dims, int32_t device) {
  check_cuda(op, name, t, device);
  if (t.dtype() != aoti_torch_dtype_float32() || t.dim() != dims) {
    fail(op, name, " must be float32 of ", dims, " dimensions");
  }
  return static_cast<const float*>(t.data());
}

const int32_t* index_of(const char* op, const char* name, const Tensor& t, int64_t size, int32_t device) {
  check_cuda(op, name, t, device);
  if (t.dim() != 1 || t.dtype() != aoti_torch_dtype_int32() || t.sizes()[0] != size ||
      (size > 1 && t.strides()[0] != 1)) {
    fail(op, name, " must be contiguous int32 of ", size, " elements");
  }
  return static_cast<const int32_t*>(t.data());
}

// What both products take: x, its scales, the weight, its scales, and the index.
struct Operands {
  Tensor x, x_scale, weight, weight_scale, sorted_ids, block_experts, num_padded;
  GroupedType type;
  int32_t device;

  explicit Operands(MoeArguments& arguments)
      : x(arguments.tensor()),
        x_scale(arguments.optional_tensor()),
        weight(arguments.tensor()),
        weight_scale(arguments.optional_tensor()),
        sorted_ids(arguments.tensor()),
        block_experts(arguments.tensor()),
        num_padded(arguments.tensor()) {}

  GroupedArgs describe(const char* op) {
    check(op, x.device_type() == aoti_torch_device_type_cuda(), "x must be on a CUDA device");
    device = x.device();
    check_cuda(op, "weight", weight, device);
    const bool codes = x.dtype() == aoti_torch_dtype_float8_e4m3fn();
    check(op, codes || x.dtype() == aoti_torch_dtype_bfloat16(), "x must be bfloat16 or float8_e4m3fn");
    check(op, weight.dtype() == x.dtype(), "weight must have the dtype of x");
    check(op, there(x_scale) == codes && there(weight_scale) == codes, "takes scales where x has codes");
    type = codes ? GroupedType::e4m3 : GroupedType::bfloat16;
    check(op, x.dim() == 2 && weight.dim() == 3, "x must have 2 dimensions and weight 3");
    const int64_t itemsize = codes ? 1 : 2;
    const int64_t experts = weight.sizes()[0], rows = weight.sizes()[1], channels = weight.sizes()[2];
    check(op, x.sizes()[1] == channels, "x must have as many channels as weight");
    check(op, experts >= 1 && experts <= kMostGroupedExperts, "takes 1 to 256 experts");
    check(op, channels >= 1 && channels * itemsize % 128 == 0, "needs channels that fill steps of 128 bytes");
    check(op, experts * rows <= INT32_MAX && channels <= INT32_MAX, "counts rows of the weight in 31 bits");
    const int64_t* const w = weight.strides();
    check(op, w[2] == 1 && w[1] == channels && (experts == 1 || w[0] == rows * channels), "weight must be contiguous");
    const bool one = x.sizes()[0] <= 1;
    const int64_t pitch = one ? channels : x.strides()[0];
    check(op, x.strides()[1] == 1 && pitch >= channels && pitch * itemsize % 16 == 0 && on_16_bytes(x.data()) &&
                  on_16_bytes(weight.data()),
          "x and weight must have rows that begin on 16 bytes");
    GroupedArgs p{};
    p.x = x.data();
    p.x_rows = x.sizes()[0];
    p.x_pitch = pitch;
    p.weight = weight.data();
    p.experts = static_cast<int>(experts);
    p.channels = static_cast<int>(channels);
    p.weight_rows = static_cast<int>(rows);
    if (codes) {
      p.x_scale = scales_of(op, "x_scale", x_scale, 2, device);
      p.w_scale = scales_of(op, "weight_scale", weight_scale, 3, device);
      const int64_t groups = (channels + kGroup - 1) / kGroup;
      const int64_t* const sizes = x_scale.sizes();
      const int64_t* const strides = x_scale.strides();
      check(op, sizes[0] == x.sizes()[0] && sizes[1] == groups, "x_scale must have one for 128 channels of each row");
      check(op, strides[0] >= 0 && strides[1] >= 0 && sizes[0] * strides[0] + sizes[1] * strides[1] <= INT32_MAX,
            "takes x_scale below 2^31 elements");
      p.scale_row = static_cast<int>(strides[0]);
      p.scale_group = static_cast<int>(strides[1]);
      const int64_t* const blocks = weight_scale.sizes();
      check(op, blocks[0] == experts && blocks[1] == (rows + kGroup - 1) / kGroup && blocks[2] == groups &&
                    weight_scale.strides()[2] == 1,
            "weight_scale must have one for each block of 128 by 128");
      p.w_scale_expert = weight_scale.strides()[0];
      p.w_scale_row = weight_scale.strides()[1];
    }
    check(op, sorted_ids.dim() == 1, "sorted_ids must have 1 dimension");
    p.padded_rows = sorted_ids.sizes()[0];
    check(op, p.padded_rows <= INT32_MAX, "takes less than 2^31 rows");
    p.sorted_ids = index_of(op, "sorted_ids", sorted_ids, p.padded_rows, device);
    p.block_experts = index_of(op, "block_experts", block_experts, p.padded_rows / kGroupedRows, device);
    p.num_padded = index_of(op, "num_padded", num_padded, 1, device);
    return p;
  }
};

void check_out(const char* op, const Tensor& out, int64_t rows, int64_t width, int32_t dtype, int32_t device) {
  check_cuda(op, "out", out, device);
  check(op, out.dtype() == dtype && out.dim() == 2 && out.sizes()[0] == rows && out.sizes()[1] == width,
        "out does not have the dtype and the sizes of the product");
  check(op, rows == 0 || (out.strides()[1] == 1 && (rows == 1 || out.strides()[0] == width) && on_16_bytes(out.data())),
        "out must be contiguous and begin on 16 bytes");
}

int multiprocessors(int32_t device) {
  int count = 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// (x, x_scale, weight, weight_scale, sorted_ids, block_experts, num_padded, out, out_scale, top_k, min_amax)
void gate_up_op(StableIValue* stack, uint64_t, uint64_t) {
  MoeArguments arguments(stack);
  Operands operands(arguments);
  const Tensor out = arguments.tensor();
  const Tensor out_scale = arguments.optional_tensor();
  const int64_t top_k = arguments.integer();
  const float min_amax = arguments.number();
  GroupedArgs p = operands.describe(kGateUp);
  const DeviceGuard guard(operands.device);
  check(kGateUp, p.weight_rows % (2 * kGroup) == 0, "needs halves of a multiple of 128 rows of weight");
  p.width = p.weight_rows / 2;
  p.column_tiles = p.width / static_cast<int>(kGroup);
  check(kGateUp, top_k >= 1 && p.x_rows * top_k <= INT32_MAX, "top_k must be 1 or more, of less than 2^31 pairs");
  p.top_k = static_cast<int>(top_k);
  p.pairs = static_cast<int>(p.x_rows * top_k);
  p.min_amax = min_amax;
  check_out(kGateUp, out, p.padded_rows, p.width, operands.x.dtype(), operands.device);
  p.out = out.data();
  check(kGateUp, there(out_scale) == (operands.type == GroupedType::e4m3), "takes out_scale where x has codes");
  if (there(out_scale)) {
    p.out_scale = const_cast<float*>(scales_of(kGateUp, "out_scale", out_scale, 2, operands.device));
    check(kGateUp, out_scale.sizes()[0] == p.column_tiles && out_scale.sizes()[1] == p.padded_rows &&
                       (p.padded_rows == 0 || out_scale.strides()[1] == 1) &&
                       (p.column_tiles == 1 || out_scale.strides()[0] == p.padded_rows),
          "out_scale must be contiguous, one for each row of each 128 columns");
  }
  check_launch(kGateUp, moe_grouped_gate_up(operands.type, p, multiprocessors(operands.device),
                                            current_stream(operands.device)));
}

// (x, x_scale, weight, weight_scale, sorted_ids, block_experts, num_padded, out)
void down_op(StableIValue* stack, uint64_t, uint64_t) {
  MoeArguments arguments(stack);
  Operands operands(arguments);
  const Tensor out = arguments.tensor();
  GroupedArgs p = operands.describe(kDown);
  const DeviceGuard guard(operands.device);
  check(kDown, p.weight_rows % kGroup == 0, "needs a multiple of 128 rows of weight");
  check(kDown, p.x_rows == p.padded_rows, "x must have a row for each of sorted_ids");
  check(kDown, out.dim() == 2 && out.sizes()[0] <= INT32_MAX, "out must have 2 dimensions and less than 2^31 pairs");
  p.width = p.weight_rows;
  p.column_tiles = (p.width + 255) / 256;
  p.top_k = 1;
  p.pairs = static_cast<int>(out.sizes()[0]);
  check_out(kDown, out, p.pairs, p.width, aoti_torch_dtype_bfloat16(), operands.device);
  p.out = out.data();
  check_launch(kDown, moe_grouped_down(operands.type, p, multiprocessors(operands.device),
                                       current_stream(operands.device)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(custom_ops_cuda, m) {
  m.def(
      "moe_grouped_gate_up(Tensor x, Tensor? x_scale, Tensor weight, Tensor? weight_scale, Tensor sorted_ids,"
      " Tensor block_experts, Tensor num_padded, Tensor(a!) out, Tensor(b!)? out_scale, int top_k, float min_amax)"
      " -> ()");
  m.def(
      "moe_grouped_down(Tensor x, Tensor? x_scale, Tensor weight, Tensor? weight_scale, Tensor sorted_ids,"
      " Tensor block_experts, Tensor num_padded, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(custom_ops_cuda, CUDA, m) {
  m.impl(kGateUp, &gate_up_op);
  m.impl(kDown, &down_op);
}
