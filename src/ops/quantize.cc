#include "circlet/ops/quantize.h"

#include <cstring>

#include "ops/internal.h"

namespace circlet {
namespace {

void CopyThrough(const EvalContext& context) {
  const Tensor& in = context.in[0];
  if (in.Raw() != context.out[0].Raw()) std::memcpy(context.out[0].Raw(), in.Raw(), static_cast<size_t>(in.Bytes()));
}

}  // namespace

std::vector<TensorType> QuantPoint::Infer(Types in) const {
  ExpectInputs(kName, in, 1);
  ExpectFloat(kName, in);
  return {in[0]};
}

void QuantPoint::Eval(const EvalContext& context) const { CopyThrough(context); }

std::vector<TensorType> Requantize::Infer(Types in) const {
  ExpectInputs(kName, in, 1);
  ExpectFloat(kName, in);
  return {in[0]};
}

void Requantize::Eval(const EvalContext& context) const { CopyThrough(context); }

CircleOp Requantize::Emit(Types, Types) const { return {kCircleCode, {}, {CircleArg::In(0)}}; }

Parsed<Requantize> Requantize::Parse(const CircleNode& node) {
  ExpectArgs(kName, node, 1);
  return {{}, {0}};
}

}  // namespace circlet
