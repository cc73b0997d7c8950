// The grouped products of experts in FP8 on Hopper as ops of namespace custom_ops_cuda: what
// custom_ops/moe/experts_hopper_fp8.py calls where it has seen that they take a problem. They check again what a wrong
// address would come of.
#include "moe_grouped_arguments.h"

namespace {

using namespace custom_ops;

constexpr char kGateUp[] = "moe_fp8_gate_up";
constexpr char kDown[] = "moe_fp8_down";
constexpr int64_t kGroup = kFp8GroupedRows;

bool contiguous_2d(const Tensor& t, int64_t rows, int64_t cols) {
  return t.dim() == 2 && t.sizes()[0] == rows && t.sizes()[1] == cols &&
         (rows == 0 || cols == 0 || (t.strides()[1] == 1 && (rows == 1 || t.strides()[0] == cols)));
}

// What both products take, after which come what they write and their own numbers.
struct Operands {
  Tensor x, x_scale, weight, weight_scale, sorted_ids, block_experts, num_padded, counter, ready;
  int32_t device;

  explicit Operands(MoeArguments& arguments)
      : x(arguments.tensor()),
        x_scale(arguments.tensor()),
        weight(arguments.tensor()),
        weight_scale(arguments.tensor()),
        sorted_ids(arguments.tensor()),
        block_experts(arguments.tensor()),
        num_padded(arguments.tensor()),
        counter(arguments.tensor()),
        ready(arguments.tensor()) {}

  Fp8GroupedArgs describe(const char* op) {
    check(op, x.device_type() == aoti_torch_device_type_cuda(), "x must be on a CUDA device");
    device = x.device();
    check_cuda(op, "weight", weight, device);
    check(op, x.dtype() == aoti_torch_dtype_float8_e4m3fn() && weight.dtype() == x.dtype(),
          "x and weight must be float8_e4m3fn");
    check(op, x.dim() == 2 && weight.dim() == 3, "x must have 2 dimensions and weight 3");
    const int64_t experts = weight.sizes()[0], rows = weight.sizes()[1], channels = weight.sizes()[2];
    check(op, x.sizes()[1] == channels, "x must have as many channels as weight");
    check(op, channels >= 1 && channels % kGroup == 0, "needs channels of a multiple of 128");
    check(op, experts >= 1 && rows >= 1 && rows % kGroup == 0, "needs rows of weight of a multiple of 128");
    check(op, experts * rows <= INT32_MAX && channels <= INT32_MAX, "counts rows of the weight in 31 bits");
    check(op, in_one_piece(weight), "weight must be contiguous");
    const bool one = x.sizes()[0] <= 1;
    const int64_t pitch = one ? channels : x.strides()[0];
    check(op, x.strides()[1] == 1 && pitch >= channels && pitch % 16 == 0 && on_16_bytes(x.data()) &&
                  on_16_bytes(weight.data()),
          "x and weight must have rows that begin on 16 bytes");
    check(op, x.sizes()[0] * pitch < UINT32_MAX, "x must be less than 2^32 bytes");
    Fp8GroupedArgs p{};
    p.x = x.data();
    p.x_pitch = pitch;
    p.weight = weight.data();
    p.experts = static_cast<int>(experts);
    p.weight_rows = static_cast<int>(rows);
    p.steps = static_cast<int>(channels / kGroup);
    check_scales(op, "x_scale", x_scale, 2, {x.sizes()[0], channels / kGroup, 0});
    check_scales(op, "weight_scale", weight_scale, 3, {experts, rows / kGroup, channels / kGroup});
    p.x_scale = static_cast<const float*>(x_scale.data());
    p.x_scale_row = x_scale.strides()[0];
    p.x_scale_block = x_scale.strides()[1];
    p.weight_scale = static_cast<const float*>(weight_scale.data());
    p.weight_scale_expert = weight_scale.strides()[0];
    p.weight_scale_row = weight_scale.strides()[1];
    p.weight_scale_block = weight_scale.strides()[2];
    check(op, sorted_ids.dim() == 1, "sorted_ids must have 1 dimension");
    p.padded_rows = sorted_ids.sizes()[0];
    check(op, p.padded_rows % kFp8GroupedRows == 0 && p.padded_rows <= INT32_MAX,
          "takes whole blocks of 128 rows, less than 2^31");
    p.sorted_ids = index_of(op, "sorted_ids", sorted_ids, p.padded_rows, device);
    p.block_experts = index_of(op, "block_experts", block_experts, p.padded_rows / kFp8GroupedRows, device);
    p.num_padded = index_of(op, "num_padded", num_padded, 1, device);
    p.counter = const_cast<int32_t*>(index_of(op, "counter", counter, 1, device));
    p.ready = reinterpret_cast<uint32_t*>(
        const_cast<int32_t*>(index_of(op, "ready", ready, p.padded_rows / kFp8GroupedRows, device)));
    return p;
  }

