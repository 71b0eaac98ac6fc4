#pragma once

#include "circlet/ops/op.h"

namespace circlet {

// Binary arithmetic with NumPy broadcasting, float32: y = a + b, a - b, a * b, max(a, b), min(a, b). Sums and products
// of int64 as well: indices of tables are computed so.
template <typename Tag>
struct Binary {
  static constexpr std::string_view kName = Tag::kName;
  static constexpr int32_t kCircleCode = Tag::kCircleCode;
  static constexpr bool kInPlace = true;
  static constexpr bool kClamps = requires { Tag::kClamps; };

  std::vector<TensorType> Infer(Types in) const;
  void Eval(const EvalContext& context) const;
  CircleOp Emit(Types in, Types out) const;
  static Parsed<Binary> Parse(const CircleNode& node);
  bool operator==(const Binary&) const = default;
};
struct AddTag {
  static constexpr std::string_view kName = "add";
  static constexpr int32_t kCircleCode = 0;
};
struct SubTag {
  static constexpr std::string_view kName = "sub";
  static constexpr int32_t kCircleCode = 41;
};
struct MulTag {
  static constexpr std::string_view kName = "mul";
  static constexpr int32_t kCircleCode = 18;
};
struct MaximumTag {
  static constexpr std::string_view kName = "maximum";
  static constexpr int32_t kCircleCode = 55;
  static constexpr bool kClamps = true;
};
struct MinimumTag {
  static constexpr std::string_view kName = "minimum";
  static constexpr int32_t kCircleCode = 57;
  static constexpr bool kClamps = true;
};
using Add = Binary<AddTag>;
using Sub = Binary<SubTag>;
using Mul = Binary<MulTag>;
using Maximum = Binary<MaximumTag>;
using Minimum = Binary<MinimumTag>;

// Unary, float32: y = -x, tanh(x), and gelu(x) = 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) (model.md 3.4).
template <typename Tag>
struct Unary {
  static constexpr std::string_view kName = Tag::kName;
  static constexpr int32_t kCircleCode = Tag::kCircleCode;
  static constexpr bool kInPlace = true;

  std::vector<TensorType> Infer(Types in) const;
  void Eval(const EvalContext& context) const;
  CircleOp Emit(Types in, Types out) const;
  static Parsed<Unary> Parse(const CircleNode& node);
  bool operator==(const Unary&) const = default;
};
struct NegTag {
  static constexpr std::string_view kName = "neg";
  static constexpr int32_t kCircleCode = 59;
};
struct TanhTag {
  static constexpr std::string_view kName = "tanh";
  static constexpr int32_t kCircleCode = 28;
};
struct GeluTag {
  static constexpr std::string_view kName = "gelu";
  static constexpr int32_t kCircleCode = 150;
};
using Neg = Unary<NegTag>;
using Tanh = Unary<TanhTag>;
using Gelu = Unary<GeluTag>;

}  // namespace circlet
