#pragma once

#include <string>

#include "circlet/base/tensor.h"
#include "circlet/pipeline/quantize.h"

namespace circlet {

// Checksums of a parameter's codes and scales that do not depend on how they are stored: what the checkpoint holds and
// what a file holds are the same when these are. `codes` of at most 8 bits with their grid, a scale a row.
CodesChecksum DescribeCodes(const std::string& parameter, int bits, const Tensor& codes);

// Where manifest.json lists them, by parameter.
inline constexpr char kStoredCodes[] = "stored_codes";

}  // namespace circlet
