// Every operator of the list, by a table of shapes: the kernel against a plain float64 version, in place, on any number
// of threads, and through its Circle form and back. An operator without rows fails.

#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <type_traits>

#include "circlet/base/threads.h"
#include "circlet/ops/ops.h"
#include "ops/test_values.h"

namespace circlet {
namespace {

struct Row {
  Op op;
  std::vector<TensorType> in;
  // Largest error against float64, relative to the largest value; 0: exact.
  double tolerance = 0;
};

TensorType F32(Shape shape) { return {DType::kF32, std::move(shape)}; }

// 3e-7: a few roundings; sums add about sqrt(K) of them.
const std::vector<Row>& Rows() {
  static const std::vector<Row> rows{
      {Add{}, {F32({2, 3, 7}), F32({2, 3, 7})}},
      {Add{}, {F32({1, 5, 33}), F32({33})}},
      {Add{}, {F32({70, 700}), F32({70, 700})}},
      {Add{}, {F32({0, 4}), F32({4})}},
      {Sub{}, {F32({1, 24, 4, 16}), F32({1, 24, 1, 16})}},
      {Sub{}, {F32({}), F32({3, 300})}},
      {Sub{}, {F32({3, 1}), F32({1, 5})}},
      {Sub{}, {F32({1}), F32({})}},
      {Mul{}, {F32({1, 6, 2, 8}), F32({1, 6, 1, 8})}},
      {Mul{}, {F32({4, 1, 3}), F32({2, 1})}},
      {Mul{}, {F32({1, 9, 64}), F32({1})}},
      {Maximum{}, {F32({5, 19}), F32({})}},
      {Minimum{}, {F32({5, 19}), F32({5, 1})}},
      {Neg{}, {F32({3, 41})}},
      {Tanh{}, {F32({3, 41})}, 3e-7},
      {Gelu{}, {F32({24, 192})}, 3e-7},
      {Gelu{}, {F32({40, 1000})}, 3e-7},
      {FullyConnected{}, {F32({1, 24, 64}), F32({33, 64})}, 2e-6},
      {FullyConnected{}, {F32({1, 1, 200}), F32({70, 200}), F32({70})}, 2e-6},
      {FullyConnected{}, {F32({5}), F32({3, 5})}, 2e-6},
      {FullyConnected{}, {F32({0, 5}), F32({3, 5})}},
      {BatchMatMul{}, {F32({1, 9, 20}), F32({1, 20, 40})}, 2e-6},
      {BatchMatMul{}, {F32({4, 1, 20}), F32({1, 20, 7})}, 2e-6},
      {BatchMatMul{}, {F32({2, 1, 70, 5}), F32({3, 5, 300})}, 2e-6},
      {BatchMatMul{.transpose_b = true}, {F32({2, 9, 600}), F32({2, 33, 600})}, 2e-6},
      {BatchMatMul{.transpose_b = true}, {F32({130, 3}), F32({4, 3})}, 2e-6},
      {BatchMatMul{}, {F32({2, 0}), F32({0, 3})}},
      {RmsNorm{.eps = 1e-6f}, {F32({1, 24, 64}), F32({64})}, 1e-7},
      {RmsNorm{.eps = 0.5f}, {F32({7, 5}), F32({5})}, 1e-7},
      {Softmax{}, {F32({2, 7, 33})}, 4e-7},
      {Softmax{}, {F32({100, 500})}, 4e-7},
      {Softmax{}, {F32({3})}, 4e-7},
      {Reshape{{2, 12}}, {F32({4, 6})}},
      {Reshape{{}}, {{DType::kI64, {1}}}},
      {Transpose{{0, 2, 1, 3}}, {F32({1, 6, 3, 8})}},
      {Transpose{{0, 2, 1}}, {F32({1, 70, 33})}},
      {Transpose{{3, 1, 0, 2}}, {{DType::kI16, {2, 3, 4, 5}}}},
      {Transpose{{1, 0}}, {{DType::kU8, {17, 40}}}},
      {Transpose{{2, 0, 1}}, {F32({40, 50, 60})}},
      {Transpose{{}}, {F32({})}},
      {Slice{{0, 1, 0, 2}, {1, 2, 5, 6}}, {F32({1, 3, 5, 8})}},
      {Slice{{1}, {1}}, {F32({4})}},
      {Slice{{3, 0}, {9, 7}}, {{DType::kI64, {10, 7}}}},
      {Split{.axis = -1, .parts = 2}, {F32({1, 5, 4, 16})}},
      {Split{.axis = 0, .parts = 3}, {{DType::kU8, {6, 5}}}},
      {SplitV{.axis = 1, .sizes = {1, 0, 4}}, {F32({3, 5, 2})}},
      {SplitV{.axis = -1, .sizes = {7}}, {{DType::kI64, {2, 7}}}},
      {Concat{.axis = -1}, {F32({2, 3, 4}), F32({2, 3, 1})}},
      {Concat{.axis = 2}, {F32({1, 70, 300}), F32({1, 70, 200}), F32({1, 70, 0})}},
      {Concat{.axis = 0}, {{DType::kI16, {2, 5}}, {DType::kI16, {1, 5}}}},
      {BroadcastTo{{3, 2, 5}}, {F32({2, 1})}},
      {BroadcastTo{{1, 2, 12, 32}}, {F32({1, 1, 12, 32})}},
      {Gather{}, {F32({20, 6}), {DType::kI64, {1, 4}}}},
      {Gather{}, {{DType::kU8, {20, 3}}, {DType::kI32, {2, 2, 3}}}},
      {Requantize{}, {F32({3, 5})}},
      {QuantPoint{}, {F32({3, 5})}},
      {Rope{}, {F32({1, 9, 4, 16}), F32({1, 9, 16}), F32({1, 9, 16})}, 3e-7},
      {Rope{.parts = 2, .negated_sin = false}, {F32({1, 50, 3, 20}), F32({1, 50, 20}), F32({1, 50, 20})}, 3e-7},
      {GatedLinear{}, {F32({1, 24, 33}), F32({1, 24, 64}), F32({33, 64})}, 2e-6},
      {GatedLinear{}, {F32({300, 2500}), F32({300, 8}), F32({2500, 8})}, 2e-6},
      {GatedLinear{}, {F32({0, 3}), F32({0, 5}), F32({3, 5})}},
      {Attention{}, {F32({1, 8, 70, 16}), F32({1, 2, 70, 16}), F32({1, 2, 70, 16}), F32({1, 1, 70, 70})}, 2e-6},
      {Attention{}, {F32({1, 4, 1, 24}), F32({1, 1, 37, 24}), F32({1, 1, 37, 24}), F32({1, 1, 37})}, 2e-6},
      {Attention{.skip_masked = false},
       {F32({1, 2, 20, 8}), F32({1, 2, 33, 8}), F32({1, 2, 33, 8}), F32({1, 1, 20, 33})},
       2e-6},
  };
  return rows;
}

std::string Label(const Row& row) {
  std::string text(row.op.Name());
  for (const TensorType& type : row.in) text += " " + type.ToString();
  return text;
}

// Operands: normal floats, small integers. Attention's mask keeps about three keys of four, some rows none.
std::vector<Tensor> Operands(const Row& row) {
  std::vector<Tensor> tensors;
  uint32_t seed = 20;
  for (const TensorType& type : row.in) {
    if (type.dtype == DType::kF32) {
      tensors.push_back(NormalTensor(type.shape, ++seed));
      continue;
    }
    Tensor tensor(type);
    for (int64_t i = 0; i < tensor.Elements(); ++i) {
      const int64_t value = (i * 7 + 3) % 20;
      std::memcpy(tensor.Raw() + i * BitWidth(type.dtype) / 8, &value, static_cast<size_t>(BitWidth(type.dtype) / 8));
    }
    tensors.push_back(tensor);
  }
  if (std::holds_alternative<Attention>(row.op.kind)) {
    const int64_t keys = row.in[3].shape[-1];
    std::span<float> mask = tensors[3].F32();
    for (size_t i = 0; i < mask.size(); ++i)
      mask[i] = static_cast<int64_t>(i) / keys == 3 || (i * 2654435761u >> 7) % 4 == 0 ? -120.0f : 0.0f;
  }
  return tensors;
}

std::vector<Tensor> Allocate(const std::vector<TensorType>& types) {
  std::vector<Tensor> tensors;
  for (const TensorType& type : types) {
    tensors.emplace_back(type);
    std::memset(tensors.back().Raw(), 0xff, static_cast<size_t>(type.Bytes()));  // NaN: what is not written shows
  }
  return tensors;
}

std::vector<Tensor> Evaluate(const Op& op, const std::vector<Tensor>& in) {
  std::vector<TensorType> types;
  for (const Tensor& tensor : in) types.push_back(tensor.Type());
  std::vector<Tensor> out = Allocate(op.Infer(types));
  op.Eval({.in = in, .out = out});
  return out;
}

::testing::AssertionResult SameBytes(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (std::memcmp(a[i].Raw(), b[i].Raw(), static_cast<size_t>(a[i].Bytes())) != 0)
      return ::testing::AssertionFailure() << "output " << i << " differs";
  return ::testing::AssertionSuccess();
}

// ---- The plain versions -------------------------------------------------------------------------------------------

// A tensor in float64, read by index with broadcasting.
struct Array {
  Shape shape;
  std::vector<double> values;

