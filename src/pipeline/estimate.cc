#include "pipeline/estimate.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <iterator>
#include <set>

#include "circlet/base/threads.h"
#include "circlet/io/file.h"
#include "ops/gemm.h"
#include "pipeline/stage.h"

namespace circlet {
namespace {

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

}  // namespace

std::vector<MatrixProduct> ProductsOf(const Graph& graph) {
  std::vector<MatrixProduct> products;
  for (const Node& node : graph.Nodes()) {
    std::vector<TensorType> in;
    for (const ValueId id : node.in) in.push_back(graph.TypeOf(id));
    std::ranges::copy(node.op.Products(in), std::back_inserter(products));
  }
  return products;
}

double ProductFlops(const Graph& graph) {
  double flops = 0;
  for (const MatrixProduct& product : ProductsOf(graph)) flops += product.Flops();
  return flops;
}

StageEstimate EstimateStage(const Stage& stage, const ItemSet& items, int rank) {
  StageEstimate estimate{.name = stage.name};
  for (const Step& step : stage.steps) {
    std::map<std::pair<int64_t, std::string>, double> flops;  // by what shapes a graph
    const Item* longest = nullptr;
    for (const Item& item : items) {
      if (item.rank != rank) continue;
      const auto [it, is_new] = flops.try_emplace({item.length, item.variant});
      if (is_new) it->second = ProductFlops(step.build(item));
      estimate.flops += it->second * items.PassageOf(item).StageRuns();
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

namespace {

// Bytes of an end's codes; ids stay as they are, float values become 16 bits at most.
int64_t CodeBytes(const TensorType& type) {
  return type.dtype == DType::kF32 ? type.shape.Elements() * static_cast<int64_t>(sizeof(int16_t)) : type.Bytes();
}

}  // namespace

int64_t FilesBytes(std::span<const PhaseSpec> phases, const Calibration& calibration) {
  constexpr int64_t kOperatorBytes = 400;  // in a file: the operator, its tensors' names and grids
  constexpr int64_t kGridBytes = 56;       // in qparams.json: range, scale and zero point of one channel
  int64_t bytes = 0;
  std::map<std::string, int64_t> channels, codes;  // by parameter; by key, as equal ends are stored once
  for (const PhaseSpec& phase : phases)
    for (const UnitSpec& unit : phase.units) {
      const Graph graph = unit.build();
      bytes += kOperatorBytes * static_cast<int64_t>(graph.Nodes().size());
      for (const Value& value : graph.Values()) {
        if (value.kind == ValueKind::kConstant) bytes += CodeBytes(value.type);
        if (value.kind != ValueKind::kWeight) continue;
        const PointSpec spec = value.weight_point.name.empty() ? PointSpec{.kind = QuantKind::kNone}
                                                               : calibration.SpecFor(value.weight_point);
        bytes +=
            spec.kind == QuantKind::kAffine ? TensorType{spec.dtype, value.type.shape}.Bytes() : value.type.Bytes();
        channels[value.name] = value.weight_axis < 0 ? 1 : value.type.shape[value.weight_axis];
      }
      if (unit.item == nullptr) continue;
      const auto add = [&](const std::string& name, const std::map<std::string, std::string>& keys, ValueId end) {
        const auto key = keys.find(name);
        const TensorType& type = graph.TypeOf(end);
        codes[(key == keys.end() ? unit.name + "." + name : key->second) + type.ToString()] = CodeBytes(type);
      };
      for (const ValueId input : graph.Inputs()) add(graph.At(input).name, unit.keys, input);
      for (const Graph::Output& output : graph.Outputs())
        add(output.name, unit.output_keys.contains(output.name) ? unit.output_keys : unit.keys, output.value);
    }
  for (const auto& [name, count] : channels) bytes += count * kGridBytes;
  for (const auto& [key, size] : codes) bytes += size;
  return bytes;
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
