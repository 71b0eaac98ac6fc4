#include "quant/weights/rounding.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <random>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"
#include "circlet/io/safetensors.h"
#include "error_text.h"
#include "golden.h"
#include "ops/codes.h"
#include "quant/weights/factor.h"

namespace circlet::weights {
namespace {

using nlohmann::json;

Tensor TensorOf(const json& rows) {
  std::vector<float> values;
  for (const json& row : rows)
    for (const json& value : row) values.push_back(value.get<float>());
  return Tensor::Of<float>({static_cast<int64_t>(rows.size()), static_cast<int64_t>(rows[0].size())}, values);
}

Moment MomentOf(const Tensor& x) {
  float bound = 0;
  for (const float value : x.F32()) bound = std::max(bound, std::abs(value));
  Moment moment = Moment::Symmetric(x.GetShape()[1], bound > 0 ? bound : 1, x.GetShape()[0]);
  moment.Add(x);
  return moment;
}

struct Problem {
  Tensor weight, x;
  Moment moment;
};

// Inputs whose columns hang together, some of them far larger than the rest, more columns than positions at times.
Problem RandomProblem(unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int64_t>(low, high)(random); };
  const int64_t rows = pick(1, 40), columns = pick(1, 90), positions = pick(1, 200);
  Tensor weight({DType::kF32, {rows, columns}}), x({DType::kF32, {positions, columns}});
  for (float& value : weight.F32()) value = 0.05f * normal(random);
  for (int64_t t = 0; t < positions; ++t) {
    const float shared = normal(random);
    for (int64_t j = 0; j < columns; ++j)
      x.F32()[t * columns + j] = (shared + normal(random)) * (j % 17 == 3 ? 100 : 1) * (j % 13 == 5 ? 0 : 1);
  }
  return {weight, x, MomentOf(x)};
}

std::vector<double> LossOf(const Tensor& target, const QuantizedWeight& rounded, const Moment& moment, double damping) {
  const int64_t rows = target.GetShape()[0], n = target.GetShape()[1];
  std::vector<float> values(static_cast<size_t>(rows * n));
  Dequantize(rounded.codes, rounded.qparams, 0, values);
  double mean = 0;
  for (int64_t j = 0; j < n; ++j) mean += moment.At(j, j) / static_cast<double>(n);
  std::vector<double> loss(static_cast<size_t>(rows));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j)
        loss[r] += (static_cast<double>(values[r * n + i]) - target.F32()[r * n + i]) *
                   (static_cast<double>(values[r * n + j]) - target.F32()[r * n + j]) *
                   (moment.At(i, j) + (i != j     ? 0
                                       : mean > 0 ? damping * mean
                                                  : 1));
  return loss;
}

TEST(FactorTest, TimesItsTransposeIsTheMatrixForAnySizeAndAnyThreads) {
  for (const int64_t n : {1, 5, 95, 96, 97, 300}) {
    std::mt19937 random(static_cast<unsigned>(n));
    std::normal_distribution<double> normal;
    std::vector<double> base(static_cast<size_t>(n * n)), a(base.size());
    for (double& value : base) value = normal(random);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j)
        a[i * n + j] = (i == j) + std::inner_product(&base[i * n], &base[i * n] + n, &base[j * n], 0.0);
    std::vector<double> l = a, alone = a;
    ASSERT_EQ(Factorize(std::span(l), n), -1);
    const int threads = Threads();
    SetThreads(threads == 1 ? 3 : 1);
    ASSERT_EQ(Factorize(std::span(alone), n), -1);
    SetThreads(threads);
    EXPECT_EQ(l, alone);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j <= i; ++j) {
        double sum = 0;
        for (int64_t k = i; k < n; ++k) sum += l[k * n + i] * l[k * n + j];
        ASSERT_NEAR(sum, a[i * n + j], 1e-11 * static_cast<double>(n) * a[i * n + i]) << n << ": " << i << "," << j;
      }
    std::vector<double> right(static_cast<size_t>(3 * n)), x;
    for (double& value : right) value = normal(random);
    x = right;
    SolveWithFactor(std::span<const double>(l), n, std::span(x), 3);
    for (int64_t r = 0; r < 3; ++r)
      for (int64_t j = 0; j < n; ++j) {
        double sum = 0;
        for (int64_t i = 0; i < n; ++i) sum += x[r * n + i] * a[i * n + j];
        ASSERT_NEAR(sum, right[r * n + j], 1e-9);
      }
  }
}

