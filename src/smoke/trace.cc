#include "circlet/smoke/trace.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <numeric>

#include "circlet/base/error.h"
#include "circlet/io/names.h"
#include "circlet/model/gemma4/vision.h"
#include "circlet/model/gemma4/weights.h"
#include "circlet/ops/ops.h"
#include "circlet/preprocess/samples.h"
#include "circlet/report/terminal.h"
#include "ops/codes.h"
#include "smoke/session.h"

namespace circlet {
namespace {

struct GridEnds {
  float low, high;
};
GridEnds EndsOf(const QParams& grid) {
  const CodeRange codes = CodesOf(grid.dtype);
  const auto value = [&](int64_t code) { return grid.scale[0] * static_cast<float>(code - grid.zero_point[0]); };
  return {value(codes.min), value(codes.max)};
}

// Keeps the values of every point: float ones, or what rounding makes of them.
class Capture final : public PointReading {
 public:
  // `calibration` null: float, nothing is rounded.
  explicit Capture(const Calibration* calibration) : calibration_(calibration) {
    if (calibration != nullptr) rounding_ = std::make_unique<FakeQuantReading>(*calibration);
  }

  // Points inside a fused operator are larger or smaller than its output, so the size shows as values come, and they come
  // from several threads.
  struct Kept final : PointVisitor {
    Kept(PointVisitor* rounding_visitor, const QParams* point_grid) : rounding(rounding_visitor), grid(point_grid) {}
    void Visit(std::span<float> arriving, int64_t first) override {
      const int64_t clipped = CountOutside(arriving);
      if (rounding != nullptr) rounding->Visit(arriving, first);
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
    PointVisitor* rounding;
    const QParams* grid;
  };

  PointVisitor* At(const Point& point, const TensorType& type) override {
    // A name may stand at several places (the merged embeddings); each has a visitor, the last one is shown.
    PointVisitor* rounding = rounding_ ? rounding_->At(point, type) : nullptr;
    all_.push_back(std::make_unique<Kept>(rounding, rounding_ ? calibration_->GridOf(point.name) : nullptr));
    return by_name_[point.name] = all_.back().get();
  }
  bool Writes() const override { return rounding_ != nullptr; }
  const QParams* GridAt(const Point& point) override { return rounding_ ? rounding_->GridAt(point) : nullptr; }
  const Kept* Find(const std::string& name) const {
    const auto it = by_name_.find(name);
    return it == by_name_.end() ? nullptr : it->second;
  }

 private:
  const Calibration* calibration_;
  std::unique_ptr<FakeQuantReading> rounding_;
  std::vector<std::unique_ptr<Kept>> all_;
  std::map<std::string, Kept*> by_name_;
};

TracePoint Describe(const std::string& name, const Capture::Kept& reference, const Capture::Kept& rounded,
                    int64_t width) {
  TracePoint point{.name = name};
  const auto [low, high] = std::ranges::minmax(reference.values);
  point.min = low;
  point.max = high;
  PositionErrors errors;
  errors.Add(reference.values, rounded.values, width);
  point.errors = Summarize(std::move(errors.relative));
  point.error_out = point.errors.median;
  if (rounded.grid == nullptr || rounded.grid->PerChannel()) return point;
  point.grid = *rounded.grid;
  const GridEnds ends = EndsOf(*rounded.grid);
  point.used = (std::min(high, ends.high) - std::max(low, ends.low)) / (ends.high - ends.low);
  point.clipped = static_cast<double>(rounded.outside) / static_cast<double>(rounded.values.size());
  return point;
}

// How wide each point's tensor is. A fused operator's points do not have its output's shape, those of its expansion do.
std::map<std::string, int64_t> WidthsOf(const Graph& graph) {
  std::map<std::string, int64_t> widths;
  const Graph expanded = Expanded(graph);
  for (const Node& node : expanded.Nodes())
    for (const Point& point : node.points) {
      const Shape& shape = expanded.TypeOf(node.out[0]).shape;
      widths[point.name] = shape.Rank() == 0 ? 1 : shape[-1];
    }
  return widths;
}

// What the grids of a graph do by themselves, each on float values.
class OwnErrors {
 public:
  OwnErrors(const Graph& graph, const Calibration& calibration, const WeightSource& stored)
      : graph_(graph),
        calibration_(calibration),
        stored_(stored),
        rounding_(calibration),
        readers_(graph.Values().size()) {
    for (const Node& node : graph.Nodes())
      for (const ValueId in : node.in) readers_[in].push_back(&node);
  }

