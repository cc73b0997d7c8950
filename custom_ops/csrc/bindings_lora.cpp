// The ops of namespace custom_ops_cuda for linear layers with low-rank adapters: what custom_ops/lora/hopper.py calls
// where it has seen that they take the arguments. They check again what a wrong address would come of.
#include "lora_arguments.h"

namespace {

using namespace custom_ops;

constexpr char kDecode[] = "lora_decode";
constexpr char kPrefill[] = "lora_prefill";
// What both ops take first; the output, on its way.
Tensor take_linear(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t rank,
                   LoraLinear& p) {
  const int32_t device = x.device();
  const int32_t dtype = x.dtype();
  check_rows(op, "x", x, 2, dtype, device);
  check_rows(op, "weight", weight, 2, dtype, device);
  check_size(op, "weight", weight.sizes()[1], x.sizes()[1]);
  const std::array<int64_t, 2> sizes{x.sizes()[0], weight.sizes()[0]};
  if (sizes[0] > INT32_MAX || sizes[1] > INT32_MAX || x.sizes()[1] > INT32_MAX) fail(op, "takes sizes below 2^31");
  if (sizes[1] % kAlignment != 0) fail(op, "needs a multiple of ", kAlignment, " columns, got ", sizes[1]);
  if (rank < 1 || rank % kAlignment != 0) fail(op, "needs a rank that is a multiple of ", kAlignment, ", got ", rank);
  if (there(bias)) {
    check_vector(op, "bias", bias, dtype, device);
    check_size(op, "bias", bias.sizes()[0], sizes[1]);
    p.bias = bias.data();
  }
  const std::array<int64_t, 2> strides{sizes[1], 1};
  Tensor out = empty(sizes.data(), strides.data(), 2, dtype, device);
  p.x = x.data();
  p.weight = weight.data();
  p.out = out.data();
  p.x_row = x.strides()[0];
  p.weight_row = weight.strides()[0];
  p.tokens = static_cast<int>(sizes[0]);
  p.columns = static_cast<int>(sizes[1]);
  p.channels = static_cast<int>(x.sizes()[1]);
  p.rank = static_cast<int>(rank);
  return out;
}

// (x, weight, bias, a, y, b to b3, scaling, scalings, token_slots, ranks, round_each, tile_columns, most_blocks) -> out
void decode_op(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x = take_tensor(stack[0]);
  const Tensor weight = take_tensor(stack[1]);
  const Tensor bias = take_optional(stack[2]);
  const Tensor a = take_optional(stack[3]);
  const Tensor y = take_optional(stack[4]);
  const std::array<Tensor, kMaxSlices> b{take_tensor(stack[5]), take_optional(stack[6]), take_optional(stack[7]),
                                         take_optional(stack[8])};
  LoraDecode p{};
  p.scaling = static_cast<float>(take_double(stack[9]));
  const Tensor scalings = take_optional(stack[10]);
  const Tensor token_slots = take_optional(stack[11]);
  const Tensor ranks = take_optional(stack[12]);
  p.linear.round_each = torch::stable::detail::to<bool>(stack[13]);
  p.tile_columns = static_cast<int>(take_int(stack[14]));
  p.most_blocks = static_cast<int>(take_int(stack[15]));
  if (p.tile_columns != 64 && p.tile_columns != 128) fail(kDecode, "tile_columns must be 64 or 128");

  const Dtype dtype = float16_of(kDecode, "x", x);
  const int32_t device = x.device();
  const DeviceGuard guard(device);
  const bool batched = there(token_slots);
  const int64_t rank = b[0].dim() > 0 ? b[0].sizes()[b[0].dim() - 1] : 0;
  Tensor out = take_linear(kDecode, x, weight, bias, rank, p.linear);
  p.b_float32 = b[0].dtype() == aoti_torch_dtype_float32();
  const int32_t b_dtype = p.b_float32 ? b[0].dtype() : x.dtype();
  int64_t columns = 0;
  for (const Tensor& each : b) {
    if (!there(each)) break;
    check_rows(kDecode, "b", each, batched ? 3 : 2, b_dtype, device);
    const int64_t* const sizes = each.sizes() + (batched ? 1 : 0);
    check_size(kDecode, "b", sizes[1], rank);
    if (each.strides()[batched ? 1 : 0] != rank) fail(kDecode, "b must be contiguous");
    p.slice[p.slices++] = {each.data(), batched ? each.strides()[0] : 0, static_cast<int>(columns)};
    columns += sizes[0];
    if (p.slices > 1 && p.slice[p.slices - 1].first_column % 128 != 0) {
      fail(kDecode, "needs slices of multiples of 128 columns");
    }
  }
  check_size(kDecode, "b", columns, p.linear.columns);
  if (there(a) == there(y)) fail(kDecode, "takes one of a and y");
  if (there(a)) {
    check_rows(kDecode, "a", a, 2, x.dtype(), device);
    check_size(kDecode, "a", a.sizes()[0], rank);
    check_size(kDecode, "a", a.sizes()[1], p.linear.channels);
    if (batched || rank > 64) fail(kDecode, "takes a of one adapter of rank 64 at most");
    if (!p.linear.round_each || p.b_float32) fail(kDecode, "takes a of an adapter of 16 bits, which rounds each step");
    p.a = a.data();
    p.a_row = a.strides()[0];
  } else {
    if (y.dim() != 4) fail(kDecode, "y must have 4 dimensions, got ", y.dim());
    const std::array<int64_t, 3> want{p.slices, p.linear.tokens, rank};
    for (int64_t d = 0; d < 3; ++d) check_size(kDecode, "y", y.sizes()[d + 1], want[d]);
    if (y.dtype() != aoti_torch_dtype_float32() || y.device() != device ||
        y.strides()[0] != want[0] * want[1] * want[2]) {
      fail(kDecode, "y must be contiguous float32 on the device of x");
    }
    p.y = static_cast<const float*>(y.data());
    p.y_splits = static_cast<int>(y.sizes()[0]);
  }
  if (batched) {
    check_vector(kDecode, "token_slots", token_slots, aoti_torch_dtype_int32(), device);
    check_vector(kDecode, "ranks", ranks, aoti_torch_dtype_int32(), device);
    check_vector(kDecode, "scalings", scalings, aoti_torch_dtype_float32(), device);
    if (token_slots.sizes()[0] < p.linear.tokens) fail(kDecode, "token_slots is shorter than x");
    p.token_slots = static_cast<const int32_t*>(token_slots.data());
    p.ranks = static_cast<const int32_t*>(ranks.data());
    p.scalings = static_cast<const float*>(scalings.data());
  }
  check_launch(kDecode, lora_decode(dtype, p, multiprocessors(device), current_stream(device)));
  put(stack[0], out);
}

// (x, weight, bias, a, y, b, scaling, round_each) -> out
void prefill_op(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x = take_tensor(stack[0]);
  const Tensor weight = take_tensor(stack[1]);
  const Tensor bias = take_optional(stack[2]);
  const Tensor a = take_optional(stack[3]);
  Tensor y = take_optional(stack[4]);
  const Tensor b = take_tensor(stack[5]);
  LoraPrefill p{};
  p.scaling = static_cast<float>(take_double(stack[6]));
  p.linear.round_each = torch::stable::detail::to<bool>(stack[7]);

  const Dtype dtype = float16_of(kPrefill, "x", x);
  const int32_t device = x.device();
  const DeviceGuard guard(device);
  check_rows(kPrefill, "b", b, 2, x.dtype(), device);
  Tensor out = take_linear(kPrefill, x, weight, bias, b.sizes()[1], p.linear);
  if (p.linear.rank > 256) fail(kPrefill, "takes a rank of 256 at most, got ", p.linear.rank);
  check_size(kPrefill, "b", b.sizes()[0], p.linear.columns);
  if (there(a) == there(y)) fail(kPrefill, "takes one of a and y");
  Tensor done;
  if (there(a)) {
    check_rows(kPrefill, "a", a, 2, x.dtype(), device);
    check_size(kPrefill, "a", a.sizes()[0], p.linear.rank);
    check_size(kPrefill, "a", a.sizes()[1], p.linear.channels);
    if (p.linear.rank > kMaxPrefillOwnRank) {
      fail(kPrefill, "takes a of a rank of ", kMaxPrefillOwnRank, " at most, got ", p.linear.rank);
    }
    if (!p.linear.round_each) fail(kPrefill, "takes a of an adapter that rounds each step");
    const std::array<int64_t, 2> sizes{p.linear.tokens, p.linear.rank};
    const std::array<int64_t, 2> strides{p.linear.rank, 1};
    const std::array<int64_t, 1> count{(p.linear.tokens + 127) / 128};
    y = empty(sizes.data(), strides.data(), 2, x.dtype(), device);
    done = empty(count.data(), &strides[1], 1, aoti_torch_dtype_int32(), device);
    p.a = a.data();
    p.a_row = a.strides()[0];
    p.done = static_cast<uint32_t*>(done.data());
  } else {
    check_rows(kPrefill, "y", y, 2, x.dtype(), device);
    check_size(kPrefill, "y", y.sizes()[0], p.linear.tokens);
    check_size(kPrefill, "y", y.sizes()[1], p.linear.rank);
    if (y.strides()[0] != p.linear.rank) fail(kPrefill, "y must be contiguous");
  }
  p.y = y.data();
  p.b = b.data();
  p.b_row = b.strides()[0];
  check_launch(kPrefill, lora_prefill(dtype, p, multiprocessors(device), current_stream(device)));
  put(stack[0], out);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(custom_ops_cuda, m) {
  m.def(
      "lora_decode(Tensor x, Tensor weight, Tensor? bias, Tensor? a, Tensor? y, Tensor b, Tensor? b1, Tensor? b2,"
      " Tensor? b3, float scaling, Tensor? scalings, Tensor? token_slots, Tensor? ranks, bool round_each,"
      " int tile_columns, int most_blocks) -> Tensor");
  m.def(
      "lora_prefill(Tensor x, Tensor weight, Tensor? bias, Tensor? a, Tensor? y, Tensor b, float scaling,"
      " bool round_each) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(custom_ops_cuda, CUDA, m) {
  m.impl(kDecode, &decode_op);
  m.impl(kPrefill, &prefill_op);
}
