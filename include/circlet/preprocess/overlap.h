#pragma once

// Whether data that a model is measured on was calibrated on too: then the figures flatter.

#include <set>
#include <span>
#include <string>
#include <string_view>

#include "circlet/preprocess/samples.h"

namespace circlet {

// By which data is known again: SHA-256 of normalised lines and of pixels.
struct DataHashes {
  std::set<std::string> lines, pictures;
};

// The lines of a text, blanks joined and ASCII letters small; short ones, which many texts share, are passed over.
void AddLines(std::string_view text, DataHashes& hashes);
// Pictures as they reach the model, padding included.
void AddPictures(const Sample& sample, DataHashes& hashes);

// "3 of 812 lines also stand in the calibration data, the first: \"...\""; empty: none does.
std::string OverlapOf(std::string_view text, const DataHashes& calibration);
// "2 of 100 pictures also stand in the calibration data, the first: images/cat.png".
std::string OverlapOf(std::span<const CaptionTask> captions, const DataHashes& calibration);

}  // namespace circlet
