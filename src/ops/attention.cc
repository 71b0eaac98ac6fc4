#include "circlet/ops/attention.h"

#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "circlet/base/threads.h"
#include "circlet/ops/ops.h"
#include "hwy/aligned_allocator.h"
#include "ops/aligned.h"
#include "ops/gemm.h"
#include "ops/integer_product.h"
#include "ops/internal.h"
#include "ops/simd.h"
#include "ops/tally.h"
#include "ops/thread_floats.h"

namespace circlet {
namespace {

enum AttentionPoint { kLogitsRaw, kLogits, kMaskAdd, kSoftmax, kAttnOut, kAttnWeights, kAttnOutH, kScale };

// Query rows that share one product: enough to keep the processor's multipliers busy, few enough that their scores fit
// the second-level cache and that a causal mask wastes little.
constexpr int64_t kBlockRows = 48;

struct Sizes {
  int64_t heads, kv_heads, queries, keys, head_size;

  explicit Sizes(const Shape& q, const Shape& k)
      : heads(q[1]), kv_heads(k[1]), queries(q[2]), keys(k[2]), head_size(q[3]) {}
  int64_t KvHead(int64_t head) const { return head / (heads / kv_heads); }
};

struct KeyRun {
  int64_t begin, end;
};

// The keys that one query row computes with.
struct RowKeys {
  KeyRun only{};             // the one run that nearly all rows have
  std::vector<KeyRun> many;  // in its place, of the others
  bool visited = true;       // by observing visitors
  bool masks = true;         // whether the mask changes the scores of these keys

  std::span<const KeyRun> Runs() const { return many.empty() ? std::span(&only, 1) : std::span(many); }
  int64_t Begin() const { return Runs().front().begin; }
  int64_t End() const { return Runs().back().end; }
};

bool AllZero(const float* values, int64_t count) {
  constexpr int64_t kStep = 1024;  // without a branch a value
  for (int64_t begin = 0; begin < count; begin += kStep) {
    int different = 0;
    for (int64_t i = begin; i < std::min(count, begin + kStep); ++i) different |= values[i] != 0;
    if (different) return false;
  }
  return true;
}

// A row that keeps no key (a padded query) weighs all of them, as its expansion does; but its mask values, which no
// kept key has, stay out of the statistics.
RowKeys KeysOfRow(const float* mask, int64_t keys, bool skip_masked, float limit) {
  if (!skip_masked) return {.only = {0, keys}};
  RowKeys row{.masks = false};
  int64_t count = 0;
  for (int64_t key = 0; key < keys; ++key) {
    if (mask[key] <= limit) continue;
    KeyRun run{key, key};
    while (run.end < keys && !(mask[run.end] <= limit)) ++run.end;
    key = run.end;
    row.masks |= !AllZero(mask + run.begin, run.end - run.begin);
    if (++count == 2) row.many = {row.only};
    if (count >= 2) row.many.push_back(run);
    if (count == 1) row.only = run;
  }
  if (count == 0) return {.only = {0, keys}, .visited = false};
  return row;
}

// What stands where a product takes one float: a value, two neighbours along k in bf16, or four in bytes.
enum class Unit : uint8_t { kFloat, kPair, kQuad };

// One of the two products of an attention, q k^T or p v, for all its blocks.
class Product {
 public:
  // On the grids `left` and `right`, when they are known.
  Product(Compute compute, const QParams* left, const QParams* right, int64_t k) : left_(left), right_(right), k_(k) {
    if (BytesSummedInIntegers(left, right, k))
      unit_ = Unit::kQuad;
    else if (compute == Compute::kBf16)
      unit_ = Unit::kPair;
  }

  gemm::Operand Operand() const {
    return unit_ == Unit::kQuad ? gemm::Operand::kBytes : gemm::FloatOperand(unit_ == Unit::kPair);
  }
  bool Counts() const { return unit_ == Unit::kQuad; }
  bool Converts() const { return unit_ != Unit::kFloat; }
  // Floats that k terms take.
  int64_t Depth(int64_t k) const {
    return unit_ == Unit::kQuad ? gemm::Quads(k) : unit_ == Unit::kPair ? gemm::Pairs(k) : k;
  }
  int64_t Depth() const { return Depth(k_); }

