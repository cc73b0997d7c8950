// Stages of shared memory that go around, what threads copy into them, and bfloat16 on its way out. For sm_90a; see
// hopper.cuh.
#pragma once

#include "hopper.cuh"

namespace custom_ops::hopper {

// A place in the ring of stages, and how often it has come round.
template <int Stages>
struct RingOf {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage == Stages) stage = 0, parity ^= 1;
  }
};

#ifdef CUSTOM_OPS_HOPPER

__device__ __forceinline__ void copy_16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// An arrival of this thread, which the barrier expects, when what it copies is there.
__device__ __forceinline__ void arrive_with_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Two numbers in bfloat16, the first one low. A conversion of one alone takes four times as long as that of two.
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ float2 unpack(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

#endif

}  // namespace custom_ops::hopper
