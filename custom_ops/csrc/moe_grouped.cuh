// The grouped products of experts in bfloat16 for Hopper: gate_up, with the activation, and down.
//
// The weight is the side of the matrix instruction that is 64 high, tokens are its columns, in steps of 8: the last
// tile of an expert costs what it has. A cluster of two blocks shares the weight, so that it leaves L2 once for up to
// 320 tokens.
#pragma once

#include "moe_grouped_load.cuh"
#include "moe_grouped_write.cuh"

namespace custom_ops::grouped {

#ifdef CUSTOM_OPS_HOPPER

// What a multiplying warpgroup does with a tile of at most N rows: twice 64 rows of the weight.
template <bool GateUp, int N>
__device__ __forceinline__ void multiply_tile(const GroupedArgs& p, uint8_t* stages, Shared& s, Ring& ring,
                                              const Place& at, int odd) {
  const int group = this_thread() / 128;
  const int thread = threadIdx.x % 128;
  const int lane = this_thread() % 32;
  const int steps = steps_of(p);
  if constexpr (!GateUp) {  // where the rows go; there is time until they do
    for (int row = thread; row < at.rows; row += 128) s.pairs[odd][group][row] = p.sorted_ids[at.row + row];
  }
  // Gate and up of the same 64 columns, or 128 rows one after the other.
  const int first = (GateUp ? 64 * group : 128 * group) * kRowBytes;
  const int second = (GateUp ? 128 + 64 * group : 128 * group + 64) * kRowBytes;
  const auto release = [&](int stage) {
    if (lane < kCluster) arrive_at(&s.empty[stage], lane);
  };
  float sum[2][N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) sum[0][i] = sum[1][i] = 0.0f;

  int previous = -1;
  for (int i = 0; i < steps; ++i) {
    wait(&s.full[ring.stage], ring.parity);
    if (GateUp) fence_shared();  // rows that threads copied, for the matrix units
    const uint8_t* const stage = stages + ring.stage * kStageBytes;
    const uint64_t right = describe(stage + kWeightBytes);
    const uint64_t left0 = describe(stage + first);
    const uint64_t left1 = describe(stage + second);
    hold(sum[0]);
    hold(sum[1]);
    begin_product();
#pragma unroll
    for (int k = 0; k < kDepth / kInstructionDepth; ++k) {
      Columns<N>::multiply(sum[0], along(left0, k), along(right, k), true);
      Columns<N>::multiply(sum[1], along(left1, k), along(right, k), true);
    }
    commit_product();
    hold(sum[0]);
    hold(sum[1]);
    wait_for_product<1>();
    if (previous >= 0) release(previous);
    previous = ring.stage;
    ring.next();
  }
  wait_for_product<0>();
  hold(sum[0]);
  hold(sum[1]);
  release(previous);

  uint8_t* const parts = s.out + group * 2 * kPartBytes;
  int part = 0;
  uint32_t v[N / 4];
  if constexpr (GateUp) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      v[i] = silu_mul(sum[0][2 * i], sum[0][2 * i + 1], sum[1][2 * i], sum[1][2 * i + 1]);
    }
    const int column = at.column * 128 + group * 64;
    __nv_bfloat16* const out = static_cast<__nv_bfloat16*>(p.out) + int64_t{at.row} * p.width + column;
    sync_threads(2 + group, 128);
    write_rows<N>(v, parts, part, group, at.rows,
                  [&](int row) { return reinterpret_cast<uint8_t*>(out + int64_t{row} * p.width); });
  } else {
    const int column = at.column * kWeightRows + group * 128;
    const int rows = column < p.width ? at.rows : 0;
    sync_threads(2 + group, 128);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < N / 4; ++i) v[i] = pack(sum[half][2 * i], sum[half][2 * i + 1]);
      __nv_bfloat16* const out = static_cast<__nv_bfloat16*>(p.out) + column + half * 64;
      write_rows<N>(v, parts, part, group, rows, [&](int row) {
        const int pair = s.pairs[odd][group][row];
        return pair < p.pairs ? reinterpret_cast<uint8_t*>(out + int64_t{pair} * p.width) : nullptr;
      });
    }
  }
}

