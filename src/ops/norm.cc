#include "circlet/ops/norm.h"

#include <cstring>

#include "circlet/base/threads.h"
#include "ops/internal.h"
#include "ops/simd.h"

namespace circlet {

std::vector<TensorType> RmsNorm::Infer(Types in) const {
  ExpectInputs(kName, in, 2);
  ExpectFloat(kName, in);
  if (in[0].shape.Rank() == 0) ShapeError(kName, in, "x must have at least one axis");
  if (in[1].shape != Shape{in[0].shape[-1]})
    ShapeError(kName, in, fmt::format("gamma must be [{}], the size of x's last axis", in[0].shape[-1]));
  return {in[0]};
}

void RmsNorm::Eval(const EvalContext& context) const {
  const float* x = context.in[0].F32().data();
  const float* gamma = context.in[1].F32().data();
  float* y = context.out[0].F32().data();
  const int64_t width = context.in[0].GetShape()[-1];
  if (width == 0) return;
  ParallelFor(context.in[0].Elements() / width, RowGrain(width), [&](int64_t begin, int64_t end) {
    simd::RmsNormRows(x + begin * width, gamma, end - begin, width, eps, y + begin * width);
  });
}

CircleOp RmsNorm::Emit(Types, Types) const {
  return {kCircleCode, {{"epsilon", static_cast<double>(eps)}}, {CircleArg::In(0), CircleArg::In(1)}};
}

Parsed<RmsNorm> RmsNorm::Parse(const CircleNode& node) {
  ExpectArgs(kName, node, 2);
  return {{.eps = static_cast<float>(node.Real("epsilon", 0))}, {0, 1}};
}

std::vector<TensorType> Softmax::Infer(Types in) const {
  ExpectInputs(kName, in, 1);
  ExpectFloat(kName, in);
  if (in[0].shape.Rank() == 0) ShapeError(kName, in, "x must have at least one axis");
  return {in[0]};
}

void Softmax::Eval(const EvalContext& context) const {
  const float* x = context.in[0].F32().data();
  float* y = context.out[0].F32().data();
  const int64_t width = context.in[0].GetShape()[-1];
  if (width == 0) return;
  ParallelFor(context.in[0].Elements() / width, RowGrain(width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (x != y) std::memcpy(y + row * width, x + row * width, static_cast<size_t>(width) * sizeof(float));
      simd::SoftmaxRow(y + row * width, width);
    }
  });
}

CircleOp Softmax::Emit(Types, Types) const { return {kCircleCode, {{"beta", 1.0}}, {CircleArg::In(0)}}; }

Parsed<Softmax> Softmax::Parse(const CircleNode& node) {
  ExpectArgs(kName, node, 1);
  const double beta = node.Real("beta", 0);
  if (beta != 1.0)
    Fail("{}: option beta is {}; only 1 can be executed, so the factor must be a MUL before it", kName, beta);
  return {{}, {0}};
}

}  // namespace circlet
