#pragma once

// The samples that a run reads: of files or of random ids, perplexity windows, and caption tasks.

#include <string>
#include <vector>

#include "circlet/model/gemma4/config.h"
#include "circlet/pipeline/quantize.h"
#include "circlet/preprocess/overlap.h"
#include "circlet/preprocess/samples.h"
#include "circlet/settings/settings.h"
#include "model/gemma4/vision_profile.h"

namespace circlet::gemma4 {

inline constexpr int64_t kLongestSequence = int64_t{1} << 20;

struct RunData {
  std::vector<Sample> calibration, evaluation;
  std::vector<std::vector<int64_t>> windows;
  std::vector<CaptionTask> captions;
  std::vector<std::vector<int64_t>> answers;  // of captions: token ids, the turn's end behind them
  std::vector<std::string> skipped;
  std::string shortened;        // of the calibration samples: SampleSet::shortened
  std::string dated;            // where the chat template wrote the date into a prompt: Sample::date_place
  std::vector<DataFile> files;  // the JSON lines that were read, without their text
  bool random = false;
  DataHashes calibrated_on;           // of the calibration samples; empty where grids are given
  std::vector<std::string> overlaps;  // what is measured and was calibrated on, a line each

  // The items hold the pixels that they need.
  void ReleasePictures();
};

// Throws Error for data that is missing, damaged, empty or does not fit the model.
RunData ReadData(const QuantizeOptions& options, const Settings& settings, const Gemma4Config& config);

// Leaves one sample to be measured, without its padding: the first of the evaluation samples, or the last of the
// calibration samples where there are none. Of the others at most the first `most` stay. Throws Error when there is
// nothing to calibrate on.
void MeasureOne(int64_t most, RunData& data);

// Holds pixels (SampleOptions::hold_pixels): in memory up to `budget` bytes, from then on each sample's in a file without
// a name in directory(), whose pages come and go.
std::function<Tensor(Tensor)> PixelHolder(int64_t budget, const std::function<std::filesystem::path()>& directory);

// A sample of a layout that none of the data has: a text sample's ids around the picture's slot, and a pattern for the
// picture. It only tries the machinery.
Sample PatternSample(const VisionProfile& profile, const Gemma4Config& config, std::vector<int64_t> ids,
                     std::string source);

}  // namespace circlet::gemma4
