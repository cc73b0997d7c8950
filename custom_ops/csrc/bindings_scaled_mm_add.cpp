// scaled_mm_add on cuBLASLt: float8 products, their scales and a residual in one kernel, D = scales * (A @ B) + C.
//
// torch._scaled_mm has no place for C. The library is the one that torch has loaded, and its functions are looked up
// there: a toolkit with nvcc need not have its headers. What is known of it here are the numbers of cublasLt.h (CUDA
// 12.9 and 13), which are a part of its binary interface.
#include <dlfcn.h>

#include <map>
#include <memory>
#include <tuple>

#include "op_arguments.h"

namespace {

using namespace custom_ops;

constexpr char kOp[] = "scaled_mm_add";
constexpr size_t kWorkspaceBytes = size_t{32} << 20;  // what torch gives it on Hopper
constexpr size_t kMostPlans = 512;

// ---- the library ----------------------------------------------------------------------------------------

constexpr int kComputeFloat32 = 68;
constexpr int kFloat32 = 0;
constexpr int kBfloat16 = 14;
constexpr int kFloat8E4m3 = 28;
constexpr int32_t kTransposed = 1;
constexpr int32_t kScaleOfTensor = 0;
constexpr int32_t kScaleOfRows = 3;

enum Attribute : int {
  kTransposeA = 3,
  kScalePointerA = 17,
  kScalePointerB = 18,
  kFastSums = 25,
  kScaleModeA = 31,
  kScaleModeB = 32,
};

enum Preference : int { kMostWorkspace = 1, kAlignmentA = 5, kAlignmentB = 6, kAlignmentC = 7, kAlignmentD = 8 };

struct Algorithm {
  uint64_t data[8];
};

struct Found {
  Algorithm algorithm;
  size_t workspace;
  int status;
  float waves;
  int reserved[4];
};

using Opaque = void*;

struct CublasLt {
  int (*create)(Opaque* handle);
  int (*create_product)(Opaque* product, int compute, int scale);
  int (*set_product)(Opaque product, int attribute, const void* value, size_t bytes);
  int (*destroy_product)(Opaque product);
  int (*create_layout)(Opaque* layout, int dtype, uint64_t rows, uint64_t cols, int64_t pitch);
  int (*destroy_layout)(Opaque layout);
  int (*create_preference)(Opaque* preference);
  int (*set_preference)(Opaque preference, int attribute, const void* value, size_t bytes);
  int (*destroy_preference)(Opaque preference);
  int (*find)(Opaque handle, Opaque product, Opaque a, Opaque b, Opaque c, Opaque d, Opaque preference, int count,
              Found* found, int* returned);
  int (*multiply)(Opaque handle, Opaque product, const void* alpha, const void* a, Opaque a_layout, const void* b,
                  Opaque b_layout, const void* beta, const void* c, Opaque c_layout, void* d, Opaque d_layout,
                  const Algorithm* algorithm, void* workspace, size_t workspace_bytes, cudaStream_t stream);
};

void* loaded_library() {
  for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"}) {
    if (void* library = dlopen(name, RTLD_NOLOAD | RTLD_LAZY)) return library;
  }
  fail(kOp, "torch has loaded neither libcublasLt.so.13 nor .12");
}

template <typename Function>
void look_up(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) fail(kOp, "cuBLASLt has no ", name);
}

const CublasLt& cublaslt() {
  static const CublasLt functions = [] {
    void* const library = loaded_library();
    CublasLt f{};
    look_up(library, "cublasLtCreate", f.create);
    look_up(library, "cublasLtMatmulDescCreate", f.create_product);
    look_up(library, "cublasLtMatmulDescSetAttribute", f.set_product);
    look_up(library, "cublasLtMatmulDescDestroy", f.destroy_product);
    look_up(library, "cublasLtMatrixLayoutCreate", f.create_layout);
    look_up(library, "cublasLtMatrixLayoutDestroy", f.destroy_layout);
    look_up(library, "cublasLtMatmulPreferenceCreate", f.create_preference);
    look_up(library, "cublasLtMatmulPreferenceSetAttribute", f.set_preference);
    look_up(library, "cublasLtMatmulPreferenceDestroy", f.destroy_preference);
    look_up(library, "cublasLtMatmulAlgoGetHeuristic", f.find);
    look_up(library, "cublasLtMatmul", f.multiply);
    return f;
  }();
  return functions;
}

void check(int status, const char* what) {
  if (status != 0) throw std::runtime_error(std::string("custom_ops_cuda::") + kOp + ": cuBLASLt cannot " + what +
                                            " (status " + std::to_string(status) + ")");
}

