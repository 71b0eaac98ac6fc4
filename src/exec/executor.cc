#include "circlet/exec/executor.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "circlet/base/threads.h"
#include "exec/memory_plan.h"
#include "exec/value_grids.h"
#include "ops/codes.h"
#include "ops/integer_product.h"
#include "ops/simd.h"

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

// The tensors that a node's points see, in the order of the points. Of a fused operator they are those of its
// expansion; heads or parts that share a point count as one tensor.
std::vector<TensorType> TypesAtPoints(const Graph& graph, const Node& node) {
  std::vector<TensorType> types(node.points.size(), graph.TypeOf(node.out[0]));
  if (!node.op.Fused()) return types;
  Graph alone;
  std::vector<ValueId> in;
  for (const ValueId id : node.in) in.push_back(alone.AddInput(fmt::format("in.{}", in.size()), graph.TypeOf(id)));
  for (const ValueId id : alone.Add(node.op, in, node.points)) alone.AddOutput(fmt::format("out.{}", id), id);
  std::vector<bool> met(types.size());
  const Graph expanded = Expanded(alone);
  for (const Node& inner : expanded.Nodes()) {
    if (!inner.op.IsPoint()) continue;
    const auto at = std::ranges::find(node.points, inner.points[0].name, &Point::name) - node.points.begin();
    const Shape& shape = expanded.TypeOf(inner.out[0]).shape;
    if (!met[at])
      types[at].shape = shape;
    else if (shape.Rank() > 0)
      types[at].shape[0] += shape[0];
    met[at] = true;
  }
  return types;
}

// The node as a user knows it: the nearest point behind it, else its operator.
std::string Label(const Graph& graph, size_t index) {
  for (size_t i = index; i < graph.Nodes().size() && i < index + 8; ++i)
    for (const Point& point : graph.Nodes()[i].points)
      if (!point.name.empty()) return point.name;
  return fmt::format("node {}", index);
}

bool IsFloat(DType type) {
  return type == DType::kF32 || type == DType::kBF16 || type == DType::kF16 || type == DType::kF64;
}

Tensor Dequantized(const Tensor& codes) {
  const Tensor values = Tensor::Uninitialized({DType::kF32, codes.GetShape()});
  Dequantize(codes, *codes.Grid(), 0, values.F32());
  return values;
}

// Whether these are the values of a float32 input as codes.
bool IsCodesOf(const Tensor& given, const TensorType& type) {
  return type.dtype == DType::kF32 && IsInteger(given.GetDType()) && given.Grid() != nullptr &&
         given.GetShape() == type.shape;
}

// Scratch memory of the calling thread, shared by all its executors: nothing in it outlives the thread's next run. It
// grows to the largest plan, in place where the system can move pages: a fresh one would be faulted in anew.
std::byte* Scratch(int64_t bytes) {
  constexpr int64_t kAlignment = 64;
  struct Memory {
    std::byte* data = nullptr;
    int64_t bytes = 0;
    ~Memory() { std::free(data); }
  };
  thread_local Memory scratch;
  if (scratch.data == nullptr || scratch.bytes < bytes) {
    void* const grown = std::realloc(scratch.data, static_cast<size_t>(bytes + kAlignment));
    if (grown == nullptr) Fail("no memory for the {} bytes of a graph's values", bytes);
    scratch.data = static_cast<std::byte*>(grown);
    scratch.bytes = bytes;
  }
  return scratch.data + (-reinterpret_cast<uintptr_t>(scratch.data) & (kAlignment - 1));
}

}  // namespace

