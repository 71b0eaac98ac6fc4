#include "pipeline/step_rounding.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "circlet/graph/builder.h"
#include "ops/codes.h"
#include "quant/weights/moments.h"
#include "quant/weights/rounding.h"

namespace circlet {
namespace {

constexpr int64_t kIn = 12, kInner = 9, kOut = 7;

// Two linears that read the same values, and one behind them; what the second one computes waits beside the third.
Graph Block(int64_t length) {
  return [&] {
    Graph graph;
    const Builder b(graph);
    const ValueId x = b.Point("x", b.Input("x", {1, length, kIn}));
    const ValueId gate =
        b.Point("gate", b.Add(FullyConnected{}, {x, b.Weight("gate_proj.weight", {kInner, kIn}, WeightKind::kLinear)}));
    const ValueId up =
        b.Point("up", b.Add(FullyConnected{}, {x, b.Weight("up_proj.weight", {kInner, kIn}, WeightKind::kLinear)}));
    const ValueId act = b.Point("act", b.Add(Gelu{}, {gate}));
    const ValueId product = b.Point("mul", b.Add(Mul{}, {act, up}));
    b.Output("mul", product);
    b.Output("gate", gate);
    b.Output("y", b.Point("y", b.Add(FullyConnected{},
                                     {product, b.Weight("down_proj.weight", {kOut, kInner}, WeightKind::kLinear)})));
    return graph;
  }();
}

class StepRoundingTest : public testing::Test {
 protected:
  StepRoundingTest() {
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    const auto fill = [&](const Tensor& tensor, float scale) {
      for (float& value : tensor.F32()) value = scale * normal(random);
    };
    for (const auto& [name, shape] : {std::pair{"gate_proj.weight", Shape{kInner, kIn}},
                                      {"up_proj.weight", Shape{kInner, kIn}},
                                      {"down_proj.weight", Shape{kOut, kInner}}})
      fill(weights_[name] = Tensor({DType::kF32, shape}), 0.3f);
    for (int i = 0; i < 4; ++i) {
      const int64_t length = 5 + 3 * i;
      // The last one has padding in front, and values there that would spoil everything.
      Item item{.id = i, .length = length, .real = {{i == 3 ? 2 : 0, length}}, .label = fmt::format("calib.{}", i)};
      const Tensor x({DType::kF32, {1, length, kIn}});
      fill(x, 1);
      if (i == 3)
        for (int64_t j = 0; j < 2 * kIn; ++j) x.F32()[j] = 1;
      store_.Put(i, Chain::kFloat, "x", x);
      // What stages before have lost.
      const Tensor shifted = x.Clone();
      for (float& value : shifted.F32()) value = 0.9f * value + 0.05f * normal(random);
      store_.Put(i, Chain::kQuant, "x", shifted);
      items_.Add(item);
    }
    step_ = {.name = "block",
             .build = [](const Item& item) { return Block(item.length); },
             .inputs = {{.name = "x", .reads = {{.key = "x"}}}},
             .outputs = {{"y", {"y"}, ""}}};
  }

  struct Outcome {
    std::map<std::string, Tensor> codes;
    std::vector<RoundedLinear> linears;
  };
  Outcome Run(const WeightRounding& method) {
    recipe_.rounding = method;
    for (const char* name : {"y", "mul", "gate"}) store_.Drop(name);
    calibration_.emplace(recipe_, DialectFromName("default"));
    const WeightSource stored = [this](const std::string& name) { return name == "gain" ? gain_ : weights_.at(name); };
    const RoundedWeights rounded(*calibration_, stored);
    Outcome outcome;
    const StageContext context{.calibration = *calibration_,
                               .store = store_,
                               .items = items_,
                               .stored = stored,
                               .rounded = rounded,
                               .captured = nullptr,
                               .world = World(),
                               .compute = Compute::kFloat32,
                               .change = nullptr,
                               .advance = [this] { ++advanced_; },
                               .linears = &outcome.linears};
    StageRunner runner(context);
    const Stage stage{"block", {step_}};
    work_ = runner.Work(stage);
    std::vector<StageError> errors;
    runner.Run(stage, errors);
    for (const auto& [name, weight] : weights_)
      outcome.codes[name] = QuantizeWeight(ValuesOf(rounded(name)), *calibration_->GridOf(name), Rounding{}).codes;
    return outcome;
  }

