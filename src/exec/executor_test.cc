#include "circlet/exec/executor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <random>

#include "circlet/graph/builder.h"
#include "exec/memory_plan.h"
#include "ops/codes.h"
#include "ops/integer_product.h"

namespace circlet {
namespace {

WeightSource NoWeights() {
  return [](const std::string& name) -> Tensor { throw Bug("no weight " + name); };
}

Tensor Values(Shape shape, std::vector<float> values) { return Tensor::Of<float>(std::move(shape), values); }

std::vector<float> List(const Tensor& tensor) { return {tensor.F32().begin(), tensor.F32().end()}; }

// Doubles every value at its points.
class Doubling final : public PointReading, public PointVisitor {
 public:
  PointVisitor* At(const Point& point, const TensorType&) override { return point.name == "skip" ? nullptr : this; }
  bool Writes() const override { return true; }
  void Visit(std::span<float> values, int64_t) override {
    for (float& value : values) value *= 2;
  }
};

class Counting final : public PointReading, public PointVisitor {
 public:
  PointVisitor* At(const Point&, const TensorType&) override { return this; }
  bool Writes() const override { return false; }
  void Visit(std::span<float> values, int64_t) override { seen += static_cast<int64_t>(values.size()); }
  std::atomic<int64_t> seen = 0;
};

TEST(ExecutorTest, APointChangesItsOwnReadersOnly) {
  Graph graph;
  const Builder b(graph);
  const ValueId sum = b.Add(Add{}, {b.Input("x", {2}), b.Input("y", {2})});
  b.Output("pointed", b.Point("p", sum));
  b.Output("plain", sum);
  Doubling doubling;
  Executor executor(graph, &doubling);
  const auto out = executor.Run({{"x", Values({2}, {1, 2})}, {"y", Values({2}, {10, 20})}}, NoWeights());
  EXPECT_THAT(List(out.at("pointed")), testing::ElementsAre(22, 44));
  EXPECT_THAT(List(out.at("plain")), testing::ElementsAre(11, 22));
}

TEST(ExecutorTest, InputsAreNeverWritten) {
  Graph graph;
  const Builder b(graph);
  const ValueId x = b.Point("p", b.Reshape(b.Input("x", {2, 2}), {4}));
  b.Output("y", b.Add(Neg{}, {x}));
  Doubling doubling;
  Executor executor(graph, &doubling);
  const Tensor input = Values({2, 2}, {1, 2, 3, 4});
  EXPECT_THAT(List(executor.Run({{"x", input}}, NoWeights()).at("y")), testing::ElementsAre(-2, -4, -6, -8));
  EXPECT_THAT(List(input), testing::ElementsAre(1, 2, 3, 4));
}

TEST(ExecutorTest, ObserversSeeEveryValueOfDeadBranchesToo) {
  Graph graph;
  const Builder b(graph);
  const ValueId x = b.Input("x", {3, 5});
  b.Point("dead", b.Add(Neg{}, {x}));
  b.Output("y", b.Add(Tanh{}, {x}));
  Counting counting;
  Executor executor(graph, &counting);
  executor.Run({{"x", Tensor(TensorType{DType::kF32, {3, 5}})}}, NoWeights());
  EXPECT_EQ(counting.seen, 15);
}

TEST(ExecutorTest, AMissingOrMisshapenInputIsNamed) {
  Graph graph;
  const Builder b(graph);
  b.Output("y", b.Add(Neg{}, {b.Input("hidden", {2, 3})}));
  Executor executor(graph, nullptr);
  const auto text = [&](const std::map<std::string, Tensor>& inputs) -> std::string {
    try {
      executor.Run(inputs, NoWeights());
      return "";
    } catch (const Error& error) {
      return error.what();
    }
  };
  EXPECT_THAT(text({}), testing::HasSubstr("input \"hidden\" (float32[2,3]) is missing"));
  EXPECT_THAT(text({{"hidden", Values({3}, {1, 2, 3})}}), testing::HasSubstr("is float32[3], expected float32[2,3]"));
}

TEST(ExecutorTest, AChainOfInPlaceOperatorsNeedsOneBuffer) {
  Graph graph;
  const Builder b(graph);
  ValueId x = b.Add(Neg{}, {b.Input("x", {64, 64})});
  for (int i = 0; i < 10; ++i) x = b.Add(Tanh{}, {x});
  b.Output("y", x);
  EXPECT_EQ(Executor(graph, nullptr).PlannedBytes(), 64 * 64 * 4);
}

// Random graphs of reshapes, in-place and binary operators, and concatenations: the plan gives the values that unshared
// buffers give.
TEST(ExecutorTest, SharedBuffersNeverChangeAResult) {
  std::mt19937 random(7);
  for (int round = 0; round < 50; ++round) {
    Graph graph;
    const Builder b(graph);
    std::vector<ValueId> values{b.Input("x", {4, 8}), b.Input("y", {4, 8})};
    std::vector<std::vector<float>> expected;
    Tensor x(TensorType{DType::kF32, {4, 8}}), y(TensorType{DType::kF32, {4, 8}});
    for (float& v : x.F32()) v = static_cast<float>(random() % 7) - 3;
    for (float& v : y.F32()) v = static_cast<float>(random() % 7) - 3;
    expected = {List(x), List(y)};
    for (int step = 0; step < 12; ++step) {
      const size_t i = random() % values.size(), j = random() % values.size();
      std::vector<float> result = expected[i];
      switch (random() % 5) {
        case 0:
          values.push_back(b.Add(Neg{}, {values[i]}));
          for (float& v : result) v = -v;
          break;
        case 1:
          values.push_back(b.Reshape(b.Reshape(values[i], {32}), {4, 8}));
          break;
        case 2:
          values.push_back(b.Add(Maximum{}, {values[i], values[j]}));
          for (size_t k = 0; k < result.size(); ++k) result[k] = std::max(result[k], expected[j][k]);
          break;
        case 3: {  // the second half of one and the first of the other
          const ValueId whole = b.Add(Concat{.axis = 0}, {values[i], values[j]});
          values.push_back(b.Add(Slice{.begin = {2, 0}, .end = {6, 8}}, {whole}));
          std::copy_n(expected[i].begin() + 16, 16, result.begin());
          std::copy_n(expected[j].begin(), 16, result.begin() + 16);
          break;
        }
        default:
          values.push_back(b.Add(Sub{}, {values[i], values[j]}));
          for (size_t k = 0; k < result.size(); ++k) result[k] -= expected[j][k];
      }
      expected.push_back(std::move(result));
    }
    std::vector<std::pair<std::string, size_t>> outputs;
    for (int k = 0; k < 3; ++k) {
      const size_t pick = random() % values.size();
      outputs.emplace_back("out" + std::to_string(k), pick);
      b.Output(outputs.back().first, values[pick]);
    }
    Executor executor(graph, nullptr);
    for (int run = 0; run < 2; ++run) {
      const auto results = executor.Run({{"x", x}, {"y", y}}, NoWeights());
      for (const auto& [name, pick] : outputs) EXPECT_EQ(List(results.at(name)), expected[pick]) << Dump(graph) << name;
    }
  }
}

TEST(ExecutorTest, PartsOfAConcatenationAreMadeInTheirPlaces) {
  Graph graph;
  const Builder b(graph);
  const ValueId x = b.Input("x", {1, 32, 16});
  const ValueId whole = b.Add(Concat{.axis = 1}, {b.Add(Neg{}, {x}), b.Add(Tanh{}, {x}), x});
  b.Output("y", whole);
  EXPECT_EQ(Executor(graph, nullptr).PlannedBytes(), graph.TypeOf(whole).Bytes());
}

Tensor AsBf16(const Tensor& tensor) {
  const Tensor result(TensorType{DType::kBF16, tensor.GetShape()});
  for (int64_t i = 0; i < tensor.Elements(); ++i) {  // cut off: the values here fit
    const auto bits = std::bit_cast<uint32_t>(tensor.F32()[i]);
    std::memcpy(result.Raw() + 2 * i, reinterpret_cast<const char*>(&bits) + 2, 2);
  }
  return result;
}

// 1 + 2^-9 lies half way between two bf16 numbers and rounds to 1.
TEST(ExecutorTest, InBf16LinearsRoundTheirOperandsAndNothingElse) {
  const float odd = 1.0f + std::ldexp(1.0f, -9);
  Graph graph;
  const Builder b(graph);
  const ValueId x = b.Input("x", {1, 2}), shared = b.Weight("shared", {1, 2}, WeightKind::kNone),
                own = b.Weight("own", {1, 2}, WeightKind::kNone);
  b.Output("own", b.Add(FullyConnected{}, {x, own}));
  b.Output("shared", b.Add(FullyConnected{}, {x, shared}));
  b.Output("sum", b.Add(Add{}, {x, shared}));
  if (!Bf16Supported()) {
    EXPECT_THROW(Executor(graph, nullptr, {.compute = Compute::kBf16}), Error);
    return;
  }
  Executor executor(graph, nullptr, {.compute = Compute::kBf16});
  const auto run = [&](bool stored_bf16) {
    executor.ForgetWeights();
    return executor.Run({{"x", Values({1, 2}, {odd, 2})}}, [&](const std::string& name) {
      const Tensor weight = Values({1, 2}, {name == "shared" ? odd : 1.5f, 4});
      return stored_bf16 && name == "own" ? AsBf16(weight) : weight;
    });
  };
  for (const bool stored_bf16 : {false, true}) {
    const auto results = run(stored_bf16);
    EXPECT_THAT(List(results.at("own")), testing::ElementsAre(1.5f + 8));
    EXPECT_THAT(List(results.at("shared")), testing::ElementsAre(odd * odd + 8)) << "read by another operator too";
    EXPECT_THAT(List(results.at("sum")), testing::ElementsAre(odd + odd, 6));
  }
}

// Names a grid at its points "a" and "b", where values lie already; "off" takes values off any grid.
class OnGrids final : public PointReading, public PointVisitor {
 public:
  PointVisitor* At(const Point& point, const TensorType&) override { return point.name == "off" ? this : nullptr; }
  bool Writes() const override { return true; }
  const QParams* GridAt(const Point& point) override {
    const auto it = grids.find(point.name);
    return it == grids.end() ? nullptr : &it->second;
  }
  void Visit(std::span<float>, int64_t) override {}

