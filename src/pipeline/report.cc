#include "pipeline/report.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "circlet/pipeline/quantize.h"
#include "circlet/report/terminal.h"
#include "pipeline/manifest.h"
#include "pipeline/quantize.h"

namespace circlet {

nlohmann::json Number(double value) { return std::isfinite(value) ? nlohmann::json(value) : nlohmann::json(nullptr); }

nlohmann::json ToJson(const Agreement& agreement) {
  return {{"tokens", agreement.tokens},
          {"kl", Number(agreement.divergence.value)},
          {"kl_standard_error", Number(agreement.divergence.standard_error)},
          {"same_top", Number(agreement.same_top.value)},
          {"same_top_standard_error", Number(agreement.same_top.standard_error)}};
}

std::string WithError(const std::string& mean, double error) {
  return std::isnan(error) ? mean : fmt::format("{} ± {:.2g}", mean, error);
}

std::string AgreementText(const Agreement& agreement, const std::string& reference, const std::string& other) {
  const Mean& divergence = agreement.divergence;
  return fmt::format("KL({} || {}) {} nats a token, same top-1 at {:.2f} % of {} tokens", reference, other,
                     WithError(fmt::format("{:.4g}", divergence.value), divergence.standard_error),
                     100 * agreement.same_top.value, agreement.tokens);
}

namespace {

nlohmann::json ToJson(const ErrorMetrics& metrics) {
  return {{"mean_abs_diff", Number(metrics.MeanAbs())},
          {"max_abs_diff", Number(metrics.MaxAbs())},
          {"mse", Number(metrics.Mse())},
          {"peir", Number(metrics.Peir())},
          {"values", metrics.count},
          {"nonfinite", metrics.nonfinite_quantized + metrics.nonfinite_reference}};
}

nlohmann::json ToJson(const ErrorMetrics& metrics, const PositionSummary& by_position) {
  nlohmann::json json = ToJson(metrics);
  json["positions"] = by_position.positions;
  json["position_error_median"] = Number(by_position.median);
  json["position_error_p99"] = Number(by_position.percentile_99);
  return json;
}

nlohmann::json ToJson(const Perplexity& perplexity) {
  return {{"windows", perplexity.windows},
          {"tokens", perplexity.tokens},
          {"float", Number(perplexity.float_value)},
          {"float_standard_error", Number(perplexity.float_error)},
          {"quantized", Number(perplexity.quantized_value)},
          {"quantized_standard_error", Number(perplexity.quantized_error)},
          {"log_loss_difference", Number(perplexity.log_loss_difference.value)},
          {"log_loss_difference_standard_error", Number(perplexity.log_loss_difference.standard_error)}};
}

std::string PerplexityText(const Perplexity& perplexity) {
  const Mean& difference = perplexity.log_loss_difference;
  return fmt::format(
      "perplexity: float {}, quantized {} ({} windows, {} tokens)\n"
      "log-loss, quantized - float: {} nats a token\n",
      WithError(fmt::format("{:.4f}", perplexity.float_value), perplexity.float_error),
      WithError(fmt::format("{:.4f}", perplexity.quantized_value), perplexity.quantized_error), perplexity.windows,
      perplexity.tokens, WithError(fmt::format("{:+.4g}", difference.value), difference.standard_error));
}

// Bytes by part: units whose names differ by the number at the end are one.
std::string SizesText(const QuantizeResult& result, int columns) {
  struct Part {
    std::string name;
    int64_t files = 0, bytes = 0, parameters = 0, parameter_bytes = 0;
  };
  std::vector<Part> parts;
  int64_t bytes = 0, operators = 0;
  for (const UnitFile& unit : result.units) {
    const size_t end = unit.name.find_last_not_of("0123456789") + 1;
    const std::string name = unit.name.substr(0, end) + (end < unit.name.size() ? "I" : "");
    auto part = std::ranges::find(parts, name, &Part::name);
    if (part == parts.end()) part = parts.insert(parts.end(), {name});
    ++part->files;
    part->bytes += unit.bytes;
    part->parameters += unit.parameters;
    part->parameter_bytes += unit.parameter_bytes;
    bytes += unit.bytes;
    operators += unit.operators;
  }
  TextTable table({"part", "files", "weights bf16", "quantized", "file bytes"});
  constexpr int64_t kBFloat16Bytes = 2;
  for (const Part& part : parts)
    table.Row({part.name, fmt::format("{}", part.files), HumanBytes(part.parameters * kBFloat16Bytes),
               HumanBytes(part.parameter_bytes), HumanBytes(part.bytes)});
  const auto any = [&](const char* name) {
    return std::ranges::any_of(result.units, [&](const UnitFile& unit) { return unit.name.starts_with(name); });
  };
  std::string text =
      fmt::format("{}{} Circle files, {} operators, {}; the checkpoint's weights are {}\n", table.ToString(columns),
                  result.units.size(), operators, HumanBytes(bytes), HumanBytes(result.weight_bytes));
  if (any("decoder_layer_decode") || any("gemma4_model"))
    text += fmt::format("weights stand in several files: {}{}{}\n",
                        any("decoder_layer_decode") ? "each layer as prefill and as decode" : "",
                        any("decoder_layer_decode") && any("gemma4_model") ? ", " : "",
                        any("gemma4_model") ? "all of them again in whole graphs" : "");
  return text;
}

// What rounding methods did, in a few words.
std::string LinearsText(const std::vector<RoundedLinear>& linears) {
  const auto part = [](const RoundedLinear& linear) {
    return linear.nearest_loss > 0 ? linear.loss / linear.nearest_loss : 1.0;
  };
  const RoundedLinear& worst = *std::ranges::max_element(linears, {}, part);
  double logarithms = 0;
  int64_t rows = 0, corrected = 0, nearest = 0, dead = 0, damped = 0;
  for (const RoundedLinear& linear : linears) {
    logarithms += std::log(std::max(part(linear), 1e-12));
    rows += linear.rows;
    corrected += linear.rows_corrected;
    nearest += linear.rows_to_nearest;
    dead += linear.dead_columns;
    damped += linear.damping > linears[0].damping;
  }
  std::string text = fmt::format(
      "{} linears rounded with second moments: output error {:.1f} % of rounding to the nearest (geometric mean), at "
      "most {:.1f} % ({})\n",
      linears.size(), 100 * std::exp(logarithms / static_cast<double>(linears.size())), 100 * part(worst), worst.name);
  text += fmt::format("of {} rows {} make up for changed inputs, {} keep the nearest codes", rows, corrected, nearest);
  if (dead > 0) text += fmt::format("; {} columns never had an input", dead);
  if (damped > 0) text += fmt::format("; {} linears took more damping than asked for", damped);
  return text + "\n";
}

double Share(const GivenPoint& point) {
  return point.values > 0 ? static_cast<double>(point.beyond) / static_cast<double>(point.values) : 0;
}

// What of a packed checkpoint went to the files, and what did not.
std::string PackedText(const QuantizeResult& result) {
  std::string text;
  if (!result.stored_codes.empty()) {
    std::map<int, int64_t> by_bits;
    for (const CodesChecksum& codes : result.stored_codes) ++by_bits[codes.bits];
    std::vector<std::string> parts;
    for (const auto& [bits, count] : by_bits) parts.push_back(fmt::format("{} of {} bits", count, bits));
    text +=
        fmt::format("{} weights are the checkpoint's codes: {}\n", result.stored_codes.size(), fmt::join(parts, ", "));
  }
  if (!result.given.empty()) {
    const GivenPoint& worst = *std::ranges::max_element(result.given, {}, Share);
    const auto clamped = std::ranges::count_if(result.given, [](const GivenPoint& point) { return point.beyond > 0; });
    text += fmt::format(
        "{} points have the checkpoint's grids; at {} of them calibration values lie beyond, at most {:.3f} % "
        "({})\n",
        result.given.size(), clamped, 100 * Share(worst), worst.name);
  }
  if (!result.unused_scales.empty())
    text += fmt::format("scales that are not used: {}, {}{} (all: unused_scales of the JSON report)\n",
                        result.unused_scales.size(), result.unused_scales[0],
                        result.unused_scales.size() > 1 ? " ..." : "");
  if (!result.modules_without_scale.empty())
    text += fmt::format("linears without a scale: {}, {}{} (all: modules_without_scale of the JSON report)\n",
                        result.modules_without_scale.size(), result.modules_without_scale[0],
                        result.modules_without_scale.size() > 1 ? " ..." : "");
  if (!result.second_roundings.empty()) {
    const SecondRounding& worst =
        *std::ranges::max_element(result.second_roundings, {}, &SecondRounding::relative_error);
    double sum = 0;
    for (const SecondRounding& rounding : result.second_roundings) sum += rounding.relative_error;
    text += fmt::format(
        "{} weights were rounded before ({}) and are rounded a second time, by {:.2f} % of their norm on average, at "
        "most "
        "{:.2f} % ({}); by module: second_roundings of the JSON report\n",
        result.second_roundings.size(), result.second_roundings[0].form,
        100 * sum / static_cast<double>(result.second_roundings.size()), 100 * worst.relative_error, worst.parameter);
  }
  return text.empty() ? text : "\n" + text;
}

}  // namespace

std::string NotesText(const QuantizeResult& result) {
  std::string text;
  if (result.random_data) text += "The samples were RANDOM token ids: ranges of real text differ.\n";
  if (!result.shortened.empty()) text += result.shortened + "\n";
  if (!result.dated.empty()) {
    text += fmt::format(
        "{}: the prompts hold the date, so that another day gives other results; SOURCE_DATE_EPOCH fixes it\n",
        result.dated);
  }
  for (const std::string& skipped : result.skipped) text += fmt::format("left out: {}\n", skipped);
  for (const std::string& note : result.notes) text += fmt::format("note: {}\n", note);
  return text;
}

std::string ReportText(const QuantizeResult& result, int columns) {
  const Shape shape(result.output_shape);
  std::string text = ErrorSummary("Quantization Error Summary", shape, shape, result.output, /*with_max=*/true);
  text += fmt::format("{} on {}, {} dialect; figures of {} on {}\n", result.recipe, result.model, result.dialect,
                      result.output_name,
                      result.output_on_calibration_data ? "the calibration samples" : "samples not calibrated on");
  if (result.grids)
    text += fmt::format("grids of {}, made with {}\n", result.grids->file,
                        result.grids->recipe.empty() ? "a recipe that it does not name" : result.grids->recipe);
  if (result.widening) text += fmt::format("residual stream: {}\n", ToText(*result.widening));
  if (result.output.count == 0) text += "No sample was measured: nothing is known of the error.\n";
  text += NotesText(result);

  std::vector<float> reference, quantized;
  for (const auto& [f, q] : result.scatter) {
    reference.push_back(f);
    quantized.push_back(q);
  }
  if (!reference.empty()) text += "\n" + ScatterPlot(reference, quantized, result.output_name) + "\n";

  std::vector<StageError> stages = result.stages;
  std::ranges::stable_sort(
      stages, [](double a, double b) { return a > b || (std::isnan(b) && !std::isnan(a)); },
      [](const StageError& stage) { return stage.alone_by_position.median; });
  TextTable table({"stage", "error % alone", "error % so far", "99th %", "PEIR %", "mean |diff|", "max |diff|"});
  const auto percent = [](double ratio) { return fmt::format("{:.4f}", 100 * ratio); };
  for (const StageError& stage : stages)
    table.Row({stage.stage, percent(stage.alone_by_position.median), percent(stage.accumulated_by_position.median),
               percent(stage.accumulated_by_position.percentile_99), percent(stage.accumulated.Peir()),
               fmt::format("{:.6f}", stage.accumulated.MeanAbs()), fmt::format("{:.6f}", stage.accumulated.MaxAbs())});
  text += table.ToString(columns);
  text +=
      "error: norm of a position's differences over that of its float values; median and 99th percentile of "
      "positions\n"
      "alone: the stage on exact inputs, on up to 8 samples; all other columns: with the stages before it quantized, "
      "too\n";
  if (!result.linears.empty()) text += "\n" + LinearsText(result.linears);
  text += PackedText(result);
  if (result.agreement) text += fmt::format("\n{}\n", AgreementText(*result.agreement, "float", "quantized"));
  if (result.perplexity) text += PerplexityText(*result.perplexity);
  if (const auto& captions = result.captions)
    text += fmt::format("captions: float {} of {}, quantized {}; {}\n", captions->float_exact, captions->pictures,
                        captions->quantized_exact, AgreementText(captions->agreement, "float", "quantized"));
  if (!result.vision_profile.empty()) text += fmt::format("vision units: {}\n", result.vision_profile);
  if (!result.units.empty()) text += "\n" + SizesText(result, columns);
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
  if (result.products && result.products->plain_flops > 0)
    text += fmt::format(
        "two float32 forward runs and the moments' plain products: {:.2f} TFLOP, {:.1f} s alone in oneDNN; the run "
        "took {:.2f} times that\n",
        result.products->plain_flops / 1e12, result.products->plain_seconds,
        result.products->run_seconds / result.products->plain_seconds);
  if (result.spilled_bytes > 0)
    text += fmt::format("activations past the memory limit went to files: {}\n", HumanBytes(result.spilled_bytes));
  if (const std::string note = MemoryNote(result); !note.empty()) text += note + "\n";
  return text;
}

std::string MemoryNote(const QuantizeResult& result) {
  if (result.own_bytes <= result.memory_limit) return "";
  return fmt::format(
      "memory: {} of its own, more than the limit of {}; what the program keeps between stages does not shrink with it",
      HumanBytes(result.own_bytes), HumanBytes(result.memory_limit));
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
                      {"weight_bytes", result.weight_bytes},
                      {"points", result.points},
                      {"max_seq_len", result.max_seq_len},
                      {"unused_tensors", result.unused_tensors},
                      {"unknown_config_keys", result.unknown_keys},
                      {"notes", result.notes},
                      {"output",
                       {{"name", result.output_name},
                        {"shape", result.output_shape},
                        {"on_calibration_data", result.output_on_calibration_data},
                        {"error", ToJson(result.output, result.output_by_position)}}}};
  if (result.grids) json["grids"] = ToJson(*result.grids);
  if (result.widening) json["widening"] = ToJson(*result.widening);
  json["stages"] = nlohmann::json::array();
  for (const StageError& stage : result.stages)
    json["stages"].push_back({{"stage", stage.stage},
                              {"alone", ToJson(stage.alone, stage.alone_by_position)},
                              {"accumulated", ToJson(stage.accumulated, stage.accumulated_by_position)}});
  if (!result.linears.empty()) json["linears"] = nlohmann::json::array();
  for (const RoundedLinear& linear : result.linears)
    json["linears"].push_back({{"name", linear.name},
                               {"shape", {linear.rows, linear.columns}},
                               {"positions", linear.positions},
                               {"dead_columns", linear.dead_columns},
                               {"damping", linear.damping},
                               {"loss", Number(linear.loss)},
                               {"nearest_loss", Number(linear.nearest_loss)},
                               {"rows_to_nearest", linear.rows_to_nearest},
                               {"rows_corrected", linear.rows_corrected}});
  for (const GivenPoint& point : result.given)
    json["given_grids"].push_back({{"point", point.name},
                                   {"dtype", Name(point.grid.dtype)},
                                   {"scale", F32(point.grid.scale[0])},
                                   {"zero_point", point.grid.zero_point[0]},
                                   {"values", point.values},
                                   {"beyond", point.beyond},
                                   {"share_beyond", Share(point)}});
  if (!result.unused_scales.empty()) json["unused_scales"] = result.unused_scales;
  if (!result.modules_without_scale.empty()) json["modules_without_scale"] = result.modules_without_scale;
  for (const SecondRounding& rounding : result.second_roundings)
    json["second_roundings"].push_back({{"parameter", rounding.parameter},
                                        {"form", rounding.form},
                                        {"relative_error", Number(rounding.relative_error)}});
  if (result.perplexity) json["perplexity"] = ToJson(*result.perplexity);
  if (result.agreement) json["agreement"] = ToJson(*result.agreement);
  if (result.captions)
    json["captions"] = {{"pictures", result.captions->pictures},
                        {"float_exact", result.captions->float_exact},
                        {"quantized_exact", result.captions->quantized_exact},
                        {"agreement", ToJson(result.captions->agreement)}};
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
    json["units"].push_back({{"name", unit.name},
                             {"file", unit.file},
                             {"bytes", unit.bytes},
                             {"operators", unit.operators},
                             {"parameters", unit.parameters},
                             {"parameter_bytes", unit.parameter_bytes}});
  return DumpJson(json);
}

}  // namespace circlet
