// x @ W.T with the low-rank product of one adapter, for many tokens: a matrix product that has the expand for an
// epilogue, and the shrink too where the rank is small.
//
// Persistent blocks, in clusters of two: each makes 128 tokens by 256 columns, of the same columns, so that each reads
// half of a tile of W for both. One thread of one warpgroup loads by TMA; two warpgroups multiply 64 tokens each. When
// the channels are done, the tiles of y and B come through the same stages; the base is rounded to 16 bits before, so
// that a second set of sums has room.
//
// The shrink of a small rank is made by those who have the first columns of W: they read x anyway, and 16 or 32 rows of
// A are little beside the 256 of W. They write y and say so; the others, which ask for y when their channels are done,
// hardly wait, since the first columns of all tokens come first. Every cluster must run at once for that: the host asks
// how many can.
#include "hopper_stages.cuh"
#include "lora.h"

namespace custom_ops {
namespace {

using namespace hopper;

constexpr int kBlocks = 2;  // of a cluster
constexpr int kConsumers = 2;
constexpr int kThreads = 128 * (kConsumers + 1);
constexpr int kTokens = 64 * kConsumers;
constexpr int kColumns = 256;
constexpr int kStages = 4;
constexpr int kTokenBytes = kTokens * kRowBytes;
constexpr int kColumnBytes = kColumns * kRowBytes;
constexpr int kStageBytes = kTokenBytes + kColumnBytes;
constexpr int kPart = 64;  // columns that are finished at a time: a row of a tile of the result
constexpr int kPartBytes = 64 * kRowBytes;
template <int Rank>
constexpr int kPartsInFlight = Rank > 0 ? 1 : 2;  // A takes the room of the others
template <int Rank>
constexpr int kFactorBytes = Rank * kRowBytes;  // A, beside each stage
template <int Rank>
constexpr int kSharedBytes =
    kStages * (kStageBytes + kFactorBytes<Rank>) + kConsumers * kPartsInFlight<Rank> * kPartBytes;
constexpr int kBand = 8;  // pairs of token tiles that run together, so that W is read from L2 by all of them
constexpr int kMaxRank = kStages * kDepth;

struct Sizes {
  int tokens, columns, channels, rank;
  const void* bias;
  float scaling;
  bool round_each;
  void* y;         // [tokens, rank], where the shrink is done here
  uint32_t* done;  // of each 128 tokens: the warpgroups that have written their y, zero before
};

template <typename T>
struct Two;
template <>
struct Two<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  static __device__ __forceinline__ Type pack(float a, float b) { return __floats2bfloat162_rn(a, b); }
  static __device__ __forceinline__ float2 unpack(Type v) { return __bfloat1622float2(v); }
};
template <>
struct Two<__half> {
  using Type = __half2;
  static __device__ __forceinline__ Type pack(float a, float b) { return __floats2half2_rn(a, b); }
  static __device__ __forceinline__ float2 unpack(Type v) { return __half22float2(v); }
};

#ifdef CUSTOM_OPS_HOPPER

// Which tile a cluster works on: bands of token tiles, and in a band column after column. FirstColumns: those of all
// bands come before that.
template <bool FirstColumns>
struct Tiles {
  int pairs, columns, total;

  __device__ explicit Tiles(const Sizes& p)
      : pairs((p.tokens + kBlocks * kTokens - 1) / (kBlocks * kTokens)),
        columns((p.columns + kColumns - 1) / kColumns),
        total(pairs * columns) {}

