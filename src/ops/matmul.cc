#include "circlet/ops/matmul.h"

#include <algorithm>
#include <cstring>

#include "circlet/base/threads.h"
#include "hwy/aligned_allocator.h"
#include "ops/aligned.h"
#include "ops/codes.h"
#include "ops/gemm.h"
#include "ops/integer_product.h"
#include "ops/internal.h"
#include "ops/tally.h"
#include "ops/thread_scratch.h"

namespace circlet {

// ---- FullyConnected -----------------------------------------------------------------------------------------------

namespace {

// Slices of output columns, so that a weight never stands in memory as float32. No element of y depends on where the
// slices are cut (gemm_test.cc). For one row each thread has slices of its own, which its cache holds.
void LinearOfCodes(const Tensor& x, const Tensor& w, const float* bias, const Tensor& y) {
  const int64_t n = w.GetShape()[0], k = w.GetShape()[1], m = n == 0 ? 0 : y.Elements() / n;
  const int64_t slice_floats = int64_t{1} << (m == 1 ? 16 : 20);
  const int64_t slice = std::clamp<int64_t>(slice_floats / std::max<int64_t>(1, k), 1, std::max<int64_t>(1, n));
  const bool in_place = slice >= n || m == 1;
  const auto multiply = [&](int64_t first, int64_t last) {
    const int64_t count = last - first;
    float* const weights = ThreadScratch<float, struct WidenedWeights>(count * k);
    Dequantize(w, *w.Grid(), first * k, {weights, static_cast<size_t>(count * k)});
    float* const out = in_place ? y.F32().data() + first : ThreadScratch<float, struct SliceOfRows>(m * count);
    gemm::Linear(x.F32().data(), weights, bias == nullptr ? nullptr : bias + first, m, count, k, out);
    for (int64_t row = 0; !in_place && row < m; ++row)
      std::copy_n(out + row * count, count, y.F32().data() + row * n + first);
  };
  const auto slices = [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += slice) multiply(first, std::min(end, first + slice));
  };
  if (m == 1)
    ParallelFor(n, slice, slices);
  else
    slices(0, n);
}

}  // namespace

std::vector<TensorType> FullyConnected::Infer(Types in) const {
  if (in.size() != 2 && in.size() != 3) ShapeError(kName, in, "it takes x, W and perhaps a bias");
  ExpectFloat(kName, in);
  const Shape& x = in[0].shape;
  const Shape& w = in[1].shape;
  if (x.Rank() == 0 || w.Rank() != 2 || x[-1] != w[1])
    ShapeError(kName, in, "W must be [N,K] with K the size of x's last axis");
  if (in.size() == 3 && in[2].shape != Shape{w[0]}) ShapeError(kName, in, fmt::format("the bias must be [{}]", w[0]));
  TensorType out = in[0];
  out.shape[-1] = w[0];
  return {out};
}

std::vector<MatrixProduct> FullyConnected::Products(Types in) const {
  const int64_t n = in[1].shape[0], k = in[1].shape[1];
  return {{.m = k == 0 ? 0 : in[0].shape.Elements() / k, .n = n, .k = k}};
}

void FullyConnected::Eval(const EvalContext& context) const {
  const Shape& w = context.in[1].GetShape();
  const Shape& y = context.out[0].GetShape();
  const int64_t rows = Product(y.Sizes().first(static_cast<size_t>(y.Rank() - 1)));
  const float* bias = context.in.size() == 3 ? context.in[2].F32().data() : nullptr;
  if (IsInteger(context.in[1].GetDType())) {
    const bool exact = SummedInIntegers(context.in[0].Grid(), context.in[1].Grid(), w[1]);
    return (exact ? IntegerLinear : LinearOfCodes)(context.in[0], context.in[1], bias, context.out[0]);
  }
  const float* x = context.in[0].F32().data();
  float* to = context.out[0].F32().data();
  if (context.in[1].GetDType() == DType::kBF16)
    gemm::LinearBf16(x, context.in[1].Raw(), bias, rows, w[0], w[1], to);
  else
    gemm::Linear(x, context.in[1].F32().data(), bias, rows, w[0], w[1], to);
}

CircleOp FullyConnected::Emit(Types in, Types) const {
  return {kCircleCode,
          {{"keep_num_dims", int64_t{1}}},
          {CircleArg::In(0), CircleArg::In(1), in.size() == 3 ? CircleArg::In(2) : CircleArg::None()}};
}

