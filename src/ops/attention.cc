#include "circlet/ops/attention.h"

#include "circlet/ops/ops.h"
#include "ops/attention_sizes.h"
#include "ops/internal.h"

namespace circlet {

std::vector<TensorType> Attention::Infer(Types in) const {
  if (in.size() != 4 && in.size() != 6)
    ShapeError(kName, in, "it takes q, k, v, a mask and perhaps k and v of the past");
  ExpectFloat(kName, in);
  const Shape &q = in[0].shape, &k = in[1].shape, &v = in[2].shape, &mask = in[3].shape;
  if (q.Rank() != 4 || k.Rank() != 4 || q[0] != 1 || k[0] != 1 || k != v || q[3] != k[3])
    ShapeError(kName, in, "q must be [1,H,S,h], k and v [1,KV,T,h]");
  if (k[1] == 0 || q[1] % k[1] != 0)
    ShapeError(kName, in, fmt::format("{} query heads do not share {} key heads evenly", q[1], k[1]));
  if (q[2] == 0 || k[2] == 0 || q[3] == 0) ShapeError(kName, in, "there must be at least one query and one key");
  int64_t keys = k[2];
  if (in.size() == 6) {
    const Shape& past = in[4].shape;
    if (past.Rank() != 4 || past != in[5].shape || Shape{past[0], past[1], k[2], past[3]} != k)
      ShapeError(kName, in, fmt::format("k and v of the past must be [1,{},P,{}]", k[1], k[3]));
    keys += past[2];
  }
  if (form == Form::kBatched && mask.Rank() != 4)
    ShapeError(kName, in, fmt::format("the mask must be [1,1,{},{}]", q[2], keys));
  if (mask != Shape{1, 1, q[2], keys} && mask != Shape{1, q[2], keys})
    ShapeError(kName, in, fmt::format("the mask must be [1,1,{0},{1}] or [1,{0},{1}]", q[2], keys));
  return {{DType::kF32, {1, q[2], q[1] * q[3]}}};
}

// Of both products, whatever the mask keeps out.
std::vector<MatrixProduct> Attention::Products(Types in) const {
  const Shape& q = in[0].shape;
  const int64_t keys = in[3].shape[-1];
  return {{.m = q[2], .n = keys, .k = q[3], .count = q[1]},
          {.m = q[2], .n = q[3], .k = keys, .transposed = false, .count = q[1]}};
}

namespace {

// What both forms of the expansion are written with.
class Expansion {
 public:
  Expansion(GraphSink& sink, std::span<const Point> points) : sink_(sink), points_(points) {}

  ValueId One(Op op, std::vector<ValueId> operands) const { return sink_.Add(std::move(op), std::move(operands))[0]; }
  ValueId At(Attention::At index, ValueId value) const {
    const bool exists = static_cast<size_t>(index) < points_.size() && !points_[index].name.empty();
    return exists ? sink_.AddPoint(points_[index], value) : value;
  }
  // Heads [begin, begin + count) of x [1,heads,rows,width].
  ValueId Heads(ValueId x, int64_t begin, int64_t count) const {
    const Shape& shape = sink_.TypeOf(x).shape;
    if (count == shape[1]) return x;
    const auto at = [](int64_t size) { return static_cast<int32_t>(size); };
    return One(Slice{{0, at(begin), 0, 0}, {1, at(begin + count), at(shape[2]), at(shape[3])}}, {x});
  }

