// Float constants and parameters that have got a grid on the way become codes.
//
//   before   scale: 0.0625 float32, grid (int16, 0.0625 / 32767)
//   after    scale: 32767 int16

#include "circle/passes/lowered.h"

namespace circlet::circle {

void QuantizeConstants(Lowered& lowered) {
  for (size_t i = 0; i < lowered.model.tensors.size(); ++i) {
    Tensor& tensor = lowered.model.tensors[i];
    if (lowered.origins[i].constant >= 0 && tensor.qparams)
      tensor.data = lowered.source.Quantize(tensor.data, *tensor.qparams);
  }
}

}  // namespace circlet::circle
