// The grouped products of experts in FP8 with scales of 128 x 128 blocks, for Hopper: gate_up, with SiLU-mul and the
// quantization of what comes of it, and down.
//
// Four warps load, twice four multiply, and four finish one tile while the others are at the next. A tile is a block of
// 128 pairs of an expert and 2 x 128 columns. The sums of 128 channels are scaled in float32 as in Triton's kernels, and
// the results are theirs to the bit. docs/moe.md has where it is faster than those, and why.
#pragma once

#include "moe_fp8_finish.cuh"
#include "moe_fp8_load.cuh"
#include "moe_fp8_multiply.cuh"
#include "passes.cuh"

namespace custom_ops::moe_fp8 {

// x_map: of the rows of the second product.
template <bool GateUp>
__global__ void __launch_bounds__(kThreads, 1)
    experts(const __grid_constant__ CUtensorMap weight_map, const __grid_constant__ CUtensorMap x_map,
            const __grid_constant__ Fp8GroupedArgs p) {
#ifdef CUSTOM_OPS_HOPPER
  extern __shared__ __align__(1024) uint8_t stages[];
  const uint32_t sums = shared_address(stages) + kStages * kStageBytes;
  Shared& s = *reinterpret_cast<Shared*>(stages + kStages * kStageBytes + 4 * kSumBytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      init_barrier(&s.full[i], 1 + 128);  // with the bytes of tiles, and each thread with its copies
      init_barrier(&s.empty[i], 8);       // the warps that multiply
    }
    for (int i = 0; i < kSlots; ++i) {
      init_barrier(&s.told[i], 1);
      init_barrier(&s.taken[i], kThreads / 32);
    }
    for (int i = 0; i < 2; ++i) {
      init_barrier(&s.done[i], 4);
      init_barrier(&s.free[i], kFinishers);
    }
    fence_barriers();
  }
  __syncthreads();
  // down waits for rows, block by block; the index is there, as gate_up has waited for it before it let down start
  if constexpr (GateUp) wait_for_previous();
  start_next();
  switch (threadIdx.x / 128) {
    case 0:
      take_registers<208>();
      multiply_all<GateUp, 0>(p, stages, sums, s);
      break;
    case 1:
      take_registers<208>();
      multiply_all<GateUp, 1>(p, stages, sums, s);
      break;
    case 2:
      give_registers<48>();
      load<GateUp>(weight_map, x_map, p, stages, s);
      if constexpr (!GateUp) wait_for_previous();  // so that who waits for down has waited for gate_up
      break;
    default:
      give_registers<48>();
      finish_all<GateUp>(p, sums, s);
  }
#endif
}

// [rows, channels] of FP8 codes: two are as one 16-bit value, of which a map asks nothing.
inline cudaError_t map_of_codes(CUtensorMap* map, const void* data, int64_t rows, int64_t channels, int64_t pitch,
                                int box_rows) {
  return make_map(map, false, data, rows, channels / 2, pitch / 2, box_rows);
}

template <bool GateUp>
cudaError_t launch(const Fp8GroupedArgs& p, int multiprocessors, cudaStream_t stream) {
  const int64_t channels = int64_t{p.steps} * kBlock;
  CUtensorMap weight_map, x_map;
  cudaError_t error =
      map_of_codes(&weight_map, p.weight, int64_t{p.experts} * p.weight_rows, channels, channels, kBlock);
  if (error != cudaSuccess) return error;
  x_map = weight_map;  // which gate_up does not read
  if (!GateUp) error = map_of_codes(&x_map, p.x, p.padded_rows, channels, p.x_pitch, kRows);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(experts<GateUp>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  const int64_t most = p.padded_rows / kBlock * p.column_tiles;
  const dim3 grid(static_cast<unsigned>(most < multiprocessors ? most : multiprocessors));
  return launch_kernel(experts<GateUp>, grid, dim3(kThreads), kSharedBytes, stream, true, weight_map, x_map, p);
}

}  // namespace custom_ops::moe_fp8
