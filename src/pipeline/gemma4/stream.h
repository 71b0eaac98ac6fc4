#pragma once

// What a run measures before it widens the residual stream.

#include <vector>

#include "circlet/quant/widening.h"
#include "pipeline/gemma4/context.h"
#include "pipeline/quantize.h"

namespace circlet::gemma4 {

// The largest value of each channel at every point of the stream, by the points' names, in the float model. At most
// kMeasured calibration samples, spread evenly, run through the layers. `weights` are not widened yet, and
// context.config is theirs. The same for any number of threads and processes. Collective.
inline constexpr int64_t kMeasured = 8;
std::vector<StreamPoint> MeasureStream(const Context& context, const RunSettings& settings,
                                       const Preparation& preparation);

}  // namespace circlet::gemma4
