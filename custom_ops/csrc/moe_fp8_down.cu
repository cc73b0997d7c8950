// The second grouped product of experts in FP8 on Hopper; see moe_fp8.cuh.
#include "moe_fp8.cuh"

namespace custom_ops {

cudaError_t moe_fp8_down(const Fp8GroupedArgs& args, int multiprocessors, cudaStream_t stream) {
  if (args.padded_rows == 0 || args.column_tiles == 0 || args.pairs == 0) return cudaSuccess;
  return moe_fp8::launch<false>(args, multiprocessors, stream);
}

}  // namespace custom_ops
