// The ops of namespace custom_ops_cuda for the adapters of a batch beside a product of the BLAS: what
// custom_ops/lora/hopper_batch.py calls where it has seen that they take the arguments.
#include "lora_arguments.h"

namespace {

using namespace custom_ops;

constexpr char kShrink[] = "lora_batch_shrink";
constexpr char kExpand[] = "lora_batch_expand";
constexpr int64_t kShrinkStep = 256;   // channels that the warps of a block share, at least
constexpr int64_t kExpandStep = 64;    // columns of a warp

// The batch, for weights of that many slots and a rank.
LoraTokens take_batch(const char* op, const Tensor& sorted_tokens, const Tensor& tiles, int64_t tokens, int64_t rank,
                      int64_t grid_tiles, int32_t device) {
  check_vector(op, "sorted_tokens", sorted_tokens, aoti_torch_dtype_int32(), device);
  if (sorted_tokens.sizes()[0] < tokens) fail(op, "sorted_tokens is shorter than x");
  if (tiles.dim() != 2 || tiles.dtype() != aoti_torch_dtype_int32() || tiles.device() != device ||
      tiles.sizes()[1] != 4 || tiles.strides()[0] != 4 || tiles.strides()[1] != 1 ||
      reinterpret_cast<uintptr_t>(tiles.data()) % 16 != 0) {
    fail(op, "tiles must be int32 [tiles, 4], contiguous and on 16 bytes, on the device of x");
  }
  if (grid_tiles < 0 || grid_tiles > tiles.sizes()[0]) {
    fail(op, "grid_tiles must be 0 to ", tiles.sizes()[0], ", got ", grid_tiles);
  }
  if (rank != 16 && rank != 32 && rank != 64) fail(op, "takes a rank of 16, 32 or 64, got ", rank);
  if (tokens > INT32_MAX) fail(op, "takes sizes below 2^31");
  LoraTokens p{};
  p.tiles = static_cast<const int32_t*>(tiles.data());
  p.sorted_tokens = static_cast<const int32_t*>(sorted_tokens.data());
  p.grid_tiles = static_cast<int>(grid_tiles);
  p.tokens = static_cast<int>(tokens);
  p.rank = static_cast<int>(rank);
  return p;
}

const int32_t* take_ranks(const char* op, const Tensor& ranks, int64_t slots, int32_t device) {
  check_vector(op, "ranks", ranks, aoti_torch_dtype_int32(), device);
  check_size(op, "ranks", ranks.sizes()[0], slots);
  return static_cast<const int32_t*>(ranks.data());
}

// (x, a to a3, ranks to ranks3, sorted_tokens, tiles, grid_tiles, split_channels, y!, dependent) -> ()
void shrink_op(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor x = take_tensor(stack[0]);
  const std::array<Tensor, kMaxSlices> a{take_tensor(stack[1]), take_optional(stack[2]), take_optional(stack[3]),
                                         take_optional(stack[4])};
  const std::array<Tensor, kMaxSlices> ranks{take_tensor(stack[5]), take_optional(stack[6]), take_optional(stack[7]),
                                             take_optional(stack[8])};
  const Tensor sorted_tokens = take_tensor(stack[9]);
  const Tensor tiles = take_tensor(stack[10]);
  const int64_t grid_tiles = take_int(stack[11]);
  const int64_t split_channels = take_int(stack[12]);
  const Tensor y = take_tensor(stack[13]);
  const bool dependent = torch::stable::detail::to<bool>(stack[14]);

  if (float16_of(kShrink, "x", x) != Dtype::bfloat16) fail(kShrink, "x must be bfloat16");
  const int32_t device = x.device();
  const DeviceGuard guard(device);
  check_rows(kShrink, "x", x, 2, x.dtype(), device);
  LoraShrink p{};
  const int64_t channels = x.sizes()[1];
  if (channels % kAlignment != 0 || channels > INT32_MAX) fail(kShrink, "needs a multiple of 8 channels, below 2^31");
  if (split_channels < kShrinkStep || split_channels % kShrinkStep != 0) {
    fail(kShrink, "split_channels must be a multiple of ", kShrinkStep, ", got ", split_channels);
  }
  const int64_t splits = (channels + split_channels - 1) / split_channels;
  for (int i = 0; i < kMaxSlices && there(a[i]); ++i) {
    check_rows(kShrink, "a", a[i], 3, x.dtype(), device);
    check_size(kShrink, "a", a[i].sizes()[0], a[0].sizes()[0]);
    check_size(kShrink, "a", a[i].sizes()[1], a[0].sizes()[1]);
    check_size(kShrink, "a", a[i].sizes()[2], channels);
    if (a[i].strides()[1] != channels || a[i].strides()[0] != a[0].strides()[0]) fail(kShrink, "a must be contiguous");
    if (!there(ranks[i])) fail(kShrink, "has fewer ranks than slices");
    p.a[i] = a[i].data();
    p.ranks[i] = take_ranks(kShrink, ranks[i], a[0].sizes()[0], device);
    ++p.slices;
  }
  p.batch = take_batch(kShrink, sorted_tokens, tiles, x.sizes()[0], a[0].sizes()[1], grid_tiles, device);
  if (y.dim() != 4 || y.dtype() != aoti_torch_dtype_float32() || y.device() != device) {
    fail(kShrink, "y must be float32 [splits, slices, tokens, rank] on the device of x");
  }
  const std::array<int64_t, 4> want{splits, p.slices, x.sizes()[0], p.batch.rank};
  for (int d = 0; d < 4; ++d) check_size(kShrink, "y", y.sizes()[d], want[d]);
  if (y.strides()[3] != 1 || y.strides()[2] != p.batch.rank) fail(kShrink, "y must have contiguous slices");
  p.x = x.data();
  p.y = static_cast<float*>(y.data());
  p.x_row = x.strides()[0];
  p.a_slot = a[0].strides()[0];
  p.y_split = y.strides()[0];
  p.y_slice = y.strides()[1];
  p.channels = static_cast<int>(channels);
  p.split_channels = static_cast<int>(split_channels);
  check_launch(kShrink, lora_shrink(p, dependent, current_stream(device)));
}

// (out!, y, b to b3, scalings, ranks, sorted_tokens, tiles, grid_tiles, early_base, dependent) -> ()
void expand_op(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor out = take_tensor(stack[0]);
  const Tensor y = take_tensor(stack[1]);
  const std::array<Tensor, kMaxSlices> b{take_tensor(stack[2]), take_optional(stack[3]), take_optional(stack[4]),
                                         take_optional(stack[5])};
  const Tensor scalings = take_tensor(stack[6]);
  const Tensor ranks = take_tensor(stack[7]);
  const Tensor sorted_tokens = take_tensor(stack[8]);
  const Tensor tiles = take_tensor(stack[9]);
  const int64_t grid_tiles = take_int(stack[10]);
  LoraExpand p{};
  p.early_base = torch::stable::detail::to<bool>(stack[11]);
  const bool dependent = torch::stable::detail::to<bool>(stack[12]);

  if (float16_of(kExpand, "out", out) != Dtype::bfloat16) fail(kExpand, "out must be bfloat16");
  const int32_t device = out.device();
  const DeviceGuard guard(device);
  check_rows(kExpand, "out", out, 2, out.dtype(), device);
  const int64_t tokens = out.sizes()[0], columns = out.sizes()[1];
  if (out.strides()[0] != columns || columns > INT32_MAX) fail(kExpand, "out must be contiguous");
  if (y.dim() != 4 || y.dtype() != aoti_torch_dtype_float32() || y.device() != device) {
    fail(kExpand, "y must be float32 [splits, slices, tokens, rank] on the device of out");
  }
  const int64_t rank = y.sizes()[3], slots = b[0].dim() == 3 ? b[0].sizes()[0] : 0;
  check_size(kExpand, "y", y.sizes()[2], tokens);
  if (y.strides()[3] != 1 || y.strides()[2] != rank) fail(kExpand, "y must have contiguous slices");
  int64_t seen = 0;
  for (int i = 0; i < kMaxSlices && there(b[i]); ++i) {
    check_rows(kExpand, "b", b[i], 3, out.dtype(), device);
    check_size(kExpand, "b", b[i].sizes()[0], slots);
    check_size(kExpand, "b", b[i].sizes()[2], rank);
    if (b[i].strides()[1] != rank) fail(kExpand, "b must be contiguous");
    if (seen % kExpandStep != 0) fail(kExpand, "needs slices of multiples of ", kExpandStep, " columns");
    p.slice[p.slices++] = {b[i].data(), b[i].strides()[0], static_cast<int>(seen)};
    seen += b[i].sizes()[1];
  }
  check_size(kExpand, "b", seen, columns);
  check_size(kExpand, "y", y.sizes()[1], p.slices);
  p.batch = take_batch(kExpand, sorted_tokens, tiles, tokens, rank, grid_tiles, device);
  p.ranks = take_ranks(kExpand, ranks, slots, device);
  check_vector(kExpand, "scalings", scalings, aoti_torch_dtype_float32(), device);
  check_size(kExpand, "scalings", scalings.sizes()[0], slots);
  p.scalings = static_cast<const float*>(scalings.data());
  p.out = out.data();
  p.y = static_cast<const float*>(y.data());
  p.y_split = y.strides()[0];
  p.y_slice = y.strides()[1];
  p.splits = static_cast<int>(y.sizes()[0]);
  p.columns = static_cast<int>(columns);
  check_launch(kExpand, lora_expand(p, dependent, current_stream(device)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(custom_ops_cuda, m) {
  m.def(
      "lora_batch_shrink(Tensor x, Tensor a, Tensor? a1, Tensor? a2, Tensor? a3, Tensor ranks, Tensor? ranks1,"
      " Tensor? ranks2, Tensor? ranks3, Tensor sorted_tokens, Tensor tiles, int grid_tiles, int split_channels,"
      " Tensor(a!) y, bool dependent) -> ()");
  m.def(
      "lora_batch_expand(Tensor(a!) out, Tensor y, Tensor b, Tensor? b1, Tensor? b2, Tensor? b3, Tensor scalings,"
      " Tensor ranks, Tensor sorted_tokens, Tensor tiles, int grid_tiles, bool early_base, bool dependent) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(custom_ops_cuda, CUDA, m) {
  m.impl(kShrink, &shrink_op);
  m.impl(kExpand, &expand_op);
}
