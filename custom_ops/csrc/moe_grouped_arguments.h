// What the ops of grouped products on Hopper check of their arguments.
#pragma once

#include "moe_arguments.h"

namespace custom_ops {

inline void check(const char* op, bool good, const char* what) {
  if (!good) fail(op, what);
}

inline bool on_16_bytes(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

inline const int32_t* index_of(const char* op, const char* name, const Tensor& t, int64_t size, int32_t device) {
  check_cuda(op, name, t, device);
  if (t.dim() != 1 || t.dtype() != aoti_torch_dtype_int32() || t.sizes()[0] != size ||
      (size > 1 && t.strides()[0] != 1)) {
    fail(op, name, " must be contiguous int32 of ", size, " elements");
  }
  return static_cast<const int32_t*>(t.data());
}

inline bool in_one_piece(const Tensor& weight) {
  const int64_t rows = weight.sizes()[1], channels = weight.sizes()[2];
  const int64_t* const w = weight.strides();
  return w[2] == 1 && w[1] == channels && (weight.sizes()[0] == 1 || w[0] == rows * channels);
}

inline int multiprocessors(int32_t device) {
  int count = 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

}  // namespace custom_ops