  // The last element of a scale is counted in 32 bits.
  void check_scales(const char* op, const char* name, const Tensor& t, int64_t dims,
                    const std::array<int64_t, 3>& sizes) const {
    check_cuda(op, name, t, device);
    bool fits = t.dtype() == aoti_torch_dtype_float32() && t.dim() == dims;
    int64_t last = 0;
    for (int64_t d = 0; fits && d < dims; ++d) {
      fits = t.sizes()[d] == sizes[d] && t.strides()[d] >= 0;
      last += (sizes[d] - 1) * t.strides()[d];
    }
    if (!fits) fail(op, name, " must be float32, one for each 128 channels of a row, or block of 128 x 128");
    if (last >= UINT32_MAX) fail(op, name, " must reach less than 2^32 elements");
  }
};

int band_of(const char* op, int64_t band) {
  check(op, band >= 1 && band <= 1024, "band must be 1 to 1024");
  return static_cast<int>(band);
}

// (x, x_scale, weight, weight_scale, sorted_ids, block_experts, num_padded, counter, ready, out, out_scale, top_k,
// min_amax, band)
void gate_up_op(StableIValue* stack, uint64_t, uint64_t) {
  MoeArguments arguments(stack);
  Operands operands(arguments);
  const Tensor out = arguments.tensor(), out_scale = arguments.tensor();
  const int64_t top_k = arguments.integer();
  const float min_amax = arguments.number();
  const int64_t band = arguments.integer();
  Fp8GroupedArgs p = operands.describe(kGateUp);
  const DeviceGuard guard(operands.device);
  p.band = band_of(kGateUp, band);
  p.width = p.weight_rows / 2;
  check(kGateUp, p.width % kGroup == 0, "needs halves of a multiple of 128 rows of weight");
  p.columns = static_cast<int>(kGroup);
  p.second = p.width;
  p.column_tiles = p.width / p.columns;
  const int64_t tokens = operands.x.sizes()[0];
  check(kGateUp, top_k >= 1 && tokens * top_k <= INT32_MAX, "top_k must be 1 or more, of less than 2^31 pairs");
  p.top_k = static_cast<int>(top_k);
  p.pairs = static_cast<int>(tokens * top_k);
  check(kGateUp, min_amax >= 0x1p-60f && min_amax <= 0x1p60f, "min_amax must be 2^-60 to 2^60");
  p.min_amax = min_amax;
  check_cuda(kGateUp, "out", out, operands.device);
  check_cuda(kGateUp, "out_scale", out_scale, operands.device);
  check(kGateUp, out.dtype() == aoti_torch_dtype_float8_e4m3fn() && contiguous_2d(out, p.padded_rows, p.width) &&
                     on_16_bytes(out.data()),
        "out must be contiguous float8_e4m3fn of the sizes of the product, and begin on 16 bytes");
  check(kGateUp, out_scale.dtype() == aoti_torch_dtype_float32() &&
                     contiguous_2d(out_scale, p.padded_rows, p.width / kGroup),
        "out_scale must be contiguous float32, one for each 128 columns of out");
  p.out = out.data();
  p.out_scale = static_cast<float*>(out_scale.data());
  check_launch(kGateUp, moe_fp8_gate_up(p, multiprocessors(operands.device), current_stream(operands.device)));
}

// (x, x_scale, weight, weight_scale, sorted_ids, block_experts, num_padded, counter, ready, out, band)
void down_op(StableIValue* stack, uint64_t, uint64_t) {
  MoeArguments arguments(stack);
  Operands operands(arguments);
  const Tensor out = arguments.tensor();
  const int64_t band = arguments.integer();
  Fp8GroupedArgs p = operands.describe(kDown);
  const DeviceGuard guard(operands.device);
  p.band = band_of(kDown, band);
  check(kDown, operands.x.sizes()[0] == p.padded_rows, "x must have a row for each of sorted_ids");
  check(kDown, out.dim() == 2 && out.sizes()[0] <= INT32_MAX, "out must have 2 dimensions and less than 2^31 pairs");
  p.width = p.weight_rows;
  p.columns = 2 * static_cast<int>(kGroup);
  p.second = static_cast<int>(kGroup);
  p.column_tiles = (p.width + p.columns - 1) / p.columns;
  p.top_k = 1;
  p.pairs = static_cast<int>(out.sizes()[0]);
  check_cuda(kDown, "out", out, operands.device);
  check(kDown, out.dtype() == aoti_torch_dtype_bfloat16() && contiguous_2d(out, p.pairs, p.width) &&
                   on_16_bytes(out.data()),
        "out must be contiguous bfloat16 of the width of the product, and begin on 16 bytes");
  p.out = out.data();
  check_launch(kDown, moe_fp8_down(p, multiprocessors(operands.device), current_stream(operands.device)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(custom_ops_cuda, m) {
  m.def(
      "moe_fp8_gate_up(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor sorted_ids,"
      " Tensor block_experts, Tensor num_padded, Tensor(a!) counter, Tensor(b!) ready, Tensor(c!) out,"
      " Tensor(d!) out_scale, int top_k, float min_amax, int band) -> ()");
  m.def(
      "moe_fp8_down(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor sorted_ids,"
      " Tensor block_experts, Tensor num_padded, Tensor(a!) counter, Tensor ready,"
      " Tensor(b!) out, int band) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(custom_ops_cuda, CUDA, m) {
  m.impl(kGateUp, &gate_up_op);
  m.impl(kDown, &down_op);
}
