// x @ W.T with its low-rank product, for few tokens: a memory-bound product, and everything else in its shadow.
//
// A cluster of blocks makes 128 columns; each of its blocks reads a part of the channels of W, and of x, by TMA, which
// keeps what is read of x short of what is read of W. The partial sums meet in shared memory, and each block finishes
// a part of the columns. W is the left operand, since its rows fill the 64 of a matrix instruction and few tokens do
// not.
//
// The shrink of a single 16-bit adapter is done by a third warpgroup from the same tiles of x (its 16 to 64 rows of A
// add little to what is read of W). Any other runs as a kernel of its own beside this one (programmatic dependent
// launch); then the third warpgroup waits for it, and meanwhile fetches the adapters' rows of B into L2.
#include "hopper.cuh"
#include "lora.h"

namespace custom_ops {
namespace {

using namespace hopper;

constexpr int kMaxStages = 8;
constexpr int kMaxCluster = 4;
constexpr int kSharedBytes = 190 * 1024;

// A block's columns; as many threads load, and those of the shrink beside them.
template <int Columns>
constexpr int kThreads = 2 * Columns + 128 + 32;

// Floats from one token's sums to the next: no bank conflicts when they are written.
template <int Columns>
constexpr int kSumPitch = Columns + 4;

// W, A, x. A matrix instruction reads 64 rows of x, also where fewer are there: those after them are not used.
template <int Columns, int Tokens, int Rank>
constexpr int kStageBytes = (Columns + Rank + Tokens) * kRowBytes;

__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(v);
  } else {
    return __float2half_rn(v);
  }
}

template <typename T>
__device__ __forceinline__ float rounded(float v) {
  return to_float(from_float<T>(v));
}

#ifdef CUSTOM_OPS_HOPPER

__device__ __forceinline__ float4 sum_of(float4 a, float4 b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// Eight neighbours of a row of B.
template <typename T>
__device__ __forceinline__ void load_eight(const T* from, float (&to)[8]) {
  if constexpr (std::is_same_v<T, float>) {
    const float4 low = __ldg(reinterpret_cast<const float4*>(from));
    const float4 high = __ldg(reinterpret_cast<const float4*>(from) + 1);
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
  } else {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(from));
    T values[8];
    memcpy(values, &raw, sizeof(raw));
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = to_float(values[i]);
  }
}

// The low-rank product of a token for four neighbouring columns.
template <typename B>
__device__ __forceinline__ void low_rank(const B* b, const float* y, int rank, int pitch, float (&sums)[4]) {
#pragma unroll 2
  for (int first = 0; first < rank; first += 8) {
    float factor[8];
    *reinterpret_cast<float4*>(factor) = *reinterpret_cast<const float4*>(y + first);
    *reinterpret_cast<float4*>(factor + 4) = *reinterpret_cast<const float4*>(y + first + 4);
#pragma unroll
    for (int column = 0; column < 4; ++column) {
      float row[8];
      load_eight(b + column * pitch + first, row);
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[column] = fmaf(factor[i], row[i], sums[column]);
    }
  }
}

template <typename T, int Columns, int Tokens, int Rank>
struct Decode {
  const LoraDecode& p;
  int first_column;
  int first_token;
  int block;   // of the cluster: which part of the channels, and of the columns at the end
  int blocks;
  int slice;

  __device__ int finished_columns() const { return Columns / blocks; }

  __device__ int slot(int token) const { return p.token_slots == nullptr ? 0 : p.token_slots[token]; }

  __device__ const char* adapter(int slot) const {
    const int bytes = p.b_float32 ? 4 : 2;
    const int64_t row = first_column - p.slice[slice].first_column + block * finished_columns();
    return static_cast<const char*>(p.slice[slice].b) +
           (slot * p.slice[slice].slot_stride + row * p.linear.rank) * bytes;
  }

  // Brings the rows of B that this block will read nearer: they are spread over memory, an adapter a token.
  __device__ void prefetch(int thread, int threads) const {
    const int width = min(finished_columns(), p.linear.columns - first_column - block * finished_columns());
    const int lines = (width * p.linear.rank * (p.b_float32 ? 4 : 2) + 127) / 128;
    const int tokens = p.token_slots == nullptr ? 1 : min(Tokens, p.linear.tokens - first_token);
#pragma unroll 1
    for (int i = thread; i < tokens * lines; i += threads) {
      const int at = slot(first_token + i / lines);
      if (at >= 0) prefetch_to_l2(adapter(at) + i % lines * 128);
    }
  }

