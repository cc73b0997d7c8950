// The grid of the row-independent kernels (group_quant, silu_mul): a thread owns one vector of columns in each
// of R consecutive rows. R independent loads are in flight per thread, a warp reads 512 contiguous bytes of
// each row, and for column-major scales the R scales of a group are neighbours in memory.
#pragma once

#include "fp8.cuh"
#include "kernels.h"

namespace custom_ops {

constexpr int kThreads = 128;

// Elements from which four rows per thread still fill the device.
constexpr int64_t kManyElements = int64_t{1} << 22;

// Where a thread works. Threads are numbered along the columns first.
struct RowTile {
  int64_t row;  // the first of R
  int64_t col;  // the first of kVec
  bool active;
};

// Splits a thread's number into row tile and vector. A division would cost a thread some 20 instructions in
// series before its first load, so the host supplies the divisor's reciprocal: n / d is the upper word of
// n * magic, shifted, for n < 2^31. More threads than that (2^34 elements at least) divide.
struct RowGrid {
  uint32_t vecs;
  uint32_t magic;  // 0: divide
  uint32_t shift;
  unsigned blocks;
};

inline RowGrid row_grid(int64_t rows, int64_t cols, int rows_per_thread) {
  RowGrid grid{};
  grid.vecs = static_cast<uint32_t>((cols + kVec - 1) / kVec);
  const int64_t items = (rows + rows_per_thread - 1) / rows_per_thread * grid.vecs;
  grid.blocks = static_cast<unsigned>((items + kThreads - 1) / kThreads);
  if (static_cast<int64_t>(grid.blocks) * kThreads < int64_t{1} << 31) {
    while ((uint64_t{1} << grid.shift) < grid.vecs) ++grid.shift;
    // ceil(2^(31 + shift) / vecs), in [2^31, 2^32) because 2^(shift - 1) < vecs <= 2^shift.
    const uint64_t magic = ((uint64_t{1} << (31 + grid.shift)) + grid.vecs - 1) / grid.vecs;
    grid.magic = static_cast<uint32_t>(magic);
  }
  return grid;
}

template <int R>
__device__ __forceinline__ RowTile row_tile(const RowGrid& grid, int64_t rows) {
  const uint64_t item = static_cast<uint64_t>(blockIdx.x) * kThreads + threadIdx.x;
  uint64_t tile;
  if (grid.magic != 0) {
    tile = (item * grid.magic) >> (31 + grid.shift);
  } else {
    tile = item / grid.vecs;
  }
  const uint32_t vec = static_cast<uint32_t>(item - tile * grid.vecs);
  const int64_t row = static_cast<int64_t>(tile) * R;
  return {row, static_cast<int64_t>(vec) * kVec, row < rows};
}

// Quantizes one vector in each of R rows and stores codes and scales. Every lane of the warp calls it.
template <typename T, int R>
__device__ __forceinline__ void quantize_rows(const Vec<T> (&v)[R], const RowTile& at, int64_t rows,
                                              int64_t cols, const Quantized& out) {
  float scale[R];
  uint2 codes[R];
  group_quantize<T, R>(v, out.group_size, out.min_amax, codes, scale);
  if (!at.active) return;
#pragma unroll
  for (int i = 0; i < R; ++i) {
    if (at.row + i < rows) {
      *reinterpret_cast<uint2*>(out.codes + (at.row + i) * cols + at.col) = codes[i];
    }
  }
  if (at.col & (out.group_size - 1)) return;  // the group's first lane stores its scales
  const int64_t group = at.col >> (out.group_size == 128 ? 7 : 6);
  float* const p = out.scale + at.row * out.row_stride + group * out.group_stride;
  if (R == 4 && out.row_stride == 1 && out.group_stride % 4 == 0 && at.row + R <= rows) {
    *reinterpret_cast<float4*>(p) = make_float4(scale[0], scale[1 % R], scale[2 % R], scale[3 % R]);
    return;
  }
#pragma unroll
  for (int i = 0; i < R; ++i) {
    if (at.row + i < rows) p[i * out.row_stride] = scale[i];
  }
}

}  // namespace custom_ops
