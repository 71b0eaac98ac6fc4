#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <span>

#include "circlet/base/communicator.h"
#include "circlet/pipeline/quantize.h"
#include "circlet/preprocess/data_file.h"
#include "circlet/quant/calibration.h"
#include "circlet/settings/settings.h"
#include "pipeline/output_directory.h"
#include "pipeline/units.h"

namespace circlet {

// The output of a run: its directory, the files beside the units, and the manifest that lists them all.
class OutputRun {
 public:
  // Throws Error for an output that cannot be used (output_directory.h). In a run of several processes the others use
  // what the first has prepared. `data`: the JSON lines that were read.
  OutputRun(const QuantizeOptions& options, std::span<const DataFile> data, Communicator& world);

  const std::filesystem::path& Directory() const { return directory_.Partial(); }
  // This process's own folder for what the run saves and spills; gone when the run is finished.
  std::filesystem::path StateDirectory() const;
  // What an unfinished run has written already.
  int64_t Bytes() const;
  // From now on the unfinished run outlives this object.
  void Keep() { directory_.Keep(); }
  // Checkpoint and data by content: [{file, bytes, sha256}].
  const nlohmann::json& Inputs() const { return inputs_; }
  // Makes the directory ready. False: with `resume`, the result of a run with this identity (run_state.h) lies there
  // already, whole. Collective.
  bool Begin(const nlohmann::json& identity);
  // Writes pipeline.json, qparams.json, report.json, timings.json, effective_config.yaml and manifest.json; then the
  // directory takes its name.
  void Finish(const Settings& settings, const Calibration& calibration, nlohmann::json pipeline,
              const UnitWriter& units, const QuantizeResult& result);

 private:
  bool IsDone() const;

  const QuantizeOptions& options_;
  Communicator& world_;
  OutputDirectory directory_;
  nlohmann::json inputs_;
  std::string run_;  // hash of the identity
  std::string samples_hash_;
};

OutputDirectory::Mode ModeOf(const QuantizeOptions& options);

// As report.json, manifest.json and qparams.json have it.
nlohmann::json ToJson(const FrozenGrids& grids);

}  // namespace circlet