  double Of(const Node& node, const Point& point, std::span<const float> values, int64_t width) {
    const bool inside = !std::holds_alternative<QuantPoint>(node.op.kind);  // a fused operator
    double own = 0;
    if (PointVisitor* const visitor = rounding_.At(point, {DType::kF32, {width}})) {
      std::vector<float> before(values.begin(), values.end()), after = before;
      visitor->Visit(after, 0);
      if (const Tensor gamma = inside ? Tensor() : GammaBehind(node.out[0]);
          !gamma.Empty() && gamma.Elements() == width)
        for (size_t i = 0; i < before.size(); ++i) {
          const float factor = gamma.F32()[i % width];
          before[i] *= factor;
          after[i] *= factor;
        }
      own = MedianError(before, after, width);
    }
    return std::hypot(own, inside ? 0 : WeightError(node.in[0]));
  }

 private:
  static double MedianError(std::span<const float> reference, std::span<const float> rounded, int64_t width) {
    PositionErrors errors;
    errors.Add(reference, rounded, width);
    return Summarize(std::move(errors.relative)).median;
  }

  // The weight of the norm that reads a value next, through points and scalar factors; empty: something else does.
  Tensor GammaBehind(ValueId value) const {
    for (const Node* const reader : readers_[value]) {
      if (std::holds_alternative<RmsNorm>(reader->op.kind)) {
        const Value& gamma = graph_.At(reader->in[1]);
        if (gamma.kind == ValueKind::kWeight) return stored_(gamma.name);
      } else if (reader->in[0] == value && !reader->out.empty() && KeepsDirections(*reader)) {
        if (Tensor gamma = GammaBehind(reader->out[0]); !gamma.Empty()) return gamma;
      }
    }
    return {};
  }
  bool KeepsDirections(const Node& node) const {
    if (std::holds_alternative<QuantPoint>(node.op.kind)) return true;
    return std::holds_alternative<Mul>(node.op.kind) && graph_.TypeOf(node.in[1]).shape.Elements() == 1;
  }

  // Of the weight that makes a value in a product: inputs of any direction come out that far off on average.
  double WeightError(ValueId value) const {
    const int producer = graph_.At(value).node;
    if (producer < 0) return 0;
    const Node& node = graph_.Nodes()[producer];
    if (!std::holds_alternative<FullyConnected>(node.op.kind)) return 0;
    const Value& weight = graph_.At(node.in[1]);
    if (weight.kind != ValueKind::kWeight) return 0;
    const Tensor stored = stored_(weight.name);
    const Tensor codes = calibration_.CodesOfRows(weight.weight_point.name, stored, 0);
    if (codes.Empty()) return 0;
    const Tensor rounded = Tensor::Uninitialized({DType::kF32, stored.GetShape()});
    Dequantize(codes, *codes.Grid(), 0, rounded.F32());
    ErrorMetrics error;
    error.Add(ToF32(stored), rounded);
    return error.Relative();
  }

