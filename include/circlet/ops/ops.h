#pragma once

// The only list of operators. Printing, verification, conformance tests, reading and writing come from it.

#include <concepts>

#include "circlet/ops/attention.h"
#include "circlet/ops/elementwise.h"
#include "circlet/ops/layout.h"
#include "circlet/ops/matmul.h"
#include "circlet/ops/norm.h"
#include "circlet/ops/quantize.h"

namespace circlet {

template <typename T>
concept FusedOp = requires(const T op, GraphSink& sink, std::span<const ValueId> in, std::span<const Point> points) {
  { op.Expand(sink, in, points) } -> std::same_as<std::vector<ValueId>>;
};
template <typename T>
concept CircleOpDef = requires(const T op, Types types, const CircleNode& node) {
  { T::kCircleCode } -> std::convertible_to<int32_t>;
  { op.Emit(types, types) } -> std::same_as<CircleOp>;
  { T::Parse(node) } -> std::same_as<Parsed<T>>;
};
// An operator that lacks a part does not compile.
template <typename T>
concept OpDef = std::equality_comparable<T> && (FusedOp<T> || CircleOpDef<T> || std::same_as<T, QuantPoint>) &&
                requires(const T op, Types types, const EvalContext& context) {
                  { T::kName } -> std::convertible_to<std::string_view>;
                  { op.Infer(types) } -> std::same_as<std::vector<TensorType>>;
                  { op.Eval(context) } -> std::same_as<void>;
                };

template <OpDef... Ops>
using OpList = std::variant<Ops...>;

struct Op {
  using List = OpList<Add, Sub, Mul, Maximum, Minimum, Neg, Tanh, Gelu, FullyConnected, BatchMatMul, RmsNorm, Softmax,
                      Reshape, Transpose, Slice, Split, SplitV, Concat, BroadcastTo, Gather, Requantize, QuantPoint, Rope,
                      Attention, GatedLinear>;
  List kind;

  template <typename T>
    requires(!std::same_as<std::decay_t<T>, Op>)
  Op(T op) : kind(std::move(op)) {}  // NOLINT: an operator is an Op

  std::string_view Name() const;
  bool IsView() const;
  bool InPlace() const;
  bool KeepsValues() const;
  bool Clamps() const;
  bool IsPoint() const;
  int GridInput() const;
  // Index of that input; -1: it has none.
  int WeightInput() const;
  int TableInput() const;
  bool TakesCodes(int input) const;
  bool Fused() const;
  // Of a fused one.
  std::vector<ValueId> Expand(GraphSink& sink, std::span<const ValueId> in, std::span<const Point> points) const;
  std::span<const int> OutputPoints() const;
  std::vector<MatrixProduct> Products(Types in) const;
  std::vector<TensorType> Infer(Types in) const;
  void Eval(const EvalContext& context) const;
  bool operator==(const Op&) const = default;
};

}  // namespace circlet
