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
#include <string>
#include <vector>

#include "circlet/circle/export.h"
#include "circlet/exec/executor.h"
#include "circlet/quant/dialect.h"
#include "circlet/quant/observer.h"
#include "circlet/quant/params.h"
#include "circlet/quant/recipe.h"

namespace circlet {

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

  // The observer of a point, made on first mention; null when the point takes no statistics or is frozen already.
  Observer* ObserverOf(const Point& point);

  // Fixes the grid of every point and parameter that `graph` mentions and that has none yet. Weights are read once, for
  // their exact ranges. Boundary points belong to the graph that computes them. Throws Error naming a point that no
  // sample reached or that met a NaN or an infinity, or, with frozen points, one whose grids are not the parameter's.
  void Freeze(const Graph& graph, const WeightSource& weights);

  // The grid of a point; throws Error when it is not frozen. Null: the recipe leaves the point in float (or MX).
  const QParams* GridOf(const std::string& name) const;
  const PointParams& ParamsOf(const std::string& name) const;

  // Parameters rounded to their grids, once each; the float ones of parameters without a grid. `weights` must stay
  // valid.
  WeightSource RoundedWeights(WeightSource weights);
  // Forgets the rounded parameters (a stage is over).
  void DropWeights() { rounded_.clear(); }

  const ParameterStore& Params() const { return params_; }
  // Statistics of points that are not frozen yet, by name (resume, many processes).
  std::map<std::string, std::unique_ptr<Observer>>& Observers() { return observers_; }

 private:
  void CheckFits(const Graph& graph, const WeightSource& weights) const;

  Recipe recipe_;
  Dialect dialect_;
  bool all_frozen_ = false;
  ParameterStore params_;
  std::map<std::string, std::unique_ptr<Observer>> observers_;
  std::map<std::string, Tensor> rounded_;
};

// Feeds observers. One reading for each executor.
class ObserveReading final : public PointReading {
 public:
  explicit ObserveReading(Calibration& calibration);
  ~ObserveReading() override;
  PointVisitor* At(const Point& point, const TensorType& type) override;
  bool Writes() const override { return false; }

  // Around the run or runs of one sample. A sample that runs in slices of axis 1 states the whole length, and with
  // StartAt where each slice begins.
  void Begin(int64_t sample, int64_t whole_length = 0);
  void StartAt(int64_t position) { position_ = position; }
  void End();

 private:
  class Visitor;
  Calibration& calibration_;
  std::vector<std::unique_ptr<Visitor>> visitors_;
  int64_t position_ = 0;
};

// Rounds values at frozen points.
class FakeQuantReading final : public PointReading {
 public:
  explicit FakeQuantReading(const Calibration& calibration);
  ~FakeQuantReading() override;
  PointVisitor* At(const Point& point, const TensorType& type) override;
  bool Writes() const override { return true; }

 private:
  const Calibration& calibration_;
  std::map<std::string, std::unique_ptr<PointVisitor>> visitors_;
};

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
