#pragma once

// Factors moved between parameters such that the model computes the same and a weight rounds better (model.md 3.9). All
// factors are powers of two, so that nothing is rounded and the float model is the same to the bit.

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "circlet/base/tensor.h"
#include "circlet/exec/executor.h"

namespace circlet {

// Parameters with the factors of:
//   input_layernorm, divided, and the columns of q, k and v (q alone where keys and values are shared);
//   pre_feedforward_layernorm, divided, and the columns of gate and up;
//   the rows of up, divided, and the columns of down.
// The factor of a channel is (w / mean)^strength, w the norm's weight or the norm of up's row, mean the geometric mean
// of the channels: what is large in front of a matrix gets more of its codes.
class FoldedParameters {
 public:
  explicit FoldedParameters(double strength) : strength_(strength) {}

  // float32; as it is where the parameter has no part in it. `source` gives parameters as stored.
  Tensor operator()(std::string_view name, const Tensor& stored, const WeightSource& source) const;

  double Strength() const { return strength_; }

 private:
  using Exponents = std::vector<int8_t>;
  // Of the channels of a norm's weight, or of up's rows.
  const Exponents& Of(const std::string& parameter, const WeightSource& source) const;

  double strength_;
  mutable std::mutex mutex_;
  mutable std::map<std::string, Exponents> exponents_;
};

}  // namespace circlet
