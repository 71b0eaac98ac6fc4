#include "pipeline/gemma4/tails.h"

#include <algorithm>
#include <cmath>

#include "circlet/base/threads.h"
#include "ops/simd.h"

namespace circlet::gemma4 {
namespace {

// Takes in the largest of a block's logits; what the sums so far shrink by when `top` grows.
double Raise(std::span<const float> logits, int64_t first, Tail& tail) {
  const float before = tail.top, top = simd::MinMax(logits.data(), static_cast<int64_t>(logits.size())).max;
  if (top <= before) return 1;
  tail.top = top;
  tail.choice = first + (std::ranges::find(logits, top) - logits.begin());
  return std::exp(static_cast<double>(before) - top);
}

void FollowBlock(std::span<const float> reference, std::span<const float> quantized, int64_t first, TailPair& pair) {
  const auto count = static_cast<int64_t>(reference.size());
  const double shrink = Raise(reference, first, pair.reference);
  const simd::ExpSums block = simd::SumsOfExp(reference.data(), quantized.data(), count, pair.reference.top);
  pair.reference.sum = pair.reference.sum * shrink + block.plain;
  pair.gap = pair.gap * shrink + block.times_difference;
  const double other_shrink = Raise(quantized, first, pair.quantized);
  pair.quantized.sum = pair.quantized.sum * other_shrink + simd::SumOfExp(quantized.data(), count, pair.quantized.top);
}

}  // namespace

double Tail::LogSumExp() const { return std::log(sum) + top; }

void Follow(const Tensor& reference, const Tensor& quantized, int64_t begin, int64_t first,
            std::span<const int64_t> ids, Tails& tails) {
  const int64_t count = reference.GetShape()[1], rows = reference.GetShape()[2];
  const auto length = static_cast<int64_t>(ids.size());
  ParallelFor(count, std::max<int64_t>(1, (1 << 14) / rows), [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) {
      const int64_t position = begin + row, next = position + 1;
      const std::span<const float> r = reference.F32().subspan(row * rows, rows),
                                   q = quantized.F32().subspan(row * rows, rows);
      TailPair& pair = tails[position];
      for (int64_t column = 0; column < rows; column += kVocabularyBlock) {
        const int64_t width = std::min(kVocabularyBlock, rows - column);
        FollowBlock(r.subspan(column, width), q.subspan(column, width), first + column, pair);
      }
      const int64_t target = next < length ? ids[next] - first : -1;
      if (target < 0 || target >= rows) continue;
      pair.reference.target = r[target];
      pair.quantized.target = q[target];
    }
  });
}

}  // namespace circlet::gemma4