  explicit Array(const Tensor& tensor) : shape(tensor.GetShape()) {
    for (int64_t i = 0; i < tensor.Elements(); ++i) {
      const std::byte* at = tensor.Raw() + i * BitWidth(tensor.GetDType()) / 8;
      int64_t whole = 0;
      float real = 0;
      if (tensor.GetDType() == DType::kF32)
        std::memcpy(&real, at, 4);
      else
        std::memcpy(&whole, at, static_cast<size_t>(BitWidth(tensor.GetDType()) / 8));  // values are not negative
      values.push_back(tensor.GetDType() == DType::kF32 ? static_cast<double>(real) : static_cast<double>(whole));
    }
  }
  double At(const std::vector<int64_t>& index) const {
    int64_t flat = 0;
    for (int i = 0; i < shape.Rank(); ++i) {
      const size_t from_end = static_cast<size_t>(shape.Rank() - i);
      flat = flat * shape[i] + (shape[i] == 1 ? 0 : index[index.size() - from_end]);
    }
    return values[static_cast<size_t>(flat)];
  }
};

using Index = std::vector<int64_t>;
using Arrays = std::vector<Array>;

template <typename Tag>
double Plain(const Binary<Tag>&, const Arrays& in, int, const Index& i) {
  const double a = in[0].At(i), b = in[1].At(i);
  if constexpr (std::is_same_v<Tag, AddTag>) return a + b;
  if constexpr (std::is_same_v<Tag, SubTag>) return a - b;
  if constexpr (std::is_same_v<Tag, MulTag>) return a * b;
  if constexpr (std::is_same_v<Tag, MaximumTag>) return std::max(a, b);
  if constexpr (std::is_same_v<Tag, MinimumTag>) return std::min(a, b);
}
template <typename Tag>
double Plain(const Unary<Tag>&, const Arrays& in, int, const Index& i) {
  const double x = in[0].At(i);
  if constexpr (std::is_same_v<Tag, NegTag>) return -x;
  if constexpr (std::is_same_v<Tag, TanhTag>) return std::tanh(x);
  if constexpr (std::is_same_v<Tag, GeluTag>)
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}
double Plain(const FullyConnected&, const Arrays& in, int, Index i) {
  const int64_t n = i.back();
  double sum = in.size() == 3 ? in[2].values[static_cast<size_t>(n)] : 0;
  for (int64_t k = 0; k < in[1].shape[1]; ++k) {
    i.back() = k;
    sum += in[0].At(i) * in[1].At({n, k});
  }
  return sum;
}
double Plain(const BatchMatMul& op, const Arrays& in, int, const Index& i) {
  double sum = 0;
  for (int64_t k = 0; k < in[0].shape[-1]; ++k) {
    Index a = i, b = i;
    a.back() = k;
    (op.transpose_b ? b[b.size() - 1] : b[b.size() - 2]) = k;
    if (op.transpose_b) b[b.size() - 2] = i.back();
    sum += in[0].At(a) * in[1].At(b);
  }
  return sum;
}
double Plain(const RmsNorm& op, const Arrays& in, int, Index i) {
  const double x = in[0].At(i), gamma = in[1].At(i);
  double sum = 0;
  for (i.back() = 0; i.back() < in[0].shape[-1]; ++i.back()) sum += in[0].At(i) * in[0].At(i);
  return gamma * x / std::sqrt(sum / static_cast<double>(in[0].shape[-1]) + op.eps);
}
double Plain(const Softmax&, const Arrays& in, int, Index i) {
  const double x = in[0].At(i);
  double sum = 0;
  for (i.back() = 0; i.back() < in[0].shape[-1]; ++i.back()) sum += std::exp(in[0].At(i));
  return std::exp(x) / sum;
}
double Plain(const Transpose& op, const Arrays& in, int, const Index& i) {
  Index from(i.size());
  for (size_t axis = 0; axis < i.size(); ++axis) from[static_cast<size_t>(op.perm[axis])] = i[axis];
  return in[0].At(from);
}
double Plain(const Slice& op, const Arrays& in, int, Index i) {
  for (size_t axis = 0; axis < i.size(); ++axis) i[axis] += op.begin[axis];
  return in[0].At(i);
}
double PlainPart(const Arrays& in, int32_t axis, int64_t offset, Index i) {
  i[static_cast<size_t>(axis < 0 ? axis + in[0].shape.Rank() : axis)] += offset;
  return in[0].At(i);
}
double Plain(const Split& op, const Arrays& in, int output, const Index& i) {
  return PlainPart(in, op.axis, output * in[0].shape[op.axis] / op.parts, i);
}
double Plain(const SplitV& op, const Arrays& in, int output, const Index& i) {
  int64_t offset = 0;
  for (int part = 0; part < output; ++part) offset += op.sizes[static_cast<size_t>(part)];
  return PlainPart(in, op.axis, offset, i);
}
double Plain(const Concat& op, const Arrays& in, int, Index i) {
  const size_t axis = static_cast<size_t>(op.axis < 0 ? op.axis + in[0].shape.Rank() : op.axis);
  size_t part = 0;
  while (i[axis] >= in[part].shape[op.axis]) i[axis] -= in[part++].shape[op.axis];
  return in[part].At(i);
}
double Plain(const BroadcastTo&, const Arrays& in, int, const Index& i) { return in[0].At(i); }
double Plain(const Gather&, const Arrays& in, int, Index i) {
  const int64_t column = i.back();
  i.pop_back();
  return in[0].At({static_cast<int64_t>(in[1].At(i)), column});
}
double Plain(const Requantize&, const Arrays& in, int, const Index& i) { return in[0].At(i); }
double Plain(const QuantPoint&, const Arrays& in, int, const Index& i) { return in[0].At(i); }
double Plain(const Rope& op, const Arrays& in, int, const Index& i) {
  const int64_t width = in[0].shape[3] / op.parts, within = i[3] % width, half = width / 2;
  Index other = i;
  other[3] += within < half ? half : -half;
  const double sign = !op.negated_sin && within < half ? -1 : 1;
  const Index table{0, i[1], i[3]};
  return in[0].At(i) * in[1].At(table) + sign * in[0].At(other) * in[2].At(table);
}
double Plain(const GatedLinear&, const Arrays& in, int output, const Index& i) {
  const Arrays linear{in[1], in[2]};
  return in[0].At(i) * Plain(FullyConnected{}, linear, output, i);
}
double Plain(const Attention&, const Arrays& in, int, const Index& i) {
  const Shape &q = in[0].shape, &k = in[1].shape;
  const int64_t head = i[2] / q[3], kv = head / (q[1] / k[1]);
  double sum = 0, weighted = 0, max = -1e30;
  for (const bool second : {false, true})
    for (int64_t key = 0; key < k[2]; ++key) {
      double logit = in[3].At({0, 0, i[1], key});
      for (int64_t l = 0; l < q[3]; ++l) logit += in[0].At({0, head, i[1], l}) * in[1].At({0, kv, key, l});
      if (!second) {
        max = std::max(max, logit);
        continue;
      }
      sum += std::exp(logit - max);
      weighted += std::exp(logit - max) * in[2].At({0, kv, key, i[2] % q[3]});
    }
  return weighted / sum;
}

void ExpectPlainValues(const Row& row, const std::vector<Tensor>& in, const std::vector<Tensor>& out) {
  const Arrays arrays(in.begin(), in.end());
  for (size_t output = 0; output < out.size(); ++output) {
    const Array got(out[output]);
    std::vector<double> expected;
    double largest = 0;
    for (size_t flat = 0; flat < got.values.size(); ++flat) {
      Index index(static_cast<size_t>(got.shape.Rank()));
      int64_t rest = static_cast<int64_t>(flat);
      for (int axis = got.shape.Rank() - 1; axis >= 0; --axis) {
        index[static_cast<size_t>(axis)] = rest % got.shape[axis];
        rest /= got.shape[axis];
      }
      expected.push_back(std::visit(
          [&](const auto& op) {
            // A view in row-major order is told by position, not by index.
            if constexpr (std::is_same_v<std::decay_t<decltype(op)>, Reshape>)
              return arrays[0].values[flat];
            else
              return Plain(op, arrays, static_cast<int>(output), index);
          },
          row.op.kind));
      largest = std::max(largest, std::abs(expected.back()));
    }
    for (size_t flat = 0; flat < expected.size(); ++flat) {
      const double wanted = row.tolerance == 0 ? static_cast<float>(expected[flat]) : expected[flat];
      ASSERT_LE(std::abs(got.values[flat] - wanted), row.tolerance * largest)
          << "output " << output << ", element " << flat << " of " << expected.size() << ": " << got.values[flat]
          << ", expected " << wanted;
    }
  }
}

// ---- The tests ----------------------------------------------------------------------------------------------------

TEST(ConformanceTest, EveryOperatorHasRows) {
  std::set<std::string_view> seen;
  for (const Row& row : Rows()) seen.insert(row.op.Name());
  [&]<typename... Ops>(std::type_identity<OpList<Ops...>>) {
    for (const std::string_view name : {Ops::kName...})
      EXPECT_TRUE(seen.contains(name)) << "add a row for " << name << " of ops.h";
  }(std::type_identity<Op::List>());
}

TEST(ConformanceTest, KernelsAgreeWithPlainFloat64) {
  for (const Row& row : Rows()) {
    SCOPED_TRACE(Label(row));
    const std::vector<Tensor> in = Operands(row);
    ExpectPlainValues(row, in, Evaluate(row.op, in));
  }
}

TEST(ConformanceTest, ThreadsChangeNoByte) {
  const int before = Threads();
  for (const Row& row : Rows()) {
    SCOPED_TRACE(Label(row));
    const std::vector<Tensor> in = Operands(row);
    SetThreads(1);
    const std::vector<Tensor> alone = Evaluate(row.op, in);
    for (const int threads : {2, 4}) {
      SetThreads(threads);
      EXPECT_TRUE(SameBytes(Evaluate(row.op, in), alone)) << threads << " threads";
    }
  }
  SetThreads(before);
}

TEST(ConformanceTest, InPlaceOperatorsMayOverwriteTheirFirstInput) {
  for (const Row& row : Rows()) {
    SCOPED_TRACE(Label(row));
    if (!row.op.InPlace() && !row.op.IsView()) continue;
    const std::vector<Tensor> in = Operands(row);
    const std::vector<Tensor> apart = Evaluate(row.op, in);
    if (apart[0].Bytes() != in[0].Bytes()) continue;
    std::vector<Tensor> shared = in;
    shared[0] = in[0].Clone();
    const std::vector<Tensor> out{Tensor(apart[0].Type(), shared[0].Raw(), nullptr)};
    row.op.Eval({.in = shared, .out = out});
    EXPECT_TRUE(SameBytes(out, apart));
  }
}

TEST(ConformanceTest, OperatorsAreEqualToThemselvesOnly) {
  EXPECT_TRUE(Op(Concat{.axis = 1}) == Op(Concat{.axis = 1}));
  EXPECT_FALSE(Op(Concat{.axis = 1}) == Op(Concat{.axis = 2}));
  EXPECT_FALSE(Op(Add{}) == Op(Sub{}));
}

// An operator as the file has it: its Circle form with constants in their places.
CircleNode Written(const CircleOp& op, const std::vector<TensorType>& in, const std::vector<TensorType>& out) {
  CircleNode node{.code = op.code, .options = op.options, .outputs = out};
  for (const CircleArg& arg : op.inputs) {
    node.types.emplace_back();
    node.constants.emplace_back();
    if (arg.kind == CircleArg::Kind::kInput) node.types.back() = in[static_cast<size_t>(arg.input)];
    if (arg.kind != CircleArg::Kind::kInts && arg.kind != CircleArg::Kind::kInt) continue;
    const Shape shape = arg.kind == CircleArg::Kind::kInt ? Shape{} : Shape{static_cast<int64_t>(arg.ints.size())};
    node.constants.back() = Tensor::Of<int32_t>(shape, arg.ints);
    node.types.back() = node.constants.back().Type();
  }
  return node;
}

TEST(ConformanceTest, WhatIsWrittenToCircleReadsBackEqual) {
  for (const Row& row : Rows()) {
    SCOPED_TRACE(Label(row));
    std::visit(
        [&](const auto& op) {
          using T = std::decay_t<decltype(op)>;
          if constexpr (CircleOpDef<T>) {
            const std::vector<TensorType> out = op.Infer(row.in);
            const CircleOp written = op.Emit(row.in, out);
            EXPECT_EQ(written.code, T::kCircleCode);
            const Parsed<T> parsed = T::Parse(Written(written, row.in, out));
            EXPECT_TRUE(parsed.op == op);
            ASSERT_EQ(parsed.inputs.size(), row.in.size());
            for (size_t i = 0; i < parsed.inputs.size(); ++i) {
              const CircleArg& arg = written.inputs[static_cast<size_t>(parsed.inputs[i])];
              EXPECT_EQ(arg.kind, CircleArg::Kind::kInput);
              EXPECT_EQ(arg.input, static_cast<int>(i));
            }
          }
        },
        row.op.kind);
  }
}

}  // namespace
}  // namespace circlet
