#include "ops/gemm.h"

#include <algorithm>
#include <array>
#include <map>
#include <oneapi/dnnl/dnnl.hpp>
#include <string_view>
#include <tuple>
#include <vector>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"
#include "hwy/aligned_allocator.h"
#include "ops/simd.h"

namespace circlet::gemm {
namespace {

// oneDNN's products of one thread by (m, n, k, with bias, threads): creating one costs more than a small product. A
// primitive shares the work among as many threads as its creator had, and uses its creator's scratch memory; so each
// thread has its own.
class Linears {
 public:
  // False when oneDNN has no kernel for this processor whose sums run in one order whatever the thread count.
  bool Run(const float* x, const float* w, const float* bias, int64_t m, int64_t n, int64_t k, float* y) {
    Kernel& kernel = At({m, n, k, bias != nullptr, Threads()});
    if (!kernel.one_order) return false;
    const std::array<const float*, 4> operands{x, w, y, bias};
    for (size_t i = 0; i < kernel.args.size(); ++i) kernel.memory[i].set_data_handle(const_cast<float*>(operands[i]));
    dnnl::error::wrap_c_api(dnnl_primitive_execute(kernel.product.get(), stream_.get(),
                                                   static_cast<int>(kernel.args.size()), kernel.args.data()),
                            "it does not run");
    stream_.wait();
    return true;
  }

 private:
  using Key = std::tuple<int64_t, int64_t, int64_t, bool, int>;
  struct Kernel {
    dnnl::matmul product;
    std::vector<dnnl::memory> memory;  // x, w, y and perhaps the bias; their bytes come with each run
    std::vector<dnnl_exec_arg_t> args;
    bool one_order = false;
  };

  Kernel& At(const Key& key) {
    if (const auto it = kernels_.find(key); it != kernels_.end()) return it->second;
    // Prompts of many lengths must not collect kernels for ever.
    if (kernels_.size() >= 256) kernels_.clear();
    const auto [m, n, k, with_bias, threads] = key;
    const auto desc = [](int64_t rows, int64_t columns, dnnl::memory::dims strides) {
      return dnnl::memory::desc({rows, columns}, dnnl::memory::data_type::f32, std::move(strides));
    };
    const auto x = desc(m, k, {k, 1}), w = desc(k, n, {1, k}), y = desc(m, n, {n, 1}), bias = desc(1, n, {n, 1});
    const dnnl::matmul::primitive_desc chosen(
        with_bias ? dnnl::matmul::desc(x, w, bias, y) : dnnl::matmul::desc(x, w, y), engine_);
    Kernel kernel{.product = dnnl::matmul(chosen)};
    const auto add = [&](int index, const dnnl::memory::desc& operand) {
      kernel.memory.push_back(dnnl::memory(operand, engine_, DNNL_MEMORY_NONE));
      kernel.args.push_back({index, kernel.memory.back().get()});
    };
    add(DNNL_ARG_SRC, x);
    add(DNNL_ARG_WEIGHTS, w);
    add(DNNL_ARG_DST, y);
    if (with_bias) add(DNNL_ARG_BIAS, bias);
    // brgemm (AVX-512) never cuts k between threads; the kernel of older processors does, except for a single row.
    kernel.one_order = m == 1 || std::string_view(chosen.impl_info_str()).starts_with("brg");
    return kernels_.emplace(key, std::move(kernel)).first->second;
  }

  dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream_{engine_};
  std::map<Key, Kernel> kernels_;
};

}  // namespace

// By groups of columns, each packed by the thread that multiplies with it.
void LinearByPanels(const float* x, const float* w, const float* bias, int64_t m, int64_t n, int64_t k, float* y) {
  const int64_t columns = 4 * PanelColumns();
  constexpr int64_t kRows = 192;  // 512 steps of so many rows of x stay in the second-level cache
  ParallelFor((n + columns - 1) / columns, 1, [&](int64_t begin, int64_t end) {
    const auto packed = hwy::AllocateAligned<float>(static_cast<size_t>(PackedFloats(k, columns)));
    for (int64_t first = begin * columns; first < std::min(n, end * columns); first += columns) {
      const Panels panels{packed.get(), k, std::min(columns, n - first)};
      const int64_t count = PanelCount(panels.n);
      Pack(w + first * k, k, true, panels, 0, count);
      for (int64_t row = 0; row < m; row += kRows)
        Multiply(x + row * k, k, std::min(kRows, m - row), panels, {0, count, 0, k}, y + row * n + first, n);
    }
  });
  if (bias == nullptr) return;
  for (int64_t i = 0; i < m; ++i) simd::Binary(simd::BinaryOp::kAdd, y + i * n, bias, n, y + i * n);
}

void Linear(const float* x, const float* w, const float* bias, int64_t m, int64_t n, int64_t k, float* y) {
  if (m == 0 || n == 0) return;
  if (k == 0) {
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) y[i * n + j] = bias == nullptr ? 0.0f : bias[j];
    return;
  }
  thread_local Linears linears;
  try {
    if (!linears.Run(x, w, bias, m, n, k, y)) LinearByPanels(x, w, bias, m, n, k, y);
  } catch (const dnnl::error& error) {
    CIRCLET_CHECK(false, "oneDNN refuses the product {}x{}x{}: {}", m, n, k, error.what());
  }
}

}  // namespace circlet::gemm