struct Executor::Plan {
  Graph graph;
  MemoryPlan memory;
  std::vector<std::vector<PointVisitor*>> visitors;      // by node
  std::vector<std::vector<const QParams*>> point_grids;  // the same
  bool points_write = false;
  std::vector<int> passed_by;  // by value: the point that an input passes before anything runs (PassesCodes); -1: none
  ExecutorOptions options;
  struct Reader {
    const Node* node;  // null: the graph's output
    int operand;
    bool LinearWeight() const { return node != nullptr && node->op.WeightInput() == operand; }
    bool Table() const { return node != nullptr && node->op.TableInput() == operand; }
  };
  std::vector<std::vector<Reader>> readers;  // by value, of inputs, parameters and constants: who looks at the bytes
  std::vector<const QParams*> grids;         // by value
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
    if (home.place == MemoryPlan::Place::kArena) return Tensor(graph.TypeOf(id), arena + home.offset, nullptr);
    const Tensor& root = tensors[home.root];
    const Tensor tensor({root.GetDType(), graph.TypeOf(id).shape}, root.Raw(), nullptr);
    return IsInteger(root.GetDType()) ? tensor.WithGrid(root.Grid()) : tensor;
  }

  void FindReaders() {
    readers.resize(graph.Values().size());
    const auto note = [&](ValueId id, const Node* node, int operand) {
      const ValueId root = memory.homes[id].root;
      if (root < 0) return;
      // What reads another shape of it cannot tell which row has which grid.
      readers[root].push_back(id == root ? Reader{node, operand} : Reader{nullptr, 0});
    };
    for (size_t i = 0; i < graph.Nodes().size(); ++i) {
      const Node& node = graph.Nodes()[i];
      if (!memory.needed[i]) continue;
      if (node.op.IsPoint() && visitors[i][0] == nullptr) continue;
      for (size_t k = 0; k < node.in.size(); ++k) note(node.in[k], &node, static_cast<int>(k));
    }
    for (const Graph::Output& output : graph.Outputs()) note(output.value, nullptr, 0);
  }

  bool LinearOnly(ValueId id) const {
    return !readers[id].empty() && std::ranges::all_of(readers[id], &Reader::LinearWeight);
  }

  // Whether all who read these codes take them as they are, without making them float32 at every run.
  bool ReadAsCodes(ValueId id, const Tensor& codes) const {
    constexpr int64_t kLargeElements = int64_t{16} << 20;
    return std::ranges::all_of(readers[id], [&](const Reader& reader) {
      if (reader.Table()) return true;
      if (!reader.LinearWeight()) return false;
      return options.keep_codes || codes.Elements() > kLargeElements ||
             SummedInIntegers(grids[reader.node->in[reader.operand - 1]], codes.Grid(), codes.GetShape()[-1]);
    });
  }

  // Whether a point takes the value, which makes it float32 in the plan's own memory.
  bool ReadAtPointsOnly(ValueId id) const {
    return std::ranges::all_of(
        readers[id], [](const Reader& reader) { return reader.node != nullptr && reader.node->op.IsPoint(); });
  }

  // Whether a point does to an input what the input brings with it as codes, for readers that take those: then nothing
  // is widened between.
  bool PassesCodes(const Node& node, size_t index) const {
    if (!node.op.IsPoint() || !points_write || visitors[index][0] == nullptr || point_grids[index][0] == nullptr ||
        graph.At(node.in[0]).kind != ValueKind::kInput)
      return false;
    const auto is_read = [&](ValueId id) {
      return std::ranges::any_of(graph.Outputs(), [&](const Graph::Output& output) { return output.value == id; });
    };
    if (is_read(node.in[0]) || is_read(node.out[0])) return false;
    bool taken = false;
    for (const Node& other : graph.Nodes())
      for (size_t k = 0; k < other.in.size(); ++k) {
        if (&other != &node && other.in[k] == node.in[0]) return false;
        if (other.in[k] != node.out[0]) continue;
        if (!other.op.TakesCodes(static_cast<int>(k))) return false;
        taken = true;
      }
    return taken;
  }

  // A parameter in the form that its readers compute with.
  Tensor Bound(ValueId id, const Tensor& given) const {
    Tensor tensor = given;
    if (IsInteger(given.GetDType()) && given.Grid() != nullptr) {
      if (ReadAsCodes(id, given)) return given;
      tensor = Dequantized(given);
    }
    if (options.compute == Compute::kFloat32 || !IsFloat(tensor.GetDType())) return tensor;
    return LinearOnly(id) ? ToBF16(tensor) : ToF32(tensor);
  }

  bool Fits(ValueId id, const Tensor& given) const {
    const TensorType& type = graph.TypeOf(id);
    if (tensors[id].GetShape() != type.shape) return false;
    const bool bf16 = options.compute == Compute::kBf16 && tensors[id].GetDType() == DType::kBF16 && LinearOnly(id);
    return tensors[id].GetDType() == type.dtype || bf16 || (type.dtype == DType::kF32 && given.Grid() != nullptr);
  }

  void BindInputs(const std::map<std::string, Tensor>& inputs) {
    for (const ValueId id : graph.Inputs()) {
      const Value& value = graph.At(id);
      const auto it = inputs.find(value.name);
      if (it == inputs.end()) Fail("input \"{}\" ({}) is missing", value.name, value.type.ToString());
      const bool codes = IsCodesOf(it->second, value.type);
      if (!codes && it->second.Type() != value.type)
        Fail("input \"{}\" is {}, expected {}", value.name, it->second.Type().ToString(), value.type.ToString());
      tensors[id] = passed_by[id] >= 0               ? Passed(it->second, codes, passed_by[id])
                    : codes && !ReadAtPointsOnly(id) ? Dequantized(it->second)
                                                     : it->second;
    }
  }

  // Behind the point: codes that are on its grid already as they are.
  Tensor Passed(const Tensor& given, bool codes, int point) const {
    if (codes && *given.Grid() == *point_grids[point][0]) return given;
    const Tensor values = codes ? Dequantized(given) : given.Clone();
    VisitAll(*visitors[point][0], values);
    return values;
  }

  void BindWeights(const WeightSource& weights) {
    for (ValueId id = 0; id < static_cast<ValueId>(graph.Values().size()); ++id) {
      const Value& value = graph.At(id);
      if (value.kind == ValueKind::kConstant) tensors[id] = Bound(id, value.constant);
      if (value.kind != ValueKind::kWeight) continue;
      const Tensor given = weights(value.name);
      tensors[id] = Bound(id, given);
      if (!Fits(id, given))
        Fail("{}: is {}, expected {}; the weights are another model's", value.name, given.Type().ToString(),
             value.type.ToString());
    }
  }

  void BindOperands(bool all) {
    for (size_t i = 0; i < graph.Nodes().size(); ++i) {
      if (!memory.needed[i] || !(all || operands[i].external)) continue;
      const Node& node = graph.Nodes()[i];
      Operands& o = operands[i];
      o.in.clear();
      o.out.clear();
      for (const ValueId id : node.in) {
        const Tensor operand = TensorOf(id);
        o.in.push_back(grids[id] == nullptr ? operand : operand.WithGrid(grids[id]));
      }
      for (const ValueId id : node.out) o.out.push_back(TensorOf(id));
    }
  }
};