template <bool GateUp>
__device__ __forceinline__ void multiply_tiles(const GroupedArgs& p, uint8_t* stages, Shared& s) {
  Ring ring;
  int odd = 0;
  // what is asked for again here would otherwise be in a register that a tile needs
  for (int tile = blockIdx.x / kCluster; tile < s.first_tile[p.experts] * p.column_tiles;
       tile += gridDim.x / kCluster, odd ^= 1) {
    const Place at = place(p, s, tile, static_cast<int>(block_in_cluster()));
#define CUSTOM_OPS_TILE(N)                                        \
  if (at.rows <= N) {                                             \
    multiply_tile<GateUp, N>(p, stages, s, ring, at, odd);        \
    continue;                                                     \
  }
    CUSTOM_OPS_TILE(16)
    CUSTOM_OPS_TILE(32)
    CUSTOM_OPS_TILE(48)
    CUSTOM_OPS_TILE(64)
    CUSTOM_OPS_TILE(80)
    CUSTOM_OPS_TILE(96)
    CUSTOM_OPS_TILE(112)
    CUSTOM_OPS_TILE(120)
    CUSTOM_OPS_TILE(128)
    CUSTOM_OPS_TILE(136)
    CUSTOM_OPS_TILE(144)
    CUSTOM_OPS_TILE(160)
#undef CUSTOM_OPS_TILE
  }
}

#endif

// second_map: of gate_up, that of what gate is multiplied with; of down, that of the rows.
template <bool GateUp>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_kernel(const __grid_constant__ CUtensorMap second_map, const __grid_constant__ CUtensorMap weight_map,
                   const __grid_constant__ GroupedArgs p) {
#ifdef CUSTOM_OPS_HOPPER
  extern __shared__ __align__(1024) uint8_t stages[];
  Shared& s = *reinterpret_cast<Shared*>(stages + kStages * kStageBytes);
  const int rank = static_cast<int>(block_in_cluster());
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(&s.full[stage], 1 + kLoaders<GateUp>);
      init_barrier(&s.empty[stage], kConsumers * kWarps * kCluster);
    }
    fence_barriers();
  }
  for (int e = threadIdx.x; e < p.experts; e += kThreads) s.first_block[e] = s.end_block[e] = 0;
  sync_cluster();
  // For down the index is there: gate_up has waited for it, or this kernel would not run yet.
  if constexpr (GateUp) wait_for_previous();
  start_next();
  find_tiles(p, s);
  const int tiles = s.first_tile[p.experts] * p.column_tiles;

  if (threadIdx.x / 128 == kConsumers) {
    give_registers<40>();
    if constexpr (GateUp) {
      load_gathered(p, stages, s, rank == 0 ? weight_map : second_map, rank, tiles);
    } else if (threadIdx.x % 128 < kLoaders<false>) {
      load_rows(p, stages, s, second_map, weight_map, rank, tiles);
    }
  } else {
    take_registers<232>();
    multiply_tiles<GateUp>(p, stages, s);
  }
  __syncwarp();
  sync_cluster();  // the other block may still signal here
#endif
}

template <bool GateUp>
cudaError_t launch(const GroupedArgs& p, int multiprocessors, cudaStream_t stream) {
  CUtensorMap second_map, weight_map;
  const int64_t channels = p.channels;
  // gate and up may be halves of one weight: each ends with the last row of its own
  const int64_t rows = int64_t{p.experts - 1} * p.weight_rows + p.width;
  const int box = kWeightRows / kCluster;
  cudaError_t error = GateUp ? make_map(&second_map, true, p.up, rows, channels, channels, box)
                             : make_map(&second_map, true, p.x, p.x_rows, channels, p.x_pitch, kBox);
  if (error != cudaSuccess) return error;
  error = make_map(&weight_map, true, p.weight, rows, channels, channels, box);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(grouped_kernel<GateUp>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {kCluster, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(multiprocessors / kCluster * kCluster);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, grouped_kernel<GateUp>, second_map, weight_map, p);
}

}  // namespace custom_ops::grouped
