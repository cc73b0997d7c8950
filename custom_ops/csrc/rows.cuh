// Kernels whose elements need no others but those of their group: a thread owns R vectors of N columns, so that R
// independent loads are in flight and R vectors share the counting.
#pragma once

#include "groups.cuh"
#include "passes.cuh"
#include "sources.cuh"

namespace custom_ops {

constexpr int kThreads = 128;

// Threads are numbered, fastest first: lanes of a column block, rows of a row block, column blocks, row blocks.
//   row-major scales and none:  the row block is one row, so a warp reads on along it
//   column-major scales:        the column block is a group and the row block eight rows, so that a block of
//                               threads writes whole 32-byte sectors of scales
// The R vectors are those of R consecutive rows, or Along one row, kThreads vectors apart.
struct RowGrid {
  Divisor col_blocks;
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
  if (m.inner.divisor != 0) {
    m.first += static_cast<uint32_t>(first);
  } else {
    m.data = static_cast<const char*>(m.data) + 2 * first * m.stride;
  }
  return m;
}

inline Source rows_from(Source s, int64_t first) {
  s.x = rows_from(s.x, first);
  s.up = rows_from(s.up, first);
  return s;
}

inline RowGrid row_grid(int64_t rows, int64_t cols, int n, int rows_per_thread, const Quantized* scales) {
  RowGrid grid{};
  const int64_t row_tiles = (rows + rows_per_thread - 1) / rows_per_thread;
  const int sector_rows = 8 / rows_per_thread;
  if (scales != nullptr && scales->group_stride > 1 && row_tiles >= sector_rows) {
    grid.lane_bits = log2_of(scales->group_size / n);
    grid.row_bits = log2_of(sector_rows);
  }
  const int64_t vecs = (cols + n - 1) / n;
  grid.col_blocks = Divisor(static_cast<uint32_t>(vecs >> grid.lane_bits));  // whole: groups divide cols
  const int64_t row_blocks = (row_tiles + (int64_t{1} << grid.row_bits) - 1) >> grid.row_bits;
  const int64_t items = (row_blocks * grid.col_blocks.divisor) << (grid.lane_bits + grid.row_bits);
  grid.blocks = static_cast<unsigned>((items + kThreads - 1) / kThreads);
  return grid;
}

// The grid for vectors along rows.
inline RowGrid along_grid(int64_t rows, int64_t cols, int n, int vecs_per_thread) {
  RowGrid grid{};
  const int64_t tile = int64_t{kThreads} * n * vecs_per_thread;
  grid.col_blocks = Divisor(static_cast<uint32_t>((cols + tile - 1) / tile));
  grid.blocks = static_cast<unsigned>(rows * grid.col_blocks.divisor);
  return grid;
}

struct RowTile {
  int64_t row;   // of the first vector
  int64_t col;   // of its first element
  int64_t left;  // how many of the R vectors there are, at least; none if not positive
};

// From one of a thread's vectors to the next.
template <int N, bool Along>
struct Step {
  static constexpr int kRows = Along ? 0 : 1;
  static constexpr int kCols = Along ? kThreads * N : 0;
};

template <int N, int R, bool Along>
__device__ __forceinline__ RowTile row_tile(const RowGrid& grid, uint32_t block_index, int64_t rows,
                                            int64_t cols) {
  if constexpr (Along) {
    const uint32_t row = divide(block_index, grid.col_blocks);
    const uint32_t tile = block_index - row * grid.col_blocks.divisor;
    RowTile at;
    at.row = row;
    at.col = (static_cast<int64_t>(tile) * (R * kThreads) + threadIdx.x) * N;
    at.left = (cols - at.col + kThreads * N - 1) / (kThreads * N);
    return at;
  }
  const uint32_t item = block_index * static_cast<uint32_t>(kThreads) + threadIdx.x;
  const uint32_t lane = item & ((1u << grid.lane_bits) - 1);
  const uint32_t row = (item >> grid.lane_bits) & ((1u << grid.row_bits) - 1);
  const uint32_t block = item >> (grid.lane_bits + grid.row_bits);
  const uint32_t row_block = divide(block, grid.col_blocks);
  const uint32_t col_block = block - row_block * grid.col_blocks.divisor;
  RowTile at;
  at.row = ((row_block << grid.row_bits) + row) * static_cast<uint32_t>(R);
  at.col = static_cast<int64_t>((col_block << grid.lane_bits) + lane) * N;
  at.left = rows - at.row;
  return at;
}

// ---- where values go: a sink prepares its addresses while the loads are under way, then takes R vectors ------------

// To memory, as they are.
template <typename T>
struct Store {
  static constexpr Pass kPass = Pass::only;

  T* out;

  struct At {};
  __device__ __forceinline__ At prepare(const RowTile&, int64_t) const { return {}; }
  const Quantized* scales() const { return nullptr; }

  void skip_rows(int64_t first, int64_t cols) { out += first * cols; }

  template <typename S, bool Aligned, int N, int R>
  __device__ __forceinline__ void put(const Vec<T, N> (&v)[R], const At&, const RowTile& at, int64_t cols) const {
#pragma unroll
    for (int i = 0; i < R; ++i) {
      if (i >= at.left) break;
      T* const p = out + (at.row + i * S::kRows) * cols + at.col + i * S::kCols;
      if constexpr (Aligned) {
        store_vec(p, v[i]);
      } else {
        store_scalar(p, v[i], cols - at.col - i * S::kCols);
      }
    }
  }
};

// To codes and scales of groups.
template <typename T, Usual U>
struct ToGroups {
  static constexpr Pass kPass = Pass::only;