  __device__ float4 as_factor(float4 sum) const {
    if (!p.linear.round_each) return sum;
    return {rounded<T>(sum.x), rounded<T>(sum.y), rounded<T>(sum.z), rounded<T>(sum.w)};
  }

  // y, the sum of its parts, as the expand takes it.
  __device__ void load_y(float* y, int thread, int threads) const {
    const int rank = p.linear.rank;
    const int vectors = rank / 4;
    const int64_t part = static_cast<int64_t>(p.slices) * p.linear.tokens * rank;
    const float* const from = p.y + (static_cast<int64_t>(slice) * p.linear.tokens + first_token) * rank;
    const int tokens = min(Tokens, p.linear.tokens - first_token);
#pragma unroll 1
    for (int i = thread; i < tokens * vectors; i += threads) {
      float4 sum = *reinterpret_cast<const float4*>(from + 4 * i);
#pragma unroll 4
      for (int split = 1; split < p.y_splits; ++split) {
        sum = sum_of(sum, *reinterpret_cast<const float4*>(from + split * part + 4 * i));
      }
      *reinterpret_cast<float4*>(y + i / vectors * (rank + 4) + i % vectors * 4) = as_factor(sum);
    }
  }

  // The sum of the blocks' parts, in their order.
  __device__ float4 gather(const float* part) const {
    float4 parts[kMaxCluster];
#pragma unroll
    for (int from = 0; from < kMaxCluster; ++from) {
      if (from < blocks) parts[from] = load_from_block(part, from);
    }
    float4 sum = parts[0];
#pragma unroll
    for (int from = 1; from < kMaxCluster; ++from) {
      if (from < blocks) sum = sum_of(sum, parts[from]);
    }
    return sum;
  }

  // y from the parts of the blocks, where the shrink was done here.
  __device__ void gather_y(float* y, const float* parts, int thread, int threads) const {
    constexpr int kVectors = Rank > 0 ? Rank / 4 : 1;
#pragma unroll 1
    for (int i = thread; i < Tokens * kVectors; i += threads) {
      const int token = i / kVectors;
      const int r = i % kVectors * 4;
      const float4 sum = as_factor(gather(parts + token * (Rank + 4) + r));
      if (r < p.linear.rank) *reinterpret_cast<float4*>(y + token * (p.linear.rank + 4) + r) = sum;
    }
  }

  // Four columns of a token: the sums, the bias, the low-rank product.
  __device__ __forceinline__ void finish(int token, int group, float4 sum, const float* y) const {
    const int column = first_column + block * finished_columns() + group * 4;
    if (first_token + token >= p.linear.tokens || column >= p.linear.columns) return;
    float base[4] = {sum.x, sum.y, sum.z, sum.w};
    float product[4] = {};
    const float* const factor = y + token * (p.linear.rank + 4);
    float scaling = p.scaling;
    const int at = slot(first_token + token);
    if (at >= 0) {
      const int rank = p.token_slots == nullptr ? p.linear.rank : min(p.ranks[at], p.linear.rank);
      if (p.token_slots != nullptr) scaling = p.scalings[at];
      const char* const b = adapter(at) + group * 4 * p.linear.rank * (p.b_float32 ? 4 : 2);
      if (p.b_float32) {
        low_rank(reinterpret_cast<const float*>(b), factor, rank, p.linear.rank, product);
      } else {
        low_rank(reinterpret_cast<const T*>(b), factor, rank, p.linear.rank, product);
      }
    }
    T out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (p.linear.bias != nullptr) base[i] += to_float(static_cast<const T*>(p.linear.bias)[column + i]);
      base[i] = rounded<T>(base[i]);
      if (p.linear.round_each) product[i] = rounded<T>(product[i]);
      product[i] = __fmul_rn(product[i], scaling);
      if (p.linear.round_each) product[i] = rounded<T>(product[i]);
      out[i] = from_float<T>(at < 0 ? base[i] : __fadd_rn(base[i], product[i]));
    }
    T* const to = static_cast<T*>(p.linear.out) + static_cast<int64_t>(first_token + token) * p.linear.columns + column;
    *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(out);
  }
};