// ---- plans ----------------------------------------------------------------------------------------------

struct Key {
  int32_t device;
  int64_t m, n, k;
  bool rows, fast;
  uint32_t alignment;
  bool operator<(const Key& o) const {
    return std::tie(device, m, n, k, rows, fast, alignment) <
           std::tie(o.device, o.m, o.n, o.k, o.rows, o.fast, o.alignment);
  }
};

// What cuBLASLt wants to know of a product besides its addresses, and the algorithm that it proposes. It counts columns
// first: out.T = b @ a.T, where b is its A, kept transposed.
class Plan {
 public:
  Plan(Opaque handle, const Key& key, const void* a_scale, const void* b_scale) {
    const CublasLt& lt = cublaslt();
    check(lt.create_product(&product_, kComputeFloat32, kFloat32), "describe a product");
    set(kTransposeA, kTransposed);
    set(kFastSums, static_cast<int8_t>(key.fast));
    set(kScaleModeA, key.rows ? kScaleOfRows : kScaleOfTensor);
    set(kScaleModeB, key.rows ? kScaleOfRows : kScaleOfTensor);
    set(kScalePointerA, b_scale);
    set(kScalePointerB, a_scale);
    check(lt.create_layout(&a_, kFloat8E4m3, key.k, key.n, key.k), "describe b");
    check(lt.create_layout(&b_, kFloat8E4m3, key.k, key.m, key.k), "describe a");
    check(lt.create_layout(&c_, kBfloat16, key.n, key.m, key.n), "describe the residual");
    Opaque preference = nullptr;
    check(lt.create_preference(&preference), "take preferences");
    const size_t bytes = kWorkspaceBytes;
    check(lt.set_preference(preference, kMostWorkspace, &bytes, sizeof bytes), "take a workspace");
    for (int attribute : {kAlignmentA, kAlignmentB, kAlignmentC, kAlignmentD}) {
      check(lt.set_preference(preference, attribute, &key.alignment, sizeof key.alignment), "take an alignment");
    }
    Found found{};
    int returned = 0;
    const int status = lt.find(handle, product_, a_, b_, c_, c_, preference, 1, &found, &returned);
    lt.destroy_preference(preference);
    check(status, "find an algorithm");
    if (returned == 0 || found.status != 0) {
      fail(kOp, "cuBLASLt has no algorithm for M = ", key.m, ", N = ", key.n, ", K = ", key.k);
    }
    algorithm_ = found.algorithm;
  }
  ~Plan() {
    const CublasLt& lt = cublaslt();
    for (Opaque layout : {a_, b_, c_}) {
      if (layout != nullptr) lt.destroy_layout(layout);
    }
    if (product_ != nullptr) lt.destroy_product(product_);
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  void run(Opaque handle, const void* a, const void* a_scale, const void* b, const void* b_scale, const void* residual,
           void* out, void* workspace, cudaStream_t stream) {
    set(kScalePointerA, b_scale);
    set(kScalePointerB, a_scale);
    const float one = 1.0f;
    check(cublaslt().multiply(handle, product_, &one, b, a_, a, b_, &one, residual, c_, out, c_, &algorithm_, workspace,
                              kWorkspaceBytes, stream),
          "multiply");
  }

 private:
  template <typename Value>
  void set(Attribute attribute, const Value& value) {
    check(cublaslt().set_product(product_, attribute, &value, sizeof value), "take an attribute of a product");
  }

  Opaque product_ = nullptr;
  Opaque a_ = nullptr;
  Opaque b_ = nullptr;
  Opaque c_ = nullptr;
  Algorithm algorithm_{};
};

// What a thread has made, of one device or several. A plan is written to before each product: threads share none.
struct Plans {
  std::map<int32_t, Opaque> handles;
  std::map<Key, std::unique_ptr<Plan>> plans;

  Opaque handle(int32_t device) {
    Opaque& made = handles[device];
    if (made == nullptr) check(cublaslt().create(&made), "begin");
    return made;
  }
  Plan& plan(const Key& key, const void* a_scale, const void* b_scale) {
    const auto known = plans.find(key);
    if (known != plans.end()) return *known->second;
    if (plans.size() >= kMostPlans) plans.clear();  // of prompts of so many lengths
    return *plans.emplace(key, std::make_unique<Plan>(handle(key.device), key, a_scale, b_scale)).first->second;
  }
};

// ---- the op ---------------------------------------------------------------------------------------------

int64_t count(const Tensor& t) {
  int64_t elements = 1;
  for (int64_t d = 0; d < t.dim(); ++d) elements *= t.sizes()[d];
  return elements;
}

bool on_boundary(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data()) % 16 == 0; }

