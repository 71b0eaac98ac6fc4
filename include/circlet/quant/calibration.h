#pragma once

// From float graphs to integer grids: the observe and the fake-quantize reading of any graph, and what lies between
// them. Knows graphs and names, no model.
//
//   Calibration c(recipe, kDefault);
//   ObserveReading observe(c);
//   Executor float_run(graph, &observe);
//   for (i, inputs) { observe.Begin(i); float_run.Run(inputs, weights); observe.End(); }
//   c.Freeze(graph, weights);
//   FakeQuantReading rounding(c);
//   Executor(graph, &rounding).Run(inputs, c.RoundedWeights(weights));

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "circlet/circle/export.h"
#include "circlet/exec/executor.h"
#include "circlet/quant/dialect.h"
#include "circlet/quant/observer.h"
#include "circlet/quant/params.h"
#include "circlet/quant/recipe.h"

namespace circlet {

// Statistics of points that are not frozen yet, by name.
using ObserverMap = std::map<std::string, std::unique_ptr<Observer>>;

// Grids of points by name: being observed, or frozen.
class Calibration final {
 public:
  Calibration(Recipe recipe, Dialect dialect) : recipe_(std::move(recipe)), dialect_(dialect) {}

  const Recipe& GetRecipe() const { return recipe_; }
  const Dialect& GetDialect() const { return dialect_; }

  // Frozen points from a file: nothing is observed any more, and a point that the file lacks is an Error when it is
  // met.
  void UseFrozen(ParameterStore params);
  bool Frozen() const { return all_frozen_; }
  // Takes the grids of finished stages from an earlier process.
  void Resume(const ParameterStore& params);

  // The observer of a point among `observers`, made on first mention; null when the point takes no statistics or is
  // frozen already.
  Observer* ObserverOf(const Point& point, ObserverMap& observers) const;
  // Whether statistics of the point depend on the order of the samples (EMA).
  bool OrderMatters(const Point& point) const;

  // Fixes the grid of every point and parameter that `graph` mentions and that has none yet. Weights are read once, for
  // their exact ranges. Boundary points belong to the graph that computes them. Throws Error naming a point that no
  // sample reached or that met a NaN or an infinity, or, with frozen points, one whose grids are not the parameter's.
  void Freeze(const Graph& graph, const WeightSource& weights);

  // The grid of a point; throws Error when it is not frozen. Null: the recipe leaves the point in float (or MX).
  const QParams* GridOf(const std::string& name) const;
  const PointParams& ParamsOf(const std::string& name) const;

  // Parameters rounded to their grids, once each; the float ones of parameters without a grid. `weights` must stay
  // valid. Matrices of at most 8 bits come as codes (int8, with their grid) where activations have grids as well and
  // products are summed in integers, all others as float32.
  WeightSource RoundedWeights(WeightSource weights);
  // Rows of a parameter from `first_row` on, rounded to their grids. `rows` as stored.
  Tensor RoundedRows(const std::string& name, const Tensor& rows, int64_t first_row) const;
  // Forgets the rounded parameters (a stage is over).
  void DropWeights() { rounded_.clear(); }

  const ParameterStore& Params() const { return params_; }
  ObserverMap& Observers() { return observers_; }
  // Adds what other threads or processes have seen of other samples.
  void Absorb(ObserverMap observers);

 private:
  void CheckFits(const Graph& graph, const WeightSource& weights) const;
  bool MultipliedAsCodes(const Tensor& weight, const QParams& grid) const;

  Recipe recipe_;
  Dialect dialect_;
  bool all_frozen_ = false;
  ParameterStore params_;
  ObserverMap observers_;
  std::map<std::string, Tensor> rounded_;
};

// Feeds observers. One reading for each executor.
class ObserveReading final : public PointReading {
 public:
  explicit ObserveReading(Calibration& calibration) : ObserveReading(calibration, calibration.Observers()) {}
  // Feeds `observers`, for Calibration::Absorb: samples that are observed side by side need their own.
  ObserveReading(const Calibration& calibration, ObserverMap& observers);
  ~ObserveReading() override;
  PointVisitor* At(const Point& point, const TensorType& type) override;
  bool Writes() const override { return false; }

  // A piece of a sample: positions from `position` of `length` and, of tensors that are `columns` wide, columns from
  // `column` of `width`. Elements count as if the whole had run at once; what is not that wide is the same in every
  // piece.
  struct Slice {
    int64_t position = 0, length = 0;
    int64_t column = 0, columns = 0, width = 0;
  };
  // Around the run of one sample, or of one of its pieces (not for EMA, which takes a sample as a whole).
  void Begin(int64_t sample, std::optional<Slice> slice = std::nullopt);
  void End();

 private:
  class Visitor;
  const Calibration& calibration_;
  ObserverMap& observers_;
  std::vector<std::unique_ptr<Visitor>> visitors_;
  std::optional<Slice> slice_;
};

// Rounds values at frozen points. `on_grid`: what comes in is on its grid already, so boundary points are passed.
class FakeQuantReading final : public PointReading {
 public:
  explicit FakeQuantReading(const Calibration& calibration, bool on_grid = false);
  ~FakeQuantReading() override;
  PointVisitor* At(const Point& point, const TensorType& type) override;
  bool Writes() const override { return true; }
  const QParams* GridAt(const Point& point) override;

 private:
  const Calibration& calibration_;
  bool on_grid_;
  std::map<std::string, std::unique_ptr<PointVisitor>> visitors_;
};

// Values of a point, float32, on its grid.
Tensor Rounded(const Calibration& calibration, const std::string& point, const Tensor& values);

// The frozen grids as export needs them. Codes of a parameter are made once and shared by the units that read it; more
// than 16 MiB of them are made anew each time a file is written.
class CalibratedGrids final : public circle::GridSource {
 public:
  CalibratedGrids(const Calibration& calibration, WeightSource stored)
      : calibration_(calibration), stored_(std::move(stored)) {}
  const QParams* Find(const Point& point) const override;
  Tensor WeightCodes(const std::string& name, const QParams& grid) const override;
  std::shared_ptr<const circle::LazyConstant> LazyWeightCodes(const std::string& name,
                                                              const QParams& grid) const override;
  Tensor WeightFloat(const std::string& name) const override;
  Tensor Quantize(const Tensor& values, const QParams& grid) const override;

 private:
  const Calibration& calibration_;
  WeightSource stored_;  // any float type
  mutable std::map<std::string, Tensor> codes_;
};

}  // namespace circlet
