#pragma once

// Where accuracy is lost: the points of a case or of a model one by one, on a sample that was not calibrated on.

#include <string>
#include <vector>

#include "circlet/pipeline/quantize.h"
#include "circlet/smoke/smoke.h"

namespace circlet {

// A row of a parameter: its range, its grid's step, and the norm of what rounding changes over that of the row.
struct ParameterRow {
  float min = 0, max = 0, scale = 0;
  double error = 0;
};

struct TracePoint {
  std::string name;
  float min = 0, max = 0;  // of the float values
  std::optional<QParams> grid;
  double used = 0;     // share of the grid's range that they span
  double clipped = 0;  // share of arriving values outside the grid
  // Error of the fake-quantized values, row by row of the last axis (a position, or a position of one head) relative to
  // the float row: median and 99th percentile of the rows. A mean over the whole tensor would tell of the one row that
  // holds the largest values. `error_in`: the largest median at the points that feed this one.
  PositionSummary errors;
  double error_in = 0, error_out = 0;  // error_out: errors.median
  // What rounding does here by itself: median error of the float values on this point's grid, with the error of the
  // weight where a product is in front. Where a norm reads the values next, they are held against each other behind its
  // weight: a small channel that it amplifies counts as the model sees it.
  double own = 0;
  std::vector<float> values;  // float, only of the explained point
  std::vector<ParameterRow> parameter;  // of an explained parameter, of which nothing else but the grid is told
};

// Observes the samples (`iters` of each part; 0 or less: all), freezes and runs the last part's evaluation sample in
// both readings. Points in order of computation; the values of `explain`, if not empty, are kept, or the rows of the
// parameter of that name, which then stands last. It may be as short as a recipe's. Throws Error with the
// nearest name when there is no such point. `unused`: what the recipe says of points that are not here.
std::vector<TracePoint> Trace(std::vector<SmokePart> parts, const Recipe& recipe, int iters,
                              const std::string& explain = "", std::vector<std::string>* unused = nullptr);

struct ModelTrace {
  std::vector<TracePoint> points;
  QuantizeResult result;  // whose notes tell what was not used
};
// A checkpoint on its samples, as Quantize reads them without an output: stage by stage, within options.memory_limit.
// All but the last sample (at most `samples`) are calibrated on, and that one is measured; or eval.0, where the file
// has evaluation samples. An override without a point is an Error, as in Quantize.
ModelTrace TraceModel(const QuantizeOptions& options, int64_t samples, const std::string& explain = "");

// Points by their own error, the largest first; `rows` in all, and no more `columns` of a terminal than given.
std::string TraceText(const std::vector<TracePoint>& points, int rows = 30, int columns = 0);
// All points in the order of TraceText (docs/smoke.md). Figures that are not finite are null.
nlohmann::json TraceJson(const std::vector<TracePoint>& points);
// The same as a table, a heading and a line a point; figures that are not finite, or not there, are empty.
std::string TraceCsv(const std::vector<TracePoint>& points);
// Histogram of one point's float values with the ends of its grid; of a parameter, of its rows' errors, and the worst.
std::string ExplainText(const TracePoint& point);

}  // namespace circlet
