#include "ops/gemm.h"

#include <algorithm>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"
#include "ops/aligned.h"
#include "ops/internal.h"
#include "ops/onednn_product.h"
#include "ops/simd.h"
#include "ops/thread_scratch.h"

namespace circlet::gemm {
namespace {

// Whether there is nothing to multiply; y is filled then.
bool IsTrivial(const float* bias, int64_t m, int64_t n, int64_t k, float* y) {
  for (int64_t i = 0; k == 0 && i < m; ++i)
    for (int64_t j = 0; j < n; ++j) y[i * n + j] = bias == nullptr ? 0.0f : bias[j];
  return m == 0 || n == 0 || k == 0;
}

}  // namespace

bool MultipliesBytes() {
  static const bool multiplies = [] {
    // What oneDNN goes by, which the environment may lower.
    const dnnl::cpu_isa isa = dnnl::get_effective_cpu_isa();
    return isa == dnnl::cpu_isa::avx512_core_vnni || isa == dnnl::cpu_isa::avx512_core_bf16 ||
           isa == dnnl::cpu_isa::avx512_core_amx;
  }();
  return multiplies;
}

// By groups of columns, each packed by the thread that multiplies with it.
void LinearByPanels(const float* x, const float* w, const float* bias, int64_t m, int64_t n, int64_t k, float* y) {
  const int64_t columns = 4 * PanelColumns();
  constexpr int64_t kRows = 192;  // 512 steps of so many rows of x stay in the second-level cache
  ParallelFor((n + columns - 1) / columns, 1, [&](int64_t begin, int64_t end) {
    float* const packed = ThreadScratch<float, struct PackedWeight>(PackedFloats(k, columns));
    for (int64_t first = begin * columns; first < std::min(n, end * columns); first += columns) {
      const Panels panels{packed, k, std::min(columns, n - first)};
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
  if (IsTrivial(bias, m, n, k, y)) return;
  Count({m, n, k});
  OneDnnProduct& product = ProductOf({m, n, k}, bias != nullptr);
  if (product.OneOrder())
    product.Run(x, w, bias, y);
  else
    LinearByPanels(x, w, bias, m, n, k, y);
}

void LinearBf16(const float* x, const void* w, const float* bias, int64_t m, int64_t n, int64_t k, float* y) {
  if (IsTrivial(bias, m, n, k, y)) return;
  const ProductShape shape{.m = m, .n = n, .k = k, .operand = Operand::kBF16};
  Count(shape);
  OneDnnProduct& product = ProductOf(shape, bias != nullptr);
  CIRCLET_CHECK(product.OneOrder(), "a bf16 product on a processor without bf16");
  const auto rounded = Aligned<uint16_t>(m * k);
  ParallelFor(m * k, kElementGrain,
              [&](int64_t begin, int64_t end) { simd::F32ToBF16(x + begin, end - begin, rounded.get() + begin); });
  product.Run(rounded.get(), w, bias, y);
}

}  // namespace circlet::gemm