  // A row of the left operand, its terms [begin, end) at their places; the sum of the codes of bytes.
  double Left(const float* x, int64_t begin, int64_t end, float* to) const {
    if (unit_ == Unit::kFloat) return CopyShort(x + begin, end - begin, to + begin), 0;
    if (unit_ == Unit::kPair) return gemm::PairAlongRows(x + begin, 0, 1, end - begin, to + begin / 2, 0), 0;
    return Bytes(x + begin, end - begin, LeftZeroPoint(), left_->scale[0], to + begin / 4);
  }
  // A row of the right operand that lies along k, whole.
  double RightAlongRow(const float* x, float* to) const {
    if (unit_ == Unit::kPair) return gemm::PairAlongRows(x, 0, 1, k_, to, 0), 0;
    return Bytes(x, k_, RightZeroPoint(), right_->scale[0], to);
  }
  // The right operand [k,n] that lies across k.
  void RightAcrossRows(const float* x, int64_t n, float* to, double* row_sums) const {
    if (unit_ == Unit::kPair)
      return ParallelFor(Depth(), RowGrain(2 * n),
                         [&](int64_t begin, int64_t end) { gemm::PairRows(x, k_, n, begin, end, to); });
    const auto codes = Aligned<int8_t>(k_ * n);
    ParallelFor(k_, RowGrain(n), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        row_sums[row] = simd::CodesOf8Bits(x + row * n, n, right_->scale[0], RightZeroPoint(),
                                           reinterpret_cast<uint8_t*>(codes.get() + row * n));
    });
    ParallelFor(Depth(), RowGrain(4 * n),
                [&](int64_t begin, int64_t end) { gemm::QuadRows(codes.get(), k_, n, begin, end, to); });
  }

  void Multiply(const float* a, int64_t a_stride, int64_t m, const gemm::Panels& b, const gemm::Part& part, float* c,
                int64_t c_stride) const {
    const auto multiply = unit_ == Unit::kQuad   ? gemm::MultiplyQuads
                          : unit_ == Unit::kPair ? gemm::MultiplyPairs
                                                 : gemm::Multiply;
    multiply(a, a_stride, m, b, part, c, c_stride);
  }

  int32_t LeftZeroPoint() const { return UnsignedZeroPoint(*left_); }
  int32_t RightZeroPoint() const { return UnsignedZeroPoint(*right_) - 128; }
  double Scale() const { return static_cast<double>(left_->scale[0]) * right_->scale[0]; }

 private:
  static double Bytes(const float* x, int64_t count, int32_t zero_point, float scale, float* to) {
    auto* const bytes = reinterpret_cast<uint8_t*>(to);
    const double sum = simd::CodesOf8Bits(x, count, scale, zero_point, bytes);
    std::fill(bytes + count, bytes + 4 * gemm::Quads(count), uint8_t{0});
    return sum;
  }

  Unit unit_ = Unit::kFloat;
  const QParams *left_, *right_;
  int64_t k_;
};

// What the sums of bytes need to become values, by column.
struct Columns {
  std::vector<double> offset, zero_point, scale, bias;

