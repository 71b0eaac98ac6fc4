#pragma once

// Plain text for people: boxes, plots, tables and progress. Colourless and deterministic.

#include <cstdint>
#include <cstdio>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "circlet/base/tensor.h"
#include "circlet/report/metrics.h"

namespace circlet {

// Columns that a UTF-8 text takes on a terminal: East Asian wide characters take two, combining marks none.
int DisplayWidth(std::string_view text);

// "(1, 16, 64)", "(16,)", "()".
std::string TupleText(const Shape& shape);

// The reference's box, with a newline behind every line; labels are padded to the widest, or to `label_width`:
//   ┌───────────── TITLE ─────────────
//   │ label : value
//   └─────────────────────────────────
std::string Box(std::string_view title, std::span<const std::pair<std::string, std::string>> lines,
                int label_width = 0);

// Box of `quantize` and of the examples: output shapes, mean |diff|, max |diff| when asked, PEIR in percent; 6
// decimals.
std::string ErrorSummary(std::string_view title, const Shape& reference, const Shape& quantized,
                         const ErrorMetrics& metrics, bool with_max = false);

// What a wrapper-smoke case prints behind its run (quantization.md 11.1): box, artifacts, messages.
struct SmokeSummary {
  std::string case_name;
  std::vector<std::string> failures;    // kinds, "SHAPE", "ACCURACY"; empty = PASS
  std::optional<ErrorMetrics> metrics;  // none = n/a
  std::optional<bool> shape_match;
  std::optional<bool> quant_finite;
  std::vector<std::pair<std::string, std::string>> artifacts;  // kind, path
  std::vector<std::string> messages;
};
std::string SmokeSummaryText(const SmokeSummary& summary);

// Scatter plot of pairs (quantization.md 10.3): x = reference, y = quantized, both axes [min-5%, max+5%] of the joint
// range (an empty range counts as 1). `columns` and `rows` take in frame and labels. Perfect agreement is the diagonal;
// pairs with a non-finite member are left out. A title stands in a line above, with what the axes are.
struct PlotSize {
  int columns = 50;
  int rows = 25;
};
std::string ScatterPlot(std::span<const float> reference, std::span<const float> quantized, std::string_view title = {},
                        PlotSize size = {});

// Columns aligned over all rows: the first to the left, numbers to the right.
class TextTable {
 public:
  explicit TextTable(std::vector<std::string> header);
  void Row(std::vector<std::string> cells);  // as many as the header
  // At most `width` columns of a terminal wide (0: as it comes): what does not fit is left out from the right, and a line
  // below names it.
  std::string ToString(int width = 0) const;

 private:
  std::vector<std::vector<std::string>> rows_;  // [0] is the header
};

// One line a bin: `label  ████▌  count`, the longest bar `width` columns wide.
std::string HistogramBars(std::span<const std::pair<std::string, int64_t>> bins, int width = 40);

// A progress line: "layers.3: 12/32, 0:41 left", or with a plan "[12/23] layers.3  52 %  0:41 left", share and time of
// the whole. One rewritten line on a terminal; elsewhere a line at the end of each stage, and one a minute.
class Progress {
 public:
  // Writes to `out` (null = nothing at all). `seconds` is the clock, by default a monotonic one.
  explicit Progress(std::FILE* out, std::function<double()> seconds = {});
  ~Progress();  // ends a line that is left open

  // The costs of all stages in order, in any unit. Begin takes the next one, from `done` on.
  void Plan(std::vector<double> costs, int done = 0);

  void Begin(std::string stage, int64_t total);
  void Advance(int64_t count = 1);
  // What is done beside the counted work: "writing lm_head". Shown on a terminal until something else is.
  void Say(std::string_view what);
  // Ends the stage's line; Begin does it too.
  void End();

  double Done() const;         // share of the plan, 0..1
  double SecondsLeft() const;  // of the plan, at the pace so far

 private:
  void Show(bool last, std::string_view said = {});
  double Share() const;  // of the present stage

  std::FILE* out_;
  std::function<double()> seconds_;
  bool terminal_ = false;
  std::string stage_;
  int64_t done_ = 0, total_ = 0;
  std::vector<double> costs_;
  int number_ = 0, first_ = 0;  // of the plan: the present stage, from 1; what was done before
  double plan_begun_ = 0;
  double begun_ = 0, shown_ = 0;
  int shown_width_ = 0;
  bool open_ = false;
};

}  // namespace circlet
