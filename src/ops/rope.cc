#include <algorithm>

#include "circlet/base/threads.h"
#include "circlet/ops/ops.h"
#include "ops/internal.h"
#include "ops/simd.h"
#include "ops/thread_scratch.h"

namespace circlet {
namespace {

// The values of one part of some positions, [rows, width] with width the size of a part; `first` is the flat index of
// the first value in the whole [1,S,H,width] tensor.
void Visit(const EvalContext& context, Rope::At point, float* values, int64_t count, int64_t first) {
  if (context.points.empty() || context.points[point] == nullptr) return;
  context.points[point]->Visit({values, static_cast<size_t>(count)}, first);
}

// With nothing to see in the halves: whole heads, whatever their parts.
void RotateHeads(const EvalContext& context, int parts, int64_t block) {
  const Shape& shape = context.in[0].GetShape();
  const int64_t positions = shape[1], heads = shape[2], head_size = shape[3], half = head_size / parts / 2;
  ParallelFor(positions, 8 * block, [&](int64_t begin, int64_t end) {
    float* const cat = ThreadScratch<float, Rope>(2 * block * heads * head_size);  // [rows, head_size]
    float* const product_sin = cat + block * heads * head_size;
    for (int64_t position = begin; position < end; position += block) {
      const int64_t count = std::min(block, end - position), row_floats = heads * head_size;
      const int64_t first = position * row_floats, floats = count * row_floats;
      const float* const x = context.in[0].F32().data() + first;
      float* const y = context.out[0].F32().data() + first;
      for (int64_t i = 0; i < floats; i += 2 * half) {
        CopyShort(x + i + half, half, cat + i);
        CopyShort(x + i, half, cat + i + half);
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t table = (position + i) * head_size;
        simd::MulRows(x + i * row_floats, head_size, context.in[1].F32().data() + table, heads, head_size,
                      y + i * row_floats);
        simd::MulRows(cat + i * row_floats, head_size, context.in[2].F32().data() + table, heads, head_size,
                      product_sin + i * row_floats);
      }
      Visit(context, Rope::kCos, y, floats, first);
      Visit(context, Rope::kSin, product_sin, floats, first);
      simd::Binary(simd::BinaryOp::kAdd, y, product_sin, floats, y);
      Visit(context, Rope::kRot, y, floats, first);
    }
  });
}

}  // namespace

std::vector<TensorType> Rope::Infer(Types in) const {
  ExpectInputs(kName, in, 3);
  ExpectFloat(kName, in);
  const Shape& x = in[0].shape;
  if (x.Rank() != 4 || x[0] != 1) ShapeError(kName, in, "x must be [1,S,H,h]");
  const Shape table{1, x[1], x[3]};
  if (in[1].shape != table || in[2].shape != table)
    ShapeError(kName, in, fmt::format("cos and sin must be {}", table.ToString()));
  if (parts < 1 || x[3] % (2 * parts) != 0)
    ShapeError(kName, in, fmt::format("h = {} must divide into {} parts of two halves", x[3], parts));
  return {in[0]};
}

void Rope::Eval(const EvalContext& context) const {
  const Shape& shape = context.in[0].GetShape();
  const int64_t positions = shape[1], heads = shape[2], head_size = shape[3];
  const int64_t width = head_size / parts, half = width / 2;
  const float* x = context.in[0].F32().data();
  const float* cos = context.in[1].F32().data();
  const float* sin = context.in[2].F32().data();
  float* y = context.out[0].F32().data();
  // A few positions at a time: visitors get pieces worth their call, and all of it stays in the cache.
  const int64_t block = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, heads * head_size));
  const auto visited = [&](Rope::At first, Rope::At last) {
    return !context.points.empty() && std::any_of(context.points.begin() + first, context.points.begin() + last + 1,
                                                  [](const PointVisitor* visitor) { return visitor != nullptr; });
  };
  if (negated_sin && !visited(Rope::kX1, Rope::kCat) && (parts == 1 || !visited(Rope::kCos, Rope::kRot)))
    return RotateHeads(context, parts, block);
  ParallelFor(positions, 8 * block, [&](int64_t begin, int64_t end) {
    const size_t floats = static_cast<size_t>(std::max<int64_t>(1, block * heads * width));
    float* x1 = ThreadScratch<float, Rope>(static_cast<int64_t>(5 * floats));  // [rows, half]
    float* x2 = x1 + floats;    // [rows, half]
    float* cat = x2 + floats;   // [rows, width]
    float* product_cos = cat + floats;
    float* product_sin = product_cos + floats;
    for (int64_t position = begin; position < end; position += block) {
      const int64_t rows = std::min(block, end - position) * heads;
      const int64_t first_row = position * heads;
      for (int64_t part = 0; part < parts; ++part) {
        for (int64_t row = 0; row < rows; ++row) {
          const float* value = x + (first_row + row) * head_size + part * width;
          CopyShort(value, half, x1 + row * half);
          CopyShort(value + half, half, x2 + row * half);
        }
        Visit(context, Rope::kX1, x1, rows * half, first_row * half);
        Visit(context, Rope::kX2, x2, rows * half, first_row * half);
        if (!negated_sin) {
          simd::Neg(x2, rows * half, x2);
          Visit(context, Rope::kNeg, x2, rows * half, first_row * half);
        }
        for (int64_t row = 0; row < rows; ++row) {
          CopyShort(x2 + row * half, half, cat + row * width);
          CopyShort(x1 + row * half, half, cat + row * width + half);
        }
        Visit(context, Rope::kCat, cat, rows * width, first_row * width);
        for (int64_t row = 0; row < rows; row += heads) {
          const int64_t first = (first_row + row) * head_size + part * width;
          const int64_t table = (first_row + row) / heads * head_size + part * width;
          simd::MulRows(x + first, head_size, cos + table, heads, width, product_cos + row * width);
          simd::MulRows(cat + row * width, width, sin + table, heads, width, product_sin + row * width);
        }
        Visit(context, Rope::kCos, product_cos, rows * width, first_row * width);
        Visit(context, Rope::kSin, product_sin, rows * width, first_row * width);
        simd::Binary(simd::BinaryOp::kAdd, product_cos, product_sin, rows * width, product_cos);
        Visit(context, Rope::kRot, product_cos, rows * width, first_row * width);
        for (int64_t row = 0; row < rows; ++row)
          CopyShort(product_cos + row * width, width, y + (first_row + row) * head_size + part * width);
      }
    }
  });
}