TEST(FactorTest, SaysWhichPivotIsNotPositive) {
  std::vector<double> a = {1, 0, 0, 0, -1, 0, 0, 0, 2};
  EXPECT_EQ(Factorize(std::span(a), 3), 1);
}

// tests/data/rounding/problems.json.xz: what scripts/record_rounding.py computes in float64, in another form.
TEST(RoundingTest, CodesAreThoseOfTheFloat64Reference) {
  const json problems = json::parse(GoldenText("rounding/problems.json.xz"));
  int64_t compared = 0;
  for (size_t n = 0; n < problems.size(); ++n) {
    const json &problem = problems[n], &o = problem["options"];
    const Tensor weight = TensorOf(problem["weight"]), x = TensorOf(problem["x"]);
    const Moment moment = MomentOf(x);
    const Metric metric(moment.Copy(), {.damping = o["damping"], .order_by_moment = o["order"]});
    RoundingOptions options{.dtype = DTypeFromName(o["dtype"].get<std::string>()),
                            .codes = CodeRange{o["qmin"], o["qmax"]},
                            .symmetric = o["symmetric"],
                            .method = {.range_factors = o["factors"],
                                       .lowest_factor = o["lowest"],
                                       .compensate = o["compensate"],
                                       .descent_passes = o["passes"],
                                       .scale_refits = o["refits"]}};
    options.method.range = o["range"] == "minmax" ? WeightRounding::Range::kMinMax
                           : o["range"] == "mse"  ? WeightRounding::Range::kMse
                                                  : WeightRounding::Range::kMoments;
    std::optional<Tensor> target;
    if (problem.contains("target")) {
      const Tensor a = TensorOf(problem["change_rows"]);
      Moment change = Moment::Cross(weight.GetShape()[0], weight.GetShape()[1], 1000, x.GetShape()[0]);
      change.Add(a, x);
      target = InputCorrection(moment, 0.3).Target(weight, change.Values());
      const Tensor wanted = TensorOf(problem["target"]);
      for (int64_t i = 0; i < wanted.Elements(); ++i) ASSERT_NEAR(target->F32()[i], wanted.F32()[i], 2e-6) << n;
    }
    const RoundedMatrix rounded = Round(weight, target ? &*target : nullptr, metric, options);
    for (int64_t i = 0; i < weight.Elements(); ++i, ++compared)
      ASSERT_EQ(CodeAt(rounded.weight.codes, i), problem["codes"][i / weight.GetShape()[1]][i % weight.GetShape()[1]])
          << "problem " << n << " " << o.dump() << " element " << i;
    for (int64_t r = 0; r < weight.GetShape()[0]; ++r) {
      // float32 sums behind a refitted scale.
      EXPECT_NEAR(rounded.weight.qparams.scale[r] / problem["scale"][r].get<double>(), 1, 2e-5) << n;
      EXPECT_EQ(rounded.weight.qparams.zero_point[r], problem["zero_point"][r]);
      EXPECT_NEAR(rounded.loss[r], problem["loss"][r].get<double>(),
                  1e-4 * problem["nearest_loss"][r].get<double>() + 1e-9);
      EXPECT_NEAR(rounded.nearest_loss[r], problem["nearest_loss"][r].get<double>(),
                  1e-4 * problem["nearest_loss"][r].get<double>() + 1e-9);
    }
  }
  EXPECT_GT(compared, 5000);
}

