// The boxes that the reference prints.

#include <fmt/format.h>

#include <cmath>

#include "report/text.h"

namespace circlet {
namespace {

std::string SixDecimals(double value) { return std::isnan(value) ? "nan" : fmt::format("{:.6f}", value); }

std::string Joined(std::span<const std::string> parts, std::string_view separator) {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? "" : std::string(separator)) + part;
  return text;
}

}  // namespace

std::string TupleText(const Shape& shape) {
  std::string text;
  for (const int64_t size : shape.Sizes()) text += fmt::format("{}{}", text.empty() ? "" : ", ", size);
  return fmt::format("({}{})", text, shape.Rank() == 1 ? "," : "");
}

std::string Box(std::string_view title, std::span<const std::pair<std::string, std::string>> lines, int label_width) {
  constexpr int kRuleWidth = 13;  // on either side of the title
  const std::string rule = Repeated("─", kRuleWidth);
  std::string text = fmt::format("┌{} {} {}\n", rule, title, rule);
  for (const auto& [label, value] : lines) label_width = std::max(label_width, DisplayWidth(label));
  for (const auto& [label, value] : lines) text += fmt::format("│ {} : {}\n", Padded(label, label_width), value);
  return text + fmt::format("└{}\n", Repeated("─", 2 * kRuleWidth + 2 + DisplayWidth(title)));
}

std::string ErrorSummary(std::string_view title, const Shape& reference, const Shape& quantized,
                         const ErrorMetrics& metrics, bool with_max) {
  std::vector<std::pair<std::string, std::string>> lines = {{"FP output shape", TupleText(reference)},
                                                            {"Quant output shape", TupleText(quantized)},
                                                            {"Mean |diff|", SixDecimals(metrics.MeanAbs())}};
  if (with_max) lines.emplace_back("Max |diff|", SixDecimals(metrics.MaxAbs()));
  lines.emplace_back("PEIR", SixDecimals(100 * metrics.Peir()) + " %");
  return Box(title, lines);
}

std::string SmokeSummaryText(const SmokeSummary& summary) {
  constexpr int kLabelWidth = 16;
  const auto figure = [&](double (ErrorMetrics::*read)() const) {
    return summary.metrics ? SixDecimals((*summary.metrics.*read)()) : std::string("n/a");
  };
  const auto percent = [&](double (ErrorMetrics::*read)() const) {
    return summary.metrics ? SixDecimals(100 * (*summary.metrics.*read)()) + " %" : std::string("n/a");
  };
  const auto truth = [](std::optional<bool> value) { return std::string(!value ? "n/a" : *value ? "True" : "False"); };
  const std::string status =
      summary.failures.empty() ? "PASS" : fmt::format("FAIL ({})", Joined(summary.failures, ", "));
  const std::pair<std::string, std::string> lines[] = {{"Case", summary.case_name},
                                                       {"Status", status},
                                                       {"Mean |diff|", figure(&ErrorMetrics::MeanAbs)},
                                                       {"Max  |diff|", figure(&ErrorMetrics::MaxAbs)},
                                                       {"PEIR", percent(&ErrorMetrics::Peir)},
                                                       {"Shape match", truth(summary.shape_match)},
                                                       {"Quant finite", truth(summary.quant_finite)}};
  std::string text = Box("Wrapper Smoke Summary", lines, kLabelWidth);
  if (!summary.artifacts.empty()) text += "Artifacts:\n";
  for (const auto& [kind, path] : summary.artifacts) text += fmt::format("  - {}: {}\n", kind, path);
  if (!summary.messages.empty()) text += "Messages:\n";
  for (const std::string& message : summary.messages) text += fmt::format("  - {}\n", message);
  return text;
}

}  // namespace circlet
