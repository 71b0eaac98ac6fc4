#pragma once

// From options to what runs through the stages: samples, perplexity windows, captions, and the sample that the exported
// units are verified with.

#include "circlet/pipeline/quantize.h"
#include "circlet/preprocess/samples.h"
#include "model/gemma4/vision_profile.h"
#include "pipeline/gemma4/text_stages.h"

namespace circlet::gemma4 {

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
};

// What the command line leaves open, from the recipe: model.name_or_path, calibration.datasets (paths), export.output_dir
// and max_seq_len, evaluation.ppl.dataset (a path).
QuantizeOptions WithRecipe(QuantizeOptions options, const Recipe& recipe);

// Throws Error for data that is missing, damaged, empty or does not fit the model.
RunData LoadRunData(const QuantizeOptions& options, const Recipe& recipe, const Gemma4Config& config);

// Fills texts, images and max_seq_len of `context`; order: calibration, evaluation, windows, captions, control,
// verification.
// The verification sample is the longest with the vision layout of the exported units, right-padded.
void MakeItems(const RunData& data, const QuantizeOptions& options, RunContext& context);

// The items hold the pixels that they need.
void ReleasePictures(RunData& data);

// The layout that the exported vision units are made for; none without pictures.
std::optional<VisionProfile> ExportedProfile(const RunContext& context);

}  // namespace circlet::gemma4
