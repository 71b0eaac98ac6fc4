#include "circlet/ops/elementwise.h"

#include "circlet/base/threads.h"
#include "ops/internal.h"
#include "ops/simd.h"

namespace circlet {
namespace {

template <typename Tag>
constexpr simd::BinaryOp kBinaryOp = [] {
  if constexpr (std::is_same_v<Tag, AddTag>) return simd::BinaryOp::kAdd;
  if constexpr (std::is_same_v<Tag, SubTag>) return simd::BinaryOp::kSub;
  if constexpr (std::is_same_v<Tag, MulTag>) return simd::BinaryOp::kMul;
  if constexpr (std::is_same_v<Tag, MaximumTag>) return simd::BinaryOp::kMax;
  if constexpr (std::is_same_v<Tag, MinimumTag>) return simd::BinaryOp::kMin;
}();

// One axis of a broadcast loop: its size, and how far each operand moves along it (0: repeated).
struct LoopAxis {
  int64_t size, a_step, b_step;
};

// The loop over `out`, adjacent axes merged where both operands walk through them evenly; at least one axis.
std::vector<LoopAxis> BroadcastLoop(const Shape& a, const Shape& b, const Shape& out) {
  std::vector<LoopAxis> axes;  // innermost first
  int64_t a_stride = 1, b_stride = 1;
  for (int i = 1; i <= out.Rank(); ++i) {
    const int64_t m = i <= a.Rank() ? a[-i] : 1;
    const int64_t n = i <= b.Rank() ? b[-i] : 1;
    const LoopAxis axis{out[-i], m == 1 ? 0 : a_stride, n == 1 ? 0 : b_stride};
    a_stride *= m;
    b_stride *= n;
    if (axis.size == 1) continue;
    if (!axes.empty()) {
      LoopAxis& inner = axes.back();
      if (axis.a_step == inner.a_step * inner.size && axis.b_step == inner.b_step * inner.size) {
        inner.size *= axis.size;
        continue;
      }
    }
    axes.push_back(axis);
  }
  if (axes.empty()) axes.push_back({1, 1, 1});
  return axes;
}

template <typename Tag>
constexpr bool kOfIntegers = std::is_same_v<Tag, AddTag> || std::is_same_v<Tag, MulTag>;

// calls element(a's offset, b's offset, index) for each element of the loop.
template <typename Element>
void ForElements(const std::vector<LoopAxis>& axes, int64_t count, const Element& element) {
  for (int64_t index = 0; index < count; ++index) {
    int64_t rest = index, a = 0, b = 0;
    for (const LoopAxis& axis : axes) {
      a += rest % axis.size * axis.a_step;
      b += rest % axis.size * axis.b_step;
      rest /= axis.size;
    }
    element(a, b, index);
  }
}

// One innermost run. A repeated first operand is written out: simd has no scalar-first form.
void BinaryRun(simd::BinaryOp op, const float* a, const float* b, const LoopAxis& axis, int64_t count, float* y) {
  if (axis.a_step == 1 && axis.b_step == 1) return simd::Binary(op, a, b, count, y);
  if (axis.a_step == 1) return simd::BinaryScalar(op, a, *b, count, y);
  constexpr int64_t kChunk = 256;
  float repeated[kChunk];
  std::fill_n(repeated, std::min(kChunk, count), *a);
  for (int64_t i = 0; i < count; i += kChunk) {
    const int64_t n = std::min(kChunk, count - i);
    if (axis.b_step == 1)
      simd::Binary(op, repeated, b + i, n, y + i);
    else
      simd::BinaryScalar(op, repeated, *b, n, y + i);
  }
}

}  // namespace

template <typename Tag>
std::vector<TensorType> Binary<Tag>::Infer(Types in) const {
  ExpectInputs(kName, in, 2);
  if (kOfIntegers<Tag> && in[0].dtype == DType::kI64 && in[1].dtype == DType::kI64)
    return {{DType::kI64, Broadcast(kName, in[0].shape, in[1].shape)}};
  ExpectFloat(kName, in);
  return {{DType::kF32, Broadcast(kName, in[0].shape, in[1].shape)}};
}

template <typename Tag>
void Binary<Tag>::Eval(const EvalContext& context) const {
  const int64_t elements = context.out[0].Elements();
  if (elements == 0) return;
  const std::vector<LoopAxis> axes =
      BroadcastLoop(context.in[0].GetShape(), context.in[1].GetShape(), context.out[0].GetShape());
  if (context.out[0].GetDType() == DType::kI64) {
    const int64_t *const a = context.in[0].I64().data(), *const b = context.in[1].I64().data();
    int64_t* const y = context.out[0].I64().data();
    ForElements(axes, elements, [&](int64_t i, int64_t j, int64_t index) {
      // Modulo 2^64, so that no file makes it overflow.
      const auto left = static_cast<uint64_t>(a[i]), right = static_cast<uint64_t>(b[j]);
      y[index] = static_cast<int64_t>(std::is_same_v<Tag, AddTag> ? left + right : left * right);
    });
    return;
  }
  const float* a = context.in[0].F32().data();
  const float* b = context.in[1].F32().data();
  float* y = context.out[0].F32().data();
  const LoopAxis inner = axes[0];
  if (axes.size() == 1) {
    ParallelFor(elements, kElementGrain, [&](int64_t begin, int64_t end) {
      BinaryRun(kBinaryOp<Tag>, a + begin * inner.a_step, b + begin * inner.b_step, inner, end - begin, y + begin);
    });
    return;
  }
  ParallelFor(elements / inner.size, RowGrain(inner.size), [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      int64_t rest = run, a_offset = 0, b_offset = 0;
      for (size_t i = 1; i < axes.size(); ++i) {
        const int64_t index = rest % axes[i].size;
        rest /= axes[i].size;
        a_offset += index * axes[i].a_step;
        b_offset += index * axes[i].b_step;
      }
      BinaryRun(kBinaryOp<Tag>, a + a_offset, b + b_offset, inner, inner.size, y + run * inner.size);
    }
  });
}

