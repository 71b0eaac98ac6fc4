#include "pipeline/step_rounding.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <set>
#include <tuple>

#include "circlet/base/threads.h"
#include "ops/gemm.h"
#include "ops/simd.h"
#include "pipeline/estimate.h"
#include "pipeline/exchange.h"
#include "quant/weights/moments.h"
#include "quant/weights/rounding.h"

namespace circlet {
namespace {

std::string CutKey(size_t group, size_t place) { return fmt::format("rounding.cut.{}.{}", group, place); }
std::string FloatKey(const Step& step, size_t group) { return fmt::format("rounding.float.{}.{}", step.name, group); }
std::string WeightKey(const Step& step, size_t group) { return FloatKey(step, group) + ".weights"; }
std::string ResidualKey(const Step& step, size_t group) { return FloatKey(step, group) + ".residual"; }
std::string ScaleKey(const Step& step, size_t group) { return FloatKey(step, group) + ".scale"; }
std::string InputName(size_t group) { return fmt::format("linear.{}", group); }
std::string NormedName(size_t group, size_t i) { return fmt::format("normed.{}.{}", group, i); }
std::string SumName(size_t group) { return fmt::format("sum.{}", group); }
std::string ResidualName(size_t group) { return fmt::format("residual.{}", group); }

int64_t RealPositions(const Item& item) {
  int64_t count = 0;
  for (const auto& [begin, end] : item.real) count += end - begin;
  return count;
}

bool HasPadding(const Item& item, const Shape& shape) {
  const bool by_position = shape.Rank() >= 3 && shape[1] == item.length && shape.Elements() == item.length * shape[-1];
  return by_position && RealPositions(item) < item.length;
}

// The positions that are no padding, [rows, width]; all of a tensor without positions.
Tensor RealRows(const Item& item, const Tensor& tensor) {
  const Shape& shape = tensor.GetShape();
  const int64_t width = shape[-1], rows = tensor.Elements() / width;
  if (!HasPadding(item, shape)) return tensor.Reshaped({rows, width});
  const int64_t count = RealPositions(item);
  const Tensor real = Tensor::Uninitialized({DType::kF32, {count, width}});
  float* to = real.F32().data();
  for (const auto& [begin, end] : item.real)
    to = std::copy(tensor.F32().data() + begin * width, tensor.F32().data() + end * width, to);
  return real;
}

// The same with all values of a position in its row, those of several heads too.
Tensor PositionRows(const Item& item, const Tensor& tensor) {
  const Shape& shape = tensor.GetShape();
  if (shape.Rank() < 3 || shape[1] != item.length) return RealRows(item, tensor);
  return RealRows(item, tensor.Reshaped({1, item.length, tensor.Elements() / item.length}));
}

void Subtract(const Tensor& a, const Tensor& b, const Tensor& difference) {
  ParallelFor(a.Elements(), 4096, [&](int64_t begin, int64_t end) {
    simd::Binary(simd::BinaryOp::kSub, a.F32().data() + begin, b.F32().data() + begin, end - begin,
                 difference.F32().data() + begin);
  });
}

Tensor Difference(const Tensor& a, const Tensor& b) {
  const Tensor difference = Tensor::Uninitialized(a.Type());
  Subtract(a, b, difference);
  return difference;
}

// x [.., columns], float32, times the transpose of weight [rows, columns], float32 or bf16.
Tensor Product(const Tensor& x, const Tensor& weight) {
  const int64_t columns = weight.GetShape()[1], rows = weight.GetShape()[0], count = x.Elements() / columns;
  const Tensor product = Tensor::Uninitialized({DType::kF32, {count, rows}});
  if (weight.GetDType() == DType::kBF16)
    gemm::LinearBf16(x.F32().data(), weight.Raw(), nullptr, count, rows, columns, product.F32().data());
  else
    gemm::Linear(x.F32().data(), weight.F32().data(), nullptr, count, rows, columns, product.F32().data());
  return product;
}

// Adds the squares of each row to what stands there, and returns how many values a row has.
int64_t AddSquares(const Tensor& rows, std::vector<double>& sums) {
  const int64_t width = rows.GetShape()[1];
  sums.resize(static_cast<size_t>(rows.GetShape()[0]));
  for (size_t row = 0; row < sums.size(); ++row)
    for (const float value : rows.F32().subspan(row * width, width)) sums[row] += double{value} * value;
  return width;
}

// The largest sum of magnitudes of a row: how much larger than its inputs a product can be.
float LargestRowSum(const Tensor& weight) {
  float largest = 0;
  const int64_t columns = weight.GetShape()[1];
  for (int64_t row = 0; row < weight.GetShape()[0]; ++row) {
    float sum = 0;
    for (const float value : weight.F32().subspan(row * columns, columns)) sum += std::abs(value);
    largest = std::max(largest, sum);
  }
  return largest;
}

// Adds up what all processes have; pieces keep what is sent small.
void Share(weights::Moment& moment, Communicator& world) {
  if (world.Size() == 1) return;
  constexpr size_t kPieceBytes = size_t{32} << 20;
  const std::string mine(reinterpret_cast<const char*>(moment.Raw().data()), moment.Raw().size());
  const std::string positions = std::to_string(moment.Positions());
  const std::vector<std::string> all_positions = world.AllGather(positions);
  for (size_t begin = 0; begin < mine.size(); begin += kPieceBytes) {
    const std::vector<std::string> pieces = world.AllGather(mine.substr(begin, kPieceBytes));
    for (int rank = 0; rank < world.Size(); ++rank)
      if (rank != world.Rank())
        moment.MergeRaw(static_cast<int64_t>(begin / sizeof(int64_t)), std::as_bytes(std::span(pieces[rank])),
                        begin == 0 ? std::stoll(all_positions[rank]) : 0);
  }
}

weights::RoundingOptions OptionsOf(const PointSpec& spec, const WeightRounding& method) {
  weights::RoundingOptions options{.dtype = spec.dtype, .symmetric = spec.scheme.symmetric, .method = method};
  if (method.bits > 0 && BitWidth(spec.dtype) == 4) {
    const int64_t half = int64_t{1} << (method.bits - 1);
    options.codes = CodesOf(spec.dtype).min < 0 ? CodeRange{-half, half - 1} : CodeRange{0, 2 * half - 1};
  }
  return options;
}

// What the group's linears give.
std::vector<ValueId> OutputsOf(const Graph& graph, const LinearGroup& group) {
  std::vector<ValueId> outputs;
  for (const Node& node : graph.Nodes())
    if (const int at = node.op.WeightInput();
        at >= 0 && std::ranges::find(group.weights, graph.At(node.in[at]).name) != group.weights.end())
      outputs.push_back(node.out[0]);
  return outputs;
}

}  // namespace

std::vector<LinearGroup> LinearGroupsOf(const Graph& graph, const Calibration& calibration) {
  std::vector<LinearGroup> groups;
  if (!calibration.GetRecipe().rounding || calibration.Frozen()) return groups;
  std::set<std::string> seen;
  for (const Node& node : graph.Nodes()) {
    if (node.op.WeightInput() < 0) continue;
    const Value& weight = graph.At(node.in[node.op.WeightInput()]);
    if (weight.kind != ValueKind::kWeight || !IsLinear(weight.weight_point.kind) || !seen.insert(weight.name).second)
      continue;
    const PointSpec spec = calibration.SpecFor(weight.weight_point);
    if (spec.kind != QuantKind::kAffine || spec.axis != 0 || BitWidth(spec.dtype) > 8) continue;
    // Behind a point that only says again what grid the value lies on.
    ValueId input = node.in[0];
    while (graph.At(input).kind == ValueKind::kNode) {
      const Node& producer = graph.Nodes()[graph.At(input).node];
      if (!producer.op.IsPoint() || producer.points[0].use != PointUse::kBoundary) break;
      input = producer.in[0];
    }
    const auto group = std::ranges::find(groups, input, &LinearGroup::input);
    if (group != groups.end())
      group->weights.push_back(weight.name);
    else
      groups.push_back({.input = input, .weights = {weight.name}});
  }
  for (LinearGroup& group : groups) {
    group.behind = FindNormsBehind(graph, OutputsOf(graph, group));
    const ValueId residual = group.behind.residual;
    if (residual < 0 || graph.At(residual).kind != ValueKind::kNode) group.behind.gain.clear();
  }
  return groups;
}

namespace {

// What stands between the nodes that a group needs and all others that later groups or the outputs need; the group's
// input first.
std::vector<ValueId> CutBehind(const Graph& graph, const std::vector<LinearGroup>& groups, size_t group) {
  // By node: the first group that needs it; behind them the outputs, and nobody.
  const size_t outputs = groups.size(), nobody = outputs + 1;
  std::vector<size_t> needed_by(graph.Nodes().size(), nobody);
  for (size_t g = nobody; g-- > 0;) {
    std::vector<ValueId> asked;
    if (g < outputs)
      asked.push_back(groups[g].input);
    else
      for (const Graph::Output& output : graph.Outputs()) asked.push_back(output.value);
    while (!asked.empty()) {
      const Value& value = graph.At(asked.back());
      asked.pop_back();
      if (value.kind != ValueKind::kNode || needed_by[value.node] == g) continue;
      needed_by[value.node] = g;
      const std::vector<ValueId>& in = graph.Nodes()[value.node].in;
      asked.insert(asked.end(), in.begin(), in.end());
    }
  }
  std::vector<ValueId> cut{groups[group].input};
  const auto add = [&](ValueId id) {
    const Value& value = graph.At(id);
    if (value.kind == ValueKind::kNode && needed_by[value.node] <= group && std::ranges::find(cut, id) == cut.end())
      cut.push_back(id);
  };
  for (size_t i = 0; i < graph.Nodes().size(); ++i)
    if (needed_by[i] > group && needed_by[i] != nobody) std::ranges::for_each(graph.Nodes()[i].in, add);
  for (const Graph::Output& output : graph.Outputs()) add(output.value);
  return cut;
}

}  // namespace

namespace {

// Which of the two sums of differences is the cheaper one: [columns, columns] of the inputs', else [rows, columns] of
// the outputs'.
bool TakesDifferences(int64_t rows, int64_t columns) { return columns <= 2 * rows; }

// Of a group's matrices, one below the other.
std::pair<int64_t, int64_t> RowsAndColumns(const Graph& graph, const LinearGroup& group) {
  int64_t rows = 0;
  for (const Value& value : graph.Values())
    if (value.kind == ValueKind::kWeight && std::ranges::find(group.weights, value.name) != group.weights.end())
      rows += value.type.shape[0];
  return {rows, graph.TypeOf(group.input).shape[-1]};
}

// What the moments of a group take and what is made of them (rounding.h).
int64_t SolverBytes(int64_t rows, int64_t columns, bool makes_up, const WeightRounding& method) {
  const bool square = TakesDifferences(rows, columns);
  // The moment (half of it, in int64) and its factors; weights, targets, changes and codes.
  int64_t bytes = (columns <= 4096 ? 20 : 8) * columns * columns + 16 * rows * columns;
  if (makes_up && square) bytes += 8 * rows * columns;
  if (method.correct_inputs) bytes += (square ? 4 * columns * columns : 8 * rows * columns) + 8 * rows * columns;
  return bytes;
}

}  // namespace

void AddRounding(const Stage& stage, const ItemSet& items, const Calibration& calibration, int rank,
                 StageEstimate& estimate) {
  if (!calibration.GetRecipe().rounding) return;
  const WeightRounding& method = *calibration.GetRecipe().rounding;
  // Products of the errors with the moments: half a one for columns in order and for a loss, a whole one for the
  // gradient that descent follows and for a refit.
  const int targets = method.correct_inputs ? 2 : 1;
  const double solves = 0.5 * targets * (1 + method.solved_ranges) + method.scale_refits +
                        (method.descent_passes > 0 ? 1 : 0) + (method.correct_inputs ? 1.5 : 1);
  for (const Step& step : stage.steps) {
    const Item* longest = nullptr;
    double positions = 0;
    for (const Item& item : items) {
      if (item.rank != rank || !items.PassageOf(item).observed) continue;
      positions += static_cast<double>(item.length);
      if (longest == nullptr || item.length > longest->length) longest = &item;
    }
    if (longest == nullptr) continue;
    const Graph graph = step.build(*longest);
    const std::vector<LinearGroup> groups = LinearGroupsOf(graph, calibration);
    // What waits for one item: from cut to cut, and the float inputs of all groups.
    double waits = 0, between = 0;
    const auto bytes_of = [&](ValueId id) { return static_cast<double>(graph.At(id).type.shape.Elements()) * 4; };
    for (size_t g = 0; g < groups.size(); ++g) {
      double bytes = 0;
      for (const ValueId id : CutBehind(graph, groups, g)) bytes += bytes_of(id);
      between = std::max(between, bytes);
      if (method.correct_inputs) waits += bytes_of(groups[g].input);
      if (method.residual_target > 0 && !groups[g].behind.gain.empty()) waits += bytes_of(groups[g].behind.residual);
    }
    estimate.waiting_bytes =
        std::max(estimate.waiting_bytes,
                 static_cast<int64_t>((waits + 2 * between) * positions / static_cast<double>(longest->length)));
    // Where the chain does not go on from the last cut it is computed once more.
    if (!groups.empty() && calibration.GetDialect().requantizing_points)
      estimate.flops += ProductFlops(graph) * positions / static_cast<double>(longest->length);
    for (const LinearGroup& group : groups) {
      const auto [all_rows, columns] = RowsAndColumns(graph, group);
      const bool square = TakesDifferences(all_rows, columns);
      const auto n = static_cast<double>(columns), rows = static_cast<double>(all_rows);
      estimate.flops += positions * n * n + targets * n * n * n / 3 + 2 * (solves + targets - 1) * rows * n * n;
      if (method.correct_inputs) estimate.flops += positions * (square ? 2 * n * n : 4 * n * rows);
      const bool makes_up = method.residual_target > 0 && !group.behind.gain.empty();
      if (makes_up && square) estimate.flops += 2 * positions * n * rows;
      estimate.rounding_bytes = std::max(estimate.rounding_bytes, SolverBytes(all_rows, columns, makes_up, method));
    }
  }
}

void AddPlainProducts(const Stage& stage, const ItemSet& items, const Calibration& calibration, int rank,
                      gemm::Tally& tally) {
  if (!calibration.GetRecipe().rounding) return;
  const int moments = calibration.GetRecipe().rounding->correct_inputs ? 2 : 1;
  for (const Step& step : stage.steps) {
    // By what shapes a graph, and by how much of it is no padding.
    std::map<std::tuple<int64_t, std::string, int64_t>, std::pair<const Item*, int64_t>> counts;
    for (const Item& item : items)
      if (item.rank == rank && items.PassageOf(item).observed)
        ++counts.try_emplace({item.length, item.variant, RealPositions(item)}, &item, 0).first->second.second;
    for (const auto& [shape, counted] : counts) {
      const auto& [item, count] = counted;
      const Graph graph = step.build(*item);
      for (const MatrixProduct& product : ProductsOf(graph))
        tally.Add({.m = product.m, .n = product.n, .k = product.k, .transposed = product.transposed},
                  2 * count * product.count);
      for (const LinearGroup& group : LinearGroupsOf(graph, calibration)) {
        const TensorType& x = graph.TypeOf(group.input);
        const int64_t columns = x.shape[-1];
        const int64_t rows = x.shape.Elements() / columns;
        tally.Add({.m = columns, .n = columns, .k = HasPadding(*item, x.shape) ? RealPositions(*item) : rows},
                  moments * count);
      }
    }
  }
}

// Of one group.
struct StepRounding::Moments {
  std::optional<weights::Moment> inputs;               // sum x x^T; none: no calibration item reaches the step
  std::optional<weights::Moment> differences;          // sum x (x_f - x)^T, where that is the cheaper form
  std::map<std::string, weights::Moment> corrections;  // else by weight: sum W (x_f - x) x^T
  std::optional<weights::Moment> residuals;  // beside `differences`: sum r x^T, r what the target makes up for
};

StepRounding::StepRounding(const StageContext& context, const Step& step, std::vector<std::string> outputs)
    : c_(context), step_(step), outputs_(std::move(outputs)) {
  std::vector<LinearGroup> groups;
  for (const Item& item : c_.items) {
    if (!c_.PassageOf(item).observed) continue;
    if (c_.IsMine(item)) items_.push_back(&item);
    if (!groups.empty()) continue;
    const Graph graph = WithOutputs(step.build(item), outputs_);
    groups = LinearGroupsOf(graph, c_.calibration);
    bounds_.resize(groups.size());
    for (size_t g = 0; g < groups.size(); ++g) {
      weights_.push_back(groups[g].weights);
      sizes_.push_back(RowsAndColumns(graph, groups[g]));
      const NormsBehind& behind = groups[g].behind;
      const std::vector<ValueId> cut = CutBehind(graph, groups, g);
      const auto residual = std::ranges::find(cut, behind.residual);
      behind_.push_back({.norms = behind.reads.size(),
                         .eps = behind.eps,
                         .gain = MakesUp() && residual != cut.end() ? behind.gain : "",
                         .place = static_cast<size_t>(residual - cut.begin())});
    }
  }
}

int64_t StepRounding::Work() const { return static_cast<int64_t>(items_.size() * weights_.size()); }

bool StepRounding::Corrects() const { return c_.calibration.GetRecipe().rounding->correct_inputs; }

bool StepRounding::MakesUp() const { return c_.calibration.GetRecipe().rounding->residual_target > 0; }

WeightRounding::TokenWeights StepRounding::TokenWeights() const {
  return c_.calibration.GetRecipe().rounding->token_weights;
}

Graph StepRounding::WithInputs(Graph graph, const Item& item) const {
  using Weights = WeightRounding::TokenWeights;
  if (weights_.empty() || !c_.PassageOf(item).observed) return graph;
  const std::vector<LinearGroup> groups = LinearGroupsOf(graph, c_.calibration);
  for (size_t g = 0; g < groups.size(); ++g) {
    const LinearGroup& group = groups[g];
    if (Corrects()) graph.AddOutput(InputName(g), group.input);
    if (TokenWeights() != Weights::kNone || !behind_[g].gain.empty())
      for (size_t i = 0; i < group.behind.reads.size(); ++i) graph.AddOutput(NormedName(g, i), group.behind.reads[i]);
    if (TokenWeights() == Weights::kStream && group.behind.sum >= 0) graph.AddOutput(SumName(g), group.behind.sum);
    if (!behind_[g].gain.empty()) graph.AddOutput(ResidualName(g), group.behind.residual);
  }
  return graph;
}

void StepRounding::KeepInputs(const Item& item, const std::map<std::string, Tensor>& results) {
  if (weights_.empty() || !c_.PassageOf(item).observed) return;
  const auto put = [&](const std::string& key, const Tensor& tensor) {
    c_.store.Put(item.id, Chain::kFloat, key, tensor, ActivationStore::Read::kLate);
  };
  const auto rows_of = [&](const std::string& output) {
    const auto it = results.find(output);
    return it == results.end() ? Tensor() : PositionRows(item, it->second);
  };
  for (size_t g = 0; g < weights_.size(); ++g) {
    if (Corrects()) {
      const Tensor rows = RealRows(item, results.at(InputName(g)));
      put(FloatKey(step_, g), rows.Clone());
      const float largest = weights::MagnitudeOf(rows);
      const std::lock_guard lock(mutex_);
      bounds_[g].in_float = std::max(bounds_[g].in_float, largest);
    }
    // What the norms divide by, squared.
    std::vector<double> squares;
    int64_t values = 0;
    for (size_t i = 0; i < behind_[g].norms; ++i)
      if (const Tensor rows = rows_of(NormedName(g, i)); !rows.Empty()) values += AddSquares(rows, squares);
    if (values == 0) continue;
    for (double& square : squares) square = square / static_cast<double>(values) + behind_[g].eps;
    const auto count = static_cast<int64_t>(squares.size());
    if (!behind_[g].gain.empty()) {
      const Tensor scale = Tensor::Uninitialized({DType::kF32, {count}});
      std::ranges::transform(squares, scale.F32().begin(), [](double square) { return std::sqrt(square); });
      put(ScaleKey(step_, g), scale);
      put(ResidualKey(step_, g), rows_of(ResidualName(g)).Clone());
    }
    if (TokenWeights() == WeightRounding::TokenWeights::kNone) continue;
    const Tensor weights = Tensor::Uninitialized({DType::kF32, {count}});
    std::vector<double> of_sum;
    const Tensor sum = rows_of(SumName(g));
    const int64_t width = sum.Empty() ? 1 : AddSquares(sum, of_sum);
    for (size_t row = 0; row < squares.size(); ++row) {
      const double stream = sum.Empty() ? 1 : of_sum[row] / static_cast<double>(width) + behind_[g].eps;
      weights.F32()[row] = static_cast<float>(1 / (squares[row] * stream));
    }
    put(WeightKey(step_, g), weights);
  }
}

Graph StepRounding::Segment(const Item& item, size_t group) const {
  const Graph graph = WithOutputs(step_.build(item), outputs_);
  const std::vector<LinearGroup> groups = LinearGroupsOf(graph, c_.calibration);
  CIRCLET_CHECK(groups.size() == weights_.size(), "{}: {} groups of linears in one graph, {} in another", item.label,
                groups.size(), weights_.size());
  std::vector<ValueId> to;
  if (group < groups.size())
    to = CutBehind(graph, groups, group);
  else
    for (const std::string& name : outputs_)
      to.push_back(std::ranges::find(graph.Outputs(), name, &Graph::Output::name)->value);
  return PartOf(graph, group == 0 ? std::vector<ValueId>{} : CutBehind(graph, groups, group - 1), to);
}

std::map<std::string, Tensor> StepRounding::Given(const Item& item, size_t group) const {
  std::map<std::string, Tensor> given;
  for (size_t place = 0; group > 0 && c_.store.Has(item.id, Chain::kQuant, CutKey(group - 1, place)); ++place)
    given[fmt::format("given.{}", place)] = c_.store.Get(item.id, Chain::kQuant, CutKey(group - 1, place));
  return given;
}

void StepRounding::Advance(size_t group) {
  if (items_.empty()) return;
  const Item& longest = **std::ranges::max_element(items_, {}, &Item::length);
  const bool side_by_side = SideBySide(step_.build(longest));
  using Plans = std::map<std::tuple<int64_t, std::string>, std::unique_ptr<ReadyGraph>>;
  std::vector<Plans> workers(Threads());
  const WeightSource weights = c_.rounded;
  std::vector<size_t> given(items_.size()), made(items_.size());
  ForItems(static_cast<int64_t>(items_.size()), side_by_side, [&](int64_t i, int worker) {
    const Item& item = *items_[i];
    auto& plan = workers[worker][{item.length, item.variant}];
    if (plan == nullptr)
      plan = std::make_unique<ReadyGraph>(Segment(item, group),
                                          std::make_unique<FakeQuantReading>(c_.calibration, true), c_.ComputeOf(item));
    std::map<std::string, Tensor> inputs = Given(item, group);
    given[i] = inputs.size();
    const std::map<std::string, Tensor> results =
        RunItem(c_, step_, item, Chain::kQuant, true, plan->executor, weights, std::move(inputs));
    made[i] = results.size();
    const Tensor rows = RealRows(item, results.at("wanted.0"));
    const float largest = weights::MagnitudeOf(rows);
    {
      const std::lock_guard lock(mutex_);
      bounds_[group].rounded = std::max(bounds_[group].rounded, largest);
      bounds_[group].positions += rows.GetShape()[0];
    }
    for (size_t place = 0; place < made[i]; ++place)
      c_.store.Put(item.id, Chain::kQuant, CutKey(group, place), results.at(fmt::format("wanted.{}", place)).Clone());
    c_.advance();
  });
  for (size_t place = 0; place < std::ranges::max(given); ++place) c_.store.Drop(CutKey(group - 1, place));
  waiting_ = std::ranges::max(made);
}

Tensor StepRounding::FloatRows(const Item& item, size_t group) const {
  return c_.store.Get(item.id, Chain::kFloat, FloatKey(step_, group));
}

// What the group's target makes up for beside its inputs: a part of what the other operand of the sum has lost, as the
// norm in front of the sum would have to get it. [rows, width].
Tensor StepRounding::ResidualRows(const Item& item, size_t group) const {
  const float part = c_.calibration.GetRecipe().rounding->residual_target;
  const Tensor lost =
      Difference(c_.store.Get(item.id, Chain::kFloat, ResidualKey(step_, group)),
                 RealRows(item, c_.store.Get(item.id, Chain::kQuant, CutKey(group, behind_[group].place))));
  const Tensor scale = c_.store.Get(item.id, Chain::kFloat, ScaleKey(step_, group));
  const Tensor gain = ToF32(c_.stored(behind_[group].gain));
  const int64_t width = lost.GetShape()[1];
  double mean = 0;
  for (const float value : gain.F32()) mean += std::abs(value) / static_cast<double>(width);
  // Outputs that the norm all but removes would have to be huge to make up for anything.
  constexpr double kLeastGain = 0.05;
  for (int64_t row = 0; row < lost.GetShape()[0]; ++row)
    for (int64_t i = 0; i < width; ++i) {
      float& value = lost.F32()[row * width + i];
      value = std::abs(gain.F32()[i]) < kLeastGain * mean ? 0 : part * value * scale.F32()[row] / gain.F32()[i];
    }
  return lost;
}

StepRounding::Moments StepRounding::Gather(size_t group) const {
  struct Largest {
    Bounds inputs;
    float residual = 0, weight = 0;
  };
  const bool makes_up = !behind_[group].gain.empty();
  const auto weights_of = [&](const Item& item, float largest) {
    std::vector<float> weights;
    if (!c_.store.Has(item.id, Chain::kFloat, WeightKey(step_, group))) return weights;
    const Tensor stored = c_.store.Get(item.id, Chain::kFloat, WeightKey(step_, group));
    for (const float weight : stored.F32()) weights.push_back(weight / largest);
    return weights;
  };
  Largest mine{.inputs = bounds_[group]};
  for (const Item* item : items_) {
    if (makes_up) mine.residual = std::max(mine.residual, weights::MagnitudeOf(ResidualRows(*item, group)));
    for (const float weight : weights_of(*item, 1)) mine.weight = std::max(mine.weight, weight);
  }
  Largest all;
  for (const auto& rank : AllGather<Largest>(c_.world, std::span(&mine, 1))) {
    all.inputs.in_float = std::max(all.inputs.in_float, rank[0].inputs.in_float);
    all.inputs.rounded = std::max(all.inputs.rounded, rank[0].inputs.rounded);
    all.inputs.positions += rank[0].inputs.positions;
    all.residual = std::max(all.residual, rank[0].residual);
    all.weight = std::max(all.weight, rank[0].weight);
  }
  Moments moments;
  const int64_t positions = all.inputs.positions;
  if (positions == 0) return moments;
  const std::vector<std::string>& names = weights_[group];
  std::map<std::string, Tensor> weights;
  const auto [rows, columns] = sizes_[group];
  const auto bound = [](float largest) { return largest > 0 ? double{largest} : 1.0; };
  const float input = all.inputs.rounded, difference = all.inputs.in_float + all.inputs.rounded;
  moments.inputs = weights::Moment::Symmetric(columns, bound(input), positions);
  if (Corrects() && TakesDifferences(rows, columns)) {
    moments.differences = weights::Moment::Cross(columns, columns, bound(difference), positions, c_.compute);
    if (makes_up)
      moments.residuals =
          weights::Moment::Cross(rows, columns, bound(std::max(input, all.residual)), positions, c_.compute);
  } else if (Corrects()) {
    for (const std::string& name : names) {
      const Tensor stored = c_.stored(name);
      const bool as_stored = c_.compute == Compute::kBf16 && stored.GetDType() == DType::kBF16;
      const Tensor weight = ToF32(stored);
      const double largest = bound(LargestRowSum(weight)) * bound(difference) + all.residual;
      moments.corrections.emplace(name, weights::Moment::Cross(weight.GetShape()[0], columns,
                                                               std::max(largest, bound(input)), positions, c_.compute));
      weights[name] = as_stored ? stored : weight;
    }
  }
  // What all items take in turn.
  weights::PositionColumns x, of_difference, of_change;
  Tensor changed;
  for (const Item* item : items_) {
    const Tensor inputs = RealRows(*item, c_.store.Get(item->id, Chain::kQuant, CutKey(group, 0)));
    const std::vector<float> counts = weights_of(*item, all.weight);
    x.Set(inputs, counts);
    Within(item->label, [&] { moments.inputs->Add(x); });
    if (!Corrects()) continue;
    if (changed.Empty() || changed.GetShape() != inputs.GetShape()) changed = Tensor::Uninitialized(inputs.Type());
    Subtract(FloatRows(*item, group), inputs, changed);
    if (moments.differences) {
      of_difference.Set(changed, counts);
      moments.differences->Add(x, of_difference);
    }
    if (moments.residuals) {
      of_change.Set(ResidualRows(*item, group), counts);
      moments.residuals->Add(of_change, x);
    }
    for (auto& [name, correction] : moments.corrections) {
      const Tensor change = Product(changed, weights[name]);
      if (makes_up)
        std::ranges::transform(change.F32(), ResidualRows(*item, group).F32(), change.F32().begin(),
                               std::plus<float>());
      of_change.Set(change, counts);
      correction.Add(of_change, x);
    }
  }
  Share(*moments.inputs, c_.world);
  if (moments.differences) Share(*moments.differences, c_.world);
  if (moments.residuals) Share(*moments.residuals, c_.world);
  for (auto& [name, correction] : moments.corrections) Share(correction, c_.world);
  return moments;
}

void StepRounding::Solve(size_t group, Moments moments) {
  if (!moments.inputs) return;
  const WeightRounding& method = *c_.calibration.GetRecipe().rounding;
  std::map<std::string, Tensor> targets;
  std::map<std::string, std::vector<float>> changes;
  double correction_added = 0;
  hwy::AlignedFreeUniquePtr<float[]> room;
  if (method.correct_inputs) {
    Tensor differences;
    if (moments.differences) {
      const int64_t columns = moments.differences->Columns();
      differences = Tensor::Of<float>({columns, columns}, moments.differences->Values());
      moments.differences.reset();
    }
    weights::InputCorrection correction = Within(
        weights_[group][0], [&] { return weights::InputCorrection(*moments.inputs, method.correction_damping); });
    correction_added = correction.Added();
    for (const std::string& name : weights_[group]) {
      std::vector<float>& change = changes[name];
      if (differences.Empty()) {
        change = moments.corrections.at(name).Values();
        moments.corrections.erase(name);
      } else {
        const Tensor product = Product(ToF32(c_.stored(name)), differences);
        change.assign(product.F32().begin(), product.F32().end());
        if (moments.residuals)
          std::ranges::transform(change, moments.residuals->Values(), change.begin(), std::plus<float>());
      }
      targets[name] = correction.Target(c_.stored(name), change);
    }
    room = correction.GiveUp();
  }
  const int64_t positions = moments.inputs->Positions();
  const weights::Metric metric =
      Within(weights_[group][0], [&] { return weights::Metric(*std::move(moments.inputs), method, std::move(room)); });
  for (const std::string& name : weights_[group]) {
    c_.say("rounding " + name);
    Within(name, [&] {
      const Tensor weight = c_.stored(name);
      const PointSpec& spec = c_.calibration.ParamsOf(name).spec;
      const weights::RoundingOptions options = OptionsOf(spec, method);
      const auto target = targets.find(name);
      const weights::RoundedMatrix rounded =
          target == targets.end()
              ? weights::Round(weight, nullptr, metric, options)
              : weights::RoundCorrected(weight, target->second, changes.at(name), correction_added, metric, options);
      RoundedLinear report{.name = name,
                           .rows = weight.GetShape()[0],
                           .columns = weight.GetShape()[1],
                           .positions = positions,
                           .dead_columns = metric.DeadColumns(),
                           .damping = metric.Damping(),
                           .rows_to_nearest = rounded.rows_to_nearest,
                           .rows_corrected = rounded.rows_corrected};
      for (const double loss : rounded.loss) report.loss += loss;
      for (const double loss : rounded.nearest_loss) report.nearest_loss += loss;
      if (target != targets.end()) targets.erase(target);
      changes.erase(name);
      c_.calibration.SetGrid(name, rounded.weight.qparams);
      c_.rounded.Take(name, rounded.weight.codes.WithGrid(std::make_shared<QParams>(rounded.weight.qparams)));
      if (c_.linears != nullptr) c_.linears->push_back(std::move(report));
    });
  }
}

void StepRounding::Run() {
  for (size_t group = 0; group < weights_.size(); ++group) {
    Advance(group);
    const auto [rows, columns] = sizes_[group];
    c_.store.SetAside(SolverBytes(rows, columns, !behind_[group].gain.empty(), *c_.calibration.GetRecipe().rounding));
    Solve(group, Gather(group));
    c_.store.SetAside(0);
    for (const std::string& key :
         {FloatKey(step_, group), WeightKey(step_, group), ResidualKey(step_, group), ScaleKey(step_, group)})
      c_.store.Drop(key);
  }
}

bool StepRounding::Waits(const Item& item) const {
  return !weights_.empty() && std::ranges::find(items_, &item) != items_.end();
}

Graph StepRounding::Rest(const Item& item) const { return Segment(item, weights_.size()); }

std::map<std::string, Tensor> StepRounding::Finish(const Item& item, Executor& executor) const {
  std::map<std::string, Tensor> results =
      RunItem(c_, step_, item, Chain::kQuant, true, executor, c_.rounded, Given(item, weights_.size()));
  std::map<std::string, Tensor> named;
  for (size_t i = 0; i < outputs_.size(); ++i) named[outputs_[i]] = results.at(fmt::format("wanted.{}", i));
  return named;
}

void StepRounding::Drop() {
  for (size_t place = 0; place < waiting_; ++place) c_.store.Drop(CutKey(weights_.size() - 1, place));
}

}  // namespace circlet
