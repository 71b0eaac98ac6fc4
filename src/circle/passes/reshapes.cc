// A RESHAPE of a RESHAPE reads what the first one reads; one that nothing reads then goes.
//
//   before   x -> RESHAPE -> a -> RESHAPE -> y
//   after    x -> RESHAPE -> y

#include "circle/passes/lowered.h"

namespace circlet::circle {

void JoinReshapes(Lowered& lowered) {
  Model& model = lowered.model;
  std::vector<int> readers(model.tensors.size(), 0), producer(model.tensors.size(), -1);
  for (size_t i = 0; i < model.operators.size(); ++i) {
    for (const int32_t input : model.operators[i].inputs)
      if (input >= 0) ++readers[input];
    for (const int32_t output : model.operators[i].outputs) producer[output] = static_cast<int>(i);
  }
  for (const int32_t output : model.outputs) ++readers[output];
  const auto is_reshape = [&](int index) { return index >= 0 && model.operators[index].code == Reshape::kCircleCode; };
  for (Operator& op : model.operators) {
    if (op.code != Reshape::kCircleCode) continue;
    for (int first = producer[op.inputs[0]]; is_reshape(first); first = producer[op.inputs[0]]) {
      --readers[op.inputs[0]];
      op.inputs[0] = model.operators[first].inputs[0];
      ++readers[op.inputs[0]];
    }
  }
  std::vector<Operator> kept;
  for (Operator& op : model.operators)
    if (op.code != Reshape::kCircleCode || readers[op.outputs[0]] > 0) kept.push_back(std::move(op));
  model.operators = std::move(kept);
}

}  // namespace circlet::circle
