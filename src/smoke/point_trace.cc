#include "smoke/point_trace.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <set>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"
#include "circlet/ops/ops.h"
#include "ops/codes.h"
#include "pipeline/gemma4/tails.h"
#include "smoke/grid_ends.h"

namespace circlet {
namespace {

// Of points that are captured in one run.
constexpr int64_t kCapturedBytes = int64_t{128} << 20;

// Keeps the values of some points, as the reading that it hands them to leaves them.
class CaptureReading final : public PointReading {
 public:
  // `inner` null: values pass as they are.
  CaptureReading(std::unique_ptr<PointReading> inner, const Calibration& calibration,
                 const std::set<std::string>& wanted)
      : inner_(std::move(inner)), calibration_(calibration), wanted_(wanted) {}

  // Points inside a fused operator are larger or smaller than its output, so the size shows as values come, and they
  // come from several threads.
  struct Kept final : PointVisitor {
    Kept(PointVisitor* inner_visitor, const QParams* point_grid) : inner(inner_visitor), grid(point_grid) {}
    void Visit(std::span<float> arriving, int64_t first) override {
      const int64_t clipped = CountOutside(arriving);
      if (inner != nullptr) inner->Visit(arriving, first);
      const std::lock_guard lock(mutex);
      outside += clipped;
      values.resize(std::max(values.size(), static_cast<size_t>(first) + arriving.size()));
      std::ranges::copy(arriving, values.begin() + first);
    }
    int64_t CountOutside(std::span<const float> arriving) const {
      if (grid == nullptr || grid->PerChannel()) return 0;
      const GridEnds ends = EndsOf(*grid);
      const float half = grid->scale[0] / 2;
      return std::ranges::count_if(arriving,
                                   [&](float value) { return value < ends.low - half || value > ends.high + half; });
    }
    std::mutex mutex;
    std::vector<float> values;
    int64_t outside = 0;  // arriving values that the grid does not reach
    PointVisitor* inner;
    const QParams* grid;
  };

  PointVisitor* At(const Point& point, const TensorType& type) override {
    PointVisitor* const inner = inner_ ? inner_->At(point, type) : nullptr;
    if (!wanted_.contains(point.name)) return inner;
    // A name may stand at several places (the merged embeddings); each has a visitor, the last one is shown.
    const PointParams* const params = calibration_.Params().Find(point.name);
    const bool on_grid = inner != nullptr && params != nullptr && params->spec.kind == QuantKind::kAffine;
    all_.push_back(std::make_unique<Kept>(inner, on_grid ? &params->qparams : nullptr));
    return by_name_[point.name] = all_.back().get();
  }
  bool Writes() const override { return inner_ != nullptr && inner_->Writes(); }
  bool Observes() const override { return true; }
  const QParams* GridAt(const Point& point) override { return inner_ ? inner_->GridAt(point) : nullptr; }
  const Kept* Find(const std::string& name) const {
    const auto it = by_name_.find(name);
    return it == by_name_.end() ? nullptr : it->second;
  }

