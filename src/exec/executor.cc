#include "circlet/exec/executor.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "circlet/base/threads.h"
#include "exec/memory_plan.h"

namespace circlet {
namespace {

// Visits a whole tensor, rows of the last axis together, pieces in parallel.
void VisitAll(PointVisitor& visitor, const Tensor& tensor) {
  const std::span<float> values = tensor.F32();
  const int64_t row = tensor.GetShape().Rank() == 0 ? 1 : std::max<int64_t>(1, tensor.GetShape()[-1]);
  const int64_t rows = static_cast<int64_t>(values.size()) / row;
  constexpr int64_t kPiece = 1 << 16;
  ParallelFor(rows, std::max<int64_t>(1, kPiece / row), [&](int64_t begin, int64_t end) {
    visitor.Visit(values.subspan(begin * row, (end - begin) * row), begin * row);
  });
}

// The node as a user knows it: the nearest point behind it, else its operator.
std::string Label(const Graph& graph, size_t index) {
  for (size_t i = index; i < graph.Nodes().size() && i < index + 8; ++i)
    for (const Point& point : graph.Nodes()[i].points)
      if (!point.name.empty()) return point.name;
  return fmt::format("node {}", index);
}

// Scratch memory of the calling thread, shared by all its executors: a run's results are copied out of it, so nothing in it
// outlives the run. It grows to the largest plan.
std::byte* Scratch(int64_t bytes) {
  thread_local Tensor scratch;
  if (scratch.Empty() || scratch.Bytes() < bytes) {
    scratch = Tensor();
    scratch = Tensor(TensorType{DType::kU8, Shape{bytes}});
  }
  return scratch.Raw();
}

}  // namespace

struct Executor::Plan {
  Graph graph;
  MemoryPlan memory;
  std::vector<std::vector<PointVisitor*>> visitors;  // by node
  bool points_write = false;
  std::byte* arena = nullptr;
  bool bound = false;
  std::vector<Tensor> tensors;  // by value
  struct Operands {
    std::vector<Tensor> in, out;
    bool external = false;  // an operand's bytes come with each run's inputs
  };
  std::vector<Operands> operands;  // by node
  Probe probe;

  Tensor TensorOf(ValueId id) const {
    const MemoryPlan::Home& home = memory.homes[id];
    if (home.place == MemoryPlan::Place::kArena)
      return Tensor(graph.TypeOf(id), arena + home.offset, nullptr);
    return Tensor(graph.TypeOf(id), tensors[home.root].Raw(), nullptr);
  }

  void BindInputs(const std::map<std::string, Tensor>& inputs) {
    for (const ValueId id : graph.Inputs()) {
      const Value& value = graph.At(id);
      const auto it = inputs.find(value.name);
      if (it == inputs.end()) Fail("input \"{}\" ({}) is missing", value.name, value.type.ToString());
      if (it->second.Type() != value.type)
        Fail("input \"{}\" is {}, expected {}", value.name, it->second.Type().ToString(), value.type.ToString());
      tensors[id] = it->second;
    }
  }

  void BindWeights(const WeightSource& weights) {
    for (size_t id = 0; id < graph.Values().size(); ++id) {
      const Value& value = graph.Values()[id];
      if (value.kind == ValueKind::kConstant) tensors[id] = value.constant;
      if (value.kind != ValueKind::kWeight) continue;
      tensors[id] = weights(value.name);
      if (tensors[id].Type() != value.type)
        Fail("{}: is {}, expected {}", value.name, tensors[id].Type().ToString(), value.type.ToString());
    }
  }

  void BindOperands(bool all) {
    for (size_t i = 0; i < graph.Nodes().size(); ++i) {
      if (!memory.needed[i] || !(all || operands[i].external)) continue;
      const Node& node = graph.Nodes()[i];
      Operands& o = operands[i];
      o.in.clear();
      o.out.clear();
      for (const ValueId id : node.in) o.in.push_back(TensorOf(id));
      for (const ValueId id : node.out) o.out.push_back(TensorOf(id));
    }
  }
};

Executor::Executor(const Graph& graph, PointReading* reading) : plan_(std::make_unique<Plan>()) {
  plan_->graph = graph;
  std::vector<PointUseOfNode> uses(graph.Nodes().size());
  plan_->visitors.resize(graph.Nodes().size());
  plan_->points_write = reading != nullptr && reading->Writes();
  for (size_t i = 0; i < graph.Nodes().size(); ++i) {
    const Node& node = graph.Nodes()[i];
    for (const Point& point : node.points) {
      const bool asked = reading != nullptr && !point.name.empty();
      plan_->visitors[i].push_back(asked ? reading->At(point, graph.TypeOf(node.out[0])) : nullptr);
      if (plan_->visitors[i].back() != nullptr) uses[i] = {true, reading->Writes()};
    }
  }
  plan_->memory = PlanMemory(graph, uses);
  plan_->tensors.resize(graph.Values().size());
  plan_->operands.resize(graph.Nodes().size());
  for (size_t i = 0; i < graph.Nodes().size(); ++i) {
    const auto external = [&](ValueId id) { return plan_->memory.homes[id].place == MemoryPlan::Place::kInput; };
    const Node& node = graph.Nodes()[i];
    plan_->operands[i].external = std::any_of(node.in.begin(), node.in.end(), external) ||
                                  std::any_of(node.out.begin(), node.out.end(), external);
  }
}

Executor::~Executor() = default;
Executor::Executor(Executor&&) noexcept = default;

void Executor::SetProbe(Probe probe) { plan_->probe = std::move(probe); }

void Executor::ForgetWeights() { plan_->bound = false; }

int64_t Executor::PlannedBytes() const { return plan_->memory.arena_bytes; }

std::map<std::string, Tensor> Executor::Run(const std::map<std::string, Tensor>& inputs, const WeightSource& weights) {
  Plan& plan = *plan_;
  plan.BindInputs(inputs);
  if (!plan.bound) plan.BindWeights(weights);
  std::byte* const arena = Scratch(plan.memory.arena_bytes);
  const bool moved = arena != std::exchange(plan.arena, arena);
  plan.BindOperands(!plan.bound || moved);
  plan.bound = true;

  for (size_t i = 0; i < plan.graph.Nodes().size(); ++i) {
    if (!plan.memory.needed[i]) continue;
    const Node& node = plan.graph.Nodes()[i];
    const Plan::Operands& operands = plan.operands[i];
    try {
      if (std::holds_alternative<QuantPoint>(node.op.kind)) {
        if (operands.out[0].Raw() != operands.in[0].Raw())
          std::memcpy(operands.out[0].Raw(), operands.in[0].Raw(), static_cast<size_t>(operands.in[0].Bytes()));
        if (plan.visitors[i][0] != nullptr) VisitAll(*plan.visitors[i][0], operands.out[0]);
      } else if (!node.op.IsView()) {
        node.op.Eval({.in = operands.in,
                      .out = operands.out,
                      .points = plan.visitors[i],
                      .points_write = plan.points_write});
      }
    } catch (const Error& error) {
      throw error.Within(Label(plan.graph, i));
    }
    if (plan.probe)
      for (size_t k = 0; k < node.out.size(); ++k) plan.probe(node, static_cast<int>(k), operands.out[k]);
  }

  std::map<std::string, Tensor> results;
  for (const Graph::Output& output : plan.graph.Outputs()) results[output.name] = plan.TensorOf(output.value).Clone();
  return results;
}

}  // namespace circlet