Tensor ToBF16(const Tensor& tensor) {
  if (tensor.GetDType() == DType::kBF16) return tensor;
  const Tensor wide = ToF32(tensor), result = Tensor::Uninitialized({DType::kBF16, tensor.GetShape()});
  uint16_t* to = reinterpret_cast<uint16_t*>(result.Raw());
  ParallelFor(wide.Elements(), 1 << 16,
              [&](int64_t begin, int64_t end) { simd::F32ToBF16(wide.F32().data() + begin, end - begin, to + begin); });
  return result;
}

Executor::Executor(Graph given, PointReading* reading, ExecutorOptions options) : plan_(std::make_unique<Plan>()) {
  if (options.compute == Compute::kBf16 && !Bf16Supported())
    Fail("bf16: this processor does not multiply bf16; that needs AVX-512 BF16 (avx512_bf16); compute in float32");
  plan_->options = options;
  plan_->graph = std::move(given);
  const Graph& graph = plan_->graph;
  std::vector<PointUseOfNode> uses(graph.Nodes().size());
  plan_->visitors.resize(graph.Nodes().size());
  plan_->point_grids.resize(graph.Nodes().size());
  plan_->points_write = reading != nullptr && reading->Writes();
  for (size_t i = 0; i < graph.Nodes().size(); ++i) {
    const Node& node = graph.Nodes()[i];
    const std::vector<TensorType> types = reading == nullptr ? std::vector<TensorType>() : TypesAtPoints(graph, node);
    for (size_t k = 0; k < node.points.size(); ++k) {
      const Point& point = node.points[k];
      const bool asked = reading != nullptr && !point.name.empty();
      plan_->visitors[i].push_back(asked ? reading->At(point, types[k]) : nullptr);
      plan_->point_grids[i].push_back(asked ? reading->GridAt(point) : nullptr);
      if (plan_->visitors[i].back() != nullptr) uses[i] = {true, reading->Writes(), reading->Observes()};
    }
  }
  plan_->passed_by.assign(graph.Values().size(), -1);
  for (size_t i = 0; i < graph.Nodes().size(); ++i) {
    const Node& node = graph.Nodes()[i];
    if (uses[i].observes || !plan_->PassesCodes(node, i)) continue;
    plan_->passed_by[node.in[0]] = static_cast<int>(i);
    uses[i] = {};
  }
  plan_->memory = PlanMemory(graph, uses);
  plan_->FindReaders();
  plan_->grids = GridsOfValues(graph, plan_->visitors, plan_->point_grids, plan_->points_write);
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
  std::map<std::string, Tensor> results = RunInPlace(inputs, weights);
  for (auto& [name, tensor] : results) tensor = tensor.Clone();
  return results;
}

std::map<std::string, Tensor> Executor::RunInPlace(const std::map<std::string, Tensor>& inputs,
                                                   const WeightSource& weights) {
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
      if (node.op.IsPoint() && plan.passed_by[node.in[0]] >= 0) {
        // passed with the inputs
      } else if (node.op.IsPoint() && IsInteger(operands.in[0].GetDType())) {
        const QParams& grid = *operands.in[0].Grid();
        Dequantize(operands.in[0], grid, 0, operands.out[0].F32());
        const QParams* const own = plan.point_grids[i][0];
        const bool stay = plan.points_write && own != nullptr && *own == grid;
        if (plan.visitors[i][0] != nullptr && !stay) VisitAll(*plan.visitors[i][0], operands.out[0]);
      } else if (node.op.IsPoint()) {
        if (operands.out[0].Raw() != operands.in[0].Raw())
          std::memcpy(operands.out[0].Raw(), operands.in[0].Raw(), static_cast<size_t>(operands.in[0].Bytes()));
        if (plan.visitors[i][0] != nullptr) VisitAll(*plan.visitors[i][0], operands.out[0]);
      } else if (!node.op.IsView()) {
        node.op.Eval({.in = operands.in,
                      .out = operands.out,
                      .points = plan.visitors[i],
                      .grids = plan.point_grids[i],
                      .points_write = plan.points_write,
                      .compute = plan.options.compute});
      }
    } catch (const Error& error) {
      throw error.Within(Label(plan.graph, i));
    }
    if (plan.probe)
      for (size_t k = 0; k < node.out.size(); ++k) plan.probe(node, static_cast<int>(k), operands.out[k]);
  }

  std::map<std::string, Tensor> results;
  for (const Graph::Output& output : plan.graph.Outputs()) results[output.name] = plan.TensorOf(output.value);
  return results;
}

}  // namespace circlet
