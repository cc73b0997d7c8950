// One pass over memory, or two of which the second needs all of the first.
//
// The second is launched while the first still runs, where the device can (from sm_90 on): its blocks are then there
// when the first ends, with their own loads done. It goes the other way, for what the first read last is still in L2.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace custom_ops {

enum class Pass { only, first, second };

// All that the first pass wrote is seen after wait_for_first(), which returns at once if there was none.
__device__ __forceinline__ void wait_for_first() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_second_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

template <Pass P>
__device__ __forceinline__ uint32_t block_of() {
  return P == Pass::second ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
}

// May a kernel begin before the one ahead of it in its stream has ended?
inline cudaError_t can_begin_early(bool& can) {
  int device;
  int major;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  can = major >= 9;
  return error;
}

// How many blocks of so many threads the current device holds at once, if threads are all that they need.
inline cudaError_t resident_blocks(int threads, unsigned& blocks) {
  int device;
  int processors;
  int most;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxThreadsPerMultiProcessor, device);
  blocks = static_cast<unsigned>(processors) * static_cast<unsigned>(most / threads);
  return error;
}

// early: before the first pass, which must be what is ahead in the stream, has ended. The kernel waits for it itself.
template <typename... Params, typename... Args>
cudaError_t launch_kernel(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                          bool early, const Args&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// Whether the pass that fills a sink begins early.
template <typename Sink>
bool begins_early(const Sink& sink) {
  if constexpr (Sink::kPass == Pass::second) {
    return sink.early;
  } else {
    return false;
  }
}

}  // namespace custom_ops
