#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <span>

#include "circlet/base/communicator.h"
#include "circlet/pipeline/quantize.h"
#include "circlet/preprocess/data_file.h"
#include "circlet/quant/calibration.h"
#include "pipeline/units.h"

namespace circlet {

// The output directory of a run. Everything is written to "NAME.partial" beside it, which takes the final name when all
// is there; a failed run leaves neither, unless it saved a state to go on from.
class OutputRun {
 public:
  // Throws Error when the directory exists and is not ours to replace, cannot be written, or when an unfinished run
  // lies in "NAME.partial" and neither `resume` nor `force` says what to do with it. In a run of several processes the
  // others use what the first has prepared. `data`: the JSON lines that were read.
  OutputRun(const QuantizeOptions& options, std::span<const DataFile> data, Communicator& world);
  ~OutputRun();

  const std::filesystem::path& Directory() const { return partial_; }
  // This process's own folder for what the run saves and spills; gone when the run is finished.
  std::filesystem::path StateDirectory() const;
  // What an unfinished run has written already.
  int64_t Bytes() const;
  // From now on the unfinished run outlives this object.
  void Keep() { kept_ = true; }
  // Checkpoint and data by content: [{file, bytes, sha256}].
  const nlohmann::json& Inputs() const { return inputs_; }
  // Writes pipeline.json, qparams.json, report.json, timings.json, effective_config.yaml and manifest.json, then renames.
  void Finish(const Calibration& calibration, const UnitWriter& units, const QuantizeResult& result);

 private:
  void SettleAside() const;

  std::filesystem::path final_, partial_;
  std::filesystem::path aside_;  // the state, while the directory takes its final name
  Communicator& world_;
  nlohmann::json inputs_;
  bool force_;
  bool kept_ = false;
};

}  // namespace circlet