Parsed<FullyConnected> FullyConnected::Parse(const CircleNode& node) {
  ExpectArgs(kName, node, 2);
  ExpectNoActivation(kName, node);
  ExpectOption(kName, node, "weights_format", 0, 0);
  // Of rank 2 the two forms are one.
  if (node.types[0]->shape.Rank() != 2) ExpectOption(kName, node, "keep_num_dims", 1, 0);
  Parsed<FullyConnected> parsed{{}, {0, 1}};
  if (node.Has(2)) parsed.inputs.push_back(2);
  return parsed;
}

// ---- BatchMatMul --------------------------------------------------------------------------------------------------

namespace {

Shape Leading(const Shape& shape) { return Shape({shape.Sizes().begin(), shape.Sizes().end() - 2}); }

// For each matrix of a broadcast batch, which matrix of an operand it takes.
std::vector<int64_t> BatchIndices(const Shape& operand, const Shape& batch) {
  std::vector<int64_t> indices(static_cast<size_t>(batch.Elements()), 0);
  for (size_t i = 0; i < indices.size(); ++i) {
    int64_t rest = static_cast<int64_t>(i), stride = 1;
    for (int axis = 1; axis <= operand.Rank(); ++axis) {
      if (operand[-axis] != 1) indices[i] += rest % batch[-axis] * stride;
      rest /= batch[-axis];
      stride *= operand[-axis];
    }
  }
  return indices;
}

// The operands of a batch of products: float32 as they are, or in bf16 pairs (gemm.h).
struct Operands {
  const float *a, *b;  // [..,m,k], [..,k,n] or, when transposed, [..,n,k]
  int64_t k;           // of both, counted in floats
  bool bf16;
  hwy::AlignedFreeUniquePtr<float[]> pairs;

  Operands(const EvalContext& context, bool transposed)
      : a(context.in[0].F32().data()),
        b(context.in[1].F32().data()),
        k(context.in[0].GetShape()[-1]),
        bf16(context.compute == Compute::kBf16) {
    if (bf16) Pair(context.in[0].Elements() / k, context.in[1], transposed);
  }

  void Pair(int64_t a_rows, const Tensor& b_tensor, bool transposed) {
    const int64_t depth = gemm::Pairs(k), b_columns = b_tensor.Elements() / k;
    pairs = Aligned<float>((a_rows + b_columns) * depth);
    float *const a_pairs = pairs.get(), *const b_pairs = a_pairs + a_rows * depth;
    const auto along_rows = [&](const float* x, int64_t rows, float* to) {
      ParallelFor(rows, RowGrain(k), [&](int64_t begin, int64_t end) {
        gemm::PairAlongRows(x + begin * k, k, end - begin, k, to + begin * depth, depth);
      });
    };
    along_rows(a, a_rows, a_pairs);
    if (transposed) {
      along_rows(b, b_columns, b_pairs);
    } else {
      const int64_t n = b_tensor.GetShape()[-1];
      for (int64_t i = 0; i < b_columns / n; ++i)
        ParallelFor(depth, RowGrain(2 * n), [&](int64_t begin, int64_t end) {
          gemm::PairRows(b + i * k * n, k, n, begin, end, b_pairs + i * depth * n);
        });
    }
    a = a_pairs;
    b = b_pairs;
    k = depth;
  }
};

}  // namespace

std::vector<TensorType> BatchMatMul::Infer(Types in) const {
  ExpectInputs(kName, in, 2);
  ExpectFloat(kName, in);
  const Shape& a = in[0].shape;
  const Shape& b = in[1].shape;
  if (a.Rank() < 2 || b.Rank() < 2 || a[-1] != b[transpose_b ? -1 : -2])
    ShapeError(kName, in, transpose_b ? "a must be [..,M,K] and b [..,N,K]" : "a must be [..,M,K] and b [..,K,N]");
  std::vector<int64_t> sizes;
  const Shape batch = Broadcast(kName, Leading(a), Leading(b));
  sizes.assign(batch.Sizes().begin(), batch.Sizes().end());
  sizes.push_back(a[-2]);
  sizes.push_back(b[transpose_b ? -2 : -1]);
  return {{DType::kF32, Shape(std::move(sizes))}};
}

std::vector<MatrixProduct> BatchMatMul::Products(Types in) const {
  const Shape y = Infer(in)[0].shape;
  return {
      {.m = y[-2], .n = y[-1], .k = in[0].shape[-1], .transposed = transpose_b, .count = Product(Leading(y).Sizes())}};
}

