// What kernels read: x, or a gated activation of gate and up. A source loads what a vector needs (all loads of a
// thread first, to be under way together) and then makes the values of it.
#pragma once

#include "kernels.h"
#include "vec.cuh"

namespace custom_ops {

// x itself.
template <typename T>
struct Plain {
  Matrix x;

  template <int N>
  struct Raw {
    Vec<T, N> x;
  };

  explicit Plain(const Source& source) : x(source.x) {}

  bool vectorizable(int64_t cols) const { return custom_ops::vectorizable(x, cols); }

  // Where a row begins: once, for all that a thread loads of it.
  struct Row {
    const T* x;
  };
  __device__ __forceinline__ Row begin(int64_t row) const { return {row_of<T>(x, row)}; }

  template <int N, bool Aligned>
  __device__ __forceinline__ Raw<N> load(const Row& row, int64_t col, int64_t cols) const {
    return {Aligned ? load_const<T, N>(row.x + col)
                    : load_scalar<T, N>(row.x + col * x.col_stride, cols - col, x.col_stride)};
  }

  template <int N, bool Aligned>
  __device__ __forceinline__ Raw<N> load(int64_t row, int64_t col, int64_t cols) const {
    return load<N, Aligned>(begin(row), col, cols);
  }

  template <int N, int R>
  __device__ __forceinline__ void make(const Raw<N> (&raw)[R], Vec<T, N> (&v)[R]) const {
#pragma unroll
    for (int i = 0; i < R; ++i) v[i] = raw[i].x;
  }
};

// Function(gate) and up, combined by Function. gate and up are usually the halves of one packed [rows, 2 * cols]
// tensor, or with Interleaved its even and odd columns.
template <typename T, typename Function, bool Interleaved = false>
struct Gated {
  Matrix gate;
  Matrix up;
  Function function;

  template <int N>
  struct Raw {
    Vec<T, N> gate;
    Vec<T, N> up;
  };

  explicit Gated(const Source& source) : gate(source.x), up(source.up), function(source) {}

  bool vectorizable(int64_t cols) const {
    if (!Interleaved) return custom_ops::vectorizable(gate, cols) && custom_ops::vectorizable(up, cols);
    Matrix both = gate;
    both.col_stride = 1;
    return custom_ops::vectorizable(both, cols);
  }

  struct Row {
    const T* gate;
    const T* up;
  };
  __device__ __forceinline__ Row begin(int64_t row) const { return {row_of<T>(gate, row), row_of<T>(up, row)}; }

  template <int N, bool Aligned>
  __device__ __forceinline__ Raw<N> load(const Row& row, int64_t col, int64_t cols) const {
    Raw<N> raw;
    if constexpr (Aligned && Interleaved) {
      const T* const p = row.gate + 2 * col;
      deinterleave(load_const<T, N>(p), load_const<T, N>(p + N), raw.gate, raw.up);
    } else {
      raw.gate = Aligned ? load_const<T, N>(row.gate + col)
                         : load_scalar<T, N>(row.gate + col * gate.col_stride, cols - col, gate.col_stride);
      raw.up = Aligned ? load_const<T, N>(row.up + col)
                       : load_scalar<T, N>(row.up + col * up.col_stride, cols - col, up.col_stride);
    }
    return raw;
  }

  template <int N, bool Aligned>
  __device__ __forceinline__ Raw<N> load(int64_t row, int64_t col, int64_t cols) const {
    return load<N, Aligned>(begin(row), col, cols);
  }

  template <int N, int R>
  __device__ __forceinline__ void make(const Raw<N> (&raw)[R], Vec<T, N> (&v)[R]) const {
    if constexpr (R <= 2) {
      function(raw, v);
    } else {
      // One after the other: together they would need more registers than there are.
#pragma unroll
      for (int i = 0; i < R; ++i) {
        Raw<N> one[1] = {raw[i]};
        Vec<T, N> out[1];
        hide(one[0].gate);
        function(one, out);
        hide(out[0]);
        v[i] = out[0];
      }
    }
  }
};

}  // namespace custom_ops
