// The grid of the row-independent kernels (group_quant, silu_mul): a thread owns one vector of N columns in each
// of R consecutive rows, so that R independent loads are in flight.
#pragma once

#include "fp8.cuh"
#include "kernels.h"

namespace custom_ops {

constexpr int kThreads = 128;

// Threads are numbered, fastest first: lanes of a column block, rows of a row block, column blocks, row blocks.
//   row-major scales and none:  the row block is one row, so a warp reads on along it
//   column-major scales:        the column block is a group and the row block eight rows, so that a block of
//                               threads writes whole 32-byte sectors of scales
// The host supplies the reciprocal of the number of column blocks, since a division would cost a thread some 20
// instructions in series before its first load: n / d is n * magic shifted, for n < 2^31. More threads than
// that (more than 2^33 elements) divide, in 64 bits.
struct RowGrid {
  uint32_t col_blocks;
  uint32_t magic;  // 0: divide
  uint32_t magic_shift;
  uint32_t lane_bits;
  uint32_t row_bits;
  unsigned blocks;
};

struct RowTile {
  int64_t row;  // the first of R
  int64_t col;  // the first of N
  bool active;
};

constexpr uint32_t log2_of(uint32_t power) { return power <= 1 ? 0 : 1 + log2_of(power / 2); }

// scales: nullptr if nothing is quantized.
inline RowGrid row_grid(int64_t rows, int64_t cols, int n, int rows_per_thread, const Quantized* scales) {
  RowGrid grid{};
  const int64_t row_tiles = (rows + rows_per_thread - 1) / rows_per_thread;
  const int sector_rows = 8 / rows_per_thread;
  if (scales != nullptr && scales->group_stride > 1 && row_tiles >= sector_rows) {
    grid.lane_bits = log2_of(scales->group_size / n);
    grid.row_bits = log2_of(sector_rows);
  }
  const int64_t vecs = (cols + n - 1) / n;
  grid.col_blocks = static_cast<uint32_t>(vecs >> grid.lane_bits);  // whole: groups divide cols
  const int64_t row_blocks = (row_tiles + (int64_t{1} << grid.row_bits) - 1) >> grid.row_bits;
  const int64_t items = (row_blocks * grid.col_blocks) << (grid.lane_bits + grid.row_bits);
  grid.blocks = static_cast<unsigned>((items + kThreads - 1) / kThreads);
  if (static_cast<int64_t>(grid.blocks) * kThreads < int64_t{1} << 31) {
    while ((uint64_t{1} << grid.magic_shift) < grid.col_blocks) ++grid.magic_shift;
    // ceil(2^(31 + shift) / col_blocks), in [2^31, 2^32) because 2^(shift - 1) < col_blocks <= 2^shift.
    const uint64_t power = uint64_t{1} << (31 + grid.magic_shift);
    grid.magic = static_cast<uint32_t>((power + grid.col_blocks - 1) / grid.col_blocks);
  }
  return grid;
}

template <int N, int R>
__device__ __forceinline__ RowTile row_tile(const RowGrid& grid, int64_t rows) {
  uint64_t row_block;
  uint32_t col_block;
  const uint32_t item = blockIdx.x * static_cast<uint32_t>(kThreads) + threadIdx.x;  // or its low bits
  const uint32_t lane = item & ((1u << grid.lane_bits) - 1);
  const uint32_t row = (item >> grid.lane_bits) & ((1u << grid.row_bits) - 1);
  const uint32_t bits = grid.lane_bits + grid.row_bits;
  if (grid.magic != 0) {
    const uint32_t block = item >> bits;
    const uint32_t quotient = __umulhi(2 * block, grid.magic) >> grid.magic_shift;
    row_block = quotient;
    col_block = block - quotient * grid.col_blocks;
  } else {
    const uint64_t block = (static_cast<uint64_t>(blockIdx.x) * kThreads + threadIdx.x) >> bits;
    row_block = block / grid.col_blocks;
    col_block = static_cast<uint32_t>(block - row_block * grid.col_blocks);
  }
  RowTile at;
  at.row = static_cast<int64_t>((row_block << grid.row_bits) + row) * R;
  at.col = static_cast<int64_t>((col_block << grid.lane_bits) + lane) * N;
  at.active = at.row < rows;
  return at;
}

// Quantizes one vector in each of R rows and stores codes and scales. Every lane of the warp calls it.
template <typename T, int N, int R>
__device__ __forceinline__ void quantize_rows(const Vec<T, N> (&v)[R], const RowTile& at, int64_t rows,
                                              int64_t cols, const Quantized& out) {
  float scale[R];
  Codes<N> codes[R];
  group_quantize(v, out.group_size, out.min_amax, codes, scale);
  if (!at.active) return;
#pragma unroll
  for (int i = 0; i < R; ++i) {
    if (at.row + i < rows) {
      store_codes(codes[i], at.row + i, at.col, cols, out);
    }
  }
  store_scales(scale, at.row, at.col, rows, out);
}

}  // namespace custom_ops
