// The bias of a FULLY_CONNECTED lies on the grid of its sums, s_in * s_w[channel] with zero point 0: int64 behind int16
// inputs, int32 behind 8-bit ones. A per-tensor weight scale serves every channel.
//
//   before   FULLY_CONNECTED(x int16, w uint8, b float32)
//   after    FULLY_CONNECTED(x int16, w uint8, b int64 = round(b / (s_in s_w)))

#include <algorithm>
#include <cmath>

#include "circle/passes/lowered.h"

namespace circlet::circle {

void QuantizeBiases(Lowered& lowered) {
  Model& model = lowered.model;
  for (const Operator& op : model.operators) {
    if (op.code != FullyConnected::kCircleCode || op.inputs.size() < 3 || op.inputs[2] < 0) continue;
    const std::optional<QParams>&x = model.tensors[op.inputs[0]].qparams, &w = model.tensors[op.inputs[1]].qparams;
    Tensor& bias = model.tensors[op.inputs[2]];
    if (!x || !w || bias.qparams) continue;
    const std::span<const float> values = bias.data.F32();
    QParams grid{.dtype = x->dtype == DType::kI16 ? DType::kI64 : DType::kI32, .axis = 0};
    circlet::Tensor codes(TensorType{grid.dtype, bias.type.shape});
    for (size_t c = 0; c < values.size(); ++c) {
      const float scale = x->scale[0] * w->scale[w->PerChannel() ? c : 0];
      grid.scale.push_back(scale);
      grid.zero_point.push_back(0);
      const int64_t code = std::llrint(values[c] / scale);
      if (grid.dtype == DType::kI64)
        codes.I64()[c] = code;
      else
        codes.As<int32_t>()[c] = static_cast<int32_t>(std::clamp<int64_t>(code, INT32_MIN, INT32_MAX));
    }
    RequireStorable(bias.name, grid);
    bias.data = std::move(codes);
    bias.type.dtype = grid.dtype;
    bias.qparams = std::move(grid);
  }
}

}  // namespace circlet::circle