std::vector<ValueId> Rope::Expand(GraphSink& sink, std::span<const ValueId> in, std::span<const Point> points) const {
  const Shape& shape = sink.TypeOf(in[0]).shape;
  const Shape table{1, shape[1], 1, shape[3]};
  const auto one = [&](Op op, std::vector<ValueId> operands) {
    return sink.Add(std::move(op), std::move(operands))[0];
  };
  const auto point = [&](Rope::At index, ValueId value) {
    return points.empty() || points[index].name.empty() ? value : sink.AddPoint(points[index], value);
  };
  const auto split = [&](ValueId value, int32_t count) {
    return count == 1 ? std::vector<ValueId>{value} : sink.Add(Split{.axis = -1, .parts = count}, {value});
  };

  const ValueId cos = one(Reshape{table}, {in[1]});
  const ValueId sin = one(Reshape{table}, {in[2]});
  const std::vector<ValueId> xs = split(in[0], parts), coses = split(cos, parts), sines = split(sin, parts);
  std::vector<ValueId> rotated;
  for (size_t part = 0; part < xs.size(); ++part) {
    const std::vector<ValueId> halves = split(xs[part], 2);
    const ValueId x1 = point(Rope::kX1, halves[0]);
    ValueId x2 = point(Rope::kX2, halves[1]);
    if (!negated_sin) x2 = point(Rope::kNeg, one(Neg{}, {x2}));
    const ValueId cat = point(Rope::kCat, one(Concat{.axis = -1}, {x2, x1}));
    const ValueId product_cos = point(Rope::kCos, one(Mul{}, {xs[part], coses[part]}));
    const ValueId product_sin = point(Rope::kSin, one(Mul{}, {cat, sines[part]}));
    rotated.push_back(point(Rope::kRot, one(Add{}, {product_cos, product_sin})));
  }
  if (rotated.size() == 1) return rotated;
  return {one(Concat{.axis = -1}, rotated)};
}

}  // namespace circlet
