// Figures of the answers, token by token, against plain float64 sums over whole logits; and where pixels are held.

#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "circlet/base/threads.h"
#include "io/mapped_file.h"
#include "pipeline/gemma4/agreement.h"
#include "pipeline/gemma4/data.h"
#include "pipeline/gemma4/perplexity.h"
#include "temp_directory.h"

namespace circlet::gemma4 {
namespace {

constexpr int64_t kLength = 5, kVocab = 3 * kVocabularyBlock + 77;
const std::vector<int64_t> kIds{3, 1600, 0, 511, 512};

Tensor Logits(uint32_t seed, float width) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0, width);
  std::vector<float> values(kLength * kVocab);
  for (float& value : values) value = normal(engine);
  return Tensor::Of<float>({1, kLength, kVocab}, values);
}

Tensor Sum(const Tensor& a, const Tensor& b) {
  Tensor sum = a.Clone();
  for (int64_t i = 0; i < sum.Elements(); ++i) sum.F32()[i] += b.F32()[i];
  return sum;
}

// Logits of positions [begin, end) and tokens [first, last).
Tensor Cut(const Tensor& logits, int64_t begin, int64_t end, int64_t first, int64_t last) {
  return logits.Slice(begin, end, 1).Slice(first, last, 2).Clone();
}

Tails FollowInSlices(const Tensor& reference, const Tensor& quantized, int64_t positions, int64_t rows) {
  Tails tails(kLength);
  for (int64_t first = 0; first < kVocab; first += rows)
    for (int64_t begin = 0; begin < kLength; begin += positions) {
      const int64_t end = std::min(kLength, begin + positions), last = std::min(kVocab, first + rows);
      Follow(Cut(reference, begin, end, first, last), Cut(quantized, begin, end, first, last), begin, first, kIds,
             tails);
    }
  return tails;
}

struct Plain {
  double divergence = 0, reference_loss = 0, quantized_loss = 0;
  bool same_top = false;
};

Plain PlainSums(const Tensor& reference, const Tensor& quantized, int64_t position) {
  const auto row = [&](const Tensor& logits) { return logits.F32().subspan(position * kVocab, kVocab); };
  const auto log_softmax = [&](const Tensor& logits) {
    const double top = *std::ranges::max_element(row(logits));
    double sum = 0;
    for (const float logit : row(logits)) sum += std::exp(logit - top);
    std::vector<double> values;
    for (const float logit : row(logits)) values.push_back(logit - top - std::log(sum));
    return values;
  };
  const std::vector<double> r = log_softmax(reference), q = log_softmax(quantized);
  Plain plain{.reference_loss = -r[kIds[position + 1]], .quantized_loss = -q[kIds[position + 1]]};
  for (int64_t i = 0; i < kVocab; ++i) plain.divergence += std::exp(r[i]) * (r[i] - q[i]);
  plain.same_top = std::ranges::max_element(row(reference)) - row(reference).begin() ==
                   std::ranges::max_element(row(quantized)) - row(quantized).begin();
  return plain;
}

TEST(AgreementTest, FiguresArePlainSumsOverTheWholeVocabulary) {
  const Tensor reference = Logits(1, 4);
  // Rounding as with 16 bits, with 4 bits, and a model that is destroyed.
  for (const float width : {1e-4f, 0.3f, 3000.0f}) {
    SCOPED_TRACE(width);
    const Tensor quantized = Sum(reference, Logits(2, width));
    const Tails tails = FollowInSlices(reference, quantized, kLength, kVocab);
    const ItemAgreement agreement = AgreementOf(tails, 0);
    const WindowLoss loss = LossOf(tails);
    double divergence = 0, of_reference = 0, of_quantized = 0;
    int64_t same_top = 0;
    for (int64_t position = 0; position + 1 < kLength; ++position) {
      const Plain plain = PlainSums(reference, quantized, position);
      // Sums of 1613 terms in another order, and logarithms of some tens that are subtracted.
      EXPECT_NEAR(Divergence(tails[position]), plain.divergence, 1e-13 + 1e-12 * plain.divergence) << position;
      divergence += plain.divergence;
      of_reference += plain.reference_loss;
      of_quantized += plain.quantized_loss;
      same_top += plain.same_top;
    }
    EXPECT_EQ(agreement.tokens, kLength - 1);
    EXPECT_EQ(loss.tokens, kLength - 1);
    EXPECT_EQ(agreement.same_top, same_top);
    EXPECT_NEAR(agreement.divergence, divergence, 1e-12 + 1e-12 * divergence);
    EXPECT_NEAR(loss.reference, of_reference, 1e-12 * of_reference);
    EXPECT_NEAR(loss.quantized, of_quantized, 1e-12 * of_quantized);
  }
}

