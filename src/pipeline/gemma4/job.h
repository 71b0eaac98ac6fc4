#pragma once

// Gemma 4 as a job of the driver: which stages, units and items a checkpoint, a recipe and samples come to.

#include <memory>
#include <optional>
#include <vector>

#include "circlet/model/gemma4/folding.h"
#include "model/gemma4/vision_profile.h"
#include "pipeline/gemma4/context.h"
#include "pipeline/gemma4/data.h"
#include "pipeline/gemma4/given.h"
#include "pipeline/gemma4/head.h"
#include "pipeline/gemma4/text_stages.h"
#include "pipeline/gemma4/text_units.h"
#include "pipeline/gemma4/vision_stages.h"
#include "pipeline/gemma4/vision_units.h"
#include "pipeline/quantize.h"

namespace circlet::gemma4 {

class Gemma4Job final : public ModelJob {
 public:
  // Reads the checkpoint's headers and all samples. Throws Error for what does not fit.
  explicit Gemma4Job(const RunSettings& settings);

  Calibration& GetCalibration() override { return calibration_; }
  std::vector<PhaseSpec> Phases() override;
  const std::vector<Point>& Points() const override { return points_; }
  bool NeedsPreparation() const override { return !widening_ || !widening_->Empty(); }
  std::string PreparationText() const override;
  nlohmann::json Prepare(const nlohmann::json& saved, const Preparation& preparation) override;
  const Item* Repeated() const override { return context_.texts.Repeated(); }
  WeightSource Stored() const override;
  void Prefetch(const std::string& parameter) const override { weights_.Prefetch(parameter); }
  void Release(const std::string& parameter) const override { weights_.Release(parameter); }
  std::string RoundedBefore(const std::string& parameter) const override;
  void RequireUnchanged() const override { weights_.GetCheckpoint().RequireUnchanged(); }
  int64_t WholeGraphBytes() const override;
  nlohmann::json Contract(const std::vector<std::string>& units) const override;
  std::span<const DataFile> Files() const override { return data_.files; }
  std::string SamplesHash() const override { return samples_hash_; }
  void Describe(QuantizeResult& result) const override;

 private:
  void SettleWidening(const ParameterStore* frozen);
  void Fold(float strength);
  Dialect RunDialect();
  bool KeepsCodes() const;
  void Give();
  void DescribePacked(QuantizeResult& result) const;
  void AddVisionPhases(std::vector<PhaseSpec>& phases);
  void AddVisionUnits(PhaseSpec& phase);
  std::string HashOfSamples() const;
  void DescribeUnused(QuantizeResult& result) const;

  const RunSettings& settings_;
  double load_seconds_ = 0;
  ModelWeights weights_;
  Gemma4Config config_;  // as the weights correct it
  WideningOption widen_;
  // Of the stream; none: it is still to be measured, and config_ has as many channels as it may get.
  std::optional<Widening> widening_;
  bool prepared_ = false;
  std::unique_ptr<FoldedParameters> folded_;  // null: factors stay where they are
  RunData data_;
  GivenGrids given_;  // nothing but of checkpoints whose codes are kept
  Calibration calibration_;
  Context context_;
  bool whole_;  // whole-graph files too
  std::string samples_hash_;
  std::optional<VisionProfile> profile_;
  TextTables text_tables_;
  TextStages text_stages_;
  std::shared_ptr<Head> head_;
  std::optional<TextUnits> text_units_;
  std::optional<PictureTables> picture_tables_;
  std::optional<VisionStages> vision_stages_;
  std::optional<VisionUnits> vision_units_;
  std::vector<Point> points_;
};

// A run that wrote nothing, for a model that goes on on its grids.
struct Simulation {
  Recipe recipe;
  std::string dialect;
  ParameterStore grids;   // of the stream that they were calibrated on
  SolvedWeights solved;
  bool pictures = false;  // the vision tower has grids too
  int64_t length = 0;     // of the longest sample; 0: there was none
  std::string notes;      // what was not used or had to be assumed, a line each
};
// Calibrates. With options.qparams the grids are there, and nothing is computed. Throws what Quantize throws.
Simulation Simulate(const QuantizeOptions& options);

}  // namespace circlet::gemma4
