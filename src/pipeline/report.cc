#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "circlet/pipeline/quantize.h"
#include "circlet/report/terminal.h"
#include "pipeline/manifest.h"

namespace circlet {
namespace {

nlohmann::json Number(double value) { return std::isfinite(value) ? nlohmann::json(value) : nlohmann::json(nullptr); }

nlohmann::json ToJson(const ErrorMetrics& metrics) {
  return {{"mean_abs_diff", Number(metrics.MeanAbs())},
          {"max_abs_diff", Number(metrics.MaxAbs())},
          {"mse", Number(metrics.Mse())},
          {"peir", Number(metrics.Peir())},
          {"values", metrics.count},
          {"nonfinite", metrics.nonfinite_quantized + metrics.nonfinite_reference}};
}

}  // namespace

std::string ReportText(const QuantizeResult& result) {
  const Shape shape(result.output_shape);
  std::string text = ErrorSummary("Quantization Error Summary", shape, shape, result.output, /*with_max=*/true);
  text += fmt::format("{} on {}, {} dialect; figures of {} on {}\n", result.recipe, result.model, result.dialect,
                      result.output_name,
                      result.output_on_calibration_data ? "the calibration samples" : "samples not calibrated on");
  if (result.grids)
    text += fmt::format("grids of {}, made with {}\n", result.grids->file,
                        result.grids->recipe.empty() ? "a recipe that it does not name" : result.grids->recipe);
  if (result.output.count == 0) text += "No sample was measured: nothing is known of the error.\n";
  if (result.random_data) text += "The samples were RANDOM token ids: ranges of real text differ.\n";
  if (!result.shortened.empty()) text += result.shortened + "\n";
  if (!result.dated.empty()) {
    text += fmt::format(
        "{}: the prompts hold the date, so that another day gives other results; SOURCE_DATE_EPOCH fixes it\n",
        result.dated);
  }
  for (const std::string& skipped : result.skipped) text += fmt::format("left out: {}\n", skipped);
  for (const std::string& note : result.notes) text += fmt::format("note: {}\n", note);

  std::vector<float> reference, quantized;
  for (const auto& [f, q] : result.scatter) {
    reference.push_back(f);
    quantized.push_back(q);
  }
  if (!reference.empty()) text += "\n" + ScatterPlot(reference, quantized) + "\n";

  std::vector<StageError> stages = result.stages;
  std::stable_sort(stages.begin(), stages.end(), [](const StageError& a, const StageError& b) {
    return a.accumulated.Peir() > b.accumulated.Peir();
  });
  TextTable table({"stage", "PEIR % alone", "PEIR % so far", "mean |diff|", "max |diff|"});
  for (const StageError& stage : stages)
    table.Row({stage.stage, fmt::format("{:.4f}", 100 * stage.alone.Peir()), fmt::format("{:.4f}", 100 * stage.accumulated.Peir()),
               fmt::format("{:.6f}", stage.accumulated.MeanAbs()), fmt::format("{:.6f}", stage.accumulated.MaxAbs())});
  text += table.ToString();
  if (result.perplexity)
    text += fmt::format("\nperplexity: float {:.4f}, quantized {:.4f} ({} windows, {} tokens)\n",
                        result.perplexity->float_value, result.perplexity->quantized_value, result.perplexity->windows,
                        result.perplexity->tokens);
  if (result.captions)
    text += fmt::format("captions: float {} of {}, quantized {}\n", result.captions->float_exact, result.captions->pictures,
                        result.captions->quantized_exact);
  if (!result.vision_profile.empty()) text += fmt::format("vision units: {}\n", result.vision_profile);
  if (!result.units.empty()) {
    int64_t bytes = 0, operators = 0;
    for (const UnitFile& unit : result.units) {
      bytes += unit.bytes;
      operators += unit.operators;
    }
    text += fmt::format("\n{} Circle files, {} operators, {}\n", result.units.size(), operators, HumanBytes(bytes));
  }
  if (result.compute_change) {
    const ComputeChange& change = *result.compute_change;
    text += fmt::format("products in bf16; {} in float32 beside it: ", change.sample);
    if (change.points > 0)
      text += fmt::format("ranges of {} points move by {:.4f} % on average, at most {:.3f} % ({}); ", change.points,
                          100 * change.mean_range_change, 100 * change.max_range_change, change.max_point);
    text += fmt::format("float logits differ by PEIR {:.4f} %, mean |diff| {:.6f}\n", 100 * change.logits.Peir(),
                        change.logits.MeanAbs());
  }
  if (result.products && result.products->flops == 0)
    text += "matrix products: none ran, so there is nothing to measure\n";
  if (result.products && result.products->flops > 0)
    text += fmt::format(
        "matrix products: {:.2f} TFLOP, {:.1f} s alone in oneDNN; the run took {:.1f} s, {:.2f} times that\n",
        result.products->flops / 1e12, result.products->alone_seconds, result.products->run_seconds,
        result.products->run_seconds / result.products->alone_seconds);
  if (result.spilled_bytes > 0)
    text += fmt::format("activations past the memory limit went to files: {}\n", HumanBytes(result.spilled_bytes));
  return text;
}

std::string ReportJson(const QuantizeResult& result) {
  nlohmann::json json{{"schema_version", 1},
                      {"model", result.model},
                      {"recipe", result.recipe},
                      {"dialect", result.dialect},
                      {"calibration_samples", result.calibration_samples},
                      {"evaluation_samples", result.evaluation_samples},
                      {"random_data", result.random_data},
                      {"skipped", result.skipped},
                      {"shortened", result.shortened},
                      {"dated", result.dated},
                      {"points", result.points},
                      {"max_seq_len", result.max_seq_len},
                      {"unused_tensors", result.unused_tensors},
                      {"unknown_config_keys", result.unknown_keys},
                      {"notes", result.notes},
                      {"output",
                       {{"name", result.output_name},
                        {"shape", result.output_shape},
                        {"on_calibration_data", result.output_on_calibration_data},
                        {"error", ToJson(result.output)}}}};
  if (result.grids) json["grids"] = ToJson(*result.grids);
  json["stages"] = nlohmann::json::array();
  for (const StageError& stage : result.stages)
    json["stages"].push_back({{"stage", stage.stage}, {"alone", ToJson(stage.alone)}, {"accumulated", ToJson(stage.accumulated)}});
  if (result.perplexity)
    json["perplexity"] = {{"windows", result.perplexity->windows},
                          {"tokens", result.perplexity->tokens},
                          {"float", result.perplexity->float_value},
                          {"quantized", result.perplexity->quantized_value}};
  if (result.captions)
    json["captions"] = {{"pictures", result.captions->pictures},
                        {"float_exact", result.captions->float_exact},
                        {"quantized_exact", result.captions->quantized_exact}};
  if (result.compute_change) {
    const ComputeChange& change = *result.compute_change;
    json["compute"] = {{"products", "bf16"},
                       {"sample", change.sample},
                       {"points", change.points},
                       {"mean_range_change", change.mean_range_change},
                       {"max_range_change", change.max_range_change},
                       {"max_range_change_point", change.max_point},
                       {"logits", ToJson(change.logits)}};
  }
  json["pictures"] = result.pictures;
  json["vision_profile"] = result.vision_profile;
  json["units"] = nlohmann::json::array();
  for (const UnitFile& unit : result.units)
    json["units"].push_back({{"name", unit.name}, {"file", unit.file}, {"bytes", unit.bytes}, {"operators", unit.operators}});
  return DumpJson(json);
}

}  // namespace circlet
