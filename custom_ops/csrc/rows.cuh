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
// instructions in series before its first load: n / d is n * magic shifted, for n < 2^31.
struct RowGrid {
  uint32_t col_blocks;
  uint32_t magic;
  uint32_t magic_shift;
  uint32_t lane_bits;
  uint32_t row_bits;
  unsigned blocks;
};

constexpr uint32_t log2_of(uint32_t power) { return power <= 1 ? 0 : 1 + log2_of(power / 2); }

// Calls launch(first row, number of rows) for all rows: once, but for matrices of more than 2^30 vectors, whose
// threads would not count in 31 bits. Slices are multiples of the rows of a row block.
template <typename Launch>
cudaError_t for_row_slices(int64_t rows, int64_t cols, Launch launch) {
  if (rows == 0 || cols == 0) return cudaSuccess;
  int64_t slice = (int64_t{1} << 30) / ((cols + 3) / 4);
  if (slice == 0) return cudaErrorInvalidValue;  // a row of 8 GiB
  if (slice > 8) slice = slice / 8 * 8;
  for (int64_t first = 0; first < rows; first += slice) {
    const cudaError_t error = launch(first, rows - first < slice ? rows - first : slice);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// The rows from `first` on. 16-bit elements.
inline Matrix rows_from(Matrix m, int64_t first) {
  return {static_cast<const char*>(m.data) + 2 * first * m.stride, m.stride};
}

inline Quantized rows_from(Quantized q, int64_t first, int64_t cols) {
  q.codes += first * cols;
  q.scale += first * q.row_stride;
  return q;
}

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
  while ((uint64_t{1} << grid.magic_shift) < grid.col_blocks) ++grid.magic_shift;
  // ceil(2^(31 + shift) / col_blocks), in [2^31, 2^32) because 2^(shift - 1) < col_blocks <= 2^shift.
  const uint64_t power = uint64_t{1} << (31 + grid.magic_shift);
  grid.magic = static_cast<uint32_t>((power + grid.col_blocks - 1) / grid.col_blocks);
  return grid;
}

struct RowTile {
  int64_t row;   // the first of R
  int64_t col;   // the first of N
  int64_t left;  // rows from here on
};

template <int N, int R>
__device__ __forceinline__ RowTile row_tile(const RowGrid& grid, int64_t rows) {
  const uint32_t item = blockIdx.x * static_cast<uint32_t>(kThreads) + threadIdx.x;
  const uint32_t lane = item & ((1u << grid.lane_bits) - 1);
  const uint32_t row = (item >> grid.lane_bits) & ((1u << grid.row_bits) - 1);
  const uint32_t block = item >> (grid.lane_bits + grid.row_bits);
  const uint32_t row_block = __umulhi(2 * block, grid.magic) >> grid.magic_shift;
  const uint32_t col_block = block - row_block * grid.col_blocks;
  RowTile at;
  at.row = ((row_block << grid.row_bits) + row) * static_cast<uint32_t>(R);
  at.col = static_cast<int64_t>((col_block << grid.lane_bits) + lane) * N;
  at.left = rows - at.row;
  return at;
}

// quantized_at, computed here and now: while the loads before it are under way, and not, as the compiler would
// have it, at the end, where a small launch waits for it.
__device__ __forceinline__ QuantizedAt early_quantized_at(const Quantized& out, const RowTile& tile, int64_t cols) {
  QuantizedAt at = quantized_at(out, tile.row, tile.col, cols);
  asm volatile("" : "+l"(at.codes), "+l"(at.scale));
  return at;
}

// Quantizes one vector in each of R rows and stores codes and scales. Every lane of the warp calls it.
template <typename T, int N, int R>
__device__ __forceinline__ void quantize_rows(const Vec<T, N> (&v)[R], const QuantizedAt& at, int64_t left,
                                              int64_t cols, const Quantized& out) {
  float scale[R];
  Codes<N> codes[R];
  group_quantize(v, out.group_size, out.min_amax, codes, scale);
  if (left > 0) store_quantized(codes, scale, at, left, cols, out);
}

}  // namespace custom_ops