  static Tensor ValuesOf(const Tensor& operand) {
    if (operand.GetDType() == DType::kF32) return operand;
    const Tensor values = Tensor::Uninitialized({DType::kF32, operand.GetShape()});
    Dequantize(operand, *operand.Grid(), 0, values.F32());
    return values;
  }

  // Rows of all items that are no padding.
  Tensor Rows(const std::function<Tensor(const Item&)>& of) const {
    std::vector<float> all;
    int64_t width = 0;
    for (const Item& item : items_) {
      const Tensor tensor = of(item);
      width = tensor.GetShape()[-1];
      const auto [begin, end] = item.real[0];
      all.insert(all.end(), tensor.F32().begin() + begin * width, tensor.F32().begin() + end * width);
    }
    return Tensor::Of<float>({static_cast<int64_t>(all.size()) / width, width}, all);
  }

  // A linear into a norm, and that into a sum, instead of the block.
  void UseSublayer(int64_t rows) {
    std::mt19937 random(6);
    std::normal_distribution<float> normal;
    const auto fill = [&](Shape shape, float scale) {
      const Tensor tensor({DType::kF32, std::move(shape)});
      for (float& value : tensor.F32()) value = scale * normal(random);
      return tensor;
    };
    weights_.clear();
    store_.Drop("h");
    weights_["o_proj.weight"] = fill({rows, kIn}, 0.3f);
    gain_ = fill({rows}, 1);
    gain_.F32()[1] = 1e-3f;  // the target leaves it alone
    for (const Item& item : items_) {
      const Tensor h = fill({1, item.length, rows}, 2), lost = h.Clone();
      for (float& value : lost.F32()) value += 0.3f * normal(random);
      store_.Put(item.id, Chain::kFloat, "h", h);
      store_.Put(item.id, Chain::kQuant, "h", lost);
    }
    step_.build = [rows](const Item& item) {
      Graph graph;
      const Builder b(graph);
      const ValueId h = b.Point("h", b.Input("h", {1, item.length, rows}));
      const ValueId first = b.Add(Slice{{0, 0, 0}, {1, static_cast<int32_t>(item.length), 1}}, {h});
      const ValueId x = b.Point("x", b.Add(Mul{}, {b.Input("x", {1, item.length, kIn}), first}));
      const ValueId o =
          b.Point("o", b.Add(FullyConnected{}, {x, b.Weight("o_proj.weight", {rows, kIn}, WeightKind::kLinear)}));
      const ValueId normed = b.Point("normed", b.Add(RmsNorm{kEps}, {o, b.Weight("gain", {rows}, WeightKind::kNorm)}));
      b.Output("y", b.Point("sum", b.Add(Add{}, {h, normed})));
      return graph;
    };
    step_.inputs.push_back({.name = "h", .reads = {{.key = "h"}}});
  }
  static constexpr float kEps = 1e-6f;