  __device__ void place(int tile, int block, int& token, int& column) const {
    if (FirstColumns && tile < pairs) {
      token = (tile * kBlocks + block) * kTokens;
      column = 0;
      return;
    }
    constexpr int kBefore = FirstColumns ? 1 : 0;
    tile -= kBefore * pairs;
    const int width = columns - kBefore;
    const int band = tile / (kBand * width);
    const int within = tile - band * kBand * width;
    const int height = min(kBand, pairs - band * kBand);
    token = ((band * kBand + within % height) * kBlocks + block) * kTokens;
    column = (within / height + kBefore) * kColumns;
  }
};

// Writes a warpgroup's y, rounded, and says so.
template <typename T, int Rank>
__device__ __forceinline__ void publish(const Sizes& p, const float (&y)[Rank / 2], int group, int thread, int token) {
  const int lane = thread % 32;
#pragma unroll
  for (int i = 0; i < Rank / 4; ++i) {
    const int row = token + group * 64 + thread / 32 * 16 + lane / 4 + i % 2 * 8;
    const int at = i / 2 * 8 + lane % 4 * 2;
    if (row < p.tokens && at < p.rank) {
      *reinterpret_cast<typename Two<T>::Type*>(static_cast<T*>(p.y) + static_cast<int64_t>(row) * p.rank + at) =
          Two<T>::pack(y[2 * i], y[2 * i + 1]);
    }
  }
  fence_global();
  sync_threads(1 + group, 128);
  if (thread == 0 && token < p.tokens) add_released(p.done + token / kTokens, 1);
}

using Ring = RingOf<kStages>;

#endif

// Rank: of the shrink that is done here, 16 or 32; 0: y is given.
template <typename T, int Rank>
__global__ void __launch_bounds__(kThreads, 1)
    prefill_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap weight_map,
                   const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap y_map, const __grid_constant__ CUtensorMap b_map,
                   const __grid_constant__ CUtensorMap out_map, const __grid_constant__ Sizes p) {
#ifdef CUSTOM_OPS_HOPPER
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ uint64_t full[kStages], empty[kStages];
  const int block = static_cast<int>(block_in_cluster());
  const int cluster = static_cast<int>(blockIdx.x) / kBlocks;
  const int clusters = static_cast<int>(gridDim.x) / kBlocks;
  const Tiles<(Rank > 0)> tiles(p);
  constexpr int kParts = kPartsInFlight<Rank>;
  uint8_t* const factors = shared + kStages * kStageBytes;
  uint8_t* const staging = factors + kStages * kFactorBytes<Rank>;
  const int steps = (p.channels + kDepth - 1) / kDepth;
  const int rank_steps = (p.rank + kDepth - 1) / kDepth;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(&full[stage], 1);
      init_barrier(&empty[stage], kConsumers * kBlocks);
    }
    fence_barriers();
  }
  sync_cluster();
  start_next();

  const int group = threadIdx.x / 128;
  if (group == kConsumers) {
    give_registers<40>();
    if (threadIdx.x == 128 * kConsumers) {
      Ring ring;
      // both blocks must have read a stage before either writes it
      const auto load = [&](const CUtensorMap* left, const CUtensorMap* right, int depth, int token, int column,
                            bool shrinks) {
        wait(&empty[ring.stage], ring.parity ^ 1);
        uint8_t* const tile = shared + ring.stage * kStageBytes;
        expect_bytes(&full[ring.stage], kStageBytes + (shrinks ? kFactorBytes<Rank> : 0));
        if (shrinks) load_tile(&a_map, &full[ring.stage], factors + ring.stage * kFactorBytes<Rank>, depth, 0);
        load_tile(left, &full[ring.stage], tile, depth, token);
        load_tile_for((1 << kBlocks) - 1, right, &full[ring.stage],
                      tile + kTokenBytes + block * (kColumnBytes / kBlocks), depth,
                      column + block * (kColumns / kBlocks));
        ring.next();
      };
      bool waited = Rank > 0;
      if (Rank > 0) wait_for_previous();  // what it has written may be x
      for (int tile = cluster; tile < tiles.total; tile += clusters) {
        int token, column;
        tiles.place(tile, block, token, column);
        for (int i = 0; i < steps; ++i) load(&x_map, &weight_map, i * kDepth, token, column, Rank > 0 && column == 0);
        if (!waited) wait_for_previous();
        waited = true;
        if (Rank > 0 && token < p.tokens) {
          while (load_acquired(p.done + token / kTokens) < kConsumers) __nanosleep(32);
          fence_global();
        }
        for (int i = 0; i < rank_steps; ++i) load(&y_map, &b_map, i * kDepth, token, column, false);
      }
      // what this block still sends or is sent must land before either block goes
      for (int i = 0; i < kStages; ++i) {
        wait(&empty[ring.stage], ring.parity ^ 1);
        ring.next();
      }
    }
  } else {
    take_registers<232>();
    Ring ring;
    const int thread = threadIdx.x % 128;
    const int lane = threadIdx.x % 32;
    uint8_t* const parts = staging + group * kParts * kPartBytes;
    const auto release = [&](int stage) {
      if (thread < kBlocks) arrive_at(&empty[stage], thread);
    };
    for (int tile = cluster; tile < tiles.total; tile += clusters) {
      int token, column;
      tiles.place(tile, block, token, column);
      float d[kColumns / 2];
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) d[i] = 0.0f;
      int previous = -1;
      const auto multiply_steps = [&](auto&& hold_beside, auto&& multiply_beside) {
        for (int i = 0; i < steps; ++i) {
          wait(&full[ring.stage], ring.parity);
          const uint8_t* const stage = shared + ring.stage * kStageBytes;
          const uint64_t left = describe(stage + group * 64 * kRowBytes);
          const uint64_t right = describe(stage + kTokenBytes);
          hold(d);
          hold_beside();
          begin_product();
#pragma unroll
          for (int k = 0; k < kDepth / kInstructionDepth; ++k) {
            multiply<T>(d, along(left, k), along(right, k), true);
            multiply_beside(along(left, k), k);  // between them, so that one of these does not wait for another
          }
          commit_product();
          hold(d);
          hold_beside();
          wait_for_product<1>();
          if (previous >= 0) release(previous);
          previous = ring.stage;
          ring.next();
        }
        wait_for_product<0>();
        hold(d);
        hold_beside();
        if (previous >= 0) release(previous);
      };
      const auto nothing = [](auto...) {};
      if constexpr (Rank > 0) {
        if (column == 0) {
          float y[Rank / 2];
#pragma unroll
          for (int i = 0; i < Rank / 2; ++i) y[i] = 0.0f;
          const auto shrink = [&](uint64_t left, int k) {
            multiply<T>(y, left, along(describe(factors + ring.stage * kFactorBytes<Rank>), k), true);
          };
          multiply_steps([&] { hold(y); }, shrink);
          publish<T, Rank>(p, y, group, thread, token);
        } else {
          multiply_steps(nothing, nothing);
        }
      } else {
        multiply_steps(nothing, nothing);
      }

      typename Two<T>::Type base[kColumns / 4];
#pragma unroll
      for (int i = 0; i < kColumns / 4; ++i) {
        float low = d[2 * i], high = d[2 * i + 1];
        if (p.bias != nullptr) {
          const int at = column + i / 2 * 8 + lane % 4 * 2;
          if (at < p.columns) {
            const float2 bias =
                Two<T>::unpack(*reinterpret_cast<const typename Two<T>::Type*>(static_cast<const T*>(p.bias) + at));
            low += bias.x, high += bias.y;
          }
        }
        base[i] = Two<T>::pack(low, high);
      }

      const Ring first = ring;
      for (int i = 0; i < rank_steps; ++i) {
        wait(&full[ring.stage], ring.parity);
        ring.next();
      }
#pragma unroll
      for (int part = 0; part < kColumns / kPart; ++part) {
        float e[kPart / 2];
#pragma unroll
        for (int i = 0; i < kPart / 2; ++i) e[i] = 0.0f;
        hold(e);
        int at = first.stage;
        for (int i = 0; i < rank_steps; ++i) {
          const uint8_t* const stage = shared + at * kStageBytes;
          const uint64_t left = describe(stage + group * 64 * kRowBytes);
          const uint64_t right = describe(stage + kTokenBytes + part * kPart * kRowBytes);
          begin_product();
#pragma unroll
          for (int k = 0; k < kDepth / kInstructionDepth; ++k) multiply<T>(e, along(left, k), along(right, k), true);
          at = at + 1 == kStages ? 0 : at + 1;
        }
        commit_product();
        // the store that read this place, two parts ago
        if (thread == 0) wait_for_stores<kParts - 1>();
        sync_threads(1 + group, 128);
        wait_for_product<0>();
        hold(e);
        uint8_t* const tile_part = parts + part % kParts * kPartBytes;
#pragma unroll
        for (int i = 0; i < kPart / 4; ++i) {
          const float2 before = Two<T>::unpack(base[part * (kPart / 4) + i]);
          float2 product{e[2 * i], e[2 * i + 1]};
          if (p.round_each) product = Two<T>::unpack(Two<T>::pack(product.x, product.y));
          product.x = __fmul_rn(product.x, p.scaling), product.y = __fmul_rn(product.y, p.scaling);
          if (p.round_each) product = Two<T>::unpack(Two<T>::pack(product.x, product.y));
          const int row = thread / 32 * 16 + lane / 4 + i % 2 * 8;
          const int chunk = i / 2 ^ row % kAtomRows;  // 128-byte swizzle
          *reinterpret_cast<typename Two<T>::Type*>(tile_part + row * kRowBytes + chunk * 16 + lane % 4 * 4) =
              Two<T>::pack(__fadd_rn(before.x, product.x), __fadd_rn(before.y, product.y));
        }
        fence_shared();
        sync_threads(1 + group, 128);
        if (thread == 0) store_tile(&out_map, tile_part, column + part * kPart, token + group * 64);
      }
      for (int i = 0, at = first.stage; i < rank_steps; ++i) {
        release(at);
        at = at + 1 == kStages ? 0 : at + 1;
      }
    }
    if (thread == 0) wait_for_stores<0>();
  }
