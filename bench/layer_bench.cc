// One decoder layer of E2B's widths and one vision encoder layer: float, observing, in bf16 (0 ratio without such a
// processor), observing, fake-quantized and export, beside the float32 matrix products alone in oneDNN. Prints one
// table; `--json` prints it as JSON. Ratios are of minima in one run.
//
//   layer_bench [--json] [--threads N] [--tokens 2048] [--rounds 5] [--recipe default]

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "circlet/base/threads.h"
#include "circlet/circle/export.h"
#include "circlet/model/gemma4/config.h"
#include "circlet/model/gemma4/tables.h"
#include "circlet/model/gemma4/text.h"
#include "circlet/model/gemma4/vision.h"
#include "circlet/quant/affine.h"
#include "circlet/quant/calibration.h"
#include "ops/gemm.h"

using namespace circlet;

namespace {

double Seconds(const std::function<void()>& body) {
  const auto begin = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

Tensor Normal(const Shape& shape, float deviation, uint32_t seed) {
  Tensor tensor(TensorType{DType::kF32, shape});
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, deviation);
  for (float& value : tensor.F32()) value = normal(random);
  return tensor;
}

struct Case {
  std::string name;
  Graph graph;
  std::map<std::string, Tensor> inputs;
  std::vector<std::array<int64_t, 4>> products;  // count, M, N, K
  std::vector<Graph> exported;
};

LayerConfig Layer(bool full) {
  LayerConfig layer{.full = full, .head_dim = full ? 512 : 256, .kv_heads = 1, .intermediate = 6144};
  layer.rope = full ? RopeConfig{RopeConfig::Type::kProportional, 1e6f, 0.25f, 1.0f} : RopeConfig{};
  layer.window = full ? 0 : 512;
  return layer;
}

Case TextCase(bool full, int64_t tokens) {
  TextConfig config{.vocab_size = 16, .hidden_size = 1536, .num_heads = 8, .ple_dim = 256, .ple_vocab_size = 16};
  config.rms_norm_eps = 1e-6f;
  config.layers = {Layer(full)};
  const LayerConfig& layer = config.layers[0];
  Case c{.name = full ? "text layer, full attention" : "text layer, sliding attention"};
  BuildDecoderLayer(BlockBuilder(c.graph, kDefault), config, 0, Phase::kPrefill, tokens);
  const RopeTables rope = TextRopeTables(layer.rope, layer.head_dim, 0, tokens, true);
  c.inputs = {{"hidden", Normal({1, tokens, 1536}, 1.0f, 1)},
              {"mask", PrefillMask(tokens, tokens, layer.window)},
              {"cos", rope.cos},
              {"sin", rope.sin},
              {"per_layer_input", Normal({1, tokens, 256}, 1.0f, 2)}};
  const int64_t h = layer.head_dim;
  c.products = {{1, tokens, 8 * h, 1536}, {2, tokens, h, 1536},    {1, tokens, 1536, 8 * h}, {2, tokens, 6144, 1536},
                {1, tokens, 1536, 6144},  {1, tokens, 256, 1536}, {1, tokens, 1536, 256},   {8, tokens, tokens, h},
                {8, tokens, h, tokens}};
  for (const Phase phase : {Phase::kPrefill, Phase::kDecode}) {
    c.exported.emplace_back();
    BuildDecoderLayer(BlockBuilder(c.exported.back(), kDefault), config, 0, phase, tokens);
  }
  return c;
}

Case VisionCase() {
  VisionConfig config{.hidden_size = 768, .intermediate_size = 3072, .num_layers = 1, .num_heads = 12, .kv_heads = 12,
                      .head_dim = 64, .patch_size = 16, .pooling_kernel_size = 3, .position_embedding_size = 10240};
  config.rms_norm_eps = 1e-6f;
  config.rope_theta = 100.0f;
  constexpr int64_t kPatches = 2520;
  std::vector<int64_t> positions;
  for (int64_t y = 0; y < 42; ++y)
    for (int64_t x = 0; x < 60; ++x) positions.insert(positions.end(), {x, y});
  Case c{.name = "vision layer"};
  BuildVisionLayer(BlockBuilder(c.graph, kDefault), config, 0, kPatches);
  const RopeTables rope = VisionRopeTables(config.rope_theta, config.head_dim, positions);
  c.inputs = {{"hidden", Normal({1, kPatches, 768}, 1.0f, 1)},
              {"mask", VisionMask(positions)},
              {"cos", rope.cos},
              {"sin", rope.sin}};
  c.products = {{4, kPatches, 768, 768}, {2, kPatches, 3072, 768}, {1, kPatches, 768, 3072},
                {12, kPatches, kPatches, 64}, {12, kPatches, 64, kPatches}};
  c.exported.emplace_back();
  BuildVisionLayer(BlockBuilder(c.exported.back(), kDefault), config, 0, kPatches);
  return c;
}

struct Row {
  std::string name;
  double products, observe, floats, bf16, rounded, write;
};

Row Measure(Case& c, int rounds, const Recipe& recipe) {
  std::map<std::string, Tensor> parameters;
  uint32_t seed = 10;
  for (const Value& value : c.graph.Values()) {
    if (value.kind != ValueKind::kWeight) continue;
    const Shape& shape = value.type.shape;
    const bool matrix = shape.Rank() == 2;
    Tensor tensor = Normal(shape, matrix ? 1.0f / std::sqrt(static_cast<float>(shape[1])) : 0.1f, ++seed);
    if (!matrix)
      for (float& v : tensor.F32()) v += shape.Rank() == 1 ? 1.0f : 0.0f;
    parameters[value.name] = tensor;
  }
  const WeightSource weights = [&](const std::string& name) { return parameters.at(name); };

  struct Product {
    int64_t count, m, n, k;
    Tensor a, b, y;
  };
  std::vector<Product> products;
  for (const auto& [count, m, n, k] : c.products)
    products.push_back({count, m, n, k, Normal({m, k}, 1, 3), Normal({n, k}, 1, 4), Tensor(TensorType{DType::kF32, {m, n}})});

  Calibration calibration(recipe, kDefault);
  ObserveReading observe(calibration);
  Executor plain(c.graph, nullptr), observing(c.graph, &observe);
  std::optional<Executor> bf16;
  if (Bf16Supported()) bf16.emplace(c.graph, nullptr, ExecutorOptions{.compute = Compute::kBf16});
  Row row{c.name, 1e9, 1e9, 1e9, 1e9, 1e9, 1e9};
  const auto keep = [](double& best, double seconds) { best = std::min(best, seconds); };
  for (int i = 0; i < rounds; ++i) {
    keep(row.products, Seconds([&] {
      for (const Product& p : products)
        for (int64_t j = 0; j < p.count; ++j)
          gemm::Linear(p.a.F32().data(), p.b.F32().data(), nullptr, p.m, p.n, p.k, p.y.F32().data());
    }));
    keep(row.floats, Seconds([&] { plain.Run(c.inputs, weights); }));
    if (bf16) keep(row.bf16, Seconds([&] { bf16->Run(c.inputs, weights); }));
    observe.Begin(i);
    keep(row.observe, Seconds([&] { observing.Run(c.inputs, weights); }));
    observe.End();
  }
  Calibration frozen(recipe, kDefault);
  {
    // Boundary points belong to other graphs; a wide grid stands for what a whole run would know by now.
    calibration.Freeze(c.graph, weights);
    ParameterStore store;
    for (const std::string& name : calibration.Params().Names()) store.Set(calibration.ParamsOf(name));
    for (const Node& node : c.graph.Nodes())
      for (const Point& point : node.points)
        if (point.use == PointUse::kBoundary && store.Find(point.name) == nullptr) {
          PointParams params{.spec = calibration.GetRecipe().SpecFor(point, kDefault)};
          params.min = {-120.0f};
          params.max = {120.0f};
          params.qparams = ComputeQParams(-120.0f, 120.0f, params.spec.dtype, params.spec.scheme.symmetric);
          store.Set(params);
        }
    frozen.UseFrozen(std::move(store));
  }
  FakeQuantReading rounding(frozen);
  Executor rounded(c.graph, &rounding);
  const WeightSource rounded_weights = RoundedWeights(frozen, weights);
  for (int i = 0; i < rounds; ++i) {
    keep(row.rounded, Seconds([&] { rounded.Run(c.inputs, rounded_weights); }));
    keep(row.floats, Seconds([&] { plain.Run(c.inputs, weights); }));
  }
  const CalibratedGrids grids(frozen, weights);
  const std::filesystem::path path = std::filesystem::temp_directory_path() / "circlet_layer_bench.circle";
  keep(row.write, Seconds([&] {
    for (const Graph& graph : c.exported) circle::Write(circle::ToCircle(graph, grids), path);
  }));
  std::filesystem::remove(path);
  return row;
}

}  // namespace

