// What Hopper's matrix units and its copy engine are told, an instruction a function: mbarriers, TMA, wgmma, clusters,
// programmatic dependent launch. For sm_90a; on another architecture kernels that use it have no body.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CUSTOM_OPS_HOPPER 1
#elif defined(__CUDA_ARCH__)
#pragma nv_diag_suppress 177  // what only the bodies use
#endif

namespace custom_ops::hopper {

// A tile of operands has rows of 64 16-bit values, 128 bytes, swizzled: the one layout used here.
constexpr int kDepth = 64;
constexpr int kRowBytes = 128;
constexpr int kAtomRows = 8;  // that a swizzle repeats after; a tile begins on such an atom, 1024 bytes
constexpr int kInstructionDepth = 16;

// ---- host -------------------------------------------------------------------------------------------------------

// A map of [rows, cols] 16-bit values with a pitch in elements, read or written in boxes of box_rows x 64.
// cuTensorMapEncodeTiled comes from the driver at run time, so that nothing links with it.
inline cudaError_t make_map(CUtensorMap* map, bool bfloat16, const void* data, int64_t rows, int64_t cols,
                            int64_t pitch, int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                               cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(pitch) * 2};
  const cuuint32_t box[2] = {kDepth, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult made = encode(
      map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<void*>(data),
      sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

#ifdef CUSTOM_OPS_HOPPER

// ---- barriers ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void init_barrier(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

// Makes initialised barriers known to the copy engine and the cluster.
__device__ __forceinline__ void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void expect_bytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// At the barrier in the same place of another block of the cluster. What has been read before was read by the matrix
// units, and their wait orders it: release.cluster would be a fence of the whole GPU, which made a product of 1024
// tokens on an H100 take 68 microseconds instead of 52.
__device__ __forceinline__ void arrive_at(uint64_t* barrier, uint32_t block) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
      "r"(block)
      : "memory");
}

__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- the copy engine --------------------------------------------------------------------------------------------

__device__ __forceinline__ void load_tile(const CUtensorMap* map, uint64_t* barrier, void* to, int col, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(col), "r"(row)
      : "memory");
}

// Into the same place of every block of the cluster that is in the mask, and signalled there.
__device__ __forceinline__ void load_tile_for(uint16_t blocks, const CUtensorMap* map, uint64_t* barrier, void* to,
                                              int col, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "h"(blocks), "r"(col), "r"(row)
      : "memory");
}

__device__ __forceinline__ void store_tile(const CUtensorMap* map, const void* from, int col, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared_address(from)), "r"(col), "r"(row)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until all but `Pending` of this thread's stores have read their tile.
template <int Pending>
__device__ __forceinline__ void wait_for_stores() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

// Until what this thread wrote to shared memory can be read by the copy engine and the matrix units.
__device__ __forceinline__ void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The same of global memory: what was written, or what others wrote and this thread has acquired.
__device__ __forceinline__ void fence_global() {
  asm volatile("fence.acq_rel.gpu;\nfence.proxy.async.global;" ::: "memory");
}

__device__ __forceinline__ void add_released(uint32_t* to, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

__device__ __forceinline__ uint32_t load_acquired(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void prefetch_to_l2(const void* pointer) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer));
}

// ---- clusters, dependent launch ---------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t block_in_cluster() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ uint32_t blocks_in_cluster() {
  uint32_t count;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
  return count;
}

// What was written to shared memory before it can be read by the blocks of the cluster after it.
__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// In two parts and without a fence: that the others are this far, whatever they wrote.
__device__ __forceinline__ void arrive_at_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// Four floats at the same place of another block's shared memory.
__device__ __forceinline__ float4 load_from_block(const float* here, uint32_t block) {
  float4 v;
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(shared_address(here)), "r"(block)
      : "memory");
  return v;
}

// Until the kernel before this one is done and what it wrote can be read.
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// From here on the next kernel may start, up to its own wait.
__device__ __forceinline__ void start_next() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// The threads of a warpgroup, or of two, without the others. Barrier 0 is __syncthreads.
__device__ __forceinline__ void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

template <int Registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <int Registers>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// ---- the matrix units -------------------------------------------------------------------------------------------

// A tile as wgmma takes it: K-major, 128-byte swizzle, atoms of 8 rows one after the other.
__device__ __forceinline__ uint64_t describe(const void* tile) {
  return (static_cast<uint64_t>(shared_address(tile) & 0x3FFFF) >> 4) | (uint64_t{1} << 16) |
         (uint64_t{kAtomRows * kRowBytes >> 4} << 32) | (uint64_t{1} << 62);
}

