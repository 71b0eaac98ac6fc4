#include "circlet/smoke/trace.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>

#include "circlet/base/error.h"
#include "circlet/io/names.h"
#include "circlet/quant/affine.h"
#include "circlet/report/terminal.h"
#include "ops/codes.h"
#include "quant/targets.h"
#include "smoke/grid_ends.h"
#include "smoke/point_trace.h"
#include "smoke/session.h"

namespace circlet {
namespace {

std::string Percent(double share) { return fmt::format("{:.2f}", 100 * share); }

}  // namespace

namespace {

// The point or parameter that `name` means, which may leave out what a recipe may. Throws Error with the nearest name
// when there is none.
std::string PointNamed(const std::string& name, std::span<const Point> points) {
  if (name.empty()) return name;
  const auto named = std::ranges::find_if(points, [&](const Point& point) { return PathNames(name, point.name); });
  if (named != points.end()) return named->name;
  std::vector<std::string> names;
  for (const Point& point : points)
    for (const std::string_view left_out : {"", "model.", "model.language_model."})
      if (point.name.starts_with(left_out)) names.push_back(point.name.substr(left_out.size()));
  Fail("no point \"{}\"{}; `--rows {}` lists all that values pass, qparams.json of a run has parameters too", name,
       NearestHint(name, names), points.size());
}

ParameterRow RowOf(std::span<const float> values, std::span<const float> rounded, float scale) {
  ParameterRow row{.min = std::ranges::min(values), .max = std::ranges::max(values), .scale = scale};
  double squares = 0, change = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    squares += double{values[i]} * values[i];
    change += std::pow(double{rounded[i]} - values[i], 2);
  }
  row.error = change == 0 ? 0 : std::sqrt(change / squares);
  return row;
}

// Rows of a parameter as the steps bring them: whole, or slice by slice.
class ParameterTrace {
 public:
  explicit ParameterTrace(std::string name) { point_.name = std::move(name); }

  void See(const WatchedStep& step) {
    for (const Value& value : step.graph.Values()) {
      if (value.kind != ValueKind::kWeight || value.weight_point.name != point_.name) continue;
      const int64_t first = step.slice ? step.slice->column : 0;
      if (std::ssize(point_.parameter) != first) continue;  // seen already
      const auto floats = [](const Tensor& given) {
        if (given.Grid() == nullptr) return ToF32(given);
        const Tensor values = Tensor::Uninitialized({DType::kF32, given.GetShape()});
        Dequantize(given, *given.Grid(), 0, values.F32());
        return values;
      };
      const Tensor stored = floats(step.parameter(value.name, false)),
                   rounded = floats(step.parameter(value.name, true));
      const PointParams* const params = step.calibration.Params().Find(point_.name);
      if (params == nullptr) continue;
      point_.grid = params->qparams;
      const Shape& shape = stored.GetShape();
      const int64_t rows = shape.Rank() < 2 ? 1 : shape[0], width = stored.Elements() / std::max<int64_t>(rows, 1);
      const std::vector<float>& scales = params->qparams.scale;
      // Of a table that rows are looked up in, the step has those alone.
      if (scales.size() > 1 && !step.slice && std::ssize(scales) != rows) continue;
      for (int64_t row = 0; row < rows; ++row) {
        const auto at = static_cast<size_t>(first + row);
        point_.parameter.push_back(RowOf(stored.F32().subspan(row * width, width),
                                         rounded.F32().subspan(row * width, width),
                                         scales.empty() ? 0 : scales[std::min(at, scales.size() - 1)]));
      }
    }
  }

  void AddTo(std::vector<TracePoint>& points) {
    if (!point_.parameter.empty()) points.push_back(std::move(point_));
  }

 private:
  TracePoint point_;
};

class TraceWatcher final : public Watcher {
 public:
  TraceWatcher(int64_t samples, std::string explain)
      : samples_(samples), explain_(std::move(explain)), trace_(""), parameter_("") {}
  int64_t CalibrationSamples() const override { return samples_; }
  void Expect(std::span<const Point> points) override {
    const std::string name = PointNamed(explain_, points);
    trace_ = PointTrace(name);
    parameter_ = ParameterTrace(name);
  }
  void See(const WatchedStep& step) override {
    trace_.See(step);
    parameter_.See(step);
  }
  int64_t Bytes(const Graph& graph) const override { return PointTrace::Bytes(graph); }
  std::vector<TracePoint> Take() {
    std::vector<TracePoint> points = trace_.Take();
    parameter_.AddTo(points);
    return points;
  }

 private:
  int64_t samples_;
  std::string explain_;
  PointTrace trace_;
  ParameterTrace parameter_;
};

}  // namespace

std::vector<TracePoint> Trace(std::vector<SmokePart> parts, const Recipe& recipe, int iters, const std::string& explain,
                              std::vector<std::string>* unused) {
  SmokeSession session(recipe, std::move(parts));
  if (unused != nullptr) *unused = recipe.UnusedOverrides(session.Points());
  const std::string name = PointNamed(explain, session.Points());
  session.Observe(iters);
  session.Freeze();
  const SmokePart& part = session.Parts().back();
  const RoundedWeights rounded(session.GetCalibration(), part.stored);
  PointTrace trace(name);
  ParameterTrace parameter(name);
  const WatchedStep step{.name = part.name,
                         .graph = part.graph,
                         .calibration = session.GetCalibration(),
                         .parameter = [&](const std::string& name,
                                          bool as_rounded) { return as_rounded ? rounded(name) : part.stored(name); },
                         .run =
                             [&](Chain chain, PointReading& reading) {
                               chain == Chain::kFloat ? session.RunFloat(part, part.evaluation, &reading)
                                                      : session.RunRounded(part, part.evaluation, &reading);
                             }};
  trace.See(step);
  parameter.See(step);
  std::vector<TracePoint> points = trace.Take();
  parameter.AddTo(points);
  return points;
}

