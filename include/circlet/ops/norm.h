#pragma once

#include "circlet/ops/op.h"

namespace circlet {

// y = gamma * x / sqrt(mean(x^2) + eps), over the last axis (model.md 3.1: gamma itself, not 1 + gamma).
// Inputs: x [.., D], gamma [D].
struct RmsNorm {
  static constexpr std::string_view kName = "rms_norm";
  static constexpr int32_t kCircleCode = -6;
  float eps = 1e-6f;

  std::vector<TensorType> Infer(Types in) const;
  void Eval(const EvalContext& context) const;
  CircleOp Emit(Types in, Types out) const;
  static Parsed<RmsNorm> Parse(const CircleNode& node);
  bool operator==(const RmsNorm&) const = default;
};

// y = exp(x - max) / sum(exp(x - max)), over the last axis. Terms with x - max < -28 count as 0 (each is below 7e-13 of
// the sum), so that masked keys change no bit of the others.
struct Softmax {
  static constexpr std::string_view kName = "softmax";
  static constexpr int32_t kCircleCode = 25;
  static constexpr bool kInPlace = true;

  std::vector<TensorType> Infer(Types in) const;
  void Eval(const EvalContext& context) const;
  CircleOp Emit(Types in, Types out) const;
  static Parsed<Softmax> Parse(const CircleNode& node);
  bool operator==(const Softmax&) const = default;
};

}  // namespace circlet
