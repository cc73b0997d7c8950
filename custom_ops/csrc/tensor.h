// A tensor, and the other arguments of an op, through torch's stable C interface.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <string>
#include <utility>

namespace custom_ops {

// A reference to a tensor, or to none.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

  int64_t dim() const {
    int64_t dim;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle_, &dim));
    return dim;
  }
  const int64_t* sizes() const {
    int64_t* sizes;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle_, &sizes));
    return sizes;
  }
  const int64_t* strides() const {
    int64_t* strides;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle_, &strides));
    return strides;
  }
  int32_t dtype() const {
    int32_t dtype;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle_, &dtype));
    return dtype;
  }
  int32_t device_type() const {
    int32_t type;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle_, &type));
    return type;
  }
  int32_t device() const {
    int32_t index;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle_, &index));
    return index;
  }
  void* data() const {
    void* data;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle_, &data));
    return data;
  }

 private:
  AtenTensorHandle handle_ = nullptr;
};

inline Tensor take_tensor(StableIValue value) { return Tensor(torch::stable::detail::to<AtenTensorHandle>(value)); }

inline double take_double(StableIValue value) { return torch::stable::detail::to<double>(value); }

inline int64_t take_int(StableIValue value) { return torch::stable::detail::to<int64_t>(value); }

// As the numbers of aoti_torch_dtype_*().
inline int32_t take_dtype(StableIValue value) { return torch::stable::detail::to<int32_t>(value); }

inline std::string take_string(StableIValue value) {
  const auto handle = torch::stable::detail::to<StringHandle>(value);
  const char* data = nullptr;
  size_t length = 0;
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  std::string text(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

}  // namespace custom_ops
