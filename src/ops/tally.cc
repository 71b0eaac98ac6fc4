#include "ops/tally.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <vector>

#include "circlet/base/error.h"
#include "ops/aligned.h"
#include "ops/onednn_product.h"

namespace circlet::gemm {
namespace {

std::atomic<Tally*> current = nullptr;

int64_t FlopsOf(const ProductShape& shape) { return 2 * shape.m * shape.n * shape.k; }

double Since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// The seconds of one product.
double SecondsOf(ProductShape shape) {
  // Wide products (the head over a vocabulary) are measured in a part of their columns, to save memory.
  constexpr int64_t kOperand = int64_t{1} << 26;
  const int64_t columns = shape.n;
  shape.n = std::min(columns, std::max<int64_t>(1, kOperand / shape.k));
  const auto ones = [&](int64_t elements, Operand operand) {
    auto memory = Aligned<float>(elements);
    const uint32_t one = operand == Operand::kF32 ? 0x3f800000 : operand == Operand::kBF16 ? 0x3f803f80 : 0x01010101;
    const int64_t in_one = operand == Operand::kF32 ? 1 : operand == Operand::kBF16 ? 2 : 4;
    std::fill_n(reinterpret_cast<uint32_t*>(memory.get()), (elements + in_one - 1) / in_one, one);
    return memory;
  };
  const auto a = ones(shape.m * shape.k, shape.operand), b = ones(shape.n * shape.k, shape.operand),
             y = ones(shape.m * shape.n, Operand::kF32);
  OneDnnProduct product(shape, false);
  double best = 0;
  const auto begin = std::chrono::steady_clock::now();
  for (int run = 0; run < 5 && (run == 0 || Since(begin) < 0.05); ++run) {
    const auto run_begin = std::chrono::steady_clock::now();
    product.Run(a.get(), b.get(), nullptr, y.get());
    const double seconds = Since(run_begin);
    best = run == 0 ? seconds : std::min(best, seconds);
  }
  return best * static_cast<double>(columns) / static_cast<double>(shape.n);
}

}  // namespace

void Tally::Add(const ProductShape& shape, int64_t count) {
  const std::lock_guard lock(mutex_);
  counts_[shape] += count;
}

std::map<ProductShape, int64_t> Tally::Counts() const {
  const std::lock_guard lock(mutex_);
  return counts_;
}

int64_t Tally::Flops() const {
  int64_t flops = 0;
  for (const auto& [shape, count] : Counts()) flops += count * FlopsOf(shape);
  return flops;
}

TallyScope::TallyScope(Tally& tally) {
  Tally* none = nullptr;
  CIRCLET_CHECK(current.compare_exchange_strong(none, &tally), "two tallies at the same time");
}
TallyScope::~TallyScope() { current = nullptr; }

void Count(const ProductShape& shape, int64_t count) {
  if (Tally* tally = current) tally->Add(shape, count);
}

double SecondsAlone(const Tally& tally, double limit) {
  const auto begin = std::chrono::steady_clock::now();
  const std::map<ProductShape, int64_t> counts = tally.Counts();
  std::vector<std::pair<ProductShape, int64_t>> shapes;
  for (const auto& [shape, count] : counts)
    if (count > 0 && FlopsOf(shape) > 0) shapes.emplace_back(shape, count);
  // What takes longest first. A product of few rows waits for its right operand: 16 more rows would cost the same.
  const auto cost = [](const auto& entry) {
    return entry.second * (FlopsOf(entry.first) + 32 * entry.first.n * entry.first.k);
  };
  std::sort(shapes.begin(), shapes.end(), [&](const auto& a, const auto& b) { return cost(a) > cost(b); });
  double seconds = 0, measured = 0, left = 0;
  for (const auto& entry : shapes) {
    const auto& [shape, count] = entry;
    if (measured > 0 && Since(begin) > limit) {
      left += static_cast<double>(cost(entry));
      continue;
    }
    seconds += static_cast<double>(count) * SecondsOf(shape);
    measured += static_cast<double>(cost(entry));
  }
  return measured == 0 ? 0 : seconds * (1 + left / measured);
}

}  // namespace circlet::gemm
