// The second grouped product of experts on Hopper; see moe_grouped.cuh.
#include "moe_grouped.cuh"

namespace custom_ops {

cudaError_t moe_grouped_down(const GroupedArgs& args, int multiprocessors, cudaStream_t stream) {
  if (args.padded_rows == 0 || args.column_tiles == 0 || args.x_rows == 0) return cudaSuccess;
  return grouped::launch<false>(args, multiprocessors, stream);
}

}  // namespace custom_ops