  const Graph& graph_;
  const Calibration& calibration_;
  const WeightSource& stored_;
  FakeQuantReading rounding_;
  std::vector<std::vector<const Node*>> readers_;
};

// The graph's points with the error of what feeds each.
std::vector<TracePoint> Walk(const SmokePart& part, const Capture& reference, const Capture& rounded,
                             const Calibration& calibration) {
  const Graph& graph = part.graph;
  std::vector<TracePoint> points;
  const std::map<std::string, int64_t> widths = WidthsOf(graph);
  OwnErrors own(graph, calibration, part.stored);
  std::vector<double> error(graph.Values().size(), 0.0);  // by value, of the last point on the way to it
  for (const Node& node : graph.Nodes()) {
    double arriving = 0;
    for (const ValueId in : node.in) arriving = std::max(arriving, error[in]);
    for (const Point& point : node.points) {
      const Capture::Kept *f = reference.Find(point.name), *q = rounded.Find(point.name);
      if (point.name.empty() || f == nullptr || q == nullptr || f->values.size() != q->values.size() ||
          f->values.empty())
        continue;
      const int64_t width = widths.at(point.name);
      points.push_back(Describe(point.name, *f, *q, width));
      points.back().own = own.Of(node, point, f->values, width);
      points.back().error_in = arriving;
      arriving = points.back().error_out;
    }
    for (const ValueId out : node.out) error[out] = arriving;
  }
  return points;
}

SmokePart PartOf(const Gemma4Config& config, const ModelWeights& weights, const Sample& sample) {
  std::vector<int64_t> ids;
  for (size_t i = 0; i < sample.input_ids.size(); ++i)
    if (sample.attention_mask.empty() || sample.attention_mask[i] != 0) ids.push_back(sample.input_ids[i]);
  const int64_t length = static_cast<int64_t>(ids.size());
  SmokePart part{.name = sample.source};
  const auto stored = [&weights](const std::string& name) { return weights.Float(name); };
  part.stored = stored;
  std::optional<ImageSlot> slot;
  SmokeValues values;
  std::vector<int64_t> image_tokens;
  if (!sample.pixel_values.Empty()) {
    const Shape& pixels = sample.pixel_values.GetShape();
    if (pixels[0] != 1) Fail("{}: {} images; a trace takes samples with one image or none", sample.source, pixels[0]);
    // Padding patches change nothing that is read; measured with the others they would hide them.
    const std::span<const int64_t> positions = sample.image_position_ids.I64();
    const PatchLayout layout = LayoutOf(*config.vision, positions);
    slot.emplace(ImageSlot{{positions.begin(), positions.begin() + 2 * layout.valid}, 0});
    image_tokens = {layout.tokens};
    const Tensor all = PixelValues(sample.pixel_values);
    values["pixel_values"] =
        Tensor({DType::kF32, {1, layout.valid, pixels[2]}}, all.Raw(), std::make_shared<Tensor>(all));
    part.stored = VisionWeights(*config.vision, stored, kDefault).For(slot->positions);
  }
  const std::vector<int64_t> places = CheckPlaceholders(config, ids, image_tokens);
  if (slot) slot->start = places.front();
  values["ids"] = Tensor::Of<int64_t>({1, length}, WithoutPlaceholders(config, ids));
  BuildGemma4Full(BlockBuilder(part.graph, kDefault), config, length, slot ? &*slot : nullptr);
  part.evaluation = values;
  part.calibration = {std::move(values)};
  return part;
}

std::string Percent(double share) { return fmt::format("{:.2f}", 100 * share); }

}  // namespace

std::vector<TracePoint> Trace(std::vector<SmokePart> parts, const Recipe& recipe, int iters, const std::string& explain,
                              std::vector<std::string>* unused) {
  SmokeSession session(recipe, std::move(parts));
  if (unused != nullptr) *unused = recipe.UnusedOverrides(session.Points());
  if (!explain.empty()) {
    std::vector<std::string> names;
    for (const Point& point : session.Points()) names.push_back(point.name);
    if (std::ranges::find(names, explain) == names.end())
      Fail("no point \"{}\"{}; `--rows {}` lists all", explain, NearestHint(explain, names), names.size());
  }
  session.Observe(iters);
  session.Freeze();
  const SmokePart& part = session.Parts().back();
  Capture reference(nullptr), rounded(&session.GetCalibration());
  session.RunFloat(part, part.evaluation, &reference);
  session.RunRounded(part, part.evaluation, &rounded);
  std::vector<TracePoint> points = Walk(part, reference, rounded, session.GetCalibration());
  for (TracePoint& point : points)
    if (point.name == explain) point.values = reference.Find(explain)->values;
  return points;
}

std::vector<SmokePart> ModelParts(const std::filesystem::path& model, const std::filesystem::path& samples) {
  const auto weights = std::make_shared<const ModelWeights>(ModelWeights::Open(ReadConfig(model), model));
  if (weights->HoldsCodes())
    Fail("{}: holds codes with grids of activations, which trace does not keep; evaluate and quantize --save-stages do",
         model.string());
  const Gemma4Config* const config = &weights->GetConfig();
  const SampleOptions options{.vocab_size = config->text.vocab_size,
                              .placeholders = {config->image_token_id, config->video_token_id, config->audio_token_id}};
  std::vector<Sample> all;
  if (samples.extension() == ".safetensors") {
    all = SamplesFromSafetensors(samples, "calib", options).samples;
    all.push_back(SamplesFromSafetensors(samples, "eval", options).samples.front());
  } else {
    all = LoadJsonl(samples, LoadProcessor(model), options).samples;
  }
  if (all.size() < 2)
    Fail("{}: {} sample; a trace calibrates on all but the last and needs at least 2", samples.string(), all.size());
  std::vector<SmokePart> parts;
  for (const Sample& sample : all) {
    parts.push_back(PartOf(*config, *weights, sample));
    parts.back().stored = [weights, stored = parts.back().stored](const std::string& name) {
      return stored(name);
    };
  }
  parts.back().calibration.clear();
  return parts;
}

namespace {

// Indices of the points, the largest error of its own first.
std::vector<size_t> Ranking(const std::vector<TracePoint>& points) {
  std::vector<size_t> order(points.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::ranges::stable_sort(order, std::ranges::greater(), [&](size_t i) { return points[i].own; });
  return order;
}

}  // namespace

std::string TraceText(const std::vector<TracePoint>& points, int rows) {
  const std::vector<size_t> order = Ranking(points);
  TextTable table({"#", "point", "min", "max", "scale", "grid used %", "clipped %", "own error %", "error in %",
                   "error out %", "99th %"});
  for (size_t i = 0; i < std::min<size_t>(rows, order.size()); ++i) {
    const TracePoint& point = points[order[i]];
    table.Row({std::to_string(order[i]), point.name, fmt::format("{:.4g}", point.min), fmt::format("{:.4g}", point.max),
               point.grid ? fmt::format("{:.4g}", point.grid->scale[0]) : "-", point.grid ? Percent(point.used) : "-",
               point.grid ? Percent(point.clipped) : "-", Percent(point.own), Percent(point.error_in),
               Percent(point.error_out), Percent(point.errors.percentile_99)});
  }
  std::string text = table.ToString();
  if (points.size() > static_cast<size_t>(rows))
    text += fmt::format("{} of {} points; --rows {} lists all\n", rows, points.size(), points.size());
  return text;
}

nlohmann::json TraceJson(const std::vector<TracePoint>& points) {
  const auto number = [](double value) { return std::isfinite(value) ? nlohmann::json(value) : nlohmann::json(); };
  nlohmann::json json{{"schema_version", 1}, {"points", nlohmann::json::array()}};
  for (const size_t i : Ranking(points)) {
    const TracePoint& point = points[i];
    nlohmann::json row{{"index", i},
                       {"point", point.name},
                       {"min", number(point.min)},
                       {"max", number(point.max)},
                       {"rows", point.errors.positions},
                       {"own_error", number(point.own)},
                       {"error_in", number(point.error_in)},
                       {"error_out", number(point.error_out)},
                       {"error_out_p99", number(point.errors.percentile_99)}};
    if (point.grid) {
      row["dtype"] = Name(point.grid->dtype);
      row["scale"] = number(point.grid->scale[0]);
      row["zero_point"] = point.grid->zero_point[0];
      row["grid_used"] = number(point.used);
      row["clipped"] = number(point.clipped);
    }
    json["points"].push_back(std::move(row));
  }
  return json;
}

std::string ExplainText(const TracePoint& point) {
  constexpr int kBins = 24;
  GridEnds grid{point.min, point.max};
  if (point.grid) grid = EndsOf(*point.grid);
  const float low = std::min(point.min, grid.low), high = std::max(point.max, grid.high);
  const float width = high > low ? (high - low) / kBins : 1.0f;
  const auto bin_of = [&](float value) { return std::clamp(static_cast<int>((value - low) / width), 0, kBins - 1); };
  std::vector<int64_t> counts(kBins, 0);
  for (const float value : point.values) ++counts[bin_of(value)];
  std::vector<std::pair<std::string, int64_t>> bins;
  for (int i = 0; i < kBins; ++i) {
    const bool is_low = point.grid && i == bin_of(grid.low), is_high = point.grid && i == bin_of(grid.high);
    const char* mark = is_low ? " grid low " : is_high ? " grid high" : "          ";
    bins.emplace_back(fmt::format("{:>11.4g}{}", low + width * static_cast<float>(i), mark), counts[i]);
  }
  std::string text = fmt::format("{}: {} values in [{:.6g}, {:.6g}]\n", point.name, point.values.size(), point.min,
                                 point.max);
  if (point.grid)
    text += fmt::format("grid {} [{:.6g}, {:.6g}], scale {:.6g}, zero point {}; used {} %, clipped {} %\n",
                        Name(point.grid->dtype), grid.low, grid.high, point.grid->scale[0], point.grid->zero_point[0],
                        Percent(point.used), Percent(point.clipped));
  return text + HistogramBars(bins);
}

}  // namespace circlet
