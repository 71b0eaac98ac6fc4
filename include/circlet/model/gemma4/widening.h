#pragma once

// The model with a wider residual stream (model.md 3.8): what becomes of its config and its parameters.

#include <string_view>

#include "circlet/base/tensor.h"
#include "circlet/model/gemma4/config.h"
#include "circlet/quant/widening.h"

namespace circlet {

// hidden_size grows; the constants made of it (the embedding's scale, that of the per-layer projection) stay those of
// the model's own width.
void Widen(Gemma4Config& config, const Widening& widening);

// Whether a point's values are the stream, or what is added to it: embeddings, sums, and the outputs of the norms that
// are added.
bool LiesOnStream(std::string_view point);

// Parameters in the form that the wider stream takes.
class WidenedParameters {
 public:
  WidenedParameters(const Gemma4Config& config, Widening widening);

  // The parameter in its wider form: float32, or as stored where columns of zeros are all that is new; as it is where
  // it does not meet the stream. Of a parameter whose columns are the stream's, `stored` may be any of its rows.
  Tensor operator()(std::string_view name, const Tensor& stored) const;

  const Widening& Plan() const { return widening_; }

 private:
  struct Form;
  Form FormOf(std::string_view name) const;

  Widening widening_;
  int64_t model_width_, width_;
  bool tied_head_;
  double gain_;  // of norms: the sum of squares is divided by more channels
};

}  // namespace circlet
