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
//   Executor(graph, &rounding).Run(inputs, RoundedWeights(c, weights));

#include <map>
#include <memory>
#include <optional>
#include <span>
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

  // Grids that a checkpoint says, before anything is observed: of a point, which values are rounded to in every
  // reading, also while others are observed; and of a parameter, whose source then holds its codes in the grid's type.
  // Nothing changes them.
  void GivePoint(const std::string& name, QParams grid);
  void GiveCodes(const std::string& name, QParams grid);
  // Whether the parameter's source holds its codes.
  bool HoldsCodes(const std::string& name) const;
  bool GivesPoints() const { return !given_points_.empty(); }
  // Null: the point's grid is not given, or it only stands in files.
  const QParams* GivenGrid(const Point& point) const;
  // What a point's grid shall be: the checkpoint's, or the recipe's.
  PointSpec SpecFor(const Point& point) const;

  // Frozen points from a file: nothing is observed any more, and a point that the file lacks is an Error when it is
  // met.
  void UseFrozen(ParameterStore params);
  // Throws Error naming `file` and the first of `points` whose element type, scheme or axis is not the recipe's.
  void CheckTypes(std::span<const Point> points, const std::string& file) const;
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

  // Replaces the grid of a parameter that is frozen: a rounding method has found a better one.
  void SetGrid(const std::string& name, QParams grid);

  // The grid of a point; throws Error when it is not frozen. Null: the recipe leaves the point in float (or MX).
  const QParams* GridOf(const std::string& name) const;
  const PointParams& ParamsOf(const std::string& name) const;

  // Rows of a parameter from `first_row` on, rounded to their grids, as products take them: the float ones of parameters
  // without a grid; int8 codes with their grid of matrices of at most 8 bits, where activations have grids as well and
  // products are summed in integers; all others as float32. `rows` as stored.
  Tensor RoundedRows(const std::string& name, const Tensor& rows, int64_t first_row) const;
  // Only the rows `ids` of a table [rows, width], as float32. An id outside the table is an Error naming it.
  Tensor RoundedRowsAt(const std::string& name, const Tensor& table, std::span<const int64_t> ids) const;
  // The same as codes in the storage form of a file, with their grid. Empty without an integer grid.
  Tensor CodesOfRows(const std::string& name, const Tensor& rows, int64_t first_row) const;
  // What products take of such codes.
  Tensor OperandOf(const Tensor& codes) const;
  // A parameter as products of the reference take it: float32, or codes on their grid.
  Tensor ReferenceOperand(const Tensor& stored) const;

  const ParameterStore& Params() const { return params_; }
  ObserverMap& Observers() { return observers_; }
  // Adds what other threads or processes have seen of other samples.
  void Absorb(ObserverMap observers);

 private:
  void CheckFits(const Graph& graph, const WeightSource& weights) const;
  bool MultipliedAsCodes(const Tensor& weight, const QParams& grid) const;
  // Values of a parameter on `grid`; null: it has no integer one.
  Tensor RoundedValues(const std::string& name, const Tensor& rows, const QParams* grid) const;
  // The grid of those rows; null: the parameter has no integer grid.
  std::shared_ptr<const QParams> GridOfRows(const std::string& name, const Tensor& rows, int64_t first_row) const;

  Recipe recipe_;
  Dialect dialect_;
  bool all_frozen_ = false;
  ParameterStore params_;
  ObserverMap observers_;
  std::map<std::string, QParams, std::less<>> given_points_;
};

// Parameters on their grids, each made once, for as long as this object or a copy of it lives: what the simulation
// multiplies is what the file holds. A WeightSource; several threads may ask it.
class RoundedWeights {
 public:
  // kProducts: no codes are kept beside what products take.
  enum class Use : uint8_t { kProducts, kProductsAndFiles };
  // `stored` must stay valid. `made`: codes that exist already, from an earlier object or in a file; empty for others.
  RoundedWeights(const Calibration& calibration, WeightSource stored, Use use = Use::kProducts, WeightSource made = {});

  // Codes that a rounding method has made, with their grid. Before anybody asks for the parameter.
  void Take(const std::string& name, const Tensor& codes) const;

  // What products take (Calibration::RoundedRows).
  Tensor operator()(const std::string& name) const;
  // A slice of the rows of that, for a parameter too large to stand in memory; nothing of it is kept.
  Tensor Slice(const std::string& name, int64_t begin, int64_t end) const;
  // Rows of a table [rows, width] as float32: of its codes where there are any, else rounded alone. An id outside the
  // table is an Error naming it.
  Tensor Rows(const std::string& name, std::span<const int64_t> ids) const;
  // What the file holds (Calibration::CodesOfRows); made from the checkpoint when nobody has asked for it.
  Tensor Codes(const std::string& name) const;
  // Whether codes are there already.
  bool HoldsCodes(const std::string& name) const;
  Tensor Stored(const std::string& name) const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

// Feeds observers, and rounds values at points whose grids are given. One reading for each executor.
class ObserveReading final : public PointReading {
 public:
  explicit ObserveReading(Calibration& calibration) : ObserveReading(calibration, calibration.Observers()) {}
  // Feeds `observers`, for Calibration::Absorb: samples that are observed side by side need their own.
  ObserveReading(const Calibration& calibration, ObserverMap& observers) : ObserveReading(calibration, &observers) {}
  // What a float run takes that observes nothing; null where no grid is given.
  static std::unique_ptr<ObserveReading> Reference(const Calibration& calibration);
  ~ObserveReading() override;
  PointVisitor* At(const Point& point, const TensorType& type) override;
  bool Writes() const override { return calibration_.GivesPoints(); }
  bool Observes() const override { return observers_ != nullptr; }
  const QParams* GridAt(const Point& point) override { return calibration_.GivenGrid(point); }

  // EMA takes a sample as a whole.
  void Begin(int64_t sample, const std::optional<Slice>& piece = std::nullopt) override;
  void End() override;

 private:
  class Visitor;
  ObserveReading(const Calibration& calibration, ObserverMap* observers);  // null: nothing is observed
  const Calibration& calibration_;
  ObserverMap* observers_;
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

// The frozen grids as export needs them. Codes of more than 16 MiB that nobody holds are made each time a file is
// written, piece by piece.
class CalibratedGrids final : public circle::GridSource {
 public:
  // `own`: parameters of this graph alone, float32; empty tensors for others.
  CalibratedGrids(const Calibration& calibration, RoundedWeights weights, WeightSource own = {})
      : calibration_(calibration), weights_(std::move(weights)), own_(std::move(own)) {}
  CalibratedGrids(const Calibration& calibration, WeightSource stored)
      : CalibratedGrids(calibration,
                        RoundedWeights(calibration, std::move(stored), RoundedWeights::Use::kProductsAndFiles)) {}
  const QParams* Find(const Point& point) const override;
  Tensor WeightCodes(const std::string& name, const QParams& grid) const override;
  std::shared_ptr<const circle::LazyConstant> LazyWeightCodes(const std::string& name,
                                                              const QParams& grid) const override;
  Tensor WeightFloat(const std::string& name) const override;
  Tensor Quantize(const Tensor& values, const QParams& grid) const override;

 private:
  Tensor Own(const std::string& name) const { return own_ ? own_(name) : Tensor(); }

  const Calibration& calibration_;
  RoundedWeights weights_;
  WeightSource own_;
};

}  // namespace circlet
