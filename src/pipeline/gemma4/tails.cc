#include "pipeline/gemma4/tails.h"

#include <algorithm>
#include <cmath>

#include "ops/simd.h"

namespace circlet::gemma4 {
namespace {

void FollowBlock(std::span<const float> values, int64_t first, Tail& tail) {
  const auto count = static_cast<int64_t>(values.size());
  const float top = simd::MinMax(values.data(), count).max;
  const double larger = std::max(tail.top, top);
  tail.sum =
      tail.sum * std::exp(tail.top - larger) + simd::SumOfExp(values.data(), count, top) * std::exp(top - larger);
  if (top <= tail.top) return;
  tail.top = top;
  tail.choice = first + (std::ranges::find(values, top) - values.begin());
}

}  // namespace

void Follow(const Tensor& logits, int64_t begin, int64_t first, std::span<const int64_t> ids, Tails& tails) {
  const int64_t rows = logits.GetShape()[2], length = static_cast<int64_t>(ids.size());
  for (int64_t row = 0; row < logits.GetShape()[1]; ++row) {
    const int64_t position = begin + row, next = position + 1;
    const std::span<const float> values = logits.F32().subspan(row * rows, rows);
    Tail& tail = tails[position];
    for (int64_t column = 0; column < rows; column += kVocabularyBlock)
      FollowBlock(values.subspan(column, std::min(kVocabularyBlock, rows - column)), first + column, tail);
    const int64_t target = next < length ? ids[next] - first : -1;
    if (target >= 0 && target < rows) tail.target = values[target];
  }
}

}  // namespace circlet::gemma4
