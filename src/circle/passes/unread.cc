// Tensors that no operator mentions go; the others are numbered in the order in which they are met. Origins do not
// follow: this is the last pass.
//
//   before   #0 x, #1 (left over), #2 y: operators over {0} -> {2}
//   after    #0 x, #1 y:                 operators over {0} -> {1}

#include "circle/passes/lowered.h"

namespace circlet::circle {

void RemoveUnread(Lowered& lowered) {
  Model& model = lowered.model;
  std::vector<int32_t> renumbered(model.tensors.size(), -1);
  std::vector<Tensor> tensors;
  const auto visit = [&](std::vector<int32_t>& list) {
    for (int32_t& index : list) {
      if (index < 0) continue;
      if (renumbered[index] < 0) {
        renumbered[index] = static_cast<int32_t>(tensors.size());
        tensors.push_back(std::move(model.tensors[index]));
      }
      index = renumbered[index];
    }
  };
  visit(model.inputs);
  for (Operator& op : model.operators) {
    visit(op.inputs);
    visit(op.outputs);
  }
  visit(model.outputs);
  model.tensors = std::move(tensors);
}

}  // namespace circlet::circle