 private:
  std::unique_ptr<PointReading> inner_;
  const Calibration& calibration_;
  const std::set<std::string>& wanted_;
  std::vector<std::unique_ptr<Kept>> all_;
  std::map<std::string, Kept*> by_name_;
};

// Elements and width of each point's tensor. A fused operator's points do not have its output's shape, those of its
// expansion do.
std::map<std::string, Shape> ShapesOf(const Graph& graph) {
  std::map<std::string, Shape> shapes;
  const Graph expanded = Expanded(graph);
  for (const Node& node : expanded.Nodes())
    for (const Point& point : node.points)
      if (!point.name.empty()) shapes[point.name] = expanded.TypeOf(node.out[0]).shape;
  return shapes;
}

// Errors of rows of one width that count from `first` on; of a slice in blocks that no slice cuts, so that how it was
// sliced does not show in the sums.
void AddRows(std::span<const float> reference, std::span<const float> rounded, int64_t width, int64_t first,
             bool sliced, std::vector<ErrorMetrics>& rows) {
  const int64_t count = static_cast<int64_t>(reference.size()) / width;
  rows.resize(std::max(rows.size(), static_cast<size_t>(first + count)));
  const int64_t block = sliced ? gemma4::kVocabularyBlock : width;
  ParallelFor(count, std::max<int64_t>(1, (1 << 16) / width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t column = 0; column < width; column += block) {
        const int64_t at = row * width + column, size = std::min(block, width - column);
        rows[first + row].Add(reference.subspan(at, size), rounded.subspan(at, size));
      }
  });
}

// Rows that nothing was added to were not computed.
PositionSummary SummaryOf(const std::vector<ErrorMetrics>& rows) {
  PositionErrors errors;
  for (const ErrorMetrics& row : rows)
    if (row.count > 0) errors.Add(row);
  return Summarize(std::move(errors.relative));
}

// Floats, or what codes stand for.
void CopyRow(const Tensor& weight, int64_t row, std::span<float> values) {
  const int64_t width = std::ssize(values);
  if (weight.Grid() != nullptr)
    Dequantize(weight, *weight.Grid(), row * width, values);
  else
    std::ranges::copy(weight.F32().subspan(row * width, width), values.begin());
}

// What rounding makes of a weight: inputs of any direction come out that far off on average.
void AddWeight(const Tensor& stored, const Tensor& rounded, ErrorMetrics& error) {
  if (rounded.Empty() || stored.GetShape() != rounded.GetShape()) return;
  const Tensor reference = stored.Grid() != nullptr ? stored : ToF32(stored);
  const int64_t rows = stored.GetShape()[0], width = stored.Elements() / rows;
  std::vector<float> before(static_cast<size_t>(width)), after(static_cast<size_t>(width));
  for (int64_t row = 0; row < rows; ++row) {
    CopyRow(reference, row, before);
    CopyRow(rounded, row, after);
    error.Add(before, after);
  }
}

}  // namespace

// What comes in of a point while the pieces of its step do.
struct PointTrace::Sums {
  std::vector<ErrorMetrics> errors, own;  // by row
  ErrorMetrics weight;
  int64_t weight_rows = 0;  // of a sliced weight: that were added
  int64_t values = 0, outside = 0;
  bool own_alone = false;  // of an earlier step's point, whose values a norm reads here
};

struct PointTrace::Seen {
  std::string name;
  Graph graph;
  std::map<std::string, std::vector<std::string>> reads, keeps;
  std::map<std::string, Sums> sums;
};

namespace {

// How the values of a graph hang together.
class Surroundings {
 public:
  explicit Surroundings(const WatchedStep& step) : step_(step), readers_(step.graph.Values().size()) {
    for (const Node& node : step.graph.Nodes())
      for (const ValueId in : node.in) readers_[in].push_back(&node);
  }

  // The weight of the norm that reads a value next, through points and scalar factors; empty: something else does.
  Tensor GammaBehind(ValueId value) const {
    for (const Node* const reader : readers_[value]) {
      if (std::holds_alternative<RmsNorm>(reader->op.kind)) {
        const Value& gamma = step_.graph.At(reader->in[1]);
        if (gamma.kind == ValueKind::kWeight) return ToF32(step_.parameter(gamma.name, false));
      } else if (reader->in[0] == value && !reader->out.empty() && KeepsDirections(*reader)) {
        if (Tensor gamma = GammaBehind(reader->out[0]); !gamma.Empty()) return gamma;
      }
    }
    return {};
  }

  // The weight of the product that makes a value; null: something else does.
  const Value* WeightInFront(ValueId value) const {
    const int producer = step_.graph.At(value).node;
    if (producer < 0) return nullptr;
    const Node& node = step_.graph.Nodes()[producer];
    if (!std::holds_alternative<FullyConnected>(node.op.kind)) return nullptr;
    const Value& weight = step_.graph.At(node.in[1]);
    return weight.kind == ValueKind::kWeight ? &weight : nullptr;
  }

 private:
  bool KeepsDirections(const Node& node) const {
    if (std::holds_alternative<QuantPoint>(node.op.kind)) return true;
    return std::holds_alternative<Mul>(node.op.kind) && step_.graph.TypeOf(node.in[1]).shape.Elements() == 1;
  }

