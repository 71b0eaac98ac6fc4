#pragma once

#include <array>

#include "circlet/ops/op.h"

namespace circlet {

// A quantization point: the identity, at which a reading may act. The point itself is on the node.
struct QuantPoint {
  static constexpr std::string_view kName = "point";
  static constexpr bool kIsPoint = true;
  static constexpr std::array kOutputPoints{0};

  std::vector<TensorType> Infer(Types in) const;
  void Eval(const EvalContext& context) const;  // copies; the executor calls the visitor
  bool operator==(const QuantPoint&) const = default;
};

// QUANTIZE of a file: values pass to a tensor with another grid. In float the identity; the grid is a point behind it.
struct Requantize {
  static constexpr std::string_view kName = "quantize";
  static constexpr int32_t kCircleCode = 114;
  static constexpr bool kView = true;

  std::vector<TensorType> Infer(Types in) const;
  void Eval(const EvalContext& context) const;
  CircleOp Emit(Types in, Types out) const;
  static Parsed<Requantize> Parse(const CircleNode& node);
  bool operator==(const Requantize&) const = default;
};

}  // namespace circlet