  Columns(const Product& product, int64_t count) {
    if (!product.Counts()) return;
    offset.resize(static_cast<size_t>(count));
    bias.resize(static_cast<size_t>(count));
    zero_point.assign(static_cast<size_t>(count), product.RightZeroPoint());
    scale.assign(static_cast<size_t>(count), product.Scale());
  }
  simd::IntegerColumns From(const double* offsets, int64_t first) const {
    return {offsets, zero_point.data() + first, scale.data() + first, bias.data() + first};
  }
};

// One run of Attention::Eval: operands, and for each kv head k^T and v packed for the products.
class AttentionRun {
 public:
  AttentionRun(const Attention& op, const EvalContext& context)
      : context_(context),
        sizes_(context.in[0].GetShape(), context.in[1].GetShape()),
        scores_(context.compute, context.in[0].Grid(), context.in[1].Grid(), sizes_.head_size),
        out_(context.compute, GridAt(kSoftmax), context.in[2].Grid(), sizes_.keys),
        score_stride_((sizes_.keys + simd::kSoftmaxLanes - 1) / simd::kSoftmaxLanes * simd::kSoftmaxLanes +
                      simd::kSoftmaxLanes),  // not a power of two: rows must not share cache sets
        k_floats_(gemm::PackedFloats(scores_.Depth(), sizes_.keys)),
        v_floats_(gemm::PackedFloats(out_.Depth(), sizes_.head_size)),
        packed_(ThreadFloats<AttentionRun>(sizes_.kv_heads * (k_floats_ + v_floats_))),
        row_keys_(static_cast<size_t>(sizes_.queries)),
        score_columns_(scores_, sizes_.kv_heads * sizes_.keys),
        out_columns_(out_, sizes_.head_size),
        value_sums_(out_.Converts() ? static_cast<size_t>(sizes_.kv_heads * sizes_.keys) : 0) {
    gemm::Count({sizes_.queries, sizes_.keys, sizes_.head_size, true, scores_.Operand()}, sizes_.heads);
    gemm::Count({sizes_.queries, sizes_.head_size, sizes_.keys, false, out_.Operand()}, sizes_.heads);
    if (PointVisitor* visitor = At(kScale)) visitor->Visit({&scale_, 1}, 0);
    PackAll();
    const float* mask = context.in[3].F32().data();
    ParallelFor(sizes_.queries, RowGrain(sizes_.keys), [&](int64_t begin, int64_t end) {
      const size_t row_bytes = static_cast<size_t>(sizes_.keys) * sizeof(float);
      for (int64_t row = begin; row < end; ++row) {
        const float* of_row = mask + row * sizes_.keys;
        RowKeys& keys = row_keys_[static_cast<size_t>(row)];
        if (row > begin && std::memcmp(of_row, of_row - sizes_.keys, row_bytes) == 0)
          keys = row_keys_[static_cast<size_t>(row) - 1];
        else
          keys = KeysOfRow(of_row, sizes_.keys, op.skip_masked, op.mask_fill / 2);
      }
    });
  }

  void Run() const {
    const int64_t blocks = (sizes_.queries + kBlockRows - 1) / kBlockRows;
    ParallelFor(blocks * sizes_.heads, 1, [&](int64_t begin, int64_t end) {
      float* const scratch =
          ThreadFloats<struct BlockScratch>(kBlockRows * (2 * score_stride_ + 2 * sizes_.head_size + 16));
      // The last blocks first: under a causal mask they are the longest, and threads should end together.
      for (int64_t task = begin; task < end; ++task)
        RunBlock(task % sizes_.heads, (blocks - 1 - task / sizes_.heads) * kBlockRows, scratch);
    });
    if (PointVisitor* visitor = At(kAttnOutH)) {
      const int64_t width = sizes_.heads * sizes_.head_size;
      ParallelFor(sizes_.queries, RowGrain(width), [&](int64_t begin, int64_t end) {
        visitor->Visit(context_.out[0].F32().subspan(static_cast<size_t>(begin * width),
                                                     static_cast<size_t>((end - begin) * width)),
                       begin * width);
      });
    }
  }

 private:
  PointVisitor* At(AttentionPoint point) const {
    return static_cast<size_t>(point) < context_.points.size() ? context_.points[point] : nullptr;
  }
  const QParams* GridAt(AttentionPoint point) const {
    return static_cast<size_t>(point) < context_.grids.size() ? context_.grids[point] : nullptr;
  }

  gemm::Panels KeyPanels(int64_t kv_head) const {
    return {packed_ + kv_head * (k_floats_ + v_floats_), scores_.Depth(), sizes_.keys};
  }
  gemm::Panels ValuePanels(int64_t kv_head) const {
    return {packed_ + kv_head * (k_floats_ + v_floats_) + k_floats_, out_.Depth(), sizes_.head_size};
  }

