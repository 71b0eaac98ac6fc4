// A product with a bare constant whose result has a grid: the constant gets the grid that holds it exactly, and a
// factor without a grid the result's grid divided by the constant (the reference leaves both in float). Behind that, a
// computed tensor without a grid in a quantized unit is an error.
//
//   before   x (float) -> MUL(x, 0.5 float) -> y (int16, s)
//   after    x (int16, s / 0.5) -> MUL(x, 0.5 int16) -> y (int16, s)

#include <algorithm>
#include <cmath>

#include "circle/passes/lowered.h"
#include "circle/schema.h"

namespace circlet::circle {

void FillHoles(Lowered& lowered) {
  Model& model = lowered.model;
  const std::vector<Origin>& origins = lowered.origins;
  for (auto op = model.operators.rbegin(); op != model.operators.rend(); ++op) {
    if (op->code != Mul::kCircleCode) continue;
    const int32_t constant = op->inputs[1];
    const auto& result = model.tensors[op->outputs[0]].qparams;
    if (origins[constant].constant < 0 || model.tensors[constant].qparams || !result) continue;
    const float value = model.tensors[constant].data.F32()[0];
    const auto top = static_cast<float>(CodesOf(result->dtype).max);
    const QParams exact{.dtype = result->dtype, .scale = {std::abs(value) / top}, .zero_point = {0}};
    QParams factor = *result;
    factor.scale[0] /= std::abs(value);
    for (const QParams& grid : {exact, factor}) RequireStorable(origins[constant].name, grid);
    lowered.Assign(constant, exact);
    lowered.AssignBack(op->inputs[0], factor);
  }
  const bool quantized =
      std::any_of(model.tensors.begin(), model.tensors.end(), [](const Tensor& t) { return t.qparams.has_value(); });
  for (size_t i = 0; quantized && i < model.tensors.size(); ++i) {
    const Tensor& tensor = model.tensors[i];
    if (tensor.type.dtype == DType::kF32 && !tensor.qparams && origins[i].producer >= 0)
      Fail("{}: this {} output has no quantization point; give it one, or set the whole unit to float", origins[i].name,
           OperatorName(model.operators[origins[i].producer].code));
  }
}

}  // namespace circlet::circle
