#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "circlet/base/threads.h"
#include "circlet/ops/attention.h"
#include "hwy/aligned_allocator.h"
#include "ops/aligned.h"
#include "ops/attention_rows.h"
#include "ops/attention_sizes.h"
#include "ops/code_product.h"
#include "ops/gemm.h"
#include "ops/internal.h"
#include "ops/simd.h"
#include "ops/tally.h"
#include "ops/thread_scratch.h"

namespace circlet {
namespace {

// Query rows that share one product: enough to keep the processor's multipliers busy, few enough that their scores fit
// the second-level cache and that a causal mask wastes little.
constexpr int64_t kBlockRows = 48;

// So many query rows of a key head are multiplied with keys and values where they stand: packing them would take longer
// than the products. Such rows are taken in tiles of those that a kernel takes together.
constexpr int64_t kFewRows = 16, kTileRows = 4;

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

// One run of Attention::Eval: operands, and for each kv head k^T and v packed for the products, unless the rows are
// few.
class AttentionRun {
 public:
  AttentionRun(const Attention& op, const EvalContext& context)
      : context_(context),
        k_(context.in, 1),
        v_(context.in, 2),
        sizes_(context.in[0].GetShape(), context.in[1].GetShape(), k_.Past()),
        scores_(context.compute, context.in[0].Grid(), k_.Grid(), sizes_.head_size),
        out_(context.compute, GridAt(Attention::kSoftmax), v_.Grid(), sizes_.keys),
        few_(RowsOfKvHead() <= kFewRows && !scores_.Converts() && !out_.Converts()),
        score_stride_((sizes_.keys + simd::kSoftmaxLanes - 1) / simd::kSoftmaxLanes * simd::kSoftmaxLanes +
                      simd::kSoftmaxLanes),  // not a power of two: rows must not share cache sets
        k_floats_(gemm::PackedFloats(scores_.Depth(), sizes_.keys)),
        v_floats_(gemm::PackedFloats(out_.Depth(), sizes_.head_size)),
        packed_(few_ ? nullptr : ThreadScratch<float, AttentionRun>(sizes_.kv_heads * (k_floats_ + v_floats_))),
        row_keys_(static_cast<size_t>(sizes_.queries)),
        score_columns_(scores_, sizes_.kv_heads * sizes_.keys),
        out_columns_(out_, sizes_.head_size),
        value_sums_(out_.Converts() ? static_cast<size_t>(sizes_.kv_heads * sizes_.keys) : 0) {
    gemm::Count({sizes_.queries, sizes_.keys, sizes_.head_size, true, scores_.Operand()}, sizes_.heads);
    gemm::Count({sizes_.queries, sizes_.head_size, sizes_.keys, false, out_.Operand()}, sizes_.heads);
    if (PointVisitor* visitor = At(Attention::kScale)) visitor->Visit({&scale_, 1}, 0);
    if (!few_) PackAll();
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
    // A task's rows share a key head: of its query heads, one behind the other, when they are few, else of one of them.
    const int64_t rows = few_ ? RowsOfKvHead() : sizes_.queries, parts = sizes_.heads * sizes_.queries / rows;
    const int64_t shares = (Threads() + parts - 1) / parts;  // of a part's rows, if they are few
    const int64_t block = few_ ? ((rows + shares - 1) / shares + kTileRows - 1) / kTileRows * kTileRows : kBlockRows;
    const int64_t blocks = (rows + block - 1) / block;
    ParallelFor(blocks * parts, 1, [&](int64_t begin, int64_t end) {
      float* const scratch =
          ThreadScratch<float, struct BlockScratch>(kBlockRows * (2 * score_stride_ + 2 * sizes_.head_size + 16));
      // The last blocks first: under a causal mask they are the longest, and threads should end together.
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = (blocks - 1 - task / parts) * block;
        RunBlock(task % parts * rows + first, std::min(block, rows - first), scratch);
      }
    });
    if (PointVisitor* visitor = At(Attention::kAttnOutH)) {
      const int64_t width = sizes_.heads * sizes_.head_size;
      ParallelFor(sizes_.queries, RowGrain(width), [&](int64_t begin, int64_t end) {
        visitor->Visit(context_.out[0].F32().subspan(static_cast<size_t>(begin * width),
                                                     static_cast<size_t>((end - begin) * width)),
                       begin * width);
      });
    }
  }

