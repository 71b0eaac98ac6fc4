#pragma once

// Random values of the cases (quantization.md 11.3). A value depends on seed, name and place alone, whatever the number
// of threads.

#include <cstdint>
#include <string_view>

#include "circlet/exec/executor.h"
#include "circlet/model/gemma4/config.h"

namespace circlet {

Tensor RandomNormal(const Shape& shape, uint64_t seed, std::string_view name, float deviation = 1.0f);
Tensor RandomUniform(const Shape& shape, uint64_t seed, std::string_view name, float low, float high);
// [1,count] ids of [0,limit), 0 = the vocabulary, without the config's placeholders.
Tensor RandomIds(const Gemma4Config& config, int64_t limit, int64_t count, uint64_t seed, std::string_view name);

enum class WeightLaw : uint8_t {
  kModule,  // linears uniform in +-1/sqrt(fan_in), tables N(0,1)
  kModel,   // linears and tables N(0, 0.02)
};
// Every parameter of the model by canonical name, made when it is asked for and kept. Norm gains, layer scalars and
// standardizing scales are 1, the position table all ones, biases 0, clip bounds infinite.
WeightSource RandomWeights(const Gemma4Config& config, WeightLaw law, uint64_t seed);

}  // namespace circlet