// Contiguous, on a boundary of 16 bytes, which cuBLASLt reads rows of codes in: a copy if it is not.
Tensor packed(Tensor t, size_t element, cudaStream_t stream) {
  Tensor dense = contiguous(t);
  if (on_boundary(dense)) return dense;
  Tensor copy = empty_contiguous(dense, dense.dtype());
  check_launch(kOp, cudaMemcpyAsync(copy.data(), dense.data(), element * static_cast<size_t>(count(dense)),
                                    cudaMemcpyDeviceToDevice, stream));
  return copy;
}

void require(bool holds, const char* what) {
  if (!holds) fail(kOp, what);
}

uint32_t alignment_of(std::initializer_list<const void*> addresses) {
  uint32_t alignment = 256;  // what cuBLASLt assumes unless it is told
  for (const void* address : addresses) {
    while (reinterpret_cast<uintptr_t>(address) % alignment != 0) alignment /= 2;
  }
  return alignment;
}

// (a, a_scale, b, b_scale, residual, fast_sums) -> out
void scaled_mm_add_op(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  Tensor a = arguments.tensor();
  Tensor a_scale = arguments.tensor();
  Tensor b = arguments.tensor();
  Tensor b_scale = arguments.tensor();
  Tensor residual = arguments.tensor();
  const bool fast = torch::stable::detail::to<bool>(stack[5]);
  const int32_t device = a.device();
  for (const Tensor* t : {&a, &a_scale, &b, &b_scale, &residual}) {
    require(t->device_type() == aoti_torch_device_type_cuda() && t->device() == device,
            "all tensors must be on one CUDA device");
  }
  const int32_t code = aoti_torch_dtype_float8_e4m3fn();
  require(a.dtype() == code && b.dtype() == code, "a and b must be float8_e4m3fn");
  require(a_scale.dtype() == aoti_torch_dtype_float32() && b_scale.dtype() == aoti_torch_dtype_float32(),
          "scales must be float32");
  require(residual.dtype() == aoti_torch_dtype_bfloat16(), "residual must be bfloat16");
  require(a.dim() >= 1 && a.dim() <= kMaxDims && b.dim() == 2 && residual.dim() == a.dim(),
          "a must be [..., K], b [N, K] and residual [..., N]");
  const int64_t k = a.sizes()[a.dim() - 1];
  const int64_t n = b.sizes()[0];
  int64_t m = 1;
  for (int64_t d = 0; d + 1 < a.dim(); ++d) {
    m *= a.sizes()[d];
    require(residual.sizes()[d] == a.sizes()[d], "residual must have the rows of a");
  }
  require(b.sizes()[1] == k && residual.sizes()[residual.dim() - 1] == n,
          "a must be [..., K], b [N, K] and residual [..., N]");
  require(k > 0 && k % 16 == 0 && n % 16 == 0, "N and K must be multiples of 16");
  const bool rows = count(b_scale) != 1 || count(a_scale) != 1;
  require(!rows || (count(a_scale) == m && count(b_scale) == n),
          "scales must both be of one element, or a_scale of one for each row of a and b_scale of b");

  const DeviceGuard guard(device);
  Tensor out = empty_contiguous(residual, residual.dtype());
  if (m > 0 && n > 0) {
    const cudaStream_t stream = current_stream(device);
    a = packed(std::move(a), 1, stream);
    b = packed(std::move(b), 1, stream);
    residual = packed(std::move(residual), 2, stream);
    a_scale = packed(std::move(a_scale), 4, stream);
    b_scale = packed(std::move(b_scale), 4, stream);
    const int64_t bytes = kWorkspaceBytes;
    const int64_t one = 1;
    const Tensor workspace = empty(&bytes, &one, 1, aoti_torch_dtype_int8(), device);
    const uint32_t alignment = alignment_of({a.data(), b.data(), residual.data(), out.data()});
    thread_local Plans plans;
    const Key key{device, m, n, k, rows, fast, alignment};
    Plan& plan = plans.plan(key, a_scale.data(), b_scale.data());
    plan.run(plans.handle(device), a.data(), a_scale.data(), b.data(), b_scale.data(), residual.data(), out.data(),
             workspace.data(), stream);
  }
  put(stack[0], out);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(custom_ops_cuda, m) {
  m.def(
      "scaled_mm_add(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor residual, *, bool fast_sums=False) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(custom_ops_cuda, CUDA, m) { m.impl(kOp, &scaled_mm_add_op); }
