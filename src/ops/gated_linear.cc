#include <algorithm>
#include <array>

#include "circlet/base/threads.h"
#include "circlet/ops/ops.h"
#include "ops/codes.h"
#include "ops/internal.h"
#include "ops/simd.h"
#include "ops/thread_scratch.h"

namespace circlet {
namespace {

// Rows [begin, end) of a weight, as it is given.
Tensor RowsOf(const Tensor& weight, int64_t begin, int64_t end) {
  if (begin == 0 && end == weight.GetShape()[0]) return weight;
  return IsInteger(weight.GetDType()) ? RowsOfCodes(weight, begin, end) : weight.Slice(begin, end, 0);
}

}  // namespace

std::vector<TensorType> GatedLinear::Infer(Types in) const {
  ExpectInputs(kName, in, 3);
  const std::vector<TensorType> product = FullyConnected{}.Infer(in.subspan(1));
  if (product[0] != in[0]) ShapeError(kName, in, fmt::format("a must be {}, as x W^T is", product[0].ToString()));
  return product;
}

std::vector<MatrixProduct> GatedLinear::Products(Types in) const { return FullyConnected{}.Products(in.subspan(1)); }

void GatedLinear::Eval(const EvalContext& context) const {
  const Tensor &a = context.in[0], &x = context.in[1], &w = context.in[2], &y = context.out[0];
  const int64_t n = w.GetShape()[0], rows = n == 0 ? 0 : y.Elements() / n;
  // Two MiB of the product at a time. Whole vectors of codes, and so many rows of W that what is done once for a row of
  // x is little beside them.
  constexpr int64_t kSliceElements = int64_t{1} << 19, kFewest = 1024;
  const int64_t slice = std::min(n, std::max(kFewest, kSliceElements / std::max<int64_t>(1, rows) / kFewest * kFewest));
  PointVisitor* const visitor = context.points.empty() ? nullptr : context.points[kProduct];
  for (int64_t first = 0; first < n && rows > 0; first += slice) {
    const int64_t count = std::min(slice, n - first);
    float* const product = ThreadScratch<float, GatedLinear>(rows * count);
    Shape shape = y.GetShape();
    shape[-1] = count;
    const std::array<Tensor, 2> in{x, RowsOf(w, first, first + count)};
    const std::array<Tensor, 1> out{Tensor({DType::kF32, shape}, product, nullptr)};
    FullyConnected{}.Eval({.in = in, .out = out, .compute = context.compute});
    ParallelFor(rows, RowGrain(count), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        float* const of_row = product + row * count;
        const int64_t at = row * n + first;
        if (visitor != nullptr) visitor->Visit({of_row, static_cast<size_t>(count)}, at);
        simd::Binary(simd::BinaryOp::kMul, a.F32().data() + at, of_row, count, y.F32().data() + at);
      }
    });
  }
}

std::vector<ValueId> GatedLinear::Expand(GraphSink& sink, std::span<const ValueId> in,
                                         std::span<const Point> points) const {
  ValueId product = sink.Add(FullyConnected{}, {in[1], in[2]})[0];
  if (!points.empty() && !points[kProduct].name.empty()) product = sink.AddPoint(points[kProduct], product);
  return sink.Add(Mul{}, {in[0], product});
}

}  // namespace circlet