// tests/data/rounding/layer.safetensors.xz: all linears of layer 3 of the example, whose inputs hang together as they
// do in a model. Sums of float32 differ from those of float64 in the last digits, so that a value right between two
// codes may fall on either side, and the rest of its row makes up for another error: few rows do, and they come out as
// good.
TEST(RoundingTest, ALayerOfTheExampleGetsTheReferencesCodes) {
  const SafetensorsFile golden = OpenGolden("rounding/layer.safetensors.xz");
  const SafetensorsFile model = SafetensorsFile::Open(SourcePath("examples/tiny-gemma4/model.safetensors"));
  Tensor x;
  std::optional<Metric> metric;
  int64_t rows = 0, equal_rows = 0;
  for (const char* name :
       {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
        "mlp.down_proj", "per_layer_input_gate", "per_layer_projection"}) {
    SCOPED_TRACE(name);
    const std::string key = name;
    // Linears that read the same stand behind one another.
    if (golden.Tensors().contains(key + ".x")) {
      x = ToF32(golden.Get(key + ".x"));
      metric.emplace(MomentOf(x), WeightRounding{});
    }
    const Tensor weight = model.Get("model.language_model.layers.3." + key + ".weight");
    const RoundedMatrix rounded = Round(weight, nullptr, *metric, {});
    const Tensor codes = golden.Get(key + ".codes");
    const int64_t columns = weight.GetShape()[1];
    ASSERT_EQ(codes.GetShape(), weight.GetShape());
    for (int64_t r = 0; r < weight.GetShape()[0]; ++r, ++rows) {
      bool equal = true;
      for (int64_t i = r * columns; i < (r + 1) * columns; ++i)
        equal = equal && CodeAt(rounded.weight.codes, i) == static_cast<int64_t>(codes.Raw()[i]);
      equal_rows += equal;
      if (!equal) continue;
      EXPECT_NEAR(rounded.weight.qparams.scale[r] / golden.Get(key + ".scale").F32()[r], 1, 2e-5) << r;
    }
    const double* const loss = reinterpret_cast<const double*>(golden.Get(key + ".loss").Raw());
    const auto sum = [](const std::vector<double>& each) { return std::accumulate(each.begin(), each.end(), 0.0); };
    // A range as large on both sides puts the zero point of its nearest codes between two: either is as good.
    EXPECT_NEAR(sum(rounded.nearest_loss) / loss[1], 1, 3e-2);
    EXPECT_NEAR(sum(rounded.loss) / loss[0], 1, 2e-3);
  }
  EXPECT_EQ(rows, 1104);
  EXPECT_GE(equal_rows, 1080);
}

TEST(RoundingTest, NeverWorseThanToTheNearestOnTwoHundredProblems) {
  int64_t better = 0, rows = 0;
  for (unsigned seed = 0; seed < 200; ++seed) {
    const Problem problem = RandomProblem(seed);
    const Metric metric(problem.moment.Copy(), {});
    RoundingOptions options{.dtype = seed % 3 == 0 ? DType::kU8 : DType::kU4,
                            .method = {.solved_ranges = seed % 5 == 0 ? 3 : 0}};
    if (seed % 3 == 1) options.codes = CodeRange{0, 7};
    const RoundedMatrix rounded = Round(problem.weight, nullptr, metric, options);
    const std::vector<double> loss = LossOf(problem.weight, rounded.weight, problem.moment, metric.Damping());
    for (size_t r = 0; r < loss.size(); ++r, ++rows) {
      // The stated loss is the true one, and never above that of the nearest codes.
      EXPECT_NEAR(rounded.loss[r], loss[r], 1e-3 * rounded.nearest_loss[r]) << seed;
      EXPECT_LE(rounded.loss[r], rounded.nearest_loss[r]) << seed;
      better += rounded.loss[r] < 0.9 * rounded.nearest_loss[r];
    }
  }
  EXPECT_GT(better, rows / 2);
}