#endif
}

// How many clusters run at once: a cluster that waits for another's y would wait for ever for one that cannot start.
template <typename Kernel>
int most_clusters(Kernel kernel, cudaLaunchConfig_t config, int multiprocessors) {
  config.gridDim = dim3(multiprocessors / kBlocks * kBlocks);
  int active = 0;
  if (cudaOccupancyMaxActiveClusters(&active, kernel, &config) != cudaSuccess) {
    cudaGetLastError();  // whatever is wrong, the launch meets it too
  }
  return active;
}

template <typename T, int Rank>
cudaError_t launch(const LoraPrefill& p, int multiprocessors, cudaStream_t stream) {
  const LoraLinear& linear = p.linear;
  constexpr bool kBfloat16 = std::is_same_v<T, __nv_bfloat16>;
  CUtensorMap x, weight, a, y, b, out;
  const struct {
    CUtensorMap* map;
    const void* data;
    int64_t rows, cols, pitch;
    int box;
  } maps[] = {
      {&x, linear.x, linear.tokens, linear.channels, linear.x_row, kTokens},
      {&weight, linear.weight, linear.columns, linear.channels, linear.weight_row, kColumns / kBlocks},
      {&y, p.y, linear.tokens, linear.rank, linear.rank, kTokens},
      {&b, p.b, linear.columns, linear.rank, p.b_row, kColumns / kBlocks},
      {&out, linear.out, linear.tokens, linear.columns, linear.columns, 64},
      {&a, p.a, linear.rank, linear.channels, p.a_row, Rank},
  };
  a = {};
  for (const auto& each : maps) {
    if (each.map == &a && Rank == 0) continue;
    const cudaError_t error = make_map(each.map, kBfloat16, each.data, each.rows, each.cols, each.pitch, each.box);
    if (error != cudaSuccess) return error;
  }
  const auto kernel = prefill_kernel<T, Rank>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes<Rank>);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {kBlocks, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes<Rank>;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 1;
  int most = multiprocessors / kBlocks;
  if (Rank > 0) {
    static thread_local int asked = 0, answer = 0;  // the same question gets the same answer
    if (asked != multiprocessors) answer = most_clusters(kernel, config, multiprocessors), asked = multiprocessors;
    if (answer == 0) return cudaErrorLaunchOutOfResources;
    most = answer < most ? answer : most;
    error = cudaMemsetAsync(p.done, 0, (linear.tokens + kTokens - 1) / kTokens * sizeof(uint32_t), stream);
    if (error != cudaSuccess) return error;
  } else {
    config.numAttrs = 2;
  }
  const int pairs = (linear.tokens + kBlocks * kTokens - 1) / (kBlocks * kTokens);
  const int tiles = pairs * ((linear.columns + kColumns - 1) / kColumns);
  config.gridDim = dim3((tiles < most ? tiles : most) * kBlocks);
  const Sizes sizes{linear.tokens,    linear.columns, linear.channels, linear.rank, linear.bias, p.scaling,
                    linear.round_each, p.y,            p.done};
  return cudaLaunchKernelEx(&config, kernel, x, weight, a, y, b, out, sizes);
}

template <typename T>
cudaError_t launch_for(const LoraPrefill& p, int multiprocessors, cudaStream_t stream) {
  if (p.linear.rank > kMaxRank) return cudaErrorInvalidValue;
  if (p.a == nullptr) return launch<T, 0>(p, multiprocessors, stream);
  if (p.linear.rank <= 16) return launch<T, 16>(p, multiprocessors, stream);
  if (p.linear.rank <= 32) return launch<T, 32>(p, multiprocessors, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t lora_prefill(Dtype dtype, const LoraPrefill& args, int multiprocessors, cudaStream_t stream) {
  if (args.linear.tokens == 0 || args.linear.columns == 0) return cudaSuccess;
  return dtype == Dtype::bfloat16 ? launch_for<__nv_bfloat16>(args, multiprocessors, stream)
                                  : launch_for<__half>(args, multiprocessors, stream);
}

}  // namespace custom_ops