// What `describe` returns for the same rows, so many instructions along K further.
__device__ __forceinline__ uint64_t along(uint64_t tile, int instructions) {
  return tile + static_cast<uint64_t>(instructions * kInstructionDepth * 2 >> 4);
}

__device__ __forceinline__ void begin_product() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_product() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all but `Pending` of the committed groups are done.
template <int Pending>
__device__ __forceinline__ void wait_for_product() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// The compiler must not move what is read or written here across the products in flight.
template <int Count>
__device__ __forceinline__ void hold(float (&d)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define CUSTOM_OPS_D16 \
  "%0, %1, %2, %3, %4, %5, %6, %7"
#define CUSTOM_OPS_OPERANDS16 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
// d [64, 16] of a warpgroup = a [64, 16] @ b [16, 16].T, plus d if `add`.
template <typename T>
__device__ __forceinline__ void multiply(float (&d)[8], uint64_t a, uint64_t b, bool add) {
#define CUSTOM_OPS_WGMMA(TYPE)                                                                                    \
  asm volatile(                                                                                                   \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"                                                             \
      "wgmma.mma_async.sync.aligned.m64n16k16.f32." TYPE "." TYPE " {" CUSTOM_OPS_D16 "}, %8, %9, p, 1, 1, 0, 0;\n}" \
      : CUSTOM_OPS_OPERANDS16                                                                                    \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    CUSTOM_OPS_WGMMA("bf16");
  } else {
    CUSTOM_OPS_WGMMA("f16");
  }
#undef CUSTOM_OPS_WGMMA
}

#undef CUSTOM_OPS_D16
#undef CUSTOM_OPS_OPERANDS16

#define CUSTOM_OPS_D32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define CUSTOM_OPS_OPERANDS32 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
// d [64, 32] of a warpgroup = a [64, 16] @ b [32, 16].T, plus d if `add`.
template <typename T>
__device__ __forceinline__ void multiply(float (&d)[16], uint64_t a, uint64_t b, bool add) {
#define CUSTOM_OPS_WGMMA(TYPE)                                                                                    \
  asm volatile(                                                                                                   \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"                                                             \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE " {" CUSTOM_OPS_D32 "}, %16, %17, p, 1, 1, 0, 0;\n}" \
      : CUSTOM_OPS_OPERANDS32                                                                                    \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    CUSTOM_OPS_WGMMA("bf16");
  } else {
    CUSTOM_OPS_WGMMA("f16");
  }
#undef CUSTOM_OPS_WGMMA
}

#undef CUSTOM_OPS_D32
#undef CUSTOM_OPS_OPERANDS32

#define CUSTOM_OPS_D64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define CUSTOM_OPS_OPERANDS64 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
// d [64, 64] of a warpgroup = a [64, 16] @ b [64, 16].T, plus d if `add`.
template <typename T>
__device__ __forceinline__ void multiply(float (&d)[32], uint64_t a, uint64_t b, bool add) {
#define CUSTOM_OPS_WGMMA(TYPE)                                                                                    \
  asm volatile(                                                                                                   \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                             \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" CUSTOM_OPS_D64 "}, %32, %33, p, 1, 1, 0, 0;\n}" \
      : CUSTOM_OPS_OPERANDS64                                                                                    \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    CUSTOM_OPS_WGMMA("bf16");
  } else {
    CUSTOM_OPS_WGMMA("f16");
  }
#undef CUSTOM_OPS_WGMMA
}

#undef CUSTOM_OPS_D64
#undef CUSTOM_OPS_OPERANDS64

#define CUSTOM_OPS_D256 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
  "%59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, " \
  "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, " \
  "%97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, " \
  "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define CUSTOM_OPS_OPERANDS256 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
  "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
  "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
  "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
  "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
  "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
  "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), \
  "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), \
  "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), \
  "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), \
  "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), \
  "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), \
  "+f"(d[103]), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), \
  "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), \
  "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), \
  "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
// d [64, 256] of a warpgroup = a [64, 16] @ b [256, 16].T, plus d if `add`.
template <typename T>
__device__ __forceinline__ void multiply(float (&d)[128], uint64_t a, uint64_t b, bool add) {
#define CUSTOM_OPS_WGMMA(TYPE)                                                                                    \
  asm volatile(                                                                                                   \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                                             \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {" CUSTOM_OPS_D256 "}, %128, %129, p, 1, 1, 0, 0;\n}" \
      : CUSTOM_OPS_OPERANDS256                                                                                    \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    CUSTOM_OPS_WGMMA("bf16");
  } else {
    CUSTOM_OPS_WGMMA("f16");
  }
#undef CUSTOM_OPS_WGMMA
}

#undef CUSTOM_OPS_D256
#undef CUSTOM_OPS_OPERANDS256

#endif

}  // namespace custom_ops::hopper