 private:
  PointVisitor* At(Attention::At point) const {
    return static_cast<size_t>(point) < context_.points.size() ? context_.points[point] : nullptr;
  }
  const QParams* GridAt(Attention::At point) const {
    return static_cast<size_t>(point) < context_.grids.size() ? context_.grids[point] : nullptr;
  }

  int64_t RowsOfKvHead() const { return sizes_.heads / sizes_.kv_heads * sizes_.queries; }

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
    const float* all_k = k_.Whole<struct WholeKeys>();
    const float* all_v = all_v_ = v_.Whole<struct WholeValues>();
    const int64_t k_converted = scores_.Converts() ? kv_heads * k_elements : 0;
    const int64_t v_converted = out_.Converts() ? kv_heads * v_elements : 0;
    hwy::AlignedFreeUniquePtr<float[]> converted;
    if (k_converted + v_converted > 0)
      converted = Aligned<float>(k_converted + v_converted);
    if (scores_.Converts()) all_k = ConvertKeys(all_k, converted.get());
    if (out_.Converts()) all_v = ConvertValues(all_v, converted.get() + k_converted);
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
  const float* ConvertKeys(const float* k, float* to) {
    const int64_t width = sizes_.head_size;
    ParallelFor(sizes_.kv_heads * sizes_.keys, RowGrain(width), [&](int64_t begin, int64_t end) {
      for (int64_t key = begin; key < end; ++key) {
        const double sum = scores_.RightAlongRow(k + key * width, to + key * scores_.Depth());
        if (scores_.Counts())
          score_columns_.offset[static_cast<size_t>(key)] =
              -scores_.LeftZeroPoint() * (sum - static_cast<double>(width) * scores_.RightZeroPoint());
      }
    });
    return to;
  }

  // v [KV,T,h] to v [KV,Depth(T),h].
  const float* ConvertValues(const float* v, float* to) {
    for (int64_t kv_head = 0; kv_head < sizes_.kv_heads; ++kv_head)
      out_.RightAcrossRows(v + kv_head * sizes_.keys * sizes_.head_size, sizes_.head_size,
                           to + kv_head * out_.Depth() * sizes_.head_size, value_sums_.data() + kv_head * sizes_.keys);
    return to;
  }

  void Visit(Attention::At point, const RowKeys& row, float* scores, int64_t first) const {
    PointVisitor* visitor = At(point);
    if (visitor == nullptr || !(row.visited || context_.points_write)) return;
    for (const KeyRun& run : row.Runs())
      visitor->Visit({scores + run.begin, static_cast<size_t>(run.end - run.begin)}, first + run.begin);
  }

  // Scores of one row in [low, high) to probabilities; what the row does not keep becomes exactly 0.
  void SoftmaxRow(const RowKeys& row, const float* mask, float* scores, int64_t first, KeyRun range) const {
    Visit(Attention::kLogitsRaw, row, scores, first);
    if (scale_ != 1.0f)
      for (const KeyRun& run : row.Runs())
        for (int64_t key = run.begin; key < run.end; ++key) scores[key] *= scale_;
    Visit(Attention::kLogits, row, scores, first);
    if (row.masks)
      for (const KeyRun& run : row.Runs())
        simd::Binary(simd::BinaryOp::kAdd, scores + run.begin, mask + run.begin, run.end - run.begin,
                     scores + run.begin);
    Visit(Attention::kMaskAdd, row, scores, first);
    const KeyRun kept{row.Begin() / simd::kSoftmaxLanes * simd::kSoftmaxLanes, row.End()};
    int64_t masked = kept.begin;
    for (const KeyRun& run : row.Runs()) {
      std::fill(scores + masked, scores + run.begin, -std::numeric_limits<float>::infinity());
      masked = run.end;
    }
    simd::SoftmaxRow(scores + kept.begin, kept.end - kept.begin);
    std::fill(scores + range.begin, scores + kept.begin, 0.0f);
    std::fill(scores + kept.end, scores + range.end, 0.0f);
    Visit(Attention::kSoftmax, row, scores, first);
  }