ModelTrace TraceModel(const QuantizeOptions& options, int64_t samples, const std::string& explain) {
  TraceWatcher watcher(samples, explain);
  ModelTrace trace{.result = QuantizeWatched(options, watcher)};
  trace.points = watcher.Take();
  return trace;
}

namespace {

// Indices of the points, the largest error of its own first.
std::vector<size_t> Ranking(const std::vector<TracePoint>& points) {
  std::vector<size_t> order;
  for (size_t i = 0; i < points.size(); ++i)
    if (points[i].parameter.empty()) order.push_back(i);
  std::ranges::stable_sort(order, std::ranges::greater(), [&](size_t i) { return points[i].own; });
  return order;
}

}  // namespace

std::string TraceText(const std::vector<TracePoint>& points, int rows, int columns) {
  const std::vector<size_t> order = Ranking(points);
  TextTable table({"#", "point", "own error %", "error in %", "error out %", "99th %", "clipped %", "grid used %",
                   "scale", "min", "max"});
  for (size_t i = 0; i < std::min<size_t>(rows, order.size()); ++i) {
    const TracePoint& point = points[order[i]];
    table.Row({std::to_string(order[i]), point.name, Percent(point.own), Percent(point.error_in),
               Percent(point.error_out), Percent(point.errors.percentile_99), point.grid ? Percent(point.clipped) : "-",
               point.grid ? Percent(point.used) : "-", point.grid ? fmt::format("{:.4g}", point.grid->scale[0]) : "-",
               fmt::format("{:.4g}", point.min), fmt::format("{:.4g}", point.max)});
  }
  std::string text = table.ToString(columns);
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

std::string TraceCsv(const std::vector<TracePoint>& points) {
  const nlohmann::json json = TraceJson(points);
  const char* const keys[] = {"index", "point",     "own_error", "error_in", "error_out",  "error_out_p99", "rows",
                              "dtype", "grid_used", "clipped",   "scale",    "zero_point", "min",           "max"};
  std::string text;
  for (const char* key : keys) text += fmt::format("{}{}", text.empty() ? "" : ",", key);
  for (const nlohmann::json& point : json.at("points")) {
    text += "\n";
    for (const char* key : keys) {
      const auto value = point.find(key);
      const bool is_text = value != point.end() && value->is_string();
      if (key != keys[0]) text += ",";
      if (value != point.end() && !value->is_null()) text += is_text ? value->get<std::string>() : value->dump();
    }
  }
  return text + "\n";
}

namespace {

std::string ExplainParameter(const TracePoint& point) {
  constexpr int kBins = 12, kWorst = 10;
  const std::vector<ParameterRow>& rows = point.parameter;
  std::vector<size_t> order(rows.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::ranges::stable_sort(order, std::ranges::greater(), [&](size_t i) { return rows[i].error; });
  const double largest = rows[order[0]].error;
  std::vector<int64_t> counts(kBins, 0);
  for (const ParameterRow& row : rows)
    ++counts[largest > 0 ? std::min(kBins - 1, static_cast<int>(row.error / largest * kBins)) : 0];
  std::vector<std::pair<std::string, int64_t>> bins;
  for (int i = 0; i < kBins; ++i) bins.emplace_back(fmt::format("{:>8.3f} %", 100 * largest * i / kBins), counts[i]);
  std::string text = fmt::format(
      "{}: {} rows, {} with {}\nrows by error, the norm of what rounding changes over the row's:\n", point.name,
      rows.size(), Name(point.grid->dtype), point.grid->scale.size() > 1 ? "a scale a row" : "one scale");
  text += HistogramBars(bins) + "\n";
  TextTable table({"row", "error %", "scale", "min", "max"});
  for (const size_t i : std::span(order).first(std::min<size_t>(order.size(), kWorst)))
    table.Row({std::to_string(i), fmt::format("{:.3f}", 100 * rows[i].error), fmt::format("{:.4g}", rows[i].scale),
               fmt::format("{:.4g}", rows[i].min), fmt::format("{:.4g}", rows[i].max)});
  return text + table.ToString();
}

}  // namespace

std::string ExplainText(const TracePoint& point) {
  if (!point.parameter.empty()) return ExplainParameter(point);
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
  std::string text =
      fmt::format("{}: {} values in [{:.6g}, {:.6g}]\n", point.name, point.values.size(), point.min, point.max);
  if (point.grid)
    text += fmt::format("grid {} [{:.6g}, {:.6g}], scale {:.6g}, zero point {}; used {} %, clipped {} %\n",
                        Name(point.grid->dtype), grid.low, grid.high, point.grid->scale[0], point.grid->zero_point[0],
                        Percent(point.used), Percent(point.clipped));
  return text + HistogramBars(bins);
}

}  // namespace circlet
