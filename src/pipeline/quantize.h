#pragma once

// The driver of a run: phases of any model family, from the first item to the finished directory.

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "circlet/base/communicator.h"
#include "circlet/pipeline/quantize.h"
#include "circlet/preprocess/data_file.h"
#include "circlet/quant/calibration.h"
#include "pipeline/phase.h"
#include "pipeline/schedule.h"

namespace circlet {

// What a run has whatever its model.
struct RunSettings {
  // Loads the recipe and takes from it what the options leave open: model.name_or_path, export.output_dir and
  // max_seq_len, evaluation.ppl.dataset.
  explicit RunSettings(const QuantizeOptions& asked);

  Recipe recipe;
  QuantizeOptions options;
  Communicator& world;

  bool Writes() const { return !options.output.empty(); }
};

// A model family's part of a run. It is made before anything is computed and throws what a user can mend.
class ModelJob {
 public:
  virtual ~ModelJob() = default;

  virtual Calibration& GetCalibration() = 0;
  // In order of computation; called once. They may refer to the job.
  virtual std::vector<PhaseSpec> Phases() = 0;
  // Every point and parameter that phases will meet.
  virtual const std::vector<Point>& Points() const = 0;
  // The item that a control item repeats, in either set; null: there is none.
  virtual const Item* Repeated() const = 0;

  // Parameters as in the checkpoint, valid as long as the job.
  virtual WeightSource Stored() const = 0;
  // Lets the kernel read a parameter ahead, and take its pages back.
  virtual void Prefetch(const std::string& parameter) const = 0;
  virtual void Release(const std::string& parameter) const = 0;

  // The Circle files, and verify.safetensors.
  virtual int64_t OutputBytes() const = 0;
  // Memory that the largest unit takes when it is run in one piece.
  virtual int64_t WholeGraphBytes() const = 0;

  // Throws Error when the checkpoint has changed since it was opened.
  virtual void RequireUnchanged() const = 0;

  // The JSON lines that were read.
  virtual std::span<const DataFile> Files() const = 0;
  // Of all samples as they were read.
  virtual std::string SamplesHash() const = 0;
  // What the family knows of the result: model, samples, what the checkpoint and its config held besides.
  virtual void Describe(QuantizeResult& result) const = 0;
};

// What the store of a run holds when.
Schedule ScheduleOf(std::span<const PhaseSpec> phases, const RunSettings& settings, const Calibration& calibration);

QuantizeResult RunJob(const RunSettings& settings, ModelJob& job);
std::string DryRunJob(const RunSettings& settings, ModelJob& job);

}  // namespace circlet
