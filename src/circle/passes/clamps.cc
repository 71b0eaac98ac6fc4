// A clamp computes on the grid of its output. An input on another grid is requantized first; a bound that no code of
// the grid can pass is left out; a RESHAPE in front moves behind, as the reference orders them.
//
//   before   x (g1) -> MINIMUM(x, 6.0) -> y (g2)          x (g) -> MAXIMUM(x, -inf) -> y (g)   x -> RESHAPE -> MINIMUM
//   -> y after    x (g1) -> QUANTIZE -> MINIMUM(., code) -> y   x (g) named y                        x -> MINIMUM ->
//   RESHAPE -> y

#include <cmath>
#include <map>
#include <utility>

#include "circle/passes/lowered.h"
#include "ops/codes.h"

namespace circlet::circle {
namespace {

class Clamps {
 public:
  explicit Clamps(Lowered& lowered) : l_(lowered), model_(lowered.model), origins_(lowered.origins) {}

  void Run() {
    std::vector<Operator> settled;
    std::map<int32_t, int32_t> standin;  // for the output of a clamp that is left out
    const auto current = [&](int32_t index) {
      const auto it = standin.find(index);
      return it == standin.end() ? index : it->second;
    };
    std::vector<int> readers(model_.tensors.size(), 0);
    for (const Operator& op : model_.operators)
      for (const int32_t input : op.inputs)
        if (input >= 0) ++readers[input];
    for (Operator& op : model_.operators) {
      for (int32_t& input : op.inputs) input = current(input);
      const bool clamp = origins_[op.outputs[0]].clamps;
      if (clamp && !Settle(op, settled)) {
        standin[op.outputs[0]] = op.inputs[0];
        continue;
      }
      const bool shaped = clamp && !settled.empty() && settled.back().code == Reshape::kCircleCode &&
                          settled.back().outputs[0] == op.inputs[0] && readers[op.inputs[0]] == 1;
      settled.push_back(std::move(op));
      if (shaped) MoveReshapeBehind(settled);
    }
    model_.operators = std::move(settled);
    for (int32_t& output : model_.outputs) output = current(output);
    for (size_t i = 0; i < model_.operators.size(); ++i)
      for (const int32_t output : model_.operators[i].outputs) origins_[output].producer = static_cast<int>(i);
  }

 private:
  void MoveReshapeBehind(std::vector<Operator>& operators) {
    Operator &reshape = operators[operators.size() - 2], &clamp = operators.back();
    const int32_t source = reshape.inputs[0];
    const int32_t clamped = l_.NewTensor(origins_[source].name, model_.tensors[source].type, /*computed=*/true);
    model_.tensors[clamped].qparams = model_.tensors[source].qparams;
    clamp.inputs[0] = source;
    reshape.inputs[0] = clamped;
    reshape.outputs[0] = std::exchange(clamp.outputs[0], clamped);
    std::swap(reshape, clamp);
  }

  // Gives one clamp its grid; false when it cannot bind.
  bool Settle(Operator& op, std::vector<Operator>& settled) {
    int32_t& input = op.inputs[0];
    const int32_t bound = op.inputs[1], output = op.outputs[0];
    const std::optional<QParams> given = model_.tensors[input].qparams;
    if (!model_.tensors[output].qparams && given) l_.Assign(output, *given);
    const std::optional<QParams> grid = model_.tensors[output].qparams;
    if (!grid || !given) return true;
    if (*grid != *given) {
      settled.push_back(l_.Requantized(input, model_.tensors[output].name, *grid));
      input = settled.back().outputs[0];
    }
    if (Binds(op.code, bound, *grid)) {
      l_.Assign(bound, *grid);
      return true;
    }
    if (origins_[output].pointed && !origins_[input].pointed) {
      model_.tensors[input].name = origins_[input].name = origins_[output].name;
      origins_[input].pointed = true;
    }
    return false;
  }

  bool Binds(int32_t code, int32_t bound, const QParams& grid) const {
    const float value = model_.tensors[bound].data.F32()[0];
    if (!std::isfinite(value)) return false;
    const CodeRange codes = CodesOf(grid.dtype);
    const int64_t at = CodeAt(l_.source.Quantize(model_.tensors[bound].data, grid), 0);
    return code == Minimum::kCircleCode ? at < codes.max : at > codes.min;
  }

  Lowered& l_;
  Model& model_;
  std::vector<Origin>& origins_;
};

}  // namespace

void SettleClamps(Lowered& lowered) { Clamps(lowered).Run(); }

}  // namespace circlet::circle