TEST(RoundingTest, AnyNumberOfThreadsGivesTheSameCodes) {
  const Problem problem = RandomProblem(7);
  const int threads = Threads();
  std::vector<RoundedMatrix> results;
  for (const int count : {1, 2, 5}) {
    SetThreads(count);
    results.push_back(Round(problem.weight, nullptr, Metric(problem.moment.Copy(), {}), {}));
  }
  SetThreads(threads);
  for (const RoundedMatrix& other : results) {
    EXPECT_EQ(other.weight.qparams, results[0].weight.qparams);
    EXPECT_EQ(other.loss, results[0].loss);
    for (int64_t i = 0; i < problem.weight.Elements(); ++i)
      EXPECT_EQ(CodeAt(other.weight.codes, i), CodeAt(results[0].weight.codes, i));
  }
}

TEST(RoundingTest, DeadColumnsAreRoundedToTheNearest) {
  Tensor x({DType::kF32, {9, 4}}), weight({DType::kF32, {1, 4}});
  for (int64_t t = 0; t < 9; ++t) x.F32()[t * 4] = 1.0f + static_cast<float>(t);
  const float values[] = {0.31f, -0.2f, 0.47f, 1.0f};
  std::ranges::copy(values, weight.F32().begin());
  const Metric metric(MomentOf(x), {});
  EXPECT_EQ(metric.DeadColumns(), 3);
  const RoundedMatrix rounded =
      Round(weight, nullptr, metric, {.method = {.range = WeightRounding::Range::kMinMax, .scale_refits = 0}});
  const QParams& grid = rounded.weight.qparams;
  for (int64_t i = 0; i < 4; ++i)
    EXPECT_NEAR(
        (static_cast<float>(CodeAt(rounded.weight.codes, i)) - static_cast<float>(grid.zero_point[0])) * grid.scale[0],
        values[i], grid.scale[0] / 2 * 1.0001f);
}

// Columns that are the same at every position, and no damping: the second pivot is 0.
TEST(RoundingTest, AMatrixThatIsNotPositiveIsDampedUntilItIs) {
  Tensor x({DType::kF32, {4, 6}});
  for (int64_t t = 0; t < 4; ++t) std::fill_n(x.F32().begin() + t * 6, 6, static_cast<float>(t + 1));
  const Moment moment = MomentOf(x);
  const WeightRounding undamped{.damping = 0};
  const Metric metric(moment.Copy(), undamped);
  EXPECT_GT(metric.Damping(), 0);
  EXPECT_EQ(Metric(moment.Copy(), {}).Damping(), WeightRounding().damping) << "enough as it is";
  Tensor weight({DType::kF32, {3, 6}});
  for (int64_t i = 0; i < weight.Elements(); ++i) weight.F32()[i] = std::sin(static_cast<float>(i));
  const RoundedMatrix rounded = Round(weight, nullptr, metric, {.method = undamped});
  for (size_t r = 0; r < 3; ++r) EXPECT_LE(rounded.loss[r], rounded.nearest_loss[r]);
}

TEST(RoundingTest, NoInputsAtAllRoundToTheNearest) {
  const Tensor x({DType::kF32, {3, 5}});
  const Tensor weight = RandomProblem(1).weight;
  Tensor first({DType::kF32, {1, 5}});
  std::copy_n(weight.F32().begin(), 5, first.F32().begin());
  const Metric metric(MomentOf(x), {});
  EXPECT_EQ(metric.DeadColumns(), 5);
  const RoundedMatrix rounded = Round(first, nullptr, metric, {});
  EXPECT_LE(rounded.loss[0], rounded.nearest_loss[0]);
}

TEST(RoundingTest, AWeightThatIsNotFiniteIsAnErrorWithItsPlace) {
  const Problem problem = RandomProblem(3);
  problem.weight.F32()[problem.weight.GetShape()[1] + 1] = NAN;
  EXPECT_THAT(ErrorText([&] { Round(problem.weight, nullptr, Metric(problem.moment.Copy(), {}), {}); }),
              testing::HasSubstr("row 1, column 1 of the weight is nan"));
}

