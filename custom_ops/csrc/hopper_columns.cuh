// wgmma with as many columns as there are tokens: the weight is the side that is 64 high, tokens are the one that comes
// in steps of 8. For sm_90a; see hopper.cuh.
#pragma once

#include "hopper.cuh"

namespace custom_ops::hopper {

#ifdef CUSTOM_OPS_HOPPER

// multiply: d [64, N] of a warpgroup = a @ b.T, plus d if `add`, of 32 bytes along K of a [64, K] and of b [N, K].
template <int N>
struct Columns;

// The registers of d for so many columns: their names in the instruction, and what they are.
#define CUSTOM_OPS_NAMES8 "%0, %1, %2, %3"
#define CUSTOM_OPS_NAMES16 CUSTOM_OPS_NAMES8 ", %4, %5, %6, %7"
#define CUSTOM_OPS_NAMES24 CUSTOM_OPS_NAMES16 ", %8, %9, %10, %11"
#define CUSTOM_OPS_NAMES32 CUSTOM_OPS_NAMES24 ", %12, %13, %14, %15"
#define CUSTOM_OPS_NAMES40 CUSTOM_OPS_NAMES32 ", %16, %17, %18, %19"
#define CUSTOM_OPS_NAMES48 CUSTOM_OPS_NAMES40 ", %20, %21, %22, %23"
#define CUSTOM_OPS_NAMES56 CUSTOM_OPS_NAMES48 ", %24, %25, %26, %27"
#define CUSTOM_OPS_NAMES64 CUSTOM_OPS_NAMES56 ", %28, %29, %30, %31"
#define CUSTOM_OPS_NAMES72 CUSTOM_OPS_NAMES64 ", %32, %33, %34, %35"
#define CUSTOM_OPS_NAMES80 CUSTOM_OPS_NAMES72 ", %36, %37, %38, %39"
#define CUSTOM_OPS_NAMES88 CUSTOM_OPS_NAMES80 ", %40, %41, %42, %43"
#define CUSTOM_OPS_NAMES96 CUSTOM_OPS_NAMES88 ", %44, %45, %46, %47"
#define CUSTOM_OPS_NAMES104 CUSTOM_OPS_NAMES96 ", %48, %49, %50, %51"
#define CUSTOM_OPS_NAMES112 CUSTOM_OPS_NAMES104 ", %52, %53, %54, %55"
#define CUSTOM_OPS_NAMES120 CUSTOM_OPS_NAMES112 ", %56, %57, %58, %59"
#define CUSTOM_OPS_NAMES128 CUSTOM_OPS_NAMES120 ", %60, %61, %62, %63"
#define CUSTOM_OPS_NAMES136 CUSTOM_OPS_NAMES128 ", %64, %65, %66, %67"
#define CUSTOM_OPS_NAMES144 CUSTOM_OPS_NAMES136 ", %68, %69, %70, %71"
#define CUSTOM_OPS_NAMES152 CUSTOM_OPS_NAMES144 ", %72, %73, %74, %75"
#define CUSTOM_OPS_NAMES160 CUSTOM_OPS_NAMES152 ", %76, %77, %78, %79"
#define CUSTOM_OPS_SUMS8 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define CUSTOM_OPS_SUMS16 CUSTOM_OPS_SUMS8, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define CUSTOM_OPS_SUMS24 CUSTOM_OPS_SUMS16, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define CUSTOM_OPS_SUMS32 CUSTOM_OPS_SUMS24, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define CUSTOM_OPS_SUMS40 CUSTOM_OPS_SUMS32, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define CUSTOM_OPS_SUMS48 CUSTOM_OPS_SUMS40, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define CUSTOM_OPS_SUMS56 CUSTOM_OPS_SUMS48, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define CUSTOM_OPS_SUMS64 CUSTOM_OPS_SUMS56, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define CUSTOM_OPS_SUMS72 CUSTOM_OPS_SUMS64, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define CUSTOM_OPS_SUMS80 CUSTOM_OPS_SUMS72, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define CUSTOM_OPS_SUMS88 CUSTOM_OPS_SUMS80, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define CUSTOM_OPS_SUMS96 CUSTOM_OPS_SUMS88, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define CUSTOM_OPS_SUMS104 CUSTOM_OPS_SUMS96, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define CUSTOM_OPS_SUMS112 CUSTOM_OPS_SUMS104, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define CUSTOM_OPS_SUMS120 CUSTOM_OPS_SUMS112, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define CUSTOM_OPS_SUMS128 CUSTOM_OPS_SUMS120, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define CUSTOM_OPS_SUMS136 CUSTOM_OPS_SUMS128, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define CUSTOM_OPS_SUMS144 CUSTOM_OPS_SUMS136, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define CUSTOM_OPS_SUMS152 CUSTOM_OPS_SUMS144, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define CUSTOM_OPS_SUMS160 CUSTOM_OPS_SUMS152, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])

#define CUSTOM_OPS_COLUMNS(N, A, B, ADD)                                                                              \
  template <>                                                                                                      \
  struct Columns<N> {                                                                                              \
    static __device__ __forceinline__ void multiply(float* d, uint64_t a, uint64_t b, bool add) {                  \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\n"                                                 \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" CUSTOM_OPS_NAMES##N "}, " A ", " B    \
                   ", p, 1, 1, 0, 0;\n}"                                                                            \
                   : CUSTOM_OPS_SUMS##N                                                                            \
                   : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                                  \
    }                                                                                                              \
  };

CUSTOM_OPS_COLUMNS(16, "%8", "%9", "%10")
CUSTOM_OPS_COLUMNS(32, "%16", "%17", "%18")
CUSTOM_OPS_COLUMNS(48, "%24", "%25", "%26")
CUSTOM_OPS_COLUMNS(64, "%32", "%33", "%34")
CUSTOM_OPS_COLUMNS(80, "%40", "%41", "%42")
CUSTOM_OPS_COLUMNS(96, "%48", "%49", "%50")
CUSTOM_OPS_COLUMNS(112, "%56", "%57", "%58")
CUSTOM_OPS_COLUMNS(120, "%60", "%61", "%62")
CUSTOM_OPS_COLUMNS(128, "%64", "%65", "%66")
CUSTOM_OPS_COLUMNS(136, "%68", "%69", "%70")
CUSTOM_OPS_COLUMNS(144, "%72", "%73", "%74")
CUSTOM_OPS_COLUMNS(160, "%80", "%81", "%82")

#undef CUSTOM_OPS_COLUMNS
#undef CUSTOM_OPS_NAMES8
#undef CUSTOM_OPS_SUMS8
#undef CUSTOM_OPS_NAMES16
#undef CUSTOM_OPS_SUMS16
#undef CUSTOM_OPS_NAMES24
#undef CUSTOM_OPS_SUMS24
#undef CUSTOM_OPS_NAMES32
#undef CUSTOM_OPS_SUMS32
#undef CUSTOM_OPS_NAMES40
#undef CUSTOM_OPS_SUMS40
#undef CUSTOM_OPS_NAMES48
#undef CUSTOM_OPS_SUMS48
#undef CUSTOM_OPS_NAMES56
#undef CUSTOM_OPS_SUMS56
#undef CUSTOM_OPS_NAMES64
#undef CUSTOM_OPS_SUMS64
#undef CUSTOM_OPS_NAMES72
#undef CUSTOM_OPS_SUMS72
#undef CUSTOM_OPS_NAMES80
#undef CUSTOM_OPS_SUMS80
#undef CUSTOM_OPS_NAMES88
#undef CUSTOM_OPS_SUMS88
#undef CUSTOM_OPS_NAMES96
#undef CUSTOM_OPS_SUMS96
#undef CUSTOM_OPS_NAMES104
#undef CUSTOM_OPS_SUMS104
#undef CUSTOM_OPS_NAMES112
#undef CUSTOM_OPS_SUMS112
#undef CUSTOM_OPS_NAMES120
#undef CUSTOM_OPS_SUMS120
#undef CUSTOM_OPS_NAMES128
#undef CUSTOM_OPS_SUMS128
#undef CUSTOM_OPS_NAMES136
#undef CUSTOM_OPS_SUMS136
#undef CUSTOM_OPS_NAMES144
#undef CUSTOM_OPS_SUMS144
#undef CUSTOM_OPS_NAMES152
#undef CUSTOM_OPS_SUMS152
#undef CUSTOM_OPS_NAMES160
#undef CUSTOM_OPS_SUMS160

#endif

}  // namespace custom_ops::hopper
