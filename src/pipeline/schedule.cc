#include "pipeline/schedule.h"

#include <algorithm>

#include "circlet/base/error.h"

namespace circlet {
namespace {

// Adds what a step's outputs take, each graph built once.
void AddMade(const Step& step, const ItemSet& items, int rank, std::vector<PhaseFlow::Made>& makes) {
  std::map<std::string, PhaseFlow::Made> by_key;
  for (const Step::Sink& sink : step.outputs)
    for (const std::string& key : sink.keys) by_key[key] = {.key = key};
  if (by_key.empty()) return;
  std::map<std::pair<int64_t, std::string>, std::map<std::string, int64_t>> output_bytes;  // by what shapes a graph
  for (const Item& item : items) {
    if (item.rank != rank) continue;
    const auto [sizes, is_new] = output_bytes.try_emplace({item.length, item.variant});
    if (is_new) {
      const Graph graph = step.build(item);
      for (const Graph::Output& output : graph.Outputs())
        sizes->second[output.name] = graph.TypeOf(output.value).Bytes();
    }
    const Passage passage = items.PassageOf(item);
    for (const Step::Sink& sink : step.outputs)
      for (const std::string& key : sink.keys) {
        const int64_t bytes = sizes->second.at(sink.output) / static_cast<int64_t>(sink.keys.size());
        by_key[key].bytes += bytes * (passage.in_float + passage.rounded);
        if (passage.exported) by_key[key].kept_bytes += bytes;
      }
  }
  for (auto& [key, made] : by_key) makes.push_back(std::move(made));
}

}  // namespace

PhaseFlow FlowOf(const PhaseSpec& phase, int rank, bool writes) {
  PhaseFlow flow{.name = phase.name};
  for (const Step& step : phase.stage.steps) {
    for (const Input& input : step.inputs)
      for (const Read& read : input.reads) flow.reads.push_back(read.key);
    AddMade(step, *phase.items, rank, flow.makes);
  }
  if (phase.output) {
    flow.reads = phase.output->Reads();
    for (const auto& [key, type] : phase.output->Makes()) flow.makes.push_back({key, type.Bytes(), type.Bytes()});
  }
  for (const UnitSpec& unit : phase.units) {
    if (unit.item == nullptr) continue;
    for (const auto* ends : {&unit.inputs, &unit.outputs})
      for (const auto& [name, value] : *ends)
        for (const Read& read : value.reads) flow.unit_reads.push_back(read.key);
    for (const UnitSpec::Keep& keep : unit.keeps) {
      const int64_t bytes = writes ? keep.type.Bytes() : 0;
      flow.unit_makes.push_back({.key = keep.key, .bytes = bytes, .kept_bytes = bytes});
    }
  }
  return flow;
}

std::string CodesKey(const std::string& parameter) { return "codes of " + parameter; }

void AddCodes(std::span<const PhaseSpec> phases, const Calibration& calibration, std::vector<PhaseFlow>& flows) {
  struct Made {
    size_t phase = 0;
    int64_t bytes = 0;
    bool read_later = false;
  };
  std::map<std::string, Made> made;
  const auto for_weights = [](const Graph& graph, const auto& body) {
    for (const Value& value : graph.Values())
      if (value.kind == ValueKind::kWeight && !value.weight_point.name.empty()) body(value);
  };
  for (size_t phase = 0; phase < phases.size(); ++phase) {
    for (const Step& step : phases[phase].stage.steps) {
      if (step.fresh || phases[phase].items->Empty()) continue;
      for_weights(step.build((*phases[phase].items)[0]), [&](const Value& value) {
        const PointSpec spec = calibration.SpecFor(value.weight_point);
        if (spec.kind == QuantKind::kAffine)
          made.try_emplace(value.name, Made{phase, TensorType{spec.dtype, value.type.shape}.Bytes()});
      });
    }
    for (const UnitSpec& unit : phases[phase].units) {
      for_weights(unit.build(), [&](const Value& value) {
        const auto it = made.find(value.name);
        if (it == made.end() || it->second.phase == phase) return;
        it->second.read_later = true;
        flows[phase].unit_reads.push_back(CodesKey(value.name));
      });
    }
  }
  for (const auto& [name, codes] : made) {
    if (!codes.read_later) continue;
    flows[codes.phase].codes.push_back(name);
    flows[codes.phase].unit_makes.push_back({CodesKey(name), codes.bytes, codes.bytes});
  }
}

Schedule::Schedule(std::vector<PhaseFlow> phases)
    : drops_(phases.size()), codes_(phases.size()), bytes_(phases.size()) {
  struct Life {
    int made = 0, last_stage = 0, last_unit = 0;  // numbers of phases
    int64_t bytes = 0, kept_bytes = 0;
  };
  std::map<std::string, Life> lives;
  const auto make = [&](const PhaseFlow::Made& made, int phase) {
    const bool is_new = lives.try_emplace(made.key, Life{phase, phase, phase, made.bytes, made.kept_bytes}).second;
    CIRCLET_CHECK(is_new, "{} makes {}, which is made already", phases[phase].name, made.key);
  };
  const auto life_of = [&](const std::string& key, int phase) -> Life& {
    const auto life = lives.find(key);
    CIRCLET_CHECK(life != lives.end(), "{} reads {}, which nothing has made", phases[phase].name, key);
    return life->second;
  };
  for (int phase = 0; phase < static_cast<int>(phases.size()); ++phase) {
    const PhaseFlow& flow = phases[phase];
    codes_[phase] = flow.codes;
    for (const PhaseFlow::Made& made : flow.makes) make(made, phase);
    for (const std::string& key : flow.reads) life_of(key, phase).last_stage = phase;
    for (const PhaseFlow::Made& made : flow.unit_makes) make(made, phase);
    for (const std::string& key : flow.unit_reads) life_of(key, phase).last_unit = phase;
  }
  for (const auto& [key, life] : lives) {
    const bool kept = life.last_unit > life.last_stage;
    drops_[life.last_stage].push_back({key, kept});
    if (kept) drops_[life.last_unit].push_back({key, false});
    for (int phase = life.made; phase <= std::max(life.last_stage, life.last_unit); ++phase)
      bytes_[phase] += phase <= life.last_stage ? life.bytes : life.kept_bytes;
  }
}

int64_t Schedule::PeakBytes() const { return bytes_.empty() ? 0 : *std::ranges::max_element(bytes_); }

}  // namespace circlet