// A ring of stages that one warpgroup multiplies from: d += left @ right.T in each.
template <typename T, int Count>
__device__ __forceinline__ void multiply_all(float (&d)[Count], const uint8_t* stages, int stage_bytes, int left,
                                             int right, int count, int ring, uint64_t* full, uint64_t* empty) {
#pragma unroll
  for (int i = 0; i < Count; ++i) d[i] = 0.0f;
  int stage = 0;
  uint32_t parity = 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    wait(&full[stage], parity);
    const uint64_t a = describe(stages + stage * stage_bytes + left);
    const uint64_t b = describe(stages + stage * stage_bytes + right);
    hold(d);
    begin_product();
#pragma unroll
    for (int k = 0; k < kDepth / kInstructionDepth; ++k) multiply<T>(d, along(a, k), along(b, k), true);
    commit_product();
    wait_for_product<0>();
    hold(d);
    if (threadIdx.x % 128 == 0) arrive(&empty[stage]);
    if (++stage == ring) {
      stage = 0;
      parity ^= 1;
    }
  }
}

#endif

template <typename T, int Columns, int Tokens, int Rank>
__global__ void __launch_bounds__(kThreads<Columns>, 1)
    decode_kernel(const __grid_constant__ CUtensorMap weight, const __grid_constant__ CUtensorMap x,
                  const __grid_constant__ CUtensorMap a, const __grid_constant__ LoraDecode p, int stages) {
#ifdef CUSTOM_OPS_HOPPER
  constexpr int kConsumers = Columns / 64;  // warpgroups, of 64 columns each
  constexpr int kShrinks = Rank > 0 ? 1 : 0;
  constexpr int kFinishers = 128 * (kConsumers + 1);  // threads
  constexpr int kBytes = kStageBytes<Columns, Tokens, Rank>;
  constexpr int kA = Columns * kRowBytes;
  constexpr int kX = (Columns + Rank) * kRowBytes;
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ uint64_t full[kMaxStages], empty[kMaxStages];
  float* const sums = reinterpret_cast<float*>(shared);  // when the stages have been read
  float* const y_parts = sums + Tokens * kSumPitch<Columns>;
  float* const y = reinterpret_cast<float*>(shared + stages * kBytes);

  const int blocks = static_cast<int>(blocks_in_cluster());
  const int block = static_cast<int>(block_in_cluster());
  const int first_column = static_cast<int>(blockIdx.x) / blocks * Columns;
  const int first_token = static_cast<int>(blockIdx.y) * Tokens;
  int slice = 0;
  while (slice + 1 < p.slices && p.slice[slice + 1].first_column <= first_column) ++slice;
  const Decode<T, Columns, Tokens, Rank> here{p, first_column, first_token, block, blocks, slice};

  const int steps = (p.linear.channels + kDepth - 1) / kDepth;
  const int share = (steps + blocks - 1) / blocks;
  const int first_step = min(steps, block * share);
  const int count = min(steps - first_step, share);
  const int group = threadIdx.x / 128;
  const int thread = threadIdx.x % 128;
  const int lane = threadIdx.x % 32;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < stages; ++stage) {
      init_barrier(&full[stage], 1);
      init_barrier(&empty[stage], kConsumers + kShrinks);
    }
    fence_barriers();
  }
  if (threadIdx.x == kFinishers) {
    prefetch_map(&weight);
    prefetch_map(&x);
    if (kShrinks) prefetch_map(&a);
  }
  __syncthreads();
  start_next();

  if (group == kConsumers + 1) {
    if (lane == 0) {
      // without a shrink before this kernel, the one before may still write x, or any other argument
      if (kShrinks) {
#pragma unroll 1
        for (int i = 0; i < min(stages, count); ++i) prefetch_tile(&weight, (first_step + i) * kDepth, first_column);
        wait_for_previous();
      }
      int stage = 0;
      uint32_t parity = 1;
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        wait(&empty[stage], parity);
        uint8_t* const tile = shared + stage * kBytes;
        const int depth = (first_step + i) * kDepth;
        expect_bytes(&full[stage], kBytes);
        load_tile(&weight, &full[stage], tile, depth, first_column);
        if (kShrinks) load_tile(&a, &full[stage], tile + kA, depth, 0);
        load_tile(&x, &full[stage], tile + kX, depth, first_token);
        if (++stage == stages) {
          stage = 0;
          parity ^= 1;
        }
      }
    }
    __syncwarp();
  } else if (group < kConsumers) {
    float d[Tokens / 2];
    multiply_all<T>(d, shared, kBytes, group * 64 * kRowBytes, kX, count, stages, full, empty);
    sync_threads(1, 128 * (kConsumers + kShrinks));  // all stages have been read, where the sums go
    const int column = group * 64 + thread / 32 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < Tokens / 2; ++i) {
      const int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
      sums[token * kSumPitch<Columns> + column + i / 2 % 2 * 8] = d[i];
    }
  } else if constexpr (Rank > 0) {
    float d[Rank / 2];
    here.prefetch(thread, 128);
    multiply_all<T>(d, shared, kBytes, kX, kA, count, stages, full, empty);
    sync_threads(1, 128 * (kConsumers + kShrinks));
    const int token = thread / 32 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < Rank / 2; ++i) {
      const int at = token + i / 2 % 2 * 8;
      if (at < Tokens) y_parts[at * (Rank + 4) + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
    }
  } else {
    here.prefetch(thread, 128);
    wait_for_previous();
    here.load_y(y, thread, 128);
  }

  // A thread has a group of columns of every so many tokens; the first sum is under way while y is gathered.
  const int groups = here.finished_columns() / 4;
  const int apart = kFinishers / groups;
  const int column_group = threadIdx.x % groups;
  const int first = threadIdx.x / groups;
  const bool finishes = threadIdx.x < kFinishers;
  const float* const from = sums + block * here.finished_columns() + column_group * 4;
  sync_cluster();  // the sums of every block of the cluster are there
  float4 sum{};
  if (finishes) {
    if (first < Tokens) sum = here.gather(from + first * kSumPitch<Columns>);
    if (kShrinks) here.gather_y(y, y_parts, threadIdx.x, kFinishers);
  }
  __syncthreads();
  if (finishes) {
#pragma unroll 1
    for (int token = first; token < Tokens; token += apart) {
      here.finish(token, column_group, sum, y);
      if (token + apart < Tokens) sum = here.gather(from + (token + apart) * kSumPitch<Columns>);
    }
  }
  __syncwarp();
  arrive_at_cluster();
  wait_for_cluster();  // the others have read what is here