// The true losses of a problem's rows, E |W x_f - Q x|^2 but for what no Q changes: for the weight alone, for the
// corrected target alone, to the nearest, and by RoundCorrected. The inputs' differences have random products with the
// weight.
struct TwoTargets {
  TwoTargets(unsigned seed, float difference, const WeightRounding& method) {
    const Problem problem = RandomProblem(seed);
    const int64_t rows = problem.weight.GetShape()[0], n = problem.weight.GetShape()[1];
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    Tensor differences({DType::kF32, {problem.x.GetShape()[0], rows}});
    for (float& value : differences.F32()) value = difference * normal(random);
    Moment change = Moment::Cross(rows, n, 1e3, problem.x.GetShape()[0]);
    change.Add(differences, problem.x);
    const Metric metric(problem.moment.Copy(), method);
    const InputCorrection correction(problem.moment, method.correction_damping);
    const Tensor target = correction.Target(problem.weight, change.Values());
    const auto true_loss = [&](const RoundedMatrix& rounded) {
      std::vector<double> loss = LossOf(problem.weight, rounded.weight, problem.moment, metric.Damping());
      std::vector<float> values(static_cast<size_t>(rows * n));
      Dequantize(rounded.weight.codes, rounded.weight.qparams, 0, values);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < n; ++i)
          loss[r] -= 2.0 * (values[r * n + i] - problem.weight.F32()[r * n + i]) * change.At(r, i);
      return loss;
    };
    const RoundingOptions options{.method = method};
    plain = true_loss(Round(problem.weight, nullptr, metric, options));
    const RoundedMatrix to_target = Round(problem.weight, &target, metric, options);
    corrected = true_loss(to_target);
    // The nearest codes to the corrected target are not among RoundCorrected's.
    for (size_t r = 0; r < corrected.size(); ++r)
      if (to_target.loss[r] == to_target.nearest_loss[r]) corrected[r] = INFINITY;
    const RoundedMatrix both =
        RoundCorrected(problem.weight, target, change.Values(), correction.Added(), metric, options);
    best = true_loss(both);
    rows_corrected = both.rows_corrected;
    RoundingOptions to_nearest;
    to_nearest.method = {
        .range = WeightRounding::Range::kMinMax, .compensate = false, .descent_passes = 0, .scale_refits = 0};
    const RoundedMatrix rounded_to_nearest = Round(problem.weight, nullptr, metric, to_nearest);
    nearest = true_loss(rounded_to_nearest);
    loss = both.loss;
    nearest_loss = both.nearest_loss;
    const auto from = [&](const Tensor& wanted, const RoundedMatrix& rounded) {
      return LossOf(wanted, rounded.weight, problem.moment, metric.Damping());
    };
    from_weight = from(problem.weight, both);
    from_target = from(target, both);
    nearest_from_weight = from(problem.weight, rounded_to_nearest);
    nearest_from_target = from(target, rounded_to_nearest);
  }
  std::vector<double> plain, corrected, nearest, best;  // true losses
  std::vector<double> loss, nearest_loss;               // as RoundCorrected tells them
  std::vector<double> from_weight, from_target, nearest_from_weight, nearest_from_target;  // (Q - T) H' (Q - T)^T
  int64_t rows_corrected = 0;
};

TEST(RoundingTest, EachRowIsOneOfTwoTargetsOrToTheNearest) {
  const TwoTargets losses(11, 0.5f, {});
  int64_t taken = 0;
  for (size_t r = 0; r < losses.best.size(); ++r) {
    const double best = losses.best[r];
    const auto is = [&](double loss) { return std::abs(best - loss) <= 1e-6 * std::abs(loss); };
    EXPECT_TRUE(is(losses.plain[r]) || is(losses.corrected[r]) || is(losses.nearest[r])) << r;
    EXPECT_LE(best, losses.nearest[r] + 1e-6 * std::abs(losses.nearest[r])) << r;
    taken += is(losses.corrected[r]) && !is(losses.plain[r]);
  }
  EXPECT_EQ(losses.rows_corrected, taken);
  EXPECT_LT(std::accumulate(losses.best.begin(), losses.best.end(), 0.0),
            std::accumulate(losses.plain.begin(), losses.plain.end(), 0.0));
  EXPECT_GT(losses.rows_corrected, 0);
}

