// What the ops of LoRA share of taking their arguments. They check what a wrong address would come of.
#pragma once

#include <optional>

#include "lora.h"
#include "op_arguments.h"

namespace custom_ops {

constexpr int64_t kAlignment = 8;  // elements of 16 bits: 16 bytes

inline Tensor take_optional(StableIValue value) {
  const auto given = torch::stable::detail::to<std::optional<AtenTensorHandle>>(value);
  return given.has_value() ? Tensor(*given) : Tensor();
}

inline bool there(const Tensor& t) { return t.get() != nullptr; }

// Of the last `dims` dimensions, the last is contiguous and rows begin on 16 bytes.
inline void check_rows(const char* op, const char* name, const Tensor& t, int64_t dims, int32_t dtype, int32_t device) {
  if (t.dim() != dims) fail(op, name, " must have ", dims, " dimensions, got ", t.dim());
  if (t.dtype() != dtype) fail(op, name, " has a dtype that does not go with x");
  if (t.device_type() != aoti_torch_device_type_cuda() || t.device() != device) {
    fail(op, name, " must be on the device of x");
  }
  const int64_t itemsize = dtype == aoti_torch_dtype_float32() ? 4 : 2;
  bool aligned = reinterpret_cast<uintptr_t>(t.data()) % 16 == 0 && t.strides()[dims - 1] == 1;
  for (int64_t d = 0; d < dims - 1; ++d) aligned = aligned && t.strides()[d] * itemsize % 16 == 0;
  if (!aligned) fail(op, name, " must have rows that are contiguous and begin on 16 bytes");
}

inline void check_vector(const char* op, const char* name, const Tensor& t, int32_t dtype, int32_t device) {
  if (t.dim() != 1 || t.dtype() != dtype || t.device_type() != aoti_torch_device_type_cuda() ||
      t.device() != device || (t.sizes()[0] > 1 && t.strides()[0] != 1)) {
    fail(op, name, " must be a contiguous vector of its dtype on the device of x");
  }
}

inline void check_size(const char* op, const char* name, int64_t have, int64_t want) {
  if (have != want) fail(op, name, " has a size of ", have, " where the others have ", want);
}

inline int multiprocessors(int32_t device) {
  int count = 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

}  // namespace custom_ops
