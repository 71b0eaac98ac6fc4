#pragma once

#include "circlet/preprocess/samples.h"

namespace circlet {

// What every loader asks of a sample: at least one token, at most options.max_length, ids within the vocabulary.
void CheckSample(const Sample& sample, const SampleOptions& options);

}  // namespace circlet
