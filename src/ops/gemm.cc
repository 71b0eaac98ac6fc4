#include "ops/gemm.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <oneapi/dnnl/dnnl.hpp>
#include <tuple>

#include "circlet/base/error.h"

namespace circlet::gemm {
namespace {

// Primitives by (m, n, k, with bias): creating one costs more than a small product.
class Linears {
 public:
  void Run(const float* x, const float* w, const float* bias, int64_t m, int64_t n, int64_t k, float* y) {
    const std::lock_guard lock(mutex_);  // a primitive owns scratch memory: one run at a time
    const Kernel& kernel = At({m, n, k, bias != nullptr});
    const auto memory = [&](const dnnl::memory::desc& desc, const float* data) {
      return dnnl::memory(desc, engine_, const_cast<float*>(data));
    };
    std::unordered_map<int, dnnl::memory> args{{DNNL_ARG_SRC, memory(kernel.x, x)},
                                               {DNNL_ARG_WEIGHTS, memory(kernel.w, w)},
                                               {DNNL_ARG_DST, memory(kernel.y, y)}};
    if (bias != nullptr) args.emplace(DNNL_ARG_BIAS, memory(kernel.bias, bias));
    kernel.product.execute(stream_, args);
    stream_.wait();
  }

 private:
  using Key = std::tuple<int64_t, int64_t, int64_t, bool>;
  struct Kernel {
    dnnl::memory::desc x, w, bias, y;
    dnnl::matmul product;
  };

  const Kernel& At(const Key& key) {
    if (const auto it = kernels_.find(key); it != kernels_.end()) return it->second;
    // Prompts of many lengths must not collect kernels for ever.
    if (kernels_.size() >= 256) kernels_.clear();
    const auto [m, n, k, with_bias] = key;
    using Desc = dnnl::memory::desc;
    const auto desc = [](int64_t rows, int64_t columns, dnnl::memory::dims strides) {
      return Desc({rows, columns}, dnnl::memory::data_type::f32, std::move(strides));
    };
    Kernel kernel{desc(m, k, {k, 1}), desc(k, n, {1, k}), desc(1, n, {n, 1}), desc(m, n, {n, 1}), {}};
    const auto operation = with_bias ? dnnl::matmul::desc(kernel.x, kernel.w, kernel.bias, kernel.y)
                                     : dnnl::matmul::desc(kernel.x, kernel.w, kernel.y);
    kernel.product = dnnl::matmul({operation, engine_});
    return kernels_.emplace(key, std::move(kernel)).first->second;
  }

  std::mutex mutex_;
  dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream_{engine_};
  std::map<Key, Kernel> kernels_;
};

}  // namespace

void Linear(const float* x, const float* w, const float* bias, int64_t m, int64_t n, int64_t k, float* y) {
  if (m == 0 || n == 0) return;
  if (k == 0) {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) y[i * n + j] = bias == nullptr ? 0.0f : bias[j];
    return;
  }
  static Linears linears;
  try {
    linears.Run(x, w, bias, m, n, k, y);
  } catch (const dnnl::error& error) {
    CIRCLET_CHECK(false, "oneDNN refuses the product {}x{}x{}: {}", m, n, k, error.what());
  }
}

}  // namespace circlet::gemm
