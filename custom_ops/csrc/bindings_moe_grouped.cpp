// The grouped products of experts on Hopper as ops of namespace custom_ops_cuda: what custom_ops/moe/experts_hopper.py
// calls where it has seen that they take a problem. They check again what a wrong address would come of.
#include "moe_grouped_arguments.h"

namespace {

using namespace custom_ops;

constexpr char kGateUp[] = "moe_grouped_gate_up";
constexpr char kDown[] = "moe_grouped_down";
constexpr int64_t kGroup = 128;

// What both products take: x, the weight, of the first one what gate is multiplied with, and the index.
struct Operands {
  Tensor x, weight, up, sorted_ids, block_experts, num_padded;
  int32_t device;

  Operands(MoeArguments& arguments, bool first)
      : x(arguments.tensor()),
        weight(arguments.tensor()),
        up(first ? arguments.optional_tensor() : Tensor()),
        sorted_ids(arguments.tensor()),
        block_experts(arguments.tensor()),
        num_padded(arguments.tensor()) {}

  GroupedArgs describe(const char* op) {
    check(op, x.device_type() == aoti_torch_device_type_cuda(), "x must be on a CUDA device");
    device = x.device();
    check_cuda(op, "weight", weight, device);
    check(op, x.dtype() == aoti_torch_dtype_bfloat16() && weight.dtype() == x.dtype(), "x and weight must be bfloat16");
    check(op, x.dim() == 2 && weight.dim() == 3, "x must have 2 dimensions and weight 3");
    const int64_t experts = weight.sizes()[0], rows = weight.sizes()[1], channels = weight.sizes()[2];
    check(op, x.sizes()[1] == channels, "x must have as many channels as weight");
    check(op, experts >= 1 && experts <= kMostGroupedExperts, "takes 1 to 256 experts");
    check(op, channels >= 1 && channels % 64 == 0, "needs channels that fill steps of 128 bytes");
    check(op, experts * rows <= INT32_MAX && channels <= INT32_MAX, "counts rows of the weight in 31 bits");
    check(op, in_one_piece(weight), "weight must be contiguous");
    const bool one = x.sizes()[0] <= 1;
    const int64_t pitch = one ? channels : x.strides()[0];
    check(op, x.strides()[1] == 1 && pitch >= channels && pitch % 8 == 0 && on_16_bytes(x.data()) &&
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
    check(op, sorted_ids.dim() == 1, "sorted_ids must have 1 dimension");
    p.padded_rows = sorted_ids.sizes()[0];
    check(op, p.padded_rows <= INT32_MAX, "takes less than 2^31 rows");
    p.sorted_ids = index_of(op, "sorted_ids", sorted_ids, p.padded_rows, device);
    p.block_experts = index_of(op, "block_experts", block_experts, p.padded_rows / kGroupedRows, device);
    p.num_padded = index_of(op, "num_padded", num_padded, 1, device);
    return p;
  }
};

void check_out(const char* op, const Tensor& out, int64_t rows, int64_t width, int32_t device) {
  check_cuda(op, "out", out, device);
  check(op, out.dtype() == aoti_torch_dtype_bfloat16() && out.dim() == 2 && out.sizes()[0] == rows &&
                out.sizes()[1] == width,
        "out does not have the dtype and the sizes of the product");
  check(op, rows == 0 || (out.strides()[1] == 1 && (rows == 1 || out.strides()[0] == width) && on_16_bytes(out.data())),
        "out must be contiguous and begin on 16 bytes");
}

// (x, weight, up, sorted_ids, block_experts, num_padded, out, top_k)
void gate_up_op(StableIValue* stack, uint64_t, uint64_t) {
  MoeArguments arguments(stack);
  Operands operands(arguments, true);
  const Tensor out = arguments.tensor();
  const int64_t top_k = arguments.integer();
  GroupedArgs p = operands.describe(kGateUp);
  const DeviceGuard guard(operands.device);
  const Tensor& up = operands.up;
  const bool apart = up.get() != nullptr;
  p.width = apart ? p.weight_rows : p.weight_rows / 2;
  check(kGateUp, (apart || p.weight_rows % 2 == 0) && p.width % kGroup == 0,
        "needs halves of a multiple of 128 rows of weight");
  if (apart) {
    check_cuda(kGateUp, "up", up, operands.device);
    check(kGateUp, up.dtype() == operands.weight.dtype() && up.dim() == 3 && up.sizes()[0] == p.experts &&
                       up.sizes()[1] == p.weight_rows && up.sizes()[2] == p.channels && in_one_piece(up) &&
                       on_16_bytes(up.data()),
          "up must have the dtype and the sizes of weight, be contiguous and begin on 16 bytes");
    p.up = up.data();
  } else {
    p.up = static_cast<const uint16_t*>(p.weight) + int64_t{p.width} * p.channels;
  }
  p.column_tiles = p.width / static_cast<int>(kGroup);
  check(kGateUp, top_k >= 1 && p.x_rows * top_k <= INT32_MAX, "top_k must be 1 or more, of less than 2^31 pairs");
  p.top_k = static_cast<int>(top_k);
  p.pairs = static_cast<int>(p.x_rows * top_k);
  check_out(kGateUp, out, p.padded_rows, p.width, operands.device);
  p.out = out.data();
  check_launch(kGateUp, moe_grouped_gate_up(p, multiprocessors(operands.device), current_stream(operands.device)));
}

// (x, weight, sorted_ids, block_experts, num_padded, out)
void down_op(StableIValue* stack, uint64_t, uint64_t) {
  MoeArguments arguments(stack);
  Operands operands(arguments, false);
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
  check_out(kDown, out, p.pairs, p.width, operands.device);
  p.out = out.data();
  check_launch(kDown, moe_grouped_down(p, multiprocessors(operands.device), current_stream(operands.device)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(custom_ops_cuda, m) {
  m.def(
      "moe_grouped_gate_up(Tensor x, Tensor weight, Tensor? up, Tensor sorted_ids, Tensor block_experts,"
      " Tensor num_padded, Tensor(a!) out, int top_k) -> ()");
  m.def(
      "moe_grouped_down(Tensor x, Tensor weight, Tensor sorted_ids, Tensor block_experts, Tensor num_padded,"
      " Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(custom_ops_cuda, CUDA, m) {
  m.impl(kGateUp, &gate_up_op);
  m.impl(kDown, &down_op);
}