  void PackAll() {
    const auto& [heads, kv_heads, queries, keys, head_size] = sizes_;
    const int64_t key_panels = gemm::PanelCount(keys), value_panels = gemm::PanelCount(head_size);
    const int64_t panels = key_panels + value_panels;
    const int64_t k_elements = keys * scores_.Depth(), v_elements = out_.Depth() * head_size;
    const float* all_k = context_.in[1].F32().data();
    const float* all_v = context_.in[2].F32().data();
    const int64_t k_converted = scores_.Converts() ? kv_heads * k_elements : 0;
    const int64_t v_converted = out_.Converts() ? kv_heads * v_elements : 0;
    hwy::AlignedFreeUniquePtr<float[]> converted;
    if (k_converted + v_converted > 0)
      converted = Aligned<float>(k_converted + v_converted);
    if (scores_.Converts()) all_k = ConvertKeys(converted.get());
    if (out_.Converts()) all_v = ConvertValues(converted.get() + k_converted);
    ParallelFor(kv_heads * panels, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t kv_head = i / panels, panel = i % panels;
        if (panel < key_panels)
          gemm::Pack(all_k + kv_head * k_elements, scores_.Depth(), true, KeyPanels(kv_head), panel, panel + 1);
        else
          gemm::Pack(all_v + kv_head * v_elements, sizes_.head_size, false, ValuePanels(kv_head), panel - key_panels,
                     panel - key_panels + 1);
      }
    });
  }

  // k [KV,T,h] to k [KV,T,Depth(h)].
  const float* ConvertKeys(float* to) {
    const int64_t width = sizes_.head_size;
    ParallelFor(sizes_.kv_heads * sizes_.keys, RowGrain(width), [&](int64_t begin, int64_t end) {
      for (int64_t key = begin; key < end; ++key) {
        const double sum = scores_.RightAlongRow(context_.in[1].F32().data() + key * width, to + key * scores_.Depth());
        if (scores_.Counts())
          score_columns_.offset[static_cast<size_t>(key)] =
              -scores_.LeftZeroPoint() * (sum - static_cast<double>(width) * scores_.RightZeroPoint());
      }
    });
    return to;
  }

  // v [KV,T,h] to v [KV,Depth(T),h].
  const float* ConvertValues(float* to) {
    for (int64_t kv_head = 0; kv_head < sizes_.kv_heads; ++kv_head)
      out_.RightAcrossRows(context_.in[2].F32().data() + kv_head * sizes_.keys * sizes_.head_size, sizes_.head_size,
                           to + kv_head * out_.Depth() * sizes_.head_size, value_sums_.data() + kv_head * sizes_.keys);
    return to;
  }

  void Visit(AttentionPoint point, const RowKeys& row, float* scores, int64_t first) const {
    PointVisitor* visitor = At(point);
    if (visitor == nullptr || !(row.visited || context_.points_write)) return;
    for (const KeyRun& run : row.Runs())
      visitor->Visit({scores + run.begin, static_cast<size_t>(run.end - run.begin)}, first + run.begin);
  }

  // Scores of one row in [low, high) to probabilities; what the row does not keep becomes exactly 0.
  void SoftmaxRow(const RowKeys& row, const float* mask, float* scores, int64_t first, KeyRun range) const {
    Visit(kLogitsRaw, row, scores, first);
    if (scale_ != 1.0f)
      for (const KeyRun& run : row.Runs())
        for (int64_t key = run.begin; key < run.end; ++key) scores[key] *= scale_;
    Visit(kLogits, row, scores, first);
    if (row.masks)
      for (const KeyRun& run : row.Runs())
        simd::Binary(simd::BinaryOp::kAdd, scores + run.begin, mask + run.begin, run.end - run.begin,
                     scores + run.begin);
    Visit(kMaskAdd, row, scores, first);
    const KeyRun kept{row.Begin() / simd::kSoftmaxLanes * simd::kSoftmaxLanes, row.End()};
    int64_t masked = kept.begin;
    for (const KeyRun& run : row.Runs()) {
      std::fill(scores + masked, scores + run.begin, -std::numeric_limits<float>::infinity());
      masked = run.end;
    }
    simd::SoftmaxRow(scores + kept.begin, kept.end - kept.begin);
    std::fill(scores + range.begin, scores + kept.begin, 0.0f);
    std::fill(scores + kept.end, scores + range.end, 0.0f);
    Visit(kSoftmax, row, scores, first);
  }

  void RunBlock(int64_t head, int64_t first_row, float* scratch) const {
    const auto& [heads, kv_heads, queries, keys, head_size] = sizes_;
    const int64_t rows = std::min(kBlockRows, queries - first_row);
    const RowKeys* row_keys = row_keys_.data() + first_row;
    KeyRun range{keys, 0};
    for (int64_t row = 0; row < rows; ++row) {
      range.begin = std::min(range.begin, row_keys[row].Begin());
      range.end = std::max(range.end, row_keys[row].End());
    }
    range.begin = range.begin / simd::kSoftmaxLanes * simd::kSoftmaxLanes;

    // Copied, so that rows a power of two apart do not evict each other.
    const int64_t q_stride = head_size + 16;
    float* scores = scratch;                         // [rows, score_stride_]
    float* q = scores + kBlockRows * score_stride_;  // [rows, q_stride]
    float* out = q + kBlockRows * q_stride;          // [rows, head_size]
    float* units = out + kBlockRows * head_size;     // [rows, score_stride_]: the probabilities, if converted
    const int64_t kv_head = sizes_.KvHead(head), columns = gemm::PanelColumns();
    const float* q_from = context_.in[0].F32().data() + (head * queries + first_row) * head_size;
    std::array<double, kBlockRows> sums;
    for (int64_t row = 0; row < rows; ++row)
      sums[row] = scores_.Left(q_from + row * head_size, 0, head_size, q + row * q_stride);
    scores_.Multiply(q, q_stride, rows, KeyPanels(kv_head),
                     {range.begin / columns, (range.end + columns - 1) / columns, 0, scores_.Depth()}, scores,
                     score_stride_);
    if (scores_.Counts())
      for (int64_t row = 0; row < rows; ++row)
        Finish(score_columns_.From(score_columns_.offset.data() + kv_head * keys + range.begin, range.begin), sums[row],
               range.end - range.begin, scores + row * score_stride_ + range.begin);
    const float* mask = context_.in[3].F32().data();
    for (int64_t row = 0; row < rows; ++row)
      SoftmaxRow(row_keys[row], mask + (first_row + row) * keys, scores + row * score_stride_,
                 (head * queries + first_row + row) * keys, range);
    if (out_.Converts())
      for (int64_t row = 0; row < rows; ++row)
        sums[row] = out_.Left(scores + row * score_stride_, range.begin, range.end, units + row * score_stride_);
    out_.Multiply(out_.Converts() ? units : scores, score_stride_, rows, ValuePanels(kv_head),
                  {0, gemm::PanelCount(head_size), out_.Depth(range.begin), out_.Depth(range.end)}, out, head_size);
    if (out_.Counts()) FinishOut(kv_head, range, rows, sums, out);
    if (PointVisitor* visitor = At(kAttnOut))
      visitor->Visit({out, static_cast<size_t>(rows * head_size)}, (head * queries + first_row) * head_size);
    float* to = context_.out[0].F32().data() + (first_row * heads + head) * head_size;
    for (int64_t row = 0; row < rows; ++row) CopyShort(out + row * head_size, head_size, to + row * heads * head_size);
    // Last: the probabilities as a result of their own reach no product.
    for (int64_t row = 0; row < rows; ++row)
      Visit(kAttnWeights, row_keys[row], scores + row * score_stride_, (head * queries + first_row + row) * keys);
  }

  static void Finish(const simd::IntegerColumns& columns, double row_sum, int64_t count, float* values) {
    simd::FinishIntegers(reinterpret_cast<const int32_t*>(values), nullptr, columns, row_sum, count, values);
  }

  // Sums over a range of keys: probabilities outside of it are 0, so that they add nothing.
  void FinishOut(int64_t kv_head, KeyRun range, int64_t rows, const std::array<double, kBlockRows>& sums,
                 float* out) const {
    const int64_t head_size = sizes_.head_size;
    const double zero_point = out_.LeftZeroPoint();
    const double* const value_sums = value_sums_.data() + kv_head * sizes_.keys;
    std::vector<double> offset(static_cast<size_t>(head_size));
    if (zero_point != 0) OffsetsOf(kv_head, range, offset);
    for (int64_t key = range.begin; key < range.end; ++key)
      if (std::isnan(value_sums[key])) std::ranges::fill(offset, value_sums[key]);
    for (int64_t row = 0; row < rows; ++row)
      Finish(out_columns_.From(offset.data(), 0), sums[row], head_size, out + row * head_size);
  }

  void OffsetsOf(int64_t kv_head, KeyRun range, std::vector<double>& offset) const {
    const int64_t head_size = sizes_.head_size;
    const float* const v = context_.in[2].F32().data() + kv_head * sizes_.keys * head_size;
    for (int64_t column = 0; column < head_size; ++column) {
      double sum = 0;  // of v / scale
      for (int64_t key = range.begin; key < range.end; ++key)
        sum += std::rint(static_cast<double>(v[key * head_size + column]) / context_.in[2].Grid()->scale[0]);
      offset[static_cast<size_t>(column)] = -out_.LeftZeroPoint() * sum;
    }
  }

  const EvalContext& context_;
  Sizes sizes_;
  Product scores_, out_;
  int64_t score_stride_;
  float scale_ = 1.0f;  // on its grid
  int64_t k_floats_, v_floats_;
  float* packed_;
  std::vector<RowKeys> row_keys_;
  Columns score_columns_, out_columns_;
  std::vector<double> value_sums_;  // of v's rows, NaN where one has a NaN
};

}  // namespace

