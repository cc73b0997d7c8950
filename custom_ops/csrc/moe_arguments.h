// The arguments of ops for mixtures of experts, which are also flags and tensors that may be left out.
#pragma once

#include <optional>

#include "moe.h"
#include "op_arguments.h"

namespace custom_ops {

// As Arguments, with what only these ops take.
class MoeArguments {
 public:
  explicit MoeArguments(StableIValue* stack) : next_(stack) {}
  Tensor tensor() { return take_tensor(*next_++); }
  Tensor optional_tensor() {
    const auto given = torch::stable::detail::to<std::optional<AtenTensorHandle>>(*next_++);
    return given.has_value() ? Tensor(*given) : Tensor();
  }
  int64_t integer() { return take_int(*next_++); }
  bool flag() { return torch::stable::detail::to<bool>(*next_++); }
  float number() { return static_cast<float>(take_double(*next_++)); }
  std::string string() { return take_string(*next_++); }
  int32_t dtype() { return take_dtype(*next_++); }
  Arguments rest() const { return Arguments(next_); }

 private:
  StableIValue* next_;
};

inline void check_cuda(const char* op, const char* name, const Tensor& t, int32_t device) {
  if (t.device_type() != aoti_torch_device_type_cuda() || t.device() != device) {
    fail(op, name, " must be on the CUDA device of the others");
  }
}

}  // namespace custom_ops
