// The scatter plot (quantization.md 10.3), with the geometry of the plot of the reference.

#include <algorithm>
#include <cmath>
#include <vector>

#include "circlet/base/error.h"
#include "report/text.h"

namespace circlet {
namespace {

constexpr int kXTicks = 7;
constexpr int kYTicks = 5;

struct Interval {
  double low, high;
  // The value of tick k of `ticks`.
  double At(int k, int ticks) const { return low + (high - low) * k / (ticks - 1); }
};

Interval AxisOf(std::span<const float> reference, std::span<const float> quantized) {
  Interval axis{0, 0};
  bool any = false;
  for (size_t i = 0; i < reference.size(); ++i) {
    if (!std::isfinite(reference[i]) || !std::isfinite(quantized[i])) continue;
    const double low = std::min(reference[i], quantized[i]), high = std::max(reference[i], quantized[i]);
    axis = any ? Interval{std::min(axis.low, low), std::max(axis.high, high)} : Interval{low, high};
    any = true;
  }
  const double margin = 0.05 * (axis.high > axis.low ? axis.high - axis.low : 1.0);
  return {axis.low - margin, axis.high + margin};
}

// The cell of tick k: evenly spread, and between two cells the one nearer to the middle.
int TickCell(int k, int ticks, int cells) {
  const int numerator = (cells - 1) * k, denominator = ticks - 1;
  const bool upper_half = 2 * k > denominator;
  return (2 * numerator + denominator - (upper_half ? 1 : 0)) / (2 * denominator);
}

int ValueCell(double value, const Interval& axis, int cells) {
  return static_cast<int>(std::floor(0.5 + (cells - 1) * (value - axis.low) / (axis.high - axis.low)));
}

// One digit more than it takes to tell neighbouring ticks apart, `fewer` digits left out; powers of ten where that gets
// long.
std::vector<std::string> TickLabels(const Interval& axis, int ticks, int fewer = 0) {
  const double step = (axis.high - axis.low) / (ticks - 1);
  const int decimals = std::max(0, 1 + std::max(0, static_cast<int>(std::ceil(-std::log10(2 * step)))) - fewer);
  const bool powers = decimals > 6 || std::max(std::abs(axis.low), std::abs(axis.high)) >= 1e6;
  std::vector<std::string> labels;
  for (int k = 0; k < ticks; ++k) {
    const double value = axis.At(k, ticks);
    labels.push_back(powers ? fmt::format("{:.1e}", value) : fmt::format("{:.{}f}", value, decimals));
  }
  return labels;
}

// Labels centred under their ticks, kept between first and last cell; one that would touch its neighbour is left out
// and counted.
std::string LabelLine(const std::vector<std::string>& labels, int cells, int& left_out) {
  std::string line(static_cast<size_t>(cells), ' ');
  int free_from = 0;
  left_out = 0;
  for (int k = 0; k < static_cast<int>(labels.size()); ++k) {
    const int width = static_cast<int>(labels[k].size());
    const int centred = TickCell(k, static_cast<int>(labels.size()), cells) - (width - 1) / 2;
    const int start = std::max(0, std::min(centred, cells - width));
    if (start < free_from || start + width > cells) {
      ++left_out;
      continue;
    }
    line.replace(static_cast<size_t>(start), labels[k].size(), labels[k]);
    free_from = start + width + 1;
  }
  return line;
}

// With as many digits as leave room for all labels, or with the usual ones where none do.
std::string XLabels(const Interval& axis, int cells) {
  int left_out = 0;
  const std::string usual = LabelLine(TickLabels(axis, kXTicks), cells, left_out);
  for (int fewer = 1; left_out > 0 && fewer <= 2; ++fewer) {
    const std::vector<std::string> labels = TickLabels(axis, kXTicks, fewer);
    if (std::ranges::adjacent_find(labels) != labels.end()) break;
    if (const std::string line = LabelLine(labels, cells, left_out); left_out == 0) return line;
  }
  return usual;
}

}  // namespace

std::string ScatterPlot(std::span<const float> reference, std::span<const float> quantized, std::string_view title,
                        PlotSize size) {
  CIRCLET_CHECK(reference.size() == quantized.size(), "{} reference values, {} quantized", reference.size(),
                quantized.size());
  CIRCLET_CHECK(size.columns >= 24 && size.rows >= 8, "{} x {} is too small for frame and labels", size.columns,
                size.rows);
  const Interval axis = AxisOf(reference, quantized);
  const std::vector<std::string> y_labels = TickLabels(axis, kYTicks);
  int label_width = 0;
  for (const std::string& label : y_labels) label_width = std::max(label_width, DisplayWidth(label));
  const int columns = size.columns - label_width - 2, rows = size.rows - 3;  // of the canvas

  std::vector<std::vector<bool>> dots(rows, std::vector<bool>(columns));
  for (size_t i = 0; i < reference.size(); ++i) {
    if (!std::isfinite(reference[i]) || !std::isfinite(quantized[i])) continue;
    dots[rows - 1 - ValueCell(quantized[i], axis, rows)][ValueCell(reference[i], axis, columns)] = true;
  }

  const std::string margin(static_cast<size_t>(label_width), ' ');
  std::string text = margin + "┌" + Repeated("─", columns) + "┐\n";
  std::vector<std::string> label_of_row(rows);
  for (int k = 0; k < kYTicks; ++k) label_of_row[rows - 1 - TickCell(k, kYTicks, rows)] = y_labels[k];
  for (int row = 0; row < rows; ++row) {
    const std::string& label = label_of_row[row];
    text += Padded(label, label_width, Align::kRight) + (label.empty() ? "│" : "┤");
    for (const bool dot : dots[row]) text += dot ? "•" : " ";
    text += "│\n";
  }
  std::vector<bool> ticks(columns);
  for (int k = 0; k < kXTicks; ++k) ticks[TickCell(k, kXTicks, columns)] = true;
  text += margin + "└";
  for (const bool tick : ticks) text += tick ? "┬" : "─";
  text += "┘\n";
  text += margin + " " + XLabels(axis, columns) + " \n";
  return title.empty() ? text : fmt::format("{} {}: x float, y quantized\n{}", margin, title, text);
}

}  // namespace circlet
