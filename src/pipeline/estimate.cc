#include "pipeline/estimate.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <set>

#include "circlet/base/threads.h"
#include "circlet/io/file.h"
#include "ops/gemm.h"
#include "pipeline/gemma4/head.h"

namespace circlet {
using namespace gemma4;
namespace {

// Readings that an item goes through: float, and rounded once or twice (alone and so far).
int Readings(const Item& item) {
  if (item.kind == ItemKind::kVerify || item.kind == ItemKind::kControl) return 1;
  return 2 + item.alone;
}

int64_t WeightBytes(const Graph& graph) {
  int64_t bytes = 0;
  for (const Value& value : graph.Values())
    if (value.kind == ValueKind::kWeight) bytes += value.type.shape.Elements() * static_cast<int64_t>(sizeof(float));
  return bytes;
}

int64_t WorkingBytes(const Graph& graph) {
  int64_t bytes = Executor(graph, nullptr).PlannedBytes();
  for (const ValueId input : graph.Inputs()) bytes += graph.TypeOf(input).Bytes();
  // Results beside the arena, and what they are compared with.
  for (const Graph::Output& output : graph.Outputs()) bytes += 2 * graph.TypeOf(output.value).Bytes();
  return bytes;
}

// Positions of this process's items, once for each chain that they run in.
int64_t ChainPositions(const std::vector<Item>& items, int rank) {
  int64_t positions = 0;
  for (const Item& item : items)
    if (item.rank == rank)
      positions += item.length * (item.kind == ItemKind::kVerify || item.kind == ItemKind::kControl ? 1 : 2);
  return positions;
}

}  // namespace

double ProductFlops(const Graph& graph) {
  double flops = 0;
  for (const Node& node : graph.Nodes()) {
    const auto shape = [&](int input) -> const Shape& { return graph.TypeOf(node.in[input]).shape; };
    if (std::holds_alternative<FullyConnected>(node.op.kind)) {
      flops += 2.0 * static_cast<double>(shape(0).Elements()) * static_cast<double>(shape(1)[0]);
    } else if (std::holds_alternative<Attention>(node.op.kind)) {
      flops += 4.0 * static_cast<double>(shape(0).Elements()) * static_cast<double>(shape(1)[2]);
    }
  }
  return flops;
}

StageEstimate EstimateStage(const Stage& stage, const std::vector<Item>& items, int rank) {
  StageEstimate estimate{.name = stage.name};
  for (const Step& step : stage.steps) {
    std::map<std::pair<int64_t, std::string>, double> flops;  // by what shapes a graph
    const Item* longest = nullptr;
    for (const Item& item : items) {
      if (item.rank != rank) continue;
      const auto [it, is_new] = flops.try_emplace({item.length, item.variant});
      if (is_new) it->second = ProductFlops(step.build(item));
      estimate.flops += it->second * Readings(item);
      if (longest == nullptr || item.length > longest->length) longest = &item;
    }
    if (longest == nullptr) continue;
    const Graph graph = step.build(*longest);
    const int64_t side_by_side = SideBySide(graph) ? Threads() : 1;
    estimate.weight_bytes = std::max(estimate.weight_bytes, WeightBytes(graph));
    estimate.working_bytes = std::max(estimate.working_bytes, side_by_side * WorkingBytes(graph));
  }
  return estimate;
}

StageEstimate EstimateHead(const RunContext& context) {
  const int64_t width = context.config.text.hidden_size, vocab = context.config.text.vocab_size;
  StageEstimate estimate{.name = "logits"};
  int64_t longest = 0, measured_positions = 0;  // whose errors are summed one by one
  const ItemKind measured = MeasuredKind(context.items);
  for (const Item& item : context.items) {
    if (item.rank != context.world.Rank()) continue;
    // Observed, or followed in both chains; and two or three times to be measured.
    int readings = item.kind == measured ? 2 + item.alone : 0;
    if (item.kind == measured) measured_positions += item.length;
    if (item.kind == ItemKind::kCalibration) readings += 1;
    if (item.kind == ItemKind::kWindow || item.kind == ItemKind::kCaption || item.kind == ItemKind::kControl)
      readings += 2;
    estimate.flops += 2.0 * static_cast<double>(item.length * width) * static_cast<double>(vocab) * readings;
    longest = std::max(longest, item.length);
  }
  // A slice of the head in float32 and rounded; the float logits of a slice, and the others' beside them.
  const HeadSlices slices = SlicesOf(context);
  estimate.weight_bytes = 2 * 4 * slices.rows * width;
  estimate.working_bytes = 4 * (5 * slices.rows * std::min(slices.positions, longest) + 4 * longest * width) +
                           2 * static_cast<int64_t>(sizeof(ErrorMetrics)) * measured_positions;
  return estimate;
}

int64_t ActivationBytes(const RunContext& context) {
  const TextConfig& text = context.config.text;
  const int rank = context.world.Rank();
  const int64_t ple = text.HasPle() ? int64_t{text.NumLayers()} * text.ple_dim : 0;
  int64_t key_values = 0;
  for (const LayerConfig& layer : text.layers)
    if (layer.stores_kv) key_values += 2 * int64_t{layer.kv_heads} * layer.head_dim;
  const int64_t width = 2 * text.hidden_size + std::max(2 * ple, ple + key_values);
  int64_t bytes = 4 * width * ChainPositions(context.items, rank);
  if (context.config.vision)
    bytes += 4 * 2 * int64_t{context.config.vision->hidden_size} * ChainPositions(context.image_items, rank);
  return bytes;
}

int64_t OutputBytes(const RunContext& context, bool whole_model) {
  const Recipe& recipe = context.calibration.GetRecipe();
  const TextConfig& text = context.config.text;
  int64_t bits = 0;
  for (Parameter parameter : Parameters(context.config)) {
    const PointSpec spec =
        recipe.SpecFor(Point{.name = parameter.name, .role = PointRole::kWeight}, context.GetDialect());
    const int64_t own = parameter.shape.Elements() * (spec.kind == QuantKind::kAffine ? BitWidth(spec.dtype) : 32);
    const auto named = [&](const char* part) { return parameter.name.find(part) != std::string::npos; };
    const bool in_layer = named("language_model.layers.");
    const bool is_head = named("embed_tokens.weight") && context.config.tie_word_embeddings;
    // A layer stands in its prefill and its decode file, a tied table in the embedding and the head.
    bits += own * ((in_layer && recipe.export_options.prefill_decode) || is_head ? 2 : 1) + (whole_model ? own : 0);
  }
  const int64_t layers = text.NumLayers(), ple = text.HasPle() ? layers * text.ple_dim : 0;
  const int64_t codes =
      context.VerifyText() == nullptr ? 0 : 2 * context.max_seq_len * (text.hidden_size * (layers + 3) + 3 * ple);
  return bits / 8 + codes;
}

double MeasuredFlops() {
  constexpr int64_t kRows = 1024, kWidth = 1536, kColumns = 2048;
  const Tensor x({DType::kF32, {kRows, kWidth}}), w({DType::kF32, {kColumns, kWidth}}),
      y({DType::kF32, {kRows, kColumns}});
  double fastest = 1e30;
  for (int run = 0; run < 4; ++run) {
    const auto begin = std::chrono::steady_clock::now();
    gemm::Linear(x.F32().data(), w.F32().data(), nullptr, kRows, kColumns, kWidth, y.F32().data());
    fastest = std::min(fastest, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  return 2.0 * kRows * kWidth * kColumns / fastest;
}

int64_t OwnMemoryBytes() {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> status(std::fopen("/proc/self/status", "r"), std::fclose);
  char line[256];
  while (status != nullptr && std::fgets(line, sizeof(line), status.get()) != nullptr)
    if (int64_t kib = 0; std::sscanf(line, "RssAnon: %ld kB", &kib) == 1) return kib * 1024;
  return 0;
}

}  // namespace circlet