void BatchMatMul::Eval(const EvalContext& context) const {
  const Shape& a_shape = context.in[0].GetShape();
  const Shape& b_shape = context.in[1].GetShape();
  const Shape& y_shape = context.out[0].GetShape();
  const int64_t m = y_shape[-2], n = y_shape[-1];
  if (context.out[0].Elements() == 0) return;
  float* y = context.out[0].F32().data();
  if (a_shape[-1] == 0) return std::memset(y, 0, static_cast<size_t>(context.out[0].Bytes())), void();

  const Shape batch = Leading(y_shape);
  const std::vector<int64_t> a_index = BatchIndices(Leading(a_shape), batch);
  const std::vector<int64_t> b_index = BatchIndices(Leading(b_shape), batch);
  const Tensor &a_tensor = context.in[0], &b_tensor = context.in[1];
  if (BytesSummedInIntegers(a_tensor.Grid(), b_tensor.Grid(), a_shape[-1])) {
    const int64_t depth = a_shape[-1];
    gemm::Count({m, n, depth, transpose_b, gemm::Operand::kBytes}, static_cast<int64_t>(a_index.size()));
    for (size_t i = 0; i < a_index.size(); ++i)
      IntegerMatMul(a_tensor.F32().data() + a_index[i] * m * depth, *a_tensor.Grid(),
                    b_tensor.F32().data() + b_index[i] * depth * n, *b_tensor.Grid(), transpose_b, m, n, depth,
                    y + static_cast<int64_t>(i) * m * n);
    return;
  }
  if (m == 1 && context.compute == Compute::kFloat32) {
    const int64_t depth = a_shape[-1];
    gemm::Count({1, n, depth, transpose_b}, static_cast<int64_t>(a_index.size()));
    constexpr int64_t kColumns = 128;  // whole vectors of every processor
    for (size_t i = 0; i < a_index.size(); ++i)
      ParallelFor((n + kColumns - 1) / kColumns, std::max<int64_t>(1, RowGrain(depth) / kColumns),
                  [&](int64_t begin, int64_t end) {
                    const int64_t first = begin * kColumns, last = std::min(n, end * kColumns);
                    float* const to = y + static_cast<int64_t>(i) * n;
                    std::fill(to + first, to + last, 0.0f);
                    gemm::MultiplyFewRows(a_tensor.F32().data() + a_index[i] * depth, depth, 1,
                                          b_tensor.F32().data() + b_index[i] * depth * n, depth, n, transpose_b, first,
                                          last, to, n);
                  });
    return;
  }
  const Operands operands(context, transpose_b);
  const int64_t k = operands.k;
  const auto buffer = Aligned<float>(gemm::PackedFloats(k, n));
  const gemm::Panels panels{buffer.get(), k, n};
  gemm::Count({m, n, a_shape[-1], transpose_b, gemm::FloatOperand(operands.bf16)},
              static_cast<int64_t>(a_index.size()));
  const int64_t panel_count = gemm::PanelCount(n);
  // Pieces of about 64 rows by 256 columns keep both operands in the cache and give each thread several.
  constexpr int64_t kRows = 64;
  const int64_t piece_panels = std::max<int64_t>(1, 256 / gemm::PanelColumns());
  const int64_t row_pieces = (m + kRows - 1) / kRows;
  const int64_t column_pieces = (panel_count + piece_panels - 1) / piece_panels;
  for (size_t i = 0; i < a_index.size(); ++i) {
    if (i == 0 || b_index[i] != b_index[i - 1]) {
      const float* b = operands.b + b_index[i] * k * n;
      ParallelFor(panel_count, RowGrain(k * gemm::PanelColumns()), [&](int64_t begin, int64_t end) {
        gemm::Pack(b, transpose_b ? k : n, transpose_b, panels, begin, end);
      });
    }
    const float* a = operands.a + a_index[i] * m * k;
    float* c = y + static_cast<int64_t>(i) * m * n;
    ParallelFor(row_pieces * column_pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t row = piece % row_pieces * kRows;
        const int64_t first = piece / row_pieces * piece_panels;
        const auto multiply = operands.bf16 ? gemm::MultiplyPairs : gemm::Multiply;
        multiply(a + row * k, k, std::min(kRows, m - row), panels,
                 {first, std::min(panel_count, first + piece_panels), 0, k}, c + row * n, n);
      }
    });
  }
}

CircleOp BatchMatMul::Emit(Types, Types) const {
  CircleOp op{kCircleCode, {}, {CircleArg::In(0), CircleArg::In(1)}};
  if (transpose_b) op.options = {{"adjoint_rhs", int64_t{1}}};
  return op;
}

Parsed<BatchMatMul> BatchMatMul::Parse(const CircleNode& node) {
  ExpectArgs(kName, node, 2);
  ExpectOption(kName, node, "adjoint_lhs", 0, 0);
  return {{.transpose_b = node.Int("adjoint_rhs", 0) != 0}, {0, 1}};
}

}  // namespace circlet
