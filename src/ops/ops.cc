#include "circlet/ops/ops.h"

#include <algorithm>

namespace circlet {
namespace {

template <typename Read>
auto OfKind(const Op::List& kind, Read read) {
  return std::visit([&](const auto& op) { return read(op); }, kind);
}

}  // namespace

std::string_view Op::Name() const {
  return OfKind(kind, [](const auto& op) { return std::string_view(op.kName); });
}

bool Op::IsView() const {
  return OfKind(kind, [](const auto& op) {
    if constexpr (requires { op.kView; }) return op.kView;
    return false;
  });
}

bool Op::InPlace() const {
  return OfKind(kind, [](const auto& op) {
    if constexpr (requires { op.kInPlace; }) return op.kInPlace;
    return false;
  });
}

bool Op::KeepsValues() const {
  return OfKind(kind, [](const auto& op) {
    if constexpr (requires { op.kKeepsValues; }) return op.kKeepsValues;
    return false;
  });
}

bool Op::Clamps() const {
  return OfKind(kind, [](const auto& op) {
    if constexpr (requires { op.kClamps; }) return op.kClamps;
    return false;
  });
}

bool Op::IsPoint() const {
  return OfKind(kind, [](const auto& op) {
    if constexpr (requires { op.kIsPoint; }) return op.kIsPoint;
    return false;
  });
}

int Op::WeightInput() const {
  return OfKind(kind, [](const auto& op) {
    if constexpr (requires { op.kWeightInput; }) return op.kWeightInput;
    return -1;
  });
}

int Op::TableInput() const {
  return OfKind(kind, [](const auto& op) {
    if constexpr (requires { op.kTableInput; }) return op.kTableInput;
    return -1;
  });
}

bool Op::TakesCodes(int input) const {
  return OfKind(kind, [&](const auto& op) {
    if constexpr (requires { op.kCodeInputs; }) return std::ranges::find(op.kCodeInputs, input) != op.kCodeInputs.end();
    return false;
  });
}

std::vector<MatrixProduct> Op::Products(Types in) const {
  return OfKind(kind, [&](const auto& op) -> std::vector<MatrixProduct> {
    if constexpr (requires { op.Products(in); }) return op.Products(in);
    return {};
  });
}

int Op::GridInput() const {
  return OfKind(kind, [](const auto& op) {
    if constexpr (requires { op.kGridInput; }) return op.kGridInput;
    return 0;
  });
}

bool Op::Fused() const {
  return OfKind(kind, [](const auto& op) { return FusedOp<std::decay_t<decltype(op)>>; });
}

std::vector<ValueId> Op::Expand(GraphSink& sink, std::span<const ValueId> in, std::span<const Point> points) const {
  return OfKind(kind, [&](const auto& op) -> std::vector<ValueId> {
    if constexpr (FusedOp<std::decay_t<decltype(op)>>) return op.Expand(sink, in, points);
    throw Bug(fmt::format("{} has no expansion", op.kName));
  });
}

std::span<const int> Op::OutputPoints() const {
  return OfKind(kind, [](const auto& op) -> std::span<const int> {
    if constexpr (requires { op.kOutputPoints; }) return op.kOutputPoints;
    return {};
  });
}

std::vector<TensorType> Op::Infer(Types in) const {
  return OfKind(kind, [&](const auto& op) { return op.Infer(in); });
}

void Op::Eval(const EvalContext& context) const {
  OfKind(kind, [&](const auto& op) { op.Eval(context); });
}

}  // namespace circlet