 private:
  GraphSink& sink_;
  std::span<const Point> points_;
};

ValueId ExpandByHead(const Attention& op, const AttentionSizes& sizes, const Expansion& e, std::span<const ValueId> in,
                     bool rank3_mask) {
  const auto head_of = [&](ValueId x, int64_t head, int64_t rows) {
    return e.One(Reshape{{1, rows, sizes.head_size}}, {e.Heads(x, head, 1)});
  };
  const ValueId mask = rank3_mask ? in[3] : e.One(Reshape{{1, sizes.queries, sizes.keys}}, {in[3]});
  std::vector<ValueId> outs;
  ValueId k = -1, v = -1;
  for (int64_t head = 0; head < sizes.heads; ++head) {
    if (head % (sizes.heads / sizes.kv_heads) == 0) {
      k = head_of(in[1], sizes.KvHead(head), sizes.keys);
      v = head_of(in[2], sizes.KvHead(head), sizes.keys);
    }
    const ValueId q = head_of(in[0], head, sizes.queries);
    const ValueId k_operand = op.explicit_transpose ? e.One(Transpose{{0, 2, 1}}, {k}) : k;
    ValueId scores = e.One(BatchMatMul{.transpose_b = !op.explicit_transpose}, {q, k_operand});
    scores = e.At(Attention::kLogits, e.At(Attention::kLogitsRaw, scores));
    scores = e.At(Attention::kMaskAdd, e.One(Add{}, {scores, mask}));
    scores = e.At(Attention::kSoftmax, e.One(Softmax{}, {scores}));
    outs.push_back(e.At(Attention::kAttnOut, e.One(BatchMatMul{}, {scores, v})));
  }
  return e.At(Attention::kAttnOutH, e.One(Concat{.axis = 2}, std::move(outs)));
}

ValueId ExpandBatched(const AttentionSizes& sizes, GraphSink& sink, const Expansion& e, std::span<const ValueId> in) {
  const auto& [heads, kv_heads, queries, keys, width] = sizes;
  const int64_t group = heads / kv_heads;
  // [1,1,rows,columns] once for each query head of the group, [group,rows,columns].
  const auto repeated = [&](ValueId x, int64_t rows, int64_t columns) {
    if (group > 1) x = e.One(BroadcastTo{{1, group, rows, columns}}, {x});
    return e.One(Reshape{{group, rows, columns}}, {x});
  };
  std::vector<ValueId> outs;
  for (int64_t kv_head = 0; kv_head < kv_heads; ++kv_head) {
    ValueId k = e.Heads(in[1], kv_head, 1);
    const ValueId v = e.Heads(in[2], kv_head, 1);
    ValueId q = e.Heads(in[0], kv_head * group, group);
    k = e.One(Transpose{{0, 1, 3, 2}}, {k});
    q = e.One(Reshape{{group, queries, width}}, {q});
    k = repeated(k, width, keys);
    ValueId scores = e.At(Attention::kLogitsRaw, e.One(BatchMatMul{}, {q, k}));
    const ValueId scale = e.At(Attention::kScale, sink.AddConstant(Tensor::Scalar(1.0f)));
    scores = e.At(Attention::kLogits, e.One(Mul{}, {scores, scale}));
    scores = e.One(Reshape{{1, group, queries, keys}}, {scores});
    scores = e.At(Attention::kMaskAdd, e.One(Add{}, {scores, in[3]}));
    scores = e.At(Attention::kSoftmax, e.One(Softmax{}, {scores}));
    scores = e.One(Reshape{{group, queries, keys}}, {scores});
    const ValueId out = e.At(Attention::kAttnOut, e.One(BatchMatMul{}, {scores, repeated(v, keys, width)}));
    outs.push_back(e.One(Reshape{{1, group, queries, width}}, {out}));
  }
  const ValueId all = outs.size() == 1 ? outs[0] : e.One(Concat{.axis = 1}, std::move(outs));
  const ValueId by_position = e.One(Transpose{{0, 2, 1, 3}}, {all});
  return e.At(Attention::kAttnOutH, e.One(Reshape{{1, queries, heads * width}}, {by_position}));
}

}  // namespace

std::vector<ValueId> Attention::Expand(GraphSink& sink, std::span<const ValueId> in,
                                       std::span<const Point> points) const {
  const Expansion expansion(sink, points);
  std::vector<ValueId> whole(in.begin(), in.begin() + 4);
  for (size_t i = 4; i < in.size(); ++i) whole[i - 3] = expansion.One(Concat{.axis = 2}, {in[i], in[i - 3]});
  const AttentionSizes sizes(sink.TypeOf(whole[0]).shape, sink.TypeOf(whole[1]).shape, 0);
  if (form == Form::kBatched) return {ExpandBatched(sizes, sink, expansion, whole)};
  return {ExpandByHead(*this, sizes, expansion, whole, sink.TypeOf(in[3]).shape.Rank() == 3)};
}

}  // namespace circlet