template <typename Tag>
CircleOp Binary<Tag>::Emit(Types, Types) const {
  CircleOp op{kCircleCode, {}, {CircleArg::In(0), CircleArg::In(1)}};
  // The schema's default is true; the reference writes false.
  if constexpr (std::is_same_v<Tag, AddTag> || std::is_same_v<Tag, SubTag>)
    op.options = {{"pot_scale_int16", int64_t{0}}};
  return op;
}

template <typename Tag>
Parsed<Binary<Tag>> Binary<Tag>::Parse(const CircleNode& node) {
  ExpectArgs(kName, node, 2);
  ExpectNoActivation(kName, node);
  return {{}, {0, 1}};
}

template <typename Tag>
std::vector<TensorType> Unary<Tag>::Infer(Types in) const {
  ExpectInputs(kName, in, 1);
  ExpectFloat(kName, in);
  return {in[0]};
}

template <typename Tag>
void Unary<Tag>::Eval(const EvalContext& context) const {
  const float* x = context.in[0].F32().data();
  float* y = context.out[0].F32().data();
  ParallelFor(context.in[0].Elements(), kElementGrain, [&](int64_t begin, int64_t end) {
    if constexpr (std::is_same_v<Tag, NegTag>) simd::Neg(x + begin, end - begin, y + begin);
    if constexpr (std::is_same_v<Tag, TanhTag>) simd::Tanh(x + begin, end - begin, y + begin);
    if constexpr (std::is_same_v<Tag, GeluTag>) simd::Gelu(x + begin, end - begin, y + begin);
  });
}

template <typename Tag>
CircleOp Unary<Tag>::Emit(Types, Types) const {
  CircleOp op{kCircleCode, {}, {CircleArg::In(0)}};
  if constexpr (std::is_same_v<Tag, GeluTag>) op.options = {{"approximate", int64_t{1}}};
  return op;
}

template <typename Tag>
Parsed<Unary<Tag>> Unary<Tag>::Parse(const CircleNode& node) {
  ExpectArgs(kName, node, 1);
  if constexpr (std::is_same_v<Tag, GeluTag>) ExpectOption(kName, node, "approximate", 1, 0);
  return {{}, {0}};
}

template struct Binary<AddTag>;
template struct Binary<SubTag>;
template struct Binary<MulTag>;
template struct Binary<MaximumTag>;
template struct Binary<MinimumTag>;
template struct Unary<NegTag>;
template struct Unary<TanhTag>;
template struct Unary<GeluTag>;

}  // namespace circlet