  const WatchedStep& step_;
  std::vector<std::vector<const Node*>> readers_;
};

bool IsFused(const Node& node) { return !std::holds_alternative<QuantPoint>(node.op.kind); }

}  // namespace

void PointTrace::Capture(const WatchedStep& step, const std::vector<std::string>& names, Seen& seen) {
  const std::set<std::string> wanted(names.begin(), names.end());
  CaptureReading reference(ObserveReading::Reference(step.calibration), step.calibration, wanted);
  CaptureReading rounded(std::make_unique<FakeQuantReading>(step.calibration, step.on_grid), step.calibration, wanted);
  step.run(Chain::kFloat, reference);
  step.run(Chain::kQuant, rounded);
  FakeQuantReading rounding(step.calibration);
  const Surroundings around(step);
  const std::map<std::string, Shape> shapes = ShapesOf(step.graph);
  for (const Node& node : step.graph.Nodes())
    for (const Point& point : node.points) {
      const auto sums = seen.sums.find(point.name);
      if (sums == seen.sums.end() || !wanted.contains(point.name)) continue;
      Sums& of = sums->second;
      Entry& entry = entries_[index_.at(point.name)];
      const CaptureReading::Kept *f = reference.Find(point.name), *q = rounded.Find(point.name);
      if (f == nullptr || f->values.empty()) continue;
      const Shape& shape = shapes.at(point.name);
      const int64_t width = shape.Rank() == 0 ? 1 : shape[-1];
      const bool sliced = step.slice.has_value();
      const auto first = sliced ? step.slice->position : static_cast<int64_t>(of.own.size());
      if (PointVisitor* const visitor = rounding.At(point, {DType::kF32, {width}})) {
        std::vector<float> before, after = f->values;
        visitor->Visit(after, 0);
        std::span<const float> compared = f->values;
        if (const Tensor gamma = IsFused(node) ? Tensor() : around.GammaBehind(node.out[0]);
            !gamma.Empty() && gamma.Elements() == width) {
          before = f->values;
          for (size_t i = 0; i < before.size(); ++i) {
            const float factor = gamma.F32()[i % width];
            before[i] *= factor;
            after[i] *= factor;
          }
          compared = before;
          entry.behind_norm = true;
        }
        AddRows(compared, after, width, first, sliced, of.own);
      }
      if (of.own_alone || q == nullptr || f->values.size() != q->values.size()) continue;
      AddRows(f->values, q->values, width, first, sliced, of.errors);
      const auto [low, high] = std::ranges::minmax(f->values);
      entry.point.min = of.values == 0 ? low : std::min(entry.point.min, low);
      entry.point.max = of.values == 0 ? high : std::max(entry.point.max, high);
      of.values += std::ssize(f->values);
      of.outside += q->outside;
      if (q->grid != nullptr && !q->grid->PerChannel()) entry.point.grid = *q->grid;
      if (point.name == explained_)
        entry.point.values.insert(entry.point.values.end(), f->values.begin(), f->values.end());
      const Value* const weight = IsFused(node) ? nullptr : around.WeightInFront(node.in[0]);
      if (weight != nullptr && of.weight_rows == (sliced ? step.slice->column : 0)) {
        const Tensor stored = step.parameter(weight->name, false);
        AddWeight(stored, step.parameter(weight->name, true), of.weight);
        of.weight_rows += stored.GetShape()[0];
      }
    }
}

