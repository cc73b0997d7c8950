// x @ W.T with its low-rank product, for few tokens: a memory-bound product, and everything else in its shadow.
//
// A cluster of blocks makes 64 or 128 columns; each of its blocks reads a part of the channels of W, and of x, by TMA,
// which keeps what is read of x short of what is read of W. The partial sums meet in shared memory, and each block
// finishes a part of the tile. W is the left operand, since its rows fill the 64 of a matrix instruction and few tokens
// do not. A block has a multiprocessor to itself: with two on each, some have none, and what took 11.9 microseconds at
// 32 tokens on an H100 took 14.2.
//
// The shrink of a single 16-bit adapter is done by a third warpgroup from the same tiles of x (its 16 to 64 rows of A
// add little to what is read of W). Any other runs as a kernel of its own beside this one (programmatic dependent
// launch); then the third warpgroup waits for it, and meanwhile fetches the adapters' rows of B into L2. It does not
// multiply by them: while memory is busy, four warps are too few, and batches of 64 tokens took 5 microseconds longer.
#include "lora_decode.cuh"

namespace custom_ops {
namespace {

using namespace hopper;
using namespace lora_decode_parts;

constexpr int kMaxStages = 8;
constexpr int kSharedBytes = 190 * 1024;
constexpr int kLeastSharedBytes = 116 * 1024;  // of which a multiprocessor, with 228 KiB, holds one

// A block's columns; as many threads load, and those of the shrink beside them.
template <int Columns>
constexpr int kThreads = 2 * Columns + 128 + 32;

// W, A, x. A matrix instruction reads 64 rows of x, also where fewer are there: those after them are not used.
template <int Columns, int Tokens, int Rank>
constexpr int kStageBytes = (Columns + Rank + Tokens) * kRowBytes;

#ifdef CUSTOM_OPS_HOPPER

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
    wait_for_product<0>();  // at once: memory is what this kernel waits for, and it can write the stage again
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
  __shared__ Adapters<(Rank > 0 ? 1 : Tokens)> adapters;
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

  const bool finishes = threadIdx.x < kFinishers;
  WarpTile<T, Columns, Tokens, Rank> tile{here};
  const int at = static_cast<int>(threadIdx.x) / 32 * blocks + block;
  const bool first = finishes && at < tile.kCount;
  if (Rank > 0 && first) {
    wait_for_previous();
    tile.load_b(at);  // it arrives while the stages fill
  }

  if (group == kConsumers + 1) {
    if (lane == 0) {
      // without a shrink before this kernel, the one before may still write x, or any other argument. To fetch W into L2
      // meanwhile does not pay: what took 11.0 microseconds at 64 tokens on an H100 took 11.8
      if (kShrinks) wait_for_previous();
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
    here.load_adapters(adapters, thread, 128);
    here.prefetch(thread, 128);
    wait_for_previous();
    here.load_y(y, thread, 128);
  }

  if constexpr (Rank > 0) {
    __syncwarp();
    sync_cluster();  // the sums of every block of the cluster are there
    const auto finish = [&](auto number) { finish_tiles<number.value, kFinishers>(tile, sums, y_parts, y, at); };
    static_assert(kMaxCluster == 4);
    if (blocks == 1) finish(std::integral_constant<int, 1>());
    if (blocks == 2) finish(std::integral_constant<int, 2>());
    if (blocks == 3) finish(std::integral_constant<int, 3>());
    if (blocks == 4) finish(std::integral_constant<int, 4>());
  } else {
    __syncwarp();
    sync_cluster();
    if (finishes) here.finish_all(sums, y, adapters, threadIdx.x, kFinishers);
  }
  __syncwarp();
  arrive_at_cluster();
  wait_for_cluster();  // the others have read what is here
#endif
}

// How many blocks share the channels of a tile: the most that leave every cluster a place at once. A cluster lies in
// one part of the GPU: of four blocks an H100 with 132 multiprocessors does not hold 32, and the last ones would run
// alone after the others, for half of the time of them all. Then there are three, or two.
template <typename Kernel>
int cluster_of(Kernel kernel, cudaLaunchConfig_t config, int tiles, int most) {
  for (int blocks = most; blocks > 1; --blocks) {
    config.attrs[0].val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
    config.gridDim = dim3(tiles * blocks);
    int active = 0;
    if (cudaOccupancyMaxActiveClusters(&active, kernel, &config) != cudaSuccess) {
      cudaGetLastError();  // no cluster of this size; whatever else is wrong, the launch meets it too
    } else if (tiles <= active) {
      return blocks;
    }
  }
  return 1;
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

  // the sums, and the parts of y, take the place of the stages when these have been read; y comes after them. A matrix
  // instruction of the shrink reads 64 rows of x, beyond the last stage where they are fewer
  constexpr int kSums = Tokens * (kSumPitch<Columns> + Rank + 4) * 4;
  constexpr int kLeast = (kSums + kBytes - 1) / kBytes;
  constexpr int kBeyond = Rank > 0 ? (64 - Tokens) * kRowBytes : 0;
  const int y_bytes = Tokens * ((Rank > 0 ? Rank : linear.rank) + 4) * 4;
  const int after = y_bytes < kBeyond ? kBeyond : y_bytes;
  const int fit = (kSharedBytes - after) / kBytes;
  const int stages = fit < kLeast ? kLeast : fit < kMaxStages ? fit : kMaxStages;
  const int used = stages * kBytes + after;
  const int bytes = used < kLeastSharedBytes ? kLeastSharedBytes : used;

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
  while (most < kMaxCluster && most < p.most_blocks && tiles * token_tiles * (most + 1) <= multiprocessors) ++most;
  // the same question gets the same answer, and it takes the host longer than the launch
  struct Answer {
    int multiprocessors, tiles, bytes, most, blocks;
  };
  static thread_local Answer last{};
  if (last.multiprocessors != multiprocessors || last.tiles != tiles * token_tiles || last.bytes != bytes ||
      last.most != most) {
    last = {multiprocessors, tiles * token_tiles, bytes, most, cluster_of(kernel, config, tiles * token_tiles, most)};
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
