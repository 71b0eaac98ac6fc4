// Quantizes one MLP with the public headers: build a graph once, observe it in float, freeze its grids, write a Circle
// file, read the file back and check that it computes what was simulated.
//
//   example_mlp [FILE.circle]

#include <cstdio>
#include <map>
#include <random>

#include "circlet/circlet.h"

using namespace circlet;

namespace {

// down(gelu(gate(x)) * up(x)): x [1,8,32], width 64.
Graph BuildMlp() {
  Graph graph;
  const Builder b = Builder(graph).At("mlp");
  const auto linear = [](const Builder& at, ValueId x, int64_t out) {
    const ValueId weight = at.Weight("weight", {out, at.ShapeOf(x)[-1]}, WeightKind::kLinear);
    return at.Point("act_out", at.Add(FullyConnected{}, {x, weight}));
  };
  const ValueId x = b.Point("x", b.Input("x", {1, 8, 32}));
  const ValueId act = b.Point("gate_act", b.Add(Gelu{}, {linear(b.At("gate_proj"), x, 64)}));
  const ValueId product = b.Point("mul", b.Add(Mul{}, {act, linear(b.At("up_proj"), x, 64)}));
  b.Output("y", linear(b.At("down_proj"), product, 32));
  return graph;
}

Tensor Normal(const Shape& shape, float deviation, std::mt19937& random) {
  Tensor tensor(TensorType{DType::kF32, shape});
  std::normal_distribution<float> normal(0.0f, deviation);
  for (float& value : tensor.F32()) value = normal(random);
  return tensor;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string path = argc > 1 ? argv[1] : "mlp.circle";
  std::mt19937 random(1);
  const Graph graph = BuildMlp();
  std::map<std::string, Tensor> parameters;
  for (const Value& value : graph.Values())
    if (value.kind == ValueKind::kWeight) parameters[value.name] = Normal(value.type.shape, 0.15f, random);
  const WeightSource weights = [&](const std::string& name) { return parameters.at(name); };

  Calibration calibration(Recipe::Load("w8a16"), kDefault);
  ObserveReading observe(calibration);
  Executor observing(graph, &observe);
  for (int sample = 0; sample < 16; ++sample) {
    observe.Begin(sample);
    observing.Run({{"x", Normal({1, 8, 32}, 1.0f, random)}}, weights);
    observe.End();
  }
  calibration.Freeze(graph, weights);

  const std::map<std::string, Tensor> input{{"x", Normal({1, 8, 32}, 1.0f, random)}};
  const Tensor reference = Executor(graph, nullptr).Run(input, weights).at("y");
  FakeQuantReading rounding(calibration);
  const Tensor simulated = Executor(graph, &rounding).Run(input, RoundedWeights(calibration, weights)).at("y");
  ErrorMetrics metrics;
  metrics.Add(reference, simulated);
  std::printf("simulated: mean |diff| %.6f, PEIR %.4f %%\n", metrics.MeanAbs(), 100 * metrics.Peir());

  const int64_t bytes = circle::Write(circle::ToCircle(graph, CalibratedGrids(calibration, weights)), path);
  std::printf("%s: %lld bytes\n", path.c_str(), static_cast<long long>(bytes));
  const circle::Model file = circle::Read(path);
  const Tensor computed = circle::RunModel(file, input).begin()->second;
  for (int64_t i = 0; i < computed.Elements(); ++i)
    if (computed.F32()[i] != simulated.F32()[i]) {
      std::printf("value %lld differs: %g, simulated %g\n", static_cast<long long>(i), computed.F32()[i], simulated.F32()[i]);
      return 1;
    }
  std::printf("the file computes what was simulated, to the last code\n");
  return 0;
}