  // Rows of all heads count on, the queries of one behind those of another.
  void RunBlock(int64_t first_row, int64_t rows, float* scratch) const {
    const auto& [heads, kv_heads, queries, keys, head_size] = sizes_;
    const auto keys_of = [&](int64_t row) -> const RowKeys& { return row_keys_[(first_row + row) % queries]; };
    KeyRun range{keys, 0};
    for (int64_t row = 0; row < rows; ++row) {
      range.begin = std::min(range.begin, keys_of(row).Begin());
      range.end = std::max(range.end, keys_of(row).End());
    }
    range.begin = range.begin / simd::kSoftmaxLanes * simd::kSoftmaxLanes;

    // Copied, so that rows a power of two apart do not evict each other.
    const int64_t q_stride = head_size + 16;
    float* scores = scratch;                         // [rows, score_stride_]
    float* q = scores + kBlockRows * score_stride_;  // [rows, q_stride]
    float* out = q + kBlockRows * q_stride;          // [rows, head_size]
    float* units = out + kBlockRows * head_size;     // [rows, score_stride_]: the probabilities, if converted
    const int64_t kv_head = sizes_.KvHead(first_row / queries), columns = gemm::PanelColumns();
    const float* q_from = context_.in[0].F32().data() + first_row * head_size;
    std::array<double, kBlockRows> sums;
    for (int64_t row = 0; row < rows; ++row)
      sums[row] = scores_.Left(q_from + row * head_size, 0, head_size, q + row * q_stride);
    if (few_)
      k_.AddScores(q, q_stride, rows, kv_head, range.begin, range.end, scores, score_stride_);
    else
      scores_.Multiply(q, q_stride, rows, KeyPanels(kv_head),
                       {range.begin / columns, (range.end + columns - 1) / columns, 0, scores_.Depth()}, scores,
                       score_stride_);
    if (scores_.Counts())
      for (int64_t row = 0; row < rows; ++row)
        Finish(score_columns_.From(score_columns_.offset.data() + kv_head * keys + range.begin, range.begin), sums[row],
               range.end - range.begin, scores + row * score_stride_ + range.begin);
    const float* mask = context_.in[3].F32().data();
    for (int64_t row = 0; row < rows; ++row)
      SoftmaxRow(keys_of(row), mask + (first_row + row) % queries * keys, scores + row * score_stride_,
                 (first_row + row) * keys, range);
    if (out_.Converts())
      for (int64_t row = 0; row < rows; ++row)
        sums[row] = out_.Left(scores + row * score_stride_, range.begin, range.end, units + row * score_stride_);
    if (few_)
      v_.AddWeighted(scores, score_stride_, rows, kv_head, range.begin, range.end, out);
    else
      out_.Multiply(out_.Converts() ? units : scores, score_stride_, rows, ValuePanels(kv_head),
                    {0, gemm::PanelCount(head_size), out_.Depth(range.begin), out_.Depth(range.end)}, out, head_size);
    if (out_.Counts()) FinishOut(kv_head, range, rows, sums, out);
    if (PointVisitor* visitor = At(Attention::kAttnOut))
      visitor->Visit({out, static_cast<size_t>(rows * head_size)}, first_row * head_size);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t head = (first_row + row) / queries, query = (first_row + row) % queries;
      CopyShort(out + row * head_size, head_size, context_.out[0].F32().data() + (query * heads + head) * head_size);
    }
    // Last: the probabilities as a result of their own reach no product.
    for (int64_t row = 0; row < rows; ++row)
      Visit(Attention::kAttnWeights, keys_of(row), scores + row * score_stride_, (first_row + row) * keys);
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
    const float* const v = all_v_ + kv_head * sizes_.keys * head_size;
    for (int64_t column = 0; column < head_size; ++column) {
      double sum = 0;  // of v / scale
      for (int64_t key = range.begin; key < range.end; ++key)
        sum += std::rint(static_cast<double>(v[key * head_size + column]) / v_.Grid()->scale[0]);
      offset[static_cast<size_t>(column)] = -out_.LeftZeroPoint() * sum;
    }
  }

  const EvalContext& context_;
  AttentionRows k_, v_;
  AttentionSizes sizes_;
  CodeProduct scores_, out_;
  bool few_;
  int64_t score_stride_;
  float scale_ = 1.0f;  // on its grid
  int64_t k_floats_, v_floats_;
  float* packed_;
  const float* all_v_ = nullptr;  // [KV,T,h], of packed ones
  std::vector<RowKeys> row_keys_;
  CodeColumns score_columns_, out_columns_;
  std::vector<double> value_sums_;  // of v's rows, NaN where one has a NaN
};

}  // namespace

void Attention::Eval(const EvalContext& context) const { AttentionRun(*this, context).Run(); }

}  // namespace circlet