int main(int argc, char** argv) {
  bool json = false;
  int64_t tokens = 2048;
  int rounds = 5;
  std::string recipe = "default";
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--json") == 0) json = true;
    if (i + 1 >= argc) continue;
    if (std::strcmp(argv[i], "--threads") == 0) SetThreads(std::atoi(argv[i + 1]));
    if (std::strcmp(argv[i], "--tokens") == 0) tokens = std::atoll(argv[i + 1]);
    if (std::strcmp(argv[i], "--rounds") == 0) rounds = std::atoi(argv[i + 1]);
    if (std::strcmp(argv[i], "--recipe") == 0) recipe = argv[i + 1];
  }
  std::vector<Case> cases;
  cases.push_back(TextCase(false, tokens));
  cases.push_back(TextCase(true, tokens));
  cases.push_back(VisionCase());
  if (!json)
    std::printf("%-30s %9s %9s %9s %9s %9s %8s | %7s %8s %7s %7s\n", "", "products", "float", "bf16", "observe",
                "rounded", "export", "flt/prd", "flt/bf16", "obs/flt", "rnd/flt");
  for (Case& c : cases) {
    const Row r = Measure(c, rounds, Recipe::Load(recipe));
    if (json)
      std::printf(
          "{\"case\": \"%s\", \"products_s\": %.4f, \"float_s\": %.4f, \"bf16_s\": %.4f, "
          "\"observe_s\": %.4f, \"rounded_s\": %.4f, \"export_s\": %.4f}\n",
          r.name.c_str(), r.products, r.floats, r.bf16, r.observe, r.rounded, r.write);
    else
      std::printf("%-30s %8.3fs %8.3fs %8.3fs %8.3fs %8.3fs %7.3fs | %7.3f %8.3f %7.3f %7.3f\n", r.name.c_str(),
                  r.products, r.floats, r.bf16, r.observe, r.rounded, r.write, r.floats / r.products, r.floats / r.bf16,
                  r.observe / r.floats, r.rounded / r.floats);
    std::fflush(stdout);
  }
}