void PointTrace::See(const WatchedStep& step) {
  if (last_ == nullptr || last_->name != step.name) {
    Settle();
    last_ =
        std::make_shared<Seen>(Seen{.name = step.name, .graph = step.graph, .reads = step.reads, .keeps = step.keeps});
  }
  Seen& seen = *last_;
  const Surroundings around(step);
  const std::map<std::string, Shape> shapes = ShapesOf(step.graph);
  std::vector<std::string> batch;
  int64_t bytes = 0;
  std::set<std::string> met;
  for (const Node& node : step.graph.Nodes())
    for (const Point& point : node.points) {
      if (point.name.empty() || !shapes.contains(point.name) || !met.insert(point.name).second) continue;
      const auto [at, is_new] = index_.try_emplace(point.name, entries_.size());
      if (is_new) entries_.push_back({.point = {.name = point.name}});
      if (!seen.sums.contains(point.name)) {
        const bool again = !is_new && point.use == PointUse::kBoundary;
        if (again && (entries_[at->second].behind_norm || around.GammaBehind(node.out[0]).Empty())) continue;
        seen.sums[point.name].own_alone = again;
      }
      const int64_t own_bytes = 2 * 4 * shapes.at(point.name).Elements();
      if (bytes + own_bytes > kCapturedBytes && !batch.empty()) {
        Capture(step, batch, seen);
        batch.clear();
        bytes = 0;
      }
      batch.push_back(point.name);
      bytes += own_bytes;
    }
  if (!batch.empty()) Capture(step, batch, seen);
}

int64_t PointTrace::Bytes(const Graph& graph) {
  int64_t largest = 0, all = 0, rows = 0;
  for (const auto& [name, shape] : ShapesOf(graph)) {
    const int64_t elements = shape.Elements();
    largest = std::max(largest, elements);
    all += elements;
    rows += elements / (shape.Rank() == 0 ? 1 : shape[-1]);
  }
  // Captured in both readings; of one point besides, the values on its own grid and what they are held against.
  return std::max(std::min(kCapturedBytes, 2 * 4 * all), 2 * 4 * largest) + 2 * 4 * largest +
         2 * rows * static_cast<int64_t>(sizeof(ErrorMetrics));
}

// All pieces of a step are there.
void PointTrace::Settle() {
  if (last_ == nullptr) return;
  for (auto& [name, sums] : last_->sums) {
    Entry& entry = entries_[index_.at(name)];
    TracePoint& point = entry.point;
    const double own = sums.own.empty() ? 0 : SummaryOf(sums.own).median;
    if (sums.own_alone) {
      point.own = std::hypot(own, entry.weight_error);
      continue;
    }
    if (sums.errors.empty()) continue;
    entry.weight_error = sums.weight.count > 0 ? sums.weight.Relative() : 0;
    point.own = std::hypot(own, entry.weight_error);
    point.errors = SummaryOf(sums.errors);
    point.error_out = point.errors.median;
    if (!point.grid) continue;
    const GridEnds ends = EndsOf(*point.grid);
    point.used = (std::min(point.max, ends.high) - std::max(point.min, ends.low)) / (ends.high - ends.low);
    point.clipped = static_cast<double>(sums.outside) / static_cast<double>(sums.values);
  }
  // By value: the error of the last point on the way to it.
  const Graph& graph = last_->graph;
  std::vector<double> error(graph.Values().size(), 0.0);
  for (const ValueId input : graph.Inputs())
    if (const auto keys = last_->reads.find(graph.At(input).name); keys != last_->reads.end())
      for (const std::string& key : keys->second)
        if (const auto it = error_of_key_.find(key); it != error_of_key_.end())
          error[input] = std::max(error[input], it->second);
  for (const Node& node : graph.Nodes()) {
    double arriving = 0;
    for (const ValueId in : node.in) arriving = std::max(arriving, error[in]);
    for (const Point& point : node.points) {
      const auto at = index_.find(point.name);
      if (at == index_.end()) continue;
      TracePoint& traced = entries_[at->second].point;
      const auto sums = last_->sums.find(point.name);
      if (sums != last_->sums.end() && !sums->second.own_alone) {
        if (sums->second.errors.empty()) continue;
        traced.error_in = arriving;
      }
      arriving = traced.error_out;
    }
    for (const ValueId out : node.out) error[out] = arriving;
  }
  for (const Graph::Output& output : graph.Outputs())
    if (const auto keys = last_->keeps.find(output.name); keys != last_->keeps.end())
      for (const std::string& key : keys->second) error_of_key_[key] = error[output.value];
  last_.reset();
}

std::vector<TracePoint> PointTrace::Take() {
  Settle();
  std::vector<TracePoint> points;
  for (Entry& entry : entries_)
    if (entry.point.errors.positions > 0) points.push_back(std::move(entry.point));
  return points;
}

}  // namespace circlet
