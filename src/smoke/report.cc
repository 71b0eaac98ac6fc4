#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "circlet/report/terminal.h"
#include "circlet/smoke/smoke.h"

namespace circlet {
namespace {

constexpr int kSchemaVersion = 1;
constexpr double kPercent = 100;

std::string Figure(const SmokeResult& result, double (ErrorMetrics::*read)() const, double factor = 1) {
  if (!result.metrics) return "n/a";
  const double value = factor * (*result.metrics.*read)();
  return std::isnan(value) ? "nan" : fmt::format("{:.6f}", value);
}

std::string Status(const SmokeResult& result) {
  return result.Passed() ? "PASS" : fmt::format("FAIL ({})", fmt::join(result.failures, ", "));
}

nlohmann::json Number(double value) { return std::isfinite(value) ? nlohmann::json(value) : nlohmann::json(); }

nlohmann::json ShapeJson(const Shape& shape) { return std::vector<int64_t>(shape.Sizes().begin(), shape.Sizes().end()); }

nlohmann::json MetricsJson(const SmokeResult& result) {
  if (!result.metrics) return nlohmann::json::object();
  const ErrorMetrics& metrics = *result.metrics;
  return {{"shape_match", result.float_shape == result.quant_shape},
          {"fp_shape", ShapeJson(result.float_shape)},
          {"quant_shape", ShapeJson(result.quant_shape)},
          {"fp_finite", metrics.nonfinite_reference == 0},
          {"quant_finite", metrics.nonfinite_quantized == 0},
          {"mean_abs_diff", Number(metrics.MeanAbs())},
          {"max_abs_diff", Number(metrics.MaxAbs())},
          {"peir", Number(metrics.Peir())}};
}

}  // namespace

std::string SmokeText(const SmokeResult& result) {
  SmokeSummary summary{.case_name = result.name,
                       .failures = result.failures,
                       .metrics = result.metrics,
                       .messages = result.messages};
  if (result.metrics) {
    summary.shape_match = result.float_shape == result.quant_shape;
    summary.quant_finite = result.metrics->nonfinite_quantized == 0;
  }
  summary.artifacts.assign(result.artifacts.begin(), result.artifacts.end());
  std::string text = SmokeSummaryText(summary);
  if (!result.plot.empty()) text += result.plot + "\n";
  return text;
}

std::string SmokeTable(std::span<const SmokeResult> results, int columns) {
  const bool compared = std::ranges::any_of(
      results, [&](const SmokeResult& result) { return result.name == results[0].name && result.recipe != results[0].recipe; });
  std::vector<std::string> header{"case", "status",   "mean |diff|", "max |diff|", "PEIR %", "points",
                                  "ops",  "bytes", "seconds"};
  if (compared) header.insert(header.begin() + 1, "recipe");
  TextTable table(header);
  for (const SmokeResult& result : results) {
    const bool file = result.artifacts.contains("circle");
    std::vector<std::string> cells{result.name,
                                   Status(result),
                                   Figure(result, &ErrorMetrics::MeanAbs),
                                   Figure(result, &ErrorMetrics::MaxAbs),
                                   Figure(result, &ErrorMetrics::Peir, kPercent),
                                   std::to_string(result.points),
                                   file ? std::to_string(result.operators) : "-",
                                   file ? std::to_string(result.bytes) : "-",
                                   fmt::format("{:.2f}", result.seconds)};
    if (compared) cells.insert(cells.begin() + 1, result.recipe);
    table.Row(std::move(cells));
  }
  std::string text = table.ToString(columns);
  for (const SmokeResult& result : results)
    for (const std::string& message : result.messages) text += fmt::format("{}: {}\n", result.name, message);
  const int64_t passed = std::ranges::count_if(results, &SmokeResult::Passed);
  return text + fmt::format("{} of {} cases passed\n", passed, results.size());
}

std::string SmokeComparison(std::span<const SmokeResult> results, int columns) {
  std::vector<std::string> header{"case"}, names;
  std::vector<std::string> recipes;
  for (const SmokeResult& result : results) {
    if (std::ranges::find(recipes, result.recipe) == recipes.end()) recipes.push_back(result.recipe);
    if (std::ranges::find(names, result.name) == names.end()) names.push_back(result.name);
  }
  for (const std::string& recipe : recipes)
    for (const char* figure : {"mean", "PEIR %", "bytes"}) header.push_back(fmt::format("{} {}", recipe, figure));
  TextTable table(header);
  for (const std::string& name : names) {
    std::vector<std::string> cells{name};
    for (const std::string& recipe : recipes) {
      const auto result = std::ranges::find_if(
          results, [&](const SmokeResult& candidate) { return candidate.name == name && candidate.recipe == recipe; });
      const bool found = result != results.end();
      cells.push_back(found ? Figure(*result, &ErrorMetrics::MeanAbs) : "-");
      cells.push_back(found ? Figure(*result, &ErrorMetrics::Peir, kPercent) : "-");
      cells.push_back(found && result->bytes > 0 ? std::to_string(result->bytes) : "-");
    }
    table.Row(std::move(cells));
  }
  return table.ToString(columns);
}

nlohmann::json SmokeJson(const SmokeResult& result) {
  nlohmann::json bounds;
  if (result.bounds)
    bounds = {{"max_mean_abs_diff", result.bounds->max_mean},
              {"max_peir", result.bounds->max_peir},
              {"min_mean_abs_diff", result.bounds->min_mean}};
  return {{"case", result.name},
          {"profile", result.profile},
          {"recipe", result.recipe},
          {"passed", result.Passed()},
          {"failures", result.failures},
          {"metrics", MetricsJson(result)},
          {"bounds", bounds},
          {"artifacts", result.artifacts},
          {"messages", result.messages},
          {"warnings", result.warnings},
          {"points", result.points},
          {"operators", result.operators},
          {"bytes", result.bytes},
          {"verified_values", result.verified}};
}

nlohmann::json SmokeSuiteJson(std::span<const SmokeResult> results) {
  nlohmann::json cases = nlohmann::json::array();
  for (const SmokeResult& result : results) cases.push_back(SmokeJson(result));
  return {{"schema_version", kSchemaVersion}, {"cases", cases}};
}

void WriteSmokeReport(const std::filesystem::path& path, std::span<const SmokeResult> results) {
  nlohmann::json report = results.size() == 1 ? SmokeJson(results.front()) : SmokeSuiteJson(results);
  report["schema_version"] = kSchemaVersion;
  if (path.has_parent_path()) CreateDirectories(path.parent_path());
  WriteJson(path, report);
}

}  // namespace circlet
