#include "circlet/smoke/trace.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>

#include "circlet/base/error.h"
#include "circlet/io/names.h"
#include "circlet/report/terminal.h"
#include "smoke/grid_ends.h"
#include "smoke/point_trace.h"
#include "smoke/session.h"

namespace circlet {
namespace {

std::string Percent(double share) { return fmt::format("{:.2f}", 100 * share); }

}  // namespace

namespace {

// Throws Error with the nearest name when there is no such point.
void RequirePoint(const std::string& name, std::span<const Point> points) {
  if (name.empty()) return;
  std::vector<std::string> names;
  for (const Point& point : points) names.push_back(point.name);
  if (std::ranges::find(names, name) == names.end())
    Fail("no point \"{}\"{}; `--rows {}` lists all", name, NearestHint(name, names), names.size());
}

class TraceWatcher final : public Watcher {
 public:
  TraceWatcher(int64_t samples, const std::string& explain) : samples_(samples), explain_(explain), trace_(explain) {}
  int64_t CalibrationSamples() const override { return samples_; }
  void Expect(std::span<const Point> points) override { RequirePoint(explain_, points); }
  void See(const WatchedStep& step) override { trace_.See(step); }
  int64_t Bytes(const Graph& graph) const override { return PointTrace::Bytes(graph); }
  std::vector<TracePoint> Take() { return trace_.Take(); }

 private:
  int64_t samples_;
  std::string explain_;
  PointTrace trace_;
};

}  // namespace

std::vector<TracePoint> Trace(std::vector<SmokePart> parts, const Recipe& recipe, int iters, const std::string& explain,
                              std::vector<std::string>* unused) {
  SmokeSession session(recipe, std::move(parts));
  if (unused != nullptr) *unused = recipe.UnusedOverrides(session.Points());
  RequirePoint(explain, session.Points());
  session.Observe(iters);
  session.Freeze();
  const SmokePart& part = session.Parts().back();
  const RoundedWeights rounded(session.GetCalibration(), part.stored);
  PointTrace trace(explain);
  trace.See({.name = part.name,
             .graph = part.graph,
             .calibration = session.GetCalibration(),
             .parameter = [&](const std::string& name,
                              bool as_rounded) { return as_rounded ? rounded(name) : part.stored(name); },
             .run =
                 [&](Chain chain, PointReading& reading) {
                   chain == Chain::kFloat ? session.RunFloat(part, part.evaluation, &reading)
                                          : session.RunRounded(part, part.evaluation, &reading);
                 }});
  return trace.Take();
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
  std::string text =
      fmt::format("{}: {} values in [{:.6g}, {:.6g}]\n", point.name, point.values.size(), point.min, point.max);
  if (point.grid)
    text += fmt::format("grid {} [{:.6g}, {:.6g}], scale {:.6g}, zero point {}; used {} %, clipped {} %\n",
                        Name(point.grid->dtype), grid.low, grid.high, point.grid->scale[0], point.grid->zero_point[0],
                        Percent(point.used), Percent(point.clipped));
  return text + HistogramBars(bins);
}

}  // namespace circlet