std::vector<TensorType> Attention::Infer(Types in) const {
  ExpectInputs(kName, in, 4);
  ExpectFloat(kName, in);
  const Shape &q = in[0].shape, &k = in[1].shape, &v = in[2].shape, &mask = in[3].shape;
  if (q.Rank() != 4 || k.Rank() != 4 || q[0] != 1 || k[0] != 1 || k != v || q[3] != k[3])
    ShapeError(kName, in, "q must be [1,H,S,h], k and v [1,KV,T,h]");
  if (k[1] == 0 || q[1] % k[1] != 0)
    ShapeError(kName, in, fmt::format("{} query heads do not share {} key heads evenly", q[1], k[1]));
  if (q[2] == 0 || k[2] == 0 || q[3] == 0) ShapeError(kName, in, "there must be at least one query and one key");
  if (form == Form::kBatched && mask.Rank() != 4)
    ShapeError(kName, in, fmt::format("the mask must be [1,1,{},{}]", q[2], k[2]));
  if (mask != Shape{1, 1, q[2], k[2]} && mask != Shape{1, q[2], k[2]})
    ShapeError(kName, in, fmt::format("the mask must be [1,1,{0},{1}] or [1,{0},{1}]", q[2], k[2]));
  return {{DType::kF32, {1, q[2], q[1] * q[3]}}};
}