#endif
}

// How many blocks of a cluster share the channels: the most that leave every cluster a place at once. A cluster lies in
// one part of the GPU: of four blocks, with one on each multiprocessor, an H100 with 132 of these does not hold 32, and
// the last ones would run alone after the others, for half of the time of them all.
template <typename Kernel>
cudaError_t cluster_of(Kernel kernel, cudaLaunchConfig_t config, int tiles, int most, int* blocks) {
  for (int size = most; size > 1; size /= 2) {
    config.attrs[0].val.clusterDim = {static_cast<unsigned>(size), 1, 1};
    config.gridDim = dim3(tiles * size);
    int active = 0;
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&active, kernel, &config);
    if (error != cudaSuccess) return error;
    if (tiles <= active) {
      *blocks = size;
      return cudaSuccess;
    }
  }
  *blocks = 1;
  return cudaSuccess;
}

template <typename T, int Columns, int Tokens, int Rank>
cudaError_t launch(const LoraDecode& p, int multiprocessors, cudaStream_t stream) {
  const LoraLinear& linear = p.linear;
  constexpr bool kBfloat16 = std::is_same_v<T, __nv_bfloat16>;
  constexpr int kBytes = kStageBytes<Columns, Tokens, Rank>;
  CUtensorMap weight, x, a;
  cudaError_t error =
      make_map(&weight, kBfloat16, linear.weight, linear.columns, linear.channels, linear.weight_row, Columns);
  if (error != cudaSuccess) return error;
  error = make_map(&x, kBfloat16, linear.x, linear.tokens, linear.channels, linear.x_row, Tokens);
  if (error != cudaSuccess) return error;
  a = weight;
  if (Rank > 0) {
    error = make_map(&a, kBfloat16, p.a, linear.rank, linear.channels, p.a_row, Rank);
    if (error != cudaSuccess) return error;
  }

  // the sums, and the parts of y, take the place of the stages when these have been read; a matrix instruction reads
  // 64 rows of x, beyond the last stage where they are fewer
  constexpr int kSums = Tokens * (kSumPitch<Columns> + Rank + 4) * 4;
  constexpr int kLeast = (kSums + kBytes - 1) / kBytes;
  const int y_bytes = Tokens * (linear.rank + 4) * 4;
  const int after = y_bytes < 64 * kRowBytes ? 64 * kRowBytes : y_bytes;
  const int fit = (kSharedBytes - after) / kBytes;
  const int stages = fit < kLeast ? kLeast : fit < kMaxStages ? fit : kMaxStages;
  const int bytes = stages * kBytes + after;

  const auto kernel = decode_kernel<T, Columns, Tokens, Rank>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const int tiles = (linear.columns + Columns - 1) / Columns;
  const int token_tiles = (linear.tokens + Tokens - 1) / Tokens;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(kThreads<Columns>);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 1;
  int most = 1;
  while (most < kMaxCluster && most < p.most_blocks && tiles * token_tiles * most * 2 <= multiprocessors) {
    most *= 2;
  }
  // the same question gets the same answer, and it takes the host longer than the launch
  struct Answer {
    int multiprocessors, tiles, bytes, most, blocks;
  };
  static thread_local Answer last{};
  if (last.multiprocessors != multiprocessors || last.tiles != tiles * token_tiles || last.bytes != bytes ||
      last.most != most) {
    int blocks;
    error = cluster_of(kernel, config, tiles * token_tiles, most, &blocks);
    if (error != cudaSuccess) return error;
    last = {multiprocessors, tiles * token_tiles, bytes, most, blocks};
  }
  attributes[0].val.clusterDim = {static_cast<unsigned>(last.blocks), 1, 1};
  config.gridDim = dim3(tiles * last.blocks, token_tiles);
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, weight, x, a, p, stages);
}

