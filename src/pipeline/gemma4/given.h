#pragma once

// What a packed checkpoint says of grids (docs/packed.md): the int8 steps at the inputs and outputs of linears, as
// points of the model.

#include <map>
#include <string>
#include <vector>

#include "circlet/model/gemma4/weights.h"
#include "circlet/quant/dialect.h"

namespace circlet::gemma4 {

struct GivenOptions {
  bool int16_twin = false;  // 256 steps of int16 for each of int8: the same ends, a finer step
  bool kv_scales = false;   // caches of keys and values as well
};

struct GivenGrids {
  std::map<std::string, QParams> points;  // by full name
  GivenPoints added;                      // points that the model has for them alone
  std::vector<std::string> unused;        // "NAME: reason": steps that nothing takes
  std::vector<std::string> without;       // "MODULE: input, output": packed linears without a step on a side
};

// A step stands on the tensor that the linear reads where everything that reads it has the same one, else on a copy of
// it for the linear alone.
GivenGrids GivenBy(const ModelWeights& weights, const GivenOptions& options, const Dialect& dialect);

}  // namespace circlet::gemma4