  const std::map<std::string, QParams> grids{
      {"a", {.dtype = DType::kI16, .scale = {0.01f}, .zero_point = {0}}},
      {"b", {.dtype = DType::kI16, .scale = {0.02f}, .zero_point = {0}}}};
};

// y = x' W^T for x' that `build` makes of x [4,300], W [10,300] codes of int8; x lies on grid a.
std::vector<float> ProductOf(PointReading* reading, const std::function<ValueId(const Builder&, ValueId)>& build) {
  Graph graph;
  const Builder b(graph);
  const ValueId x = build(b, b.Input("x", {4, 300}));
  b.Output("y", b.Add(FullyConnected{}, {x, b.Weight("w", {10, 300}, WeightKind::kNone)}));
  std::mt19937 random(3);
  const Tensor values(TensorType{DType::kF32, {4, 300}}), codes(TensorType{DType::kI8, {10, 300}});
  for (float& v : values.F32()) v = static_cast<float>(static_cast<int16_t>(random())) * 0.01f;
  for (int8_t& v : codes.As<int8_t>()) v = static_cast<int8_t>(random());
  const QParams grid{.dtype = DType::kI8, .scale = {0.003f}, .zero_point = {5}};
  const WeightSource weights = [&](const std::string&) { return codes.WithGrid(&grid); };
  return List(Executor(graph, reading).Run({{"x", values}}, weights).at("y"));
}

// Rounds to halves at its points.
class Halves final : public PointReading, public PointVisitor {
 public:
  PointVisitor* At(const Point&, const TensorType&) override { return this; }
  bool Writes() const override { return true; }
  const QParams* GridAt(const Point&) override { return &grid; }
  void Visit(std::span<float> values, int64_t) override {
    for (float& value : values) value = std::round(value * 2) / 2;
  }
  const QParams grid{.dtype = DType::kI16, .scale = {0.5f}, .zero_point = {0}};
};

// Behind an input stands a point, as in a file; other readers get the values all the same.
TEST(ExecutorTest, InputsMayBeCodesWithTheirGrid) {
  Halves halves;
  const QParams other{.dtype = DType::kU8, .scale = {0.3f}, .zero_point = {9}};
  for (const bool point : {true, false})
    for (const QParams* grid : {&halves.grid, &other}) {
      Graph graph;
      const Builder b(graph);
      const ValueId x = b.Input("x", {4, 300});
      b.Output("y", b.Add(Neg{}, {point ? b.Point("a", x) : x}));
      std::mt19937 random(3);
      const Tensor codes(TensorType{grid->dtype, {4, 300}}), values(TensorType{DType::kF32, {4, 300}});
      for (int64_t i = 0; i < codes.Bytes(); ++i) codes.Raw()[i] = static_cast<std::byte>(random());
      Dequantize(codes, *grid, 0, values.F32());
      Executor executor(graph, &halves);
      const std::vector<float> expected = List(executor.Run({{"x", values}}, NoWeights()).at("y"));
      EXPECT_EQ(List(executor.Run({{"x", codes.WithGrid(grid)}}, NoWeights()).at("y")), expected);
      EXPECT_EQ(List(executor.Run({{"x", values}}, NoWeights()).at("y")), expected) << "the other way again";
      EXPECT_THROW(executor.Run({{"x", codes}}, NoWeights()), Error) << "codes of no grid";
    }
}

// The cache of a decode step: what reads it gets the very bytes, and there is no room for them as float32.
TEST(ExecutorTest, CodesPassAPointToAnOperatorThatTakesThem) {
  Halves halves;
  const QParams other{.dtype = DType::kU8, .scale = {0.3f}, .zero_point = {9}};
  const auto attention = [](const char* read_elsewhere) {
    Graph graph;
    const Builder b(graph);
    std::map<std::string, ValueId> at;
    for (const char* name : {"past_k", "past_v"}) at[name] = b.Point(name, b.Input(name, {1, 1, 300, 16}));
    const ValueId q = b.Input("q", {1, 4, 1, 16}), k = b.Input("k", {1, 1, 1, 16}), v = b.Input("v", {1, 1, 1, 16}),
                  mask = b.Input("mask", {1, 1, 301});
    b.Output("y", b.AddFused(Attention{.skip_masked = false}, {q, k, v, mask, at["past_k"], at["past_v"]}, {}));
    if (read_elsewhere != nullptr) b.Output("also", b.Add(Neg{}, {at[read_elsewhere]}));
    return graph;
  };
  std::mt19937 random(3);
  std::map<std::string, Tensor> given;
  const Graph graph = attention(nullptr), expanded = Expanded(graph);
  for (const ValueId id : graph.Inputs()) {
    const Value& input = graph.At(id);
    given[input.name] = Tensor(input.type);
    for (float& value : given[input.name].F32()) value = static_cast<float>(random() % 64) / 8 - 4;
  }
  for (const QParams* grid : {&halves.grid, &other}) {
    std::map<std::string, Tensor> values = given, codes = given;
    for (const char* name : {"past_k", "past_v"}) {
      const Tensor of_it(TensorType{grid->dtype, {1, 1, 300, 16}});
      for (int64_t i = 0; i < of_it.Bytes(); ++i) of_it.Raw()[i] = static_cast<std::byte>(random() % 64 * (i % 2));
      codes[name] = of_it.WithGrid(grid);
      Dequantize(codes[name], *grid, 0, values[name].F32());
    }
    Executor executor(graph, &halves), apart(expanded, &halves), beside(attention("past_k"), &halves);
    std::vector<const std::byte*> seen;
    executor.SetProbe([&](const Node& node, int, const Tensor& tensor) {
      if (node.op.IsPoint()) seen.push_back(tensor.Raw());
    });
    EXPECT_LT(executor.PlannedBytes(), 16 * 300 * 4);
    EXPECT_GT(beside.PlannedBytes(), 16 * 300 * 4);
    const std::vector<float> expected = List(apart.Run(values, NoWeights()).at("y"));
    EXPECT_EQ(List(executor.Run(codes, NoWeights()).at("y")), expected);
    if (grid == &halves.grid) EXPECT_THAT(seen, testing::ElementsAre(codes["past_k"].Raw(), codes["past_v"].Raw()));
    EXPECT_EQ(List(executor.Run(values, NoWeights()).at("y")), expected) << "as values";
    EXPECT_EQ(List(beside.Run(codes, NoWeights()).at("y")), expected) << "with another reader";
    const std::vector<float> before = List(given["past_k"]);
    EXPECT_EQ(List(executor.Run(given, NoWeights()).at("y")), List(apart.Run(given, NoWeights()).at("y")))
        << "values off the grid";
    EXPECT_EQ(List(given["past_k"]), before) << "what is given is not written";
  }
}

TEST(ExecutorTest, ProductsAreSummedInIntegersWhereBothSidesLieOnGrids) {
  const auto plain = [](const Builder&, ValueId x) { return x; };
  const auto at = [](const char* point) {
    return [=](const Builder& b, ValueId x) { return b.Point(point, x); };
  };
  OnGrids grids;
  const std::vector<float> floats = ProductOf(nullptr, plain);
  EXPECT_EQ(ProductOf(nullptr, at("a")), floats) << "the float reading knows no grids";
  EXPECT_EQ(ProductOf(&grids, plain), floats);
  EXPECT_EQ(ProductOf(&grids, at("unknown")), floats);
  EXPECT_EQ(ProductOf(&grids, [](const Builder& b, ValueId x) { return b.Point("off", b.Point("a", x)); }), floats);
  const auto twice_negated = [](const Builder& b, ValueId x) {
    return b.Add(Neg{}, {b.Add(Neg{}, {b.Point("a", x)})});
  };
  EXPECT_EQ(ProductOf(&grids, twice_negated), floats) << "arithmetic leaves the grid";
  const auto joined = [](const char* first, const char* second) {
    return [=](const Builder& b, ValueId x) {
      const ValueId upper = b.Add(Slice{{0, 0}, {1, 300}}, {x}), lower = b.Add(Slice{{1, 0}, {4, 300}}, {x});
      return b.Add(Concat{.axis = 0}, {b.Point(first, upper), b.Point(second, lower)});
    };
  };
  EXPECT_EQ(ProductOf(&grids, joined("a", "b")), floats) << "rows of two grids";

  const std::vector<float> exact = ProductOf(&grids, at("a"));
  EXPECT_NE(exact, floats) << "sums of float32 are not exact";
  for (size_t i = 0; i < exact.size(); ++i) EXPECT_NEAR(exact[i], floats[i], 1e-2) << "sums of 300 terms up to 125";
  EXPECT_EQ(ProductOf(&grids, joined("a", "a")), exact);
  EXPECT_EQ(ProductOf(&grids, [](const Builder& b, ValueId x) { return b.Point("unknown", b.Point("a", x)); }), exact);
  EXPECT_EQ(ProductOf(&grids, [](const Builder& b, ValueId x) {
              const ValueId turned = b.Add(Transpose{{1, 0}}, {b.Point("a", x)});
              return b.Reshape(b.Reshape(b.Add(Transpose{{1, 0}}, {turned}), {1200}), {4, 300});
            }),
            exact)
      << "what only moves keeps its grid";
}

// Codes whose other readers want values are dequantized: here a product and a sum read the same parameter.
TEST(ExecutorTest, CodesAreFloatsForThoseWhoWantFloats) {
  Graph graph;
  const Builder b(graph);
  const ValueId x = b.Input("x", {2, 3}), w = b.Weight("w", {2, 3}, WeightKind::kNone),
                ids = graph.AddInput("ids", {DType::kI64, {2}});
  b.Output("product", b.Add(FullyConnected{}, {x, w}));
  b.Output("sum", b.Add(Add{}, {x, w}));
  b.Output("rows", b.Add(Gather{}, {b.Weight("table", {2, 3}, WeightKind::kNone), ids}));
  b.Output("flat", b.Reshape(b.Weight("view", {2, 3}, WeightKind::kNone), {6}));
  const std::vector<uint8_t> bytes{1, 2, 3, 4, 5, 6};
  const std::vector<int64_t> rows{1, 0};
  const QParams grid{.dtype = DType::kU8, .axis = 0, .scale = {1, 10}, .zero_point = {1, 0}};
  const Tensor codes = Tensor::Of<uint8_t>({2, 3}, bytes).WithGrid(&grid);
  const std::map<std::string, Tensor> inputs{{"x", Values({2, 3}, {1, 1, 1, 0, 1, 0})},
                                             {"ids", Tensor::Of<int64_t>({2}, rows)}};
  const auto out = Executor(graph, nullptr).Run(inputs, [&](const std::string&) { return codes; });
  EXPECT_THAT(List(out.at("product")), testing::ElementsAre(3, 150, 1, 50));
  EXPECT_THAT(List(out.at("sum")), testing::ElementsAre(1, 2, 3, 40, 51, 60));
  EXPECT_THAT(List(out.at("rows")), testing::ElementsAre(40, 50, 60, 0, 1, 2));
  EXPECT_THAT(List(out.at("flat")), testing::ElementsAre(0, 1, 2, 40, 50, 60));
  const WeightSource bare = [&](const std::string&) { return Tensor::Of<uint8_t>({2, 3}, bytes); };
  EXPECT_THROW(Executor(graph, nullptr).Run(inputs, bare), Error) << "codes without a grid";
}

}  // namespace
}  // namespace circlet
