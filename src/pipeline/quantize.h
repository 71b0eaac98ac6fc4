#pragma once

// The driver of a run: phases of any model family, from the first item to the finished directory.

#include <cstdio>
#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <vector>

#include "circlet/base/communicator.h"
#include "circlet/pipeline/quantize.h"
#include "circlet/preprocess/data_file.h"
#include "circlet/quant/calibration.h"
#include "circlet/settings/settings.h"
#include "pipeline/phase.h"
#include "pipeline/schedule.h"
#include "pipeline/watch.h"

namespace circlet {

// What a run has whatever its model.
struct RunSettings {
  // Loads the recipe and takes from it what the options leave open: model.name_or_path, export.output_dir and
  // max_seq_len, evaluation.ppl.dataset.
  explicit RunSettings(const QuantizeOptions& asked);

  Settings file;  // the recipe file
  const Recipe& recipe = file.recipe;
  QuantizeOptions options;
  Communicator& world;
  Watcher* watcher = nullptr;  // may be null

  bool Writes() const { return !options.output.empty(); }
};

// What Prepare() may use.
struct Preparation {
  std::filesystem::path directory;  // for files without a name
  int64_t memory_bytes = 0;         // for activations; what does not fit goes to files
  std::FILE* progress = nullptr;    // may be null
};

// A model family's part of a run. It is made before anything is computed and throws what a user can mend.
class ModelJob {
 public:
  virtual ~ModelJob() = default;

  virtual Calibration& GetCalibration() = 0;
  // In order of computation. They may refer to the job, until they are asked for again.
  virtual std::vector<PhaseSpec> Phases() = 0;
  // Whether phases depend on what has to be computed first. Until then they are those of the largest that it may come
  // to.
  virtual bool NeedsPreparation() const = 0;
  // For --dry-run, a line or none: what the phases are taken for.
  virtual std::string PreparationText() const = 0;
  // Computes that, or takes what it once came to (`saved`; null: it has to be computed), and returns it. Collective.
  virtual nlohmann::json Prepare(const nlohmann::json& saved, const Preparation& preparation) = 0;
  // Every point and parameter that phases will meet.
  virtual const std::vector<Point>& Points() const = 0;
  // The item that a control item repeats, in either set; null: there is none.
  virtual const Item* Repeated() const = 0;

  // Parameters as in the checkpoint, valid as long as the job.
  virtual WeightSource Stored() const = 0;
  // Lets the kernel read a parameter ahead, and take its pages back.
  virtual void Prefetch(const std::string& parameter) const = 0;
  virtual void Release(const std::string& parameter) const = 0;

  // Memory that the largest unit takes when it is run in one piece.
  virtual int64_t WholeGraphBytes() const = 0;

  // What a host must know to run the units of these names, for pipeline.json: keys of the whole and, in "units", by
  // name, of single units.
  virtual nlohmann::json Contract(const std::vector<std::string>& units) const = 0;

  // Throws Error when the checkpoint has changed since it was opened.
  virtual void RequireUnchanged() const = 0;

  // The JSON lines that were read.
  virtual std::span<const DataFile> Files() const = 0;
  // Of all samples as they were read.
  virtual std::string SamplesHash() const = 0;
  // What a parameter had been rounded to before ("int4 in groups of 32", "Q4_0"), for those that the run rounds again;
  // empty: it had not been.
  virtual std::string RoundedBefore(const std::string& parameter) const = 0;
  // What the family knows of the result: model, samples, what the checkpoint and its config held besides.
  virtual void Describe(QuantizeResult& result) const = 0;
};

// What the store of a run holds when.
Schedule ScheduleOf(std::span<const PhaseSpec> phases, const RunSettings& settings, const Calibration& calibration);

// For what a run puts into files that nobody is to find.
std::filesystem::path TemporaryDirectory();

// What the run left out, did not use or had to assume, a line each: part of ReportText and of a dry run.
std::string NotesText(const QuantizeResult& result);

// What products take of the linears that a rounding method has made, by parameter.
using SolvedWeights = std::map<std::string, Tensor>;

// `solved` may be null.
QuantizeResult RunJob(const RunSettings& settings, ModelJob& job, SolvedWeights* solved = nullptr);
std::string DryRunJob(const RunSettings& settings, ModelJob& job);

}  // namespace circlet