TEST(AgreementTest, NoSliceAndNoNumberOfThreadsChangesABit) {
  const Tensor reference = Logits(1, 4), quantized = Sum(reference, Logits(2, 0.3f));
  const Tails whole = FollowInSlices(reference, quantized, kLength, kVocab);
  const int before = Threads();
  for (const int threads : {1, 3})
    for (const int64_t positions : {1, 2, 5})
      for (const int64_t blocks : {1, 2, 3}) {
        SetThreads(threads);
        const Tails sliced = FollowInSlices(reference, quantized, positions, blocks * kVocabularyBlock);
        EXPECT_EQ(AgreementOf(sliced, 0).divergence, AgreementOf(whole, 0).divergence);
        EXPECT_EQ(AgreementOf(sliced, 0).same_top, AgreementOf(whole, 0).same_top);
        EXPECT_EQ(LossOf(sliced).reference, LossOf(whole).reference);
        EXPECT_EQ(LossOf(sliced).quantized, LossOf(whole).quantized);
      }
  SetThreads(before);
}

TEST(AgreementTest, EqualLogitsAgreeExactlyAndAnAnswersPromptDoesNotCount) {
  const Tensor logits = Logits(1, 4);
  const ItemAgreement whole = AgreementOf(FollowInSlices(logits, logits, 2, kVocabularyBlock), 0);
  EXPECT_EQ(whole.divergence, 0);
  EXPECT_EQ(whole.same_top, kLength - 1);
  Tensor spoiled = logits.Clone();
  for (int64_t i = 0; i < 2 * kVocab; ++i) spoiled.F32()[i] = -spoiled.F32()[i];
  const Tails tails = FollowInSlices(logits, spoiled, kLength, kVocab);
  EXPECT_GT(AgreementOf(tails, 0).divergence, 1);
  EXPECT_EQ(AgreementOf(tails, 0).same_top, kLength - 3);
  EXPECT_EQ(AgreementOf(tails, 2).divergence, 0);
  EXPECT_EQ(AgreementOf(tails, 2).tokens, kLength - 3);
}

TEST(AgreementTest, ANaNAnywhereIsNoNumberInTheDivergence) {
  const Tensor reference = Logits(1, 4);
  Tensor quantized = reference.Clone();
  quantized.F32()[700] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(std::isnan(AgreementOf(FollowInSlices(reference, quantized, kLength, kVocabularyBlock), 0).divergence));
}

TEST(PerplexityTest, DifferencesArePairedByWindow) {
  // Windows differ by far more than float and quantized do in any of them.
  const std::vector<WindowLoss> windows{{10, 20, 21}, {10, 40, 41}, {5, 25, 25.5}};
  const Perplexity perplexity = PerplexityOf(windows);
  EXPECT_EQ(perplexity.windows, 3);
  EXPECT_EQ(perplexity.tokens, 25);
  EXPECT_DOUBLE_EQ(perplexity.float_value, std::exp(85.0 / 25));
  EXPECT_DOUBLE_EQ(perplexity.quantized_value, std::exp(87.5 / 25));
  EXPECT_DOUBLE_EQ(perplexity.log_loss_difference.value, 0.1);
  EXPECT_NEAR(perplexity.log_loss_difference.standard_error, 0, 1e-15) << "each token of each window loses 0.1";
  // Residuals 20 - 34, 40 - 34, 25 - 17.
  EXPECT_DOUBLE_EQ(perplexity.float_error,
                   perplexity.float_value * std::sqrt(3.0 / 2 * (14 * 14 + 6 * 6 + 8 * 8)) / 25);
}

TEST(PixelHolderTest, PixelsPastTheBudgetAreReadFromAFile) {
  const TempDirectory directory;
  const auto hold = PixelHolder(10000, [&] { return directory.Path(); });
  for (const bool in_memory : {true, true, false, false}) {
    Tensor pixels({DType::kU8, {1, 50, 80}});
    for (size_t i = 0; i < 4000; ++i) pixels.As<uint8_t>()[i] = static_cast<uint8_t>(i * 7);
    const Tensor held = hold(pixels.Clone());
    EXPECT_EQ(held.Type(), pixels.Type());
    EXPECT_EQ(std::memcmp(held.Raw(), pixels.Raw(), 4000), 0);
    EXPECT_EQ(PathOfMapping(held.Raw()) == nullptr, in_memory);
  }
  EXPECT_TRUE(std::filesystem::is_empty(directory.Path()));
}

}  // namespace
}  // namespace circlet::gemma4