template <typename T, int Columns, int Tokens>
cudaError_t launch_shrinking(const LoraDecode& p, int multiprocessors, cudaStream_t stream) {
  if (p.a == nullptr) return launch<T, Columns, Tokens, 0>(p, multiprocessors, stream);
  if (p.linear.rank <= 16) return launch<T, Columns, Tokens, 16>(p, multiprocessors, stream);
  if (p.linear.rank <= 32) return launch<T, Columns, Tokens, 32>(p, multiprocessors, stream);
  if (p.linear.rank <= 64) return launch<T, Columns, Tokens, 64>(p, multiprocessors, stream);
  return cudaErrorInvalidValue;
}

template <typename T, int Columns>
cudaError_t launch_tokens(const LoraDecode& p, int multiprocessors, cudaStream_t stream) {
  if constexpr (Columns == 64) {  // with 128 and 16 the compiler spills
    if (p.linear.tokens <= 16) return launch_shrinking<T, Columns, 16>(p, multiprocessors, stream);
  }
  if (p.linear.tokens <= 32) return launch_shrinking<T, Columns, 32>(p, multiprocessors, stream);
  return launch_shrinking<T, Columns, 64>(p, multiprocessors, stream);
}

template <typename T>
cudaError_t launch_for(const LoraDecode& p, int multiprocessors, cudaStream_t stream) {
  return p.tile_columns == 64 ? launch_tokens<T, 64>(p, multiprocessors, stream)
                              : launch_tokens<T, 128>(p, multiprocessors, stream);
}

}  // namespace

cudaError_t lora_decode(Dtype dtype, const LoraDecode& args, int multiprocessors, cudaStream_t stream) {
  if (args.linear.tokens == 0 || args.linear.columns == 0) return cudaSuccess;
  return dtype == Dtype::bfloat16 ? launch_for<__nv_bfloat16>(args, multiprocessors, stream)
                                  : launch_for<__half>(args, multiprocessors, stream);
}

}  // namespace custom_ops
