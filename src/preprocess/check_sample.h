#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "circlet/preprocess/samples.h"

namespace circlet {

// What every loader asks of a sample: at least one token, ids within the vocabulary.
void CheckSample(const Sample& sample, const SampleOptions& options);

// Holds samples to SampleOptions.max_length: takes, cuts or splits them, or counts those that are longer, so that one
// error tells about all of them.
class LengthLimit {
 public:
  explicit LengthLimit(const SampleOptions& options) : options_(options) {}

  // Appends what is left of the sample to `samples`. Throws Error when a cut would go through a picture.
  void Add(Sample sample, std::vector<Sample>& samples);
  // Throws Error "`place`: 29 of 32 samples are longer ..." when samples are and the options refuse that.
  void Check(std::string_view place) const;
  // "3 of 32 samples cut to 64 tokens"; empty when none was.
  std::string Summary() const;

 private:
  const SampleOptions& options_;
  int64_t all_ = 0, longer_ = 0, longest_ = 0;
  std::string longest_source_;
};

}  // namespace circlet