void Attention::Eval(const EvalContext& context) const { AttentionRun(*this, context).Run(); }

namespace {

// What both forms of the expansion are written with.
class Expansion {
 public:
  Expansion(GraphSink& sink, std::span<const Point> points) : sink_(sink), points_(points) {}

  ValueId One(Op op, std::vector<ValueId> operands) const { return sink_.Add(std::move(op), std::move(operands))[0]; }
  ValueId At(AttentionPoint index, ValueId value) const {
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

ValueId ExpandByHead(const Attention& op, const Sizes& sizes, const Expansion& e, std::span<const ValueId> in,
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
    scores = e.At(kLogits, e.At(kLogitsRaw, scores));
    scores = e.At(kMaskAdd, e.One(Add{}, {scores, mask}));
    scores = e.At(kSoftmax, e.One(Softmax{}, {scores}));
    outs.push_back(e.At(kAttnOut, e.One(BatchMatMul{}, {scores, v})));
  }
  return e.At(kAttnOutH, e.One(Concat{.axis = 2}, std::move(outs)));
}

ValueId ExpandBatched(const Sizes& sizes, GraphSink& sink, const Expansion& e, std::span<const ValueId> in) {
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
    ValueId scores = e.At(kLogitsRaw, e.One(BatchMatMul{}, {q, k}));
    const ValueId scale = e.At(kScale, sink.AddConstant(Tensor::Scalar(1.0f)));
    scores = e.At(kLogits, e.One(Mul{}, {scores, scale}));
    scores = e.One(Reshape{{1, group, queries, keys}}, {scores});
    scores = e.At(kMaskAdd, e.One(Add{}, {scores, in[3]}));
    scores = e.At(kSoftmax, e.One(Softmax{}, {scores}));
    scores = e.One(Reshape{{group, queries, keys}}, {scores});
    const ValueId out = e.At(kAttnOut, e.One(BatchMatMul{}, {scores, repeated(v, keys, width)}));
    outs.push_back(e.One(Reshape{{1, group, queries, width}}, {out}));
  }
  const ValueId all = outs.size() == 1 ? outs[0] : e.One(Concat{.axis = 1}, std::move(outs));
  const ValueId by_position = e.One(Transpose{{0, 2, 1, 3}}, {all});
  return e.At(kAttnOutH, e.One(Reshape{{1, queries, heads * width}}, {by_position}));
}

}  // namespace

std::vector<ValueId> Attention::Expand(GraphSink& sink, std::span<const ValueId> in,
                                       std::span<const Point> points) const {
  const Sizes sizes(sink.TypeOf(in[0]).shape, sink.TypeOf(in[1]).shape);
  const Expansion expansion(sink, points);
  if (form == Form::kBatched) return {ExpandBatched(sizes, sink, expansion, in)};
  return {ExpandByHead(*this, sizes, expansion, in, sink.TypeOf(in[3]).shape.Rank() == 3)};
}

}  // namespace circlet