// Rows of both kinds side by side: each goes on from its own errors.
TEST(RoundingTest, DescentGoesOnFromTheTargetThatARowTook) {
  int64_t plain = 0, corrected = 0;
  for (unsigned seed = 0; seed < 20; ++seed) {
    const TwoTargets losses(seed, 0.03f, {});
    for (size_t r = 0; r < losses.best.size(); ++r) {
      const auto is = [&](double loss) { return std::abs(losses.best[r] - loss) <= 1e-6 * std::abs(loss); };
      if (!std::isfinite(losses.corrected[r])) continue;
      EXPECT_TRUE(is(losses.plain[r]) || is(losses.corrected[r]) || is(losses.nearest[r])) << seed << " row " << r;
      plain += is(losses.plain[r]) && !is(losses.corrected[r]);
      corrected += is(losses.corrected[r]) && !is(losses.plain[r]);
    }
  }
  EXPECT_GT(plain, 20);
  EXPECT_GT(corrected, 20);
}

// Without descent, which goes on from the better one, nothing is better than what comes out; differences so small
// that many rows are hardly better off with one target than with the other.
TEST(RoundingTest, TheBetterTargetIsTakenRowByRow) {
  int64_t rows = 0, corrected = 0;
  for (unsigned seed = 0; seed < 20; ++seed)
    for (const float difference : {0.01f, 0.1f}) {
      const TwoTargets losses(seed, difference, {.descent_passes = 0, .scale_refits = 0});
      for (size_t r = 0; r < losses.best.size(); ++r, ++rows) {
        const double least = std::min({losses.plain[r], losses.corrected[r], losses.nearest[r]});
        // float32 sums of what the two targets differ by.
        EXPECT_LE(losses.best[r], least + 1e-4 * std::abs(losses.nearest[r])) << seed << " row " << r;
      }
      corrected += losses.rows_corrected;
    }
  EXPECT_GT(corrected, rows / 10);
  EXPECT_LT(corrected, rows * 9 / 10);
}

// What a row gained shows by the target that it took: the nearest codes' loss to the weight would be too small beside
// that of codes which make up for more than rounding.
TEST(RoundingTest, BothLossesOfARowAreByTheTargetThatItTook) {
  int64_t corrected = 0, apart = 0;
  for (unsigned seed = 0; seed < 20; ++seed) {
    const TwoTargets losses(seed, 0.3f, {});
    for (size_t r = 0; r < losses.loss.size(); ++r) {
      const double by_weight = losses.from_weight[r], by_target = losses.from_target[r];
      const bool to_weight = std::abs(losses.loss[r] - by_weight) < std::abs(losses.loss[r] - by_target);
      // The loss of a corrected row follows descent in float32.
      EXPECT_NEAR(losses.loss[r], to_weight ? by_weight : by_target, 1e-3 * losses.loss[r]) << seed << " row " << r;
      const double expected = to_weight ? losses.nearest_from_weight[r] : losses.nearest_from_target[r];
      EXPECT_NEAR(losses.nearest_loss[r], expected, 1e-4 * losses.nearest_from_target[r]) << seed << " row " << r;
      corrected += !to_weight;
      apart += !to_weight && losses.nearest_from_target[r] > 1.5 * losses.nearest_from_weight[r];
    }
  }
  EXPECT_GT(corrected, 50);
  EXPECT_GT(apart, 10);
}

}  // namespace
}  // namespace circlet::weights