  Quantized out;

  using At = QuantizedAt;
  // Computed here and now, and not, as the compiler would have it, at the end, where a small launch waits for it.
  __device__ __forceinline__ At prepare(const RowTile& tile, int64_t cols) const {
    QuantizedAt at = quantized_at(known<U>(out), tile.row, tile.col, cols);
    asm volatile("" : "+l"(at.codes), "+l"(at.scale));
    return at;
  }
  const Quantized* scales() const { return &out; }
  // May all rows of `cols` columns be taken as one?
  bool flat(int64_t cols) const {
    return !out.packed && out.group_stride == 1 && out.row_stride == cols >> out.group_shift;
  }

  void skip_rows(int64_t first, int64_t cols) {
    out.codes = static_cast<uint8_t*>(out.codes) + first * cols;
    out.scale = static_cast<float*>(out.scale) + first * out.row_stride;
  }

  template <typename S, bool Aligned, int N, int R>
  __device__ __forceinline__ void put(const Vec<T, N> (&v)[R], const At& to, const RowTile& at, int64_t cols) const {
    float amax[R];
    float scale[R];
    Codes<N> codes[R];
    const Quantized quantized = known<U>(out);
    group_amax(v, quantized.group_size, out.rule.min_amax, amax);
    codes_of<U>(v, amax, out.rule, codes, scale);
    if (at.left > 0) store_quantized<S>(codes, scale, to, at.left, at.col, cols, quantized);
    if (out.beside) wait_for_first();
  }
};

template <typename T, Usual U>
bool begins_early(const ToGroups<T, U>& to) {
  bool can;
  return to.out.beside && can_begin_early(can) == cudaSuccess && can;
}

// A second pass has fewer blocks than tiles: a block asks the first pass for its result once, and then goes on.
template <typename T, int N, int R, bool Aligned, bool Along, typename From, typename To>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(const __grid_constant__ From from, const __grid_constant__ To to, int64_t rows, int64_t cols,
                const __grid_constant__ RowGrid grid) {
  using S = Step<N, Along>;
  constexpr bool kSecond = To::kPass == Pass::second;
  typename To::At place;
  uint32_t block = blockIdx.x;
#pragma unroll 1
  do {
    const RowTile at = row_tile<N, R, Along>(grid, kSecond ? grid.blocks - 1 - block : block, rows, cols);
    const bool ask = !kSecond || block == blockIdx.x;
    typename From::template Raw<N> raw[R];
    if (!Aligned && ask) place = to.prepare(at, cols);  // here scalars under way would need the registers
#pragma unroll
    for (int i = 0; i < R; ++i) {
      raw[i] = {};
      if (i < at.left) raw[i] = from.template load<N, Aligned>(at.row + i * S::kRows, at.col + i * S::kCols, cols);
    }
    if (Aligned && ask) place = to.prepare(at, cols);
    Vec<T, N> v[R];
    from.make(raw, v);
    to.template put<S, Aligned>(v, place, at, cols);
    block += gridDim.x;
  } while (kSecond && block < grid.blocks);
}

template <typename T, int N, int R, bool Aligned, bool Along = false, typename From, typename To>
cudaError_t launch_rows(const From& from, const To& to, int64_t rows, int64_t cols, cudaStream_t stream) {
  const RowGrid grid = Along ? along_grid(rows, cols, N, R) : row_grid(rows, cols, N, R, to.scales());
  unsigned blocks = grid.blocks;
  if constexpr (To::kPass == Pass::second) blocks = to.blocks_of(blocks);
  return launch_kernel(rows_kernel<T, N, R, Aligned, Along, From, To>, blocks, kThreads, 0, stream,
                       begins_early(to), from, to, rows, cols, grid);
}

// Which shape of thread is fastest for quantizing, measured on an H100; the values do not depend on it. Few elements:
// more threads with less to do. More than the L2 cache holds: two vectors, along the row where rows do not matter,
// for DRAM likes neighbouring blocks to read neighbouring memory. Between: four rows, whose loads are under way
// together (1024 x 7168: 5.2 us, and 6.7 with one).
constexpr int64_t kFewElements = int64_t{1} << 16;
constexpr int64_t kManyElements = int64_t{1} << 20;
constexpr int64_t kMoreThanL2 = int64_t{1} << 24;

template <typename T, typename To>
cudaError_t launch_plain(const Source& source, const To& to, int64_t rows, int64_t cols, cudaStream_t stream) {
  const Plain<T> from(source);
  const int64_t elements = rows * cols;
  const bool flat = from.x.stride == cols && from.x.inner.divisor == 0 && from.x.col_stride == 1 && to.flat(cols);
  if (flat && from.vectorizable(elements)) {
    if (elements >= kMoreThanL2) return launch_rows<T, 8, 2, true, true>(from, to, 1, elements, stream);
    if (cols % kVec != 0) return launch_rows<T, 8, 1, true>(from, to, 1, elements, stream);
  }
  if (!from.vectorizable(cols)) return launch_rows<T, 8, 1, false>(from, to, rows, cols, stream);
  if (elements < kFewElements) return launch_rows<T, 4, 1, true>(from, to, rows, cols, stream);
  if (elements < kManyElements) return launch_rows<T, 8, 1, true>(from, to, rows, cols, stream);
  if (elements < kMoreThanL2) return launch_rows<T, 8, 4, true>(from, to, rows, cols, stream);
  return launch_rows<T, 8, 2, true>(from, to, rows, cols, stream);
}

}  // namespace custom_ops