  std::map<std::string, Tensor> weights_;
  Tensor gain_;
  ActivationStore store_;
  ItemSet items_;
  Step step_;
  Recipe recipe_ = Recipe::Load("w4a16");
  std::optional<Calibration> calibration_;
  int64_t work_ = 0, advanced_ = 0;
};

weights::Moment MomentOf(const Tensor& x) {
  weights::Moment moment = weights::Moment::Symmetric(x.GetShape()[1], 1e3, x.GetShape()[0]);
  moment.Add(x);
  return moment;
}

void ExpectCodes(const Tensor& found, const Tensor& expected, const std::string& name) {
  ASSERT_EQ(found.Type(), expected.Type());
  for (int64_t i = 0; i < found.Elements(); ++i) ASSERT_EQ(CodeAt(found, i), CodeAt(expected, i)) << name << " " << i;
}

// Each linear by the moments of what reaches it when all before it are rounded, padding left out.
TEST_F(StepRoundingTest, EachLinearSeesWhatThoseBeforeItLeave) {
  const WeightRounding method{.correct_inputs = false};
  const Outcome outcome = Run(method);
  EXPECT_EQ(advanced_, work_);
  const weights::RoundingOptions options{.method = method};
  const Tensor x =
      Rows([&](const Item& item) { return Rounded(*calibration_, "x", store_.Get(item.id, Chain::kQuant, "x")); });
  const weights::Metric first(MomentOf(x), method);
  std::map<std::string, Tensor> rounded;
  for (const char* name : {"gate_proj.weight", "up_proj.weight"}) {
    const QuantizedWeight weight = weights::Round(weights_[name], nullptr, first, options).weight;
    ExpectCodes(outcome.codes.at(name), weight.codes, name);
    rounded[name] = weight.codes.WithGrid(std::make_shared<QParams>(weight.qparams));
  }
  FakeQuantReading reading(*calibration_);
  const Tensor products = Rows([&](const Item& item) {
    return Executor(WithOutputs(Block(item.length), {"mul"}), &reading)
        .Run({{"x", store_.Get(item.id, Chain::kQuant, "x")}},
             [&](const std::string& name) {
               return rounded.contains(name) ? ValuesOf(rounded.at(name)) : weights_.at(name);
             })
        .at("mul");
  });
  const weights::Metric second(MomentOf(products), method);
  ExpectCodes(outcome.codes.at("down_proj.weight"),
              weights::Round(weights_["down_proj.weight"], nullptr, second, options).weight.codes, "down_proj.weight");
  ASSERT_EQ(outcome.linears.size(), 3u);
  EXPECT_EQ(outcome.linears[2].name, "down_proj.weight");
  for (const RoundedLinear& linear : outcome.linears) {
    EXPECT_EQ(linear.positions, 5 + 8 + 11 + 12);
    EXPECT_LT(linear.loss, linear.nearest_loss);
  }
}

// The inputs of the quantized chain are a tenth too small here: what makes up for that comes nearer to the float
// outputs.
TEST_F(StepRoundingTest, CorrectedWeightsComeNearerToTheFloatOutputs) {
  const auto error = [&](bool corrects) {
    const Outcome outcome = Run({.correct_inputs = corrects});
    double sum = 0;
    for (const Item& item : items_) {
      const Tensor expected = store_.Get(item.id, Chain::kFloat, "y"), found = store_.Get(item.id, Chain::kQuant, "y");
      for (int64_t i = item.real[0].first * kOut; i < found.Elements(); ++i)
        sum += std::pow(expected.F32()[i] - found.F32()[i], 2);
    }
    int64_t corrected = 0;
    for (const RoundedLinear& linear : outcome.linears) corrected += linear.rows_corrected;
    EXPECT_EQ(corrected > 0, corrects);
    return sum;
  };
  const double plain = error(false), corrected = error(true);
  EXPECT_LT(corrected, 0.8 * plain);
}

double MeanSquare(std::span<const float> values) {
  double sum = 0;
  for (const float value : values) sum += double{value} * value;
  return sum / static_cast<double>(values.size());
}

// By what a norm divides an error in the float model; and the target takes up a part of what the sum's other operand
// has lost, as an output that the norm brings to that. Matrices with few rows sum the target's change in another form.
TEST_F(StepRoundingTest, PositionsCountByTheNormsBehindAndTargetsTakeUpWhatTheSumHasLost) {
  using Weights = WeightRounding::TokenWeights;
  for (const int64_t rows : {kOut, kOut - 2})
    for (const Weights weights : {Weights::kOutputs, Weights::kStream})
      for (const double part : {0.0, 0.5}) {
        SCOPED_TRACE(fmt::format("{} rows, weights {}, part {}", rows, static_cast<int>(weights), part));
        step_.inputs.resize(1);
        UseSublayer(rows);
        const WeightRounding method{.token_weights = weights, .residual_target = part};
        const Outcome outcome = Run(method);
        const Tensor w = weights_.at("o_proj.weight");
        const auto float_rows = [&](const char* key) {
          return Rows([&](const Item& item) { return store_.Get(item.id, Chain::kFloat, key); });
        };
        const auto rounded_rows = [&](const char* key) {
          return Rows(
              [&](const Item& item) { return Rounded(*calibration_, key, store_.Get(item.id, Chain::kQuant, key)); });
        };
        const Tensor hf = float_rows("h"), h = rounded_rows("h"), sum = float_rows("y");
        const auto product = [&](Chain chain, const Tensor& stream) {
          const Tensor x = Rows([&](const Item& item) { return store_.Get(item.id, chain, "x"); }).Clone();
          for (int64_t i = 0; i < x.Elements(); ++i) x.F32()[i] *= stream.F32()[i / kIn * rows];
          return x;
        };
        const Tensor xf = product(Chain::kFloat, hf), x = Rounded(*calibration_, "x", product(Chain::kQuant, h));
        const int64_t count = x.GetShape()[0];
        std::vector<float> counts;
        Tensor change({DType::kF32, {count, rows}});
        double mean_gain = 0;
        for (const float g : gain_.F32()) mean_gain += std::abs(g) / static_cast<double>(rows);
        for (int64_t t = 0; t < count; ++t) {
          std::vector<float> y(static_cast<size_t>(rows)), lost(y);
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t j = 0; j < kIn; ++j) {
              y[r] += w.F32()[r * kIn + j] * xf.F32()[t * kIn + j];
              lost[r] += w.F32()[r * kIn + j] * (xf.F32()[t * kIn + j] - x.F32()[t * kIn + j]);
            }
          const double square = MeanSquare(y) + kEps;
          const double stream = MeanSquare(sum.F32().subspan(t * rows, rows)) + kEps;
          counts.push_back(static_cast<float>(1 / (square * (weights == Weights::kStream ? stream : 1))));
          for (int64_t r = 0; r < rows; ++r) {
            const float g = gain_.F32()[r], residual = hf.F32()[t * rows + r] - h.F32()[t * rows + r];
            const bool taken = std::abs(g) >= 0.05 * mean_gain;
            change.F32()[t * rows + r] =
                lost[r] + static_cast<float>(taken ? part * residual * std::sqrt(square) / g : 0);
          }
        }
        const float largest = *std::ranges::max_element(counts);
        for (float& each : counts) each /= largest;
        weights::Moment moment = weights::Moment::Symmetric(kIn, 1e3, count);
        moment.Add(x, counts);
        weights::Moment cross = weights::Moment::Cross(rows, kIn, 1e3, count);
        cross.Add(change, x, counts);
        const weights::Metric metric(moment.Copy(), method);
        const weights::InputCorrection correction(moment, method.correction_damping);
        const Tensor target = correction.Target(w, cross.Values());
        ExpectCodes(outcome.codes.at("o_proj.weight"),
                    weights::RoundCorrected(w, target, cross.Values(), correction.Added(), metric, {.method = method})
                        .weight.codes,
                    "o");
      }
}

// The chain goes on from the last cut; an output that lies before it waits there.
TEST_F(StepRoundingTest, OutputsAreThoseOfTheWholeStep) {
  step_.outputs.push_back({"mul", {"mul"}, ""});
  step_.outputs.push_back({"gate", {"gate"}, ""});
  const WeightRounding method;
  const Outcome outcome = Run(method);
  EXPECT_EQ(advanced_, work_);
  FakeQuantReading reading(*calibration_, /*on_grid=*/true);
  for (const Item& item : items_) {
    const std::map<std::string, Tensor> expected =
        Executor(Block(item.length), &reading)
            .Run({{"x", store_.Get(item.id, Chain::kQuant, "x")}}, [&](const std::string& name) {
              const auto grid = std::make_shared<QParams>(*calibration_->GridOf(name));
              return outcome.codes.at(name).WithGrid(grid);
            });
    for (const char* name : {"y", "mul", "gate"})
      EXPECT_THAT(store_.Get(item.id, Chain::kQuant, name).F32(), testing::ElementsAreArray(expected.at(name).F32()))
          << item.label << " " << name;
  }
  EXPECT_FALSE(store_.Has(0, Chain::kQuant, "rounding.cut.1.0"));
}

TEST_F(StepRoundingTest, ThreeBitsUseEightCodes) {
  const Outcome outcome = Run({.bits = 3});
  for (const auto& [name, codes] : outcome.codes) {
    int64_t largest = 0;
    for (int64_t i = 0; i < codes.Elements(); ++i) largest = std::max<int64_t>(largest, CodeAt(codes, i));
    EXPECT_EQ(codes.GetDType(), DType::kU4);
    EXPECT_EQ(largest, 7) << name;
  }
}

}  // namespace
}  // namespace circlet
