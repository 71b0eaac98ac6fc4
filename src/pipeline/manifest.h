#pragma once

#include <filesystem>

#include "circlet/pipeline/quantize.h"
#include "circlet/quant/calibration.h"
#include "pipeline/units.h"

namespace circlet {

// The output directory of a run. Everything is written to "NAME.partial" beside it, which takes the final name when all is
// there; a failed run leaves neither.
class OutputRun {
 public:
  // Throws Error when the directory exists and is not ours to replace, or cannot be written.
  OutputRun(std::filesystem::path final_path, bool force);
  ~OutputRun();

  const std::filesystem::path& Directory() const { return partial_; }
  // Writes pipeline.json, qparams.json, report.json, timings.json, effective_config.yaml and manifest.json, then renames.
  void Finish(const QuantizeOptions& options, const Calibration& calibration, const UnitWriter& units,
              const QuantizeResult& result);

 private:
  std::filesystem::path final_, partial_;
  bool force_;
  bool finished_ = false;
};

}  // namespace circlet
