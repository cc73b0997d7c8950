// The maker of rows that are those of a source.
#pragma once

#include "row_block.cuh"
#include "sources.cuh"

namespace custom_ops {

// Makes a row of a source.
template <typename T, typename From>
struct Sourced {
  From from;

  bool vectorizable(int64_t cols) const { return from.vectorizable(cols); }
  static size_t shared_bytes(int64_t) { return 0; }

  template <int V>
  __device__ __forceinline__ void fill(const RowPart& part, Vec<T> (&v)[V]) const {
    typename From::template Raw<kVec> raw[V];
    const auto row = from.begin(part.exists ? part.row : 0);
    // Two ways, or the compiler moves each load to where its values are used.
    if (part.has(V - 1)) {
#pragma unroll
      for (int i = 0; i < V; ++i) raw[i] = from.template load<kVec, true>(row, part.col(i), part.cols);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        raw[i] = {};
        if (part.has(i)) raw[i] = from.template load<kVec, true>(row, part.col(i), part.cols);
      }
    }
    from.make(raw, v);
  }

  // The long way.
  __device__ __forceinline__ int begin(const LongRow&) const { return 0; }
  __device__ __forceinline__ Vec<T> value(const LongRow& row, int, int64_t col) const {
    typename From::template Raw<kVec> raw[1];
    if (row.aligned && col + kVec <= row.cols) {
      raw[0] = from.template load<kVec, true>(row.row, col, row.cols);
    } else {
      raw[0] = from.template load<kVec, false>(row.row, col, row.cols);
    }
    Vec<T> v[1];
    from.make(raw, v);
    return v[0];
  }
};

}  // namespace custom_ops
