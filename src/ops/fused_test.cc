// Fused kernels against the primitive graphs that they stand for: the same bits, in every reading, and the same values
// shown to the points.

#include <gmock/gmock.h>

#include <map>
#include <mutex>

#include "circlet/base/threads.h"
#include "circlet/exec/executor.h"
#include "circlet/graph/builder.h"
#include "circlet/ops/ops.h"
#include "ops/codes.h"
#include "ops/gemm.h"
#include "ops/simd.h"
#include "ops/tally.h"
#include "ops/test_values.h"

namespace circlet {
namespace {

using ::testing::ElementsAre;

// Computes an expansion while it is being built, and keeps its listing.
class EagerSink final : public GraphSink {
 public:
  // Called at each point with the whole tensor, which it may change.
  using AtPoint = std::function<void(const Point&, Tensor&)>;
  explicit EagerSink(AtPoint at_point = nullptr, Compute compute = Compute::kFloat32)
      : at_point_(std::move(at_point)), compute_(compute) {}

  ValueId Given(Tensor tensor) {
    tensors_.push_back(std::move(tensor));
    return static_cast<ValueId>(tensors_.size()) - 1;
  }
  std::vector<ValueId> Add(Op op, std::vector<ValueId> in) override {
    std::vector<Tensor> operands, results;
    std::vector<TensorType> types;
    for (const ValueId id : in) operands.push_back(tensors_[static_cast<size_t>(id)]);
    for (const Tensor& tensor : operands) types.push_back(tensor.Type());
    std::vector<ValueId> ids;
    for (const TensorType& type : op.Infer(types)) results.emplace_back(type);
    op.Eval({.in = operands, .out = results, .compute = compute_});
    std::string line(op.Name());
    for (Tensor& tensor : results) {
      line += " " + tensor.GetShape().ToString();
      ids.push_back(Given(std::move(tensor)));
    }
    listing.push_back(line);
    return ids;
  }
  ValueId AddPoint(const Point& point, ValueId value) override {
    Tensor tensor = tensors_[static_cast<size_t>(value)].Clone();
    if (at_point_) at_point_(point, tensor);
    listing.push_back(fmt::format("@{}", point.name));
    return Given(std::move(tensor));
  }
  ValueId AddConstant(Tensor tensor) override { return Given(std::move(tensor)); }
  const TensorType& TypeOf(ValueId value) const override { return tensors_[static_cast<size_t>(value)].Type(); }
  const Tensor& At(ValueId value) const { return tensors_[static_cast<size_t>(value)]; }

  std::vector<std::string> listing;

 private:
  AtPoint at_point_;
  Compute compute_;
  std::vector<Tensor> tensors_;
};

// What a visitor saw: each value once, at its flat index.
class Recorder final : public PointVisitor {
 public:
  void Visit(std::span<float> values, int64_t first) override {
    const std::lock_guard lock(mutex_);
    for (size_t i = 0; i < values.size(); ++i)
      EXPECT_TRUE(seen.emplace(first + static_cast<int64_t>(i), values[i]).second) << "twice at " << first + i;
  }
  std::map<int64_t, float> seen;

 private:
  std::mutex mutex_;
};

class Snapper final : public PointVisitor {
 public:
  explicit Snapper(simd::Grid grid) : grid_(grid) {}
  void Visit(std::span<float> values, int64_t) override {
    simd::Snap(values.data(), static_cast<int64_t>(values.size()), grid_);
  }

 private:
  simd::Grid grid_;
};

std::vector<Point> Named(const std::vector<std::string>& names) {
  std::vector<Point> points;
  for (const std::string& name : names) points.push_back({.name = name});
  return points;
}

std::vector<float> Values(const Tensor& tensor) { return {tensor.F32().begin(), tensor.F32().end()}; }

template <typename T>
std::vector<float> Fused(const T& op, const std::vector<Tensor>& in, std::vector<PointVisitor*> visitors = {},
                         bool write = false, Compute compute = Compute::kFloat32) {
  std::vector<TensorType> types;
  for (const Tensor& tensor : in) types.push_back(tensor.Type());
  const std::vector<Tensor> out{Tensor(op.Infer(types)[0])};
  op.Eval({.in = in, .out = out, .points = visitors, .points_write = write, .compute = compute});
  return Values(out[0]);
}

template <typename T>
std::vector<float> Expansion(const T& op, const std::vector<Tensor>& in, const std::vector<Point>& points,
                             EagerSink& sink) {
  std::vector<ValueId> ids;
  for (const Tensor& tensor : in) ids.push_back(sink.Given(tensor));
  const std::vector<ValueId> out = op.Expand(sink, ids, points);
  EXPECT_EQ(out.size(), 1u);
  return Values(sink.At(out[0]));
}

// Both ways with every point snapping to its grid.
template <typename T>
void ExpectSameWhenSnapped(const T& op, const std::vector<Tensor>& in, const std::vector<Point>& points,
                           const std::map<std::string, simd::Grid>& grids) {
  std::vector<std::unique_ptr<Snapper>> snappers;
  std::vector<PointVisitor*> visitors;
  for (const Point& point : points) {
    snappers.push_back(point.name.empty() ? nullptr : std::make_unique<Snapper>(grids.at(point.name)));
    visitors.push_back(snappers.back().get());
  }
  EagerSink sink([&](const Point& point, Tensor& tensor) { Snapper(grids.at(point.name)).Visit(tensor.F32(), 0); });
  const std::vector<float> expected = Expansion(op, in, points, sink);
  EXPECT_TRUE(SameBits(Fused(op, in, visitors, true), expected));
}

// ---- Attention ----------------------------------------------------------------------------------------------------

enum class Mask { kOpen, kCausal, kSliding, kPaddedKeys, kPaddedQueries, kHoles };
const std::vector<Mask> kMasks{Mask::kOpen,       Mask::kCausal,        Mask::kSliding,
                               Mask::kPaddedKeys, Mask::kPaddedQueries, Mask::kHoles};

struct Case {
  int64_t heads, kv_heads, queries, keys, head_size;
  bool mask_of_rank_3 = false;

  std::string Text(Mask mask) const {
    return fmt::format("{}:{} heads, {} queries, {} keys, width {}, mask {}", heads, kv_heads, queries, keys, head_size,
                       static_cast<int>(mask));
  }
};
const std::vector<Case> kCases{
    {8, 1, 70, 70, 16}, {4, 2, 24, 24, 24},      {3, 3, 97, 131, 8},
    {2, 1, 5, 640, 40}, {4, 1, 1, 24, 32, true}, {2, 2, 1, 1100, 16},
};

// Queries are the last of the keys.
bool Keeps(Mask mask, const Case& c, int64_t query, int64_t key) {
  const int64_t position = c.keys - c.queries + query;
  switch (mask) {
    case Mask::kOpen:
      return true;
    case Mask::kCausal:
      return key <= position;
    case Mask::kSliding:
      return key <= position && key > position - 19;
    case Mask::kPaddedKeys:
      return key <= position && (key < c.keys * 2 / 3 || key == position);
    case Mask::kPaddedQueries:
      return query < c.queries / 2 && key < c.keys / 2;
    case Mask::kHoles:
      return key == position || ((query * 131 + key) * 2654435761u >> 9) % 3 != 0;
  }
  return true;
}

std::vector<Tensor> Operands(const Case& c, Mask mask, uint32_t seed = 1) {
  std::vector<Tensor> in{NormalTensor({1, c.heads, c.queries, c.head_size}, seed),
                         NormalTensor({1, c.kv_heads, c.keys, c.head_size}, seed + 1),
                         NormalTensor({1, c.kv_heads, c.keys, c.head_size}, seed + 2),
                         Tensor(TensorType{DType::kF32, {1, 1, c.queries, c.keys}})};
  if (c.mask_of_rank_3) in[3] = in[3].Reshaped({1, c.queries, c.keys});
  for (int64_t query = 0; query < c.queries; ++query)
    for (int64_t key = 0; key < c.keys; ++key)
      in[3].F32()[static_cast<size_t>(query * c.keys + key)] = Keeps(mask, c, query, key) ? 0.0f : -120.0f;
  return in;
}

const std::vector<std::string> kAttentionPoints{"logits_raw", "logits",       "mask_add",  "softmax",
                                                "attn_out",   "attn_weights", "attn_out_h"};

TEST(AttentionTest, EqualsItsExpansionInFloat) {
  for (const Case& c : kCases)
    for (const Mask mask : kMasks)
      for (const bool skip : {true, false})
        for (const bool transpose : {true, false}) {
          SCOPED_TRACE(c.Text(mask));
          const Attention op{.skip_masked = skip, .explicit_transpose = transpose};
          const std::vector<Tensor> in = Operands(c, mask);
          EagerSink sink;
          const std::vector<float> expected = Expansion(op, in, {}, sink);
          EXPECT_TRUE(SameBits(Fused(op, in), expected)) << "skip " << skip;
        }
}

TEST(AttentionTest, EqualsItsExpansionInBf16) {
  if (!Bf16Supported()) GTEST_SKIP() << "the kernel is made of AVX-512 BF16 instructions; without them the executor refuses bf16";
  std::vector<Case> cases = kCases;
  cases.push_back({2, 1, 20, 33, 7});  // odd: a pair is half empty
  for (const Case& c : cases)
    for (const Mask mask : kMasks)
      for (const bool batched : {true, false}) {
        if (batched && c.mask_of_rank_3) continue;
        SCOPED_TRACE(c.Text(mask));
        const Attention op{.skip_masked = !batched,
                           .explicit_transpose = batched,
                           .form = batched ? Attention::Form::kBatched : Attention::Form::kByHead};
        const std::vector<Tensor> in = Operands(c, mask);
        EagerSink sink(nullptr, Compute::kBf16);
        const std::vector<float> fused = Fused(op, in, {}, false, Compute::kBf16);
        EXPECT_TRUE(SameBits(fused, Expansion(op, in, {}, sink))) << "batched " << batched;
        EXPECT_FALSE(SameBits(fused, Fused(op, in))) << "it is float32";
      }
}

// Grids as calibration makes them: mask_add reaches 40 below the smallest kept logit and no further.
std::map<std::string, simd::Grid> AttentionGrids(const Case& c, bool wide) {
  const float logit = 7.0f * std::sqrt(static_cast<float>(c.head_size));
  if (wide) {
    const auto grid = [](float range) {
      return simd::Grid{range / 32767, 0, -32768, 32767, Rounding::kHalfEvenReciprocal};
    };
    return {{"logits_raw", grid(logit)}, {"logits", grid(logit * 0.9f)}, {"mask_add", grid(logit + 40)},
            {"softmax", grid(1)},        {"attn_out", grid(3)},          {"attn_weights", grid(1)},
            {"attn_out_h", grid(2.5f)}};
  }
  const auto grid = [](float low, float high) {
    const float scale = (high - low) / 255;
    return simd::Grid{scale, static_cast<int32_t>(std::lround(-low / scale)), 0, 255, Rounding::kHalfAwayDivide};
  };
  return {{"logits_raw", grid(-logit, logit)},
          {"logits", grid(-logit, logit)},
          {"mask_add", grid(-logit - 40, logit)},
          {"softmax", grid(0, 1)},
          {"attn_out", grid(-3, 3)},
          {"attn_weights", grid(0, 1)},
          {"attn_out_h", grid(-3, 2)}};
}

TEST(AttentionTest, EqualsItsExpansionWhenPointsSnap) {
  for (const Case& c : kCases)
    for (const Mask mask : kMasks)
      for (const bool wide : {true, false})
        for (const bool skip : {true, false}) {
          SCOPED_TRACE(c.Text(mask) + (wide ? " int16" : " uint8") + (skip ? " skip" : ""));
          ExpectSameWhenSnapped(Attention{.skip_masked = skip}, Operands(c, mask, 11), Named(kAttentionPoints),
                                AttentionGrids(c, wide));
        }
}

// Puts values on grids of points by name, and names them.
class Grids final : public PointReading {
 public:
  explicit Grids(std::map<std::string, QParams> grids) : grids_(std::move(grids)) {
    for (const auto& [name, grid] : grids_) {
      const CodeRange codes = CodesOf(grid.dtype);
      snappers_.try_emplace(name, simd::Grid{grid.scale[0], grid.zero_point[0], static_cast<int32_t>(codes.min),
                                             static_cast<int32_t>(codes.max), Rounding::kHalfAwayDivide});
    }
  }
  PointVisitor* At(const Point& point, const TensorType&) override { return &snappers_.at(point.name); }
  bool Writes() const override { return true; }
  const QParams* GridAt(const Point& point) override { return &grids_.at(point.name); }

 private:
  std::map<std::string, QParams> grids_;
  std::map<std::string, Snapper> snappers_;
};

// Where q, k and v, or the probabilities and v, lie on grids of 8 bits, both ways sum codes: in other kernels, and the
// expansion over all keys.
TEST(AttentionTest, EqualsItsExpansionInIntegers) {
  std::vector<Case> cases = kCases;
  cases.push_back({2, 1, 50, 33, 7});  // odd: quads are not full
  const auto grid = [](DType dtype, float scale, int32_t zero_point) {
    return QParams{.dtype = dtype, .scale = {scale}, .zero_point = {zero_point}};
  };
  const QParams wide = grid(DType::kI16, 1e-4f, 0);
  for (const Case& c : cases)
    for (const Mask mask : kMasks)
      for (const bool batched : {false, true})
        for (const auto& [softmax, v] : {std::pair{grid(DType::kU8, 1 / 255.0f, 0), grid(DType::kU8, 0.025f, 120)},
                                         {grid(DType::kI8, 1 / 255.0f, -128), grid(DType::kI8, 0.025f, 3)},
                                         {grid(DType::kU8, 1 / 250.0f, 5), grid(DType::kI4, 0.4f, 1)},
                                         {wide, grid(DType::kU8, 0.025f, 120)}}) {
          if (batched && c.mask_of_rank_3) continue;
          SCOPED_TRACE(c.Text(mask) + (batched ? " batched " : " ") + std::string(Name(softmax.dtype)));
          const std::vector<Tensor> in = Operands(c, mask, 11);
          Graph graph;
          const Builder b(graph);
          const auto input = [&](const char* name, const Tensor& tensor) {
            return b.Point(name, graph.AddInput(name, tensor.Type()));
          };
          const ValueId q = input("q", in[0]), k = input("k", in[1]), values = input("v", in[2]);
          const Attention op{.skip_masked = !batched,
                             .explicit_transpose = batched,
                             .form = batched ? Attention::Form::kBatched : Attention::Form::kByHead};
          graph.AddOutput("y", graph.Add(op, {q, k, values, graph.AddInput("mask", in[3].Type())},
                                         Named({"logits_raw", "logits", "mask_add", "softmax", "attn_out"}))
                                   .front());
          const float logit = 0.002f * std::sqrt(static_cast<float>(c.head_size));
          Grids grids({{"q", grid(DType::kU8, 0.03f, 100)},
                       {"k", grid(DType::kI8, 0.025f, 7)},
                       {"v", v},
                       {"logits_raw", grid(DType::kI16, logit, 0)},
                       {"logits", grid(DType::kI16, logit, 0)},
                       {"mask_add", grid(DType::kI16, 0.01f, 0)},
                       {"softmax", softmax},
                       {"attn_out", grid(DType::kI16, 1e-5f, 0)}});
          const std::map<std::string, Tensor> inputs{{"q", in[0]}, {"k", in[1]}, {"v", in[2]}, {"mask", in[3]}};
          gemm::Tally tally;
          const auto run = [&](const Graph& of) {
            const gemm::TallyScope scope(tally);
            return Executor(of, &grids).Run(inputs, nullptr).at("y");
          };
          EXPECT_TRUE(SameBits(run(graph).F32(), run(Expanded(graph)).F32()));
          int64_t counted = 0, others = 0;
          for (const auto& [shape, count] : tally.Counts())
            (shape.operand == gemm::Operand::kBytes ? counted : others) += count;
          EXPECT_EQ(counted, 2 * c.heads * (softmax == wide ? 1 : 2));
          EXPECT_EQ(others, 2 * c.heads * (softmax == wide ? 1 : 0));
        }
}

// The grid of `scale` cannot hold 1, so that a factor which is not applied shows.
TEST(AttentionTest, EqualsItsBatchedExpansionWithAFactorOnTheLogits) {
  std::vector<std::string> names = kAttentionPoints;
  names.push_back("scale");
  for (const Case& c : kCases) {
    if (c.mask_of_rank_3) continue;
    for (const Mask mask : kMasks)
      for (const bool wide : {true, false}) {
        SCOPED_TRACE(c.Text(mask) + (wide ? " int16" : " uint8"));
        const Attention op{.skip_masked = false, .explicit_transpose = true, .form = Attention::Form::kBatched};
        const std::vector<Tensor> in = Operands(c, mask, 11);
        EagerSink sink;
        EXPECT_TRUE(SameBits(Fused(op, in), Expansion(op, in, {}, sink)));
        std::map<std::string, simd::Grid> grids = AttentionGrids(c, wide);
        grids["scale"] = simd::Grid{0.3f, 0, -8, 7, Rounding::kHalfEvenReciprocal};
        ExpectSameWhenSnapped(op, in, Named(names), grids);
      }
  }
}

TEST(AttentionTest, EqualsItsExpansionWithSomePointsAbsent) {
  const Case c = kCases[0];
  for (size_t absent = 0; absent < kAttentionPoints.size(); ++absent) {
    SCOPED_TRACE(kAttentionPoints[absent]);
    std::vector<Point> points = Named(kAttentionPoints);
    points[absent].name.clear();
    ExpectSameWhenSnapped(Attention{}, Operands(c, Mask::kCausal), points, AttentionGrids(c, true));
  }
}

TEST(AttentionTest, EqualsItsExpansionOnEveryTarget) {
  OnEveryTarget([] {
    const Case c{4, 2, 53, 53, 24};
    const std::vector<Tensor> in = Operands(c, Mask::kCausal);
    EagerSink sink;
    const std::vector<float> expected = Expansion(Attention{}, in, {}, sink);
    EXPECT_TRUE(SameBits(Fused(Attention{}, in), expected));
  });
}

// Observing visitors see what the expansion computes: each kept key once, at its place in [H,S,T]; masked keys never.
TEST(AttentionTest, ObserversSeeEachKeptValueOnce) {
  for (const Case& c : kCases)
    for (const Mask mask : kMasks)
      for (const bool skip : {true, false}) {
        SCOPED_TRACE(c.Text(mask));
        const Attention op{.skip_masked = skip};
        const std::vector<Tensor> in = Operands(c, mask);
        std::vector<Recorder> recorders(kAttentionPoints.size());
        std::vector<PointVisitor*> visitors;
        for (Recorder& recorder : recorders) visitors.push_back(&recorder);
        const std::vector<float> out = Fused(op, in, visitors);

        std::map<std::string, std::vector<float>> computed;  // heads one behind the other
        EagerSink sink([&](const Point& point, Tensor& tensor) {
          for (const float value : tensor.F32()) computed[point.name].push_back(value);
        });
        EXPECT_TRUE(SameBits(out, Expansion(op, in, Named(kAttentionPoints), sink)));
        computed["attn_weights"] = computed["softmax"];
        for (size_t point = 0; point < kAttentionPoints.size(); ++point) {
          const bool by_key = kAttentionPoints[point].substr(0, 8) != "attn_out";
          std::map<int64_t, float> expected;
          const std::vector<float>& values = computed[kAttentionPoints[point]];
          for (size_t i = 0; i < values.size(); ++i) {
            const int64_t flat = static_cast<int64_t>(i);
            if (!by_key || !skip || Keeps(mask, c, flat / c.keys % c.queries, flat % c.keys))
              expected[flat] = values[i];
          }
          EXPECT_EQ(recorders[point].seen, expected) << kAttentionPoints[point];
        }
      }
}

TEST(AttentionTest, ThreadsChangeNoBit) {
  const int before = Threads();
  const Case c{8, 2, 150, 150, 32};
  const std::vector<Tensor> in = Operands(c, Mask::kSliding);
  SetThreads(1);
  const std::vector<float> alone = Fused(Attention{}, in);
  for (const int threads : {2, 4}) {
    SetThreads(threads);
    EXPECT_TRUE(SameBits(Fused(Attention{}, in), alone)) << threads;
  }
  SetThreads(before);
}

// Codes of a [1,KV,T,h] on a grid, and what they stand for in its place.
Tensor OnGrid(Tensor& values, const QParams& grid, uint32_t seed) {
  const Tensor codes(TensorType{grid.dtype, values.GetShape()});
  std::mt19937 random(seed);
  for (int64_t i = 0; i < codes.Bytes(); ++i) codes.Raw()[i] = static_cast<std::byte>(random());
  values = Tensor(values.Type());
  Dequantize(codes, grid, 0, values.F32());
  return codes.WithGrid(&grid);
}

// Few query rows and many; parts that end within a vector; what is given widened, and what as codes.
TEST(AttentionTest, TakesKeysAndValuesInTwoPartsAndAsCodes) {
  std::vector<Case> cases = kCases;
  cases.insert(cases.end(), {{8, 1, 1, 512, 64, true}, {4, 2, 2, 37, 24}, {6, 2, 1, 530, 7}});
  const QParams wide{.dtype = DType::kI16, .scale = {1e-4f}, .zero_point = {0}},
      bytes{.dtype = DType::kU8, .scale = {0.02f}, .zero_point = {120}};
  for (const Case& c : cases)
    for (const Mask mask : {Mask::kOpen, Mask::kSliding, Mask::kHoles})
      for (const QParams* grid : {&wide, &bytes})
        for (const bool skip : {true, false}) {
          SCOPED_TRACE(c.Text(mask) + (skip ? " skip " : " ") + std::string(Name(grid->dtype)));
          const Attention op{.skip_masked = skip};
          std::vector<Tensor> in = Operands(c, mask, 5), codes = in;
          for (const size_t i : {1, 2}) codes[i] = OnGrid(in[i], *grid, static_cast<uint32_t>(i));
          EagerSink sink;
          const std::vector<float> expected = Expansion(op, in, {}, sink);
          EXPECT_TRUE(SameBits(Fused(op, in), expected));
          const auto eval = [&](const std::vector<Tensor>& operands) {
            const std::vector<Tensor> out{Tensor(TensorType{DType::kF32, {1, c.queries, c.heads * c.head_size}})};
            op.Eval({.in = operands, .out = out});
            return Values(out[0]);
          };
          EXPECT_TRUE(SameBits(eval(codes), expected));
          for (const int64_t past : {c.keys - 1, c.keys / 2}) {
            const auto part = [&](const Tensor& whole, int64_t begin, int64_t end) {
              return whole.Slice(begin, end, 2).WithGrid(whole.Grid());
            };
            for (const bool of_codes : {true, false}) {
              const std::vector<Tensor>& ahead = of_codes ? codes : in;
              EXPECT_TRUE(SameBits(eval({in[0], part(in[1], past, c.keys), part(in[2], past, c.keys), in[3],
                                         part(ahead[1], 0, past), part(ahead[2], 0, past)}),
                                   expected))
                  << past << " of the past" << (of_codes ? ", codes" : "");
            }
          }
        }
}

// The form of the reference's files (format.md 7).
TEST(AttentionTest, ExpandsInTheOrderOfTheReferencesFiles) {
  EagerSink prefill;
  Expansion(Attention{.explicit_transpose = true}, Operands({4, 2, 5, 7, 6}, Mask::kOpen), {}, prefill);
  const std::vector<std::string> head{"slice [1,1,5,6]",      "reshape [1,5,6]", "transpose [1,6,7]",
                                      "batch_matmul [1,5,7]", "add [1,5,7]",     "softmax [1,5,7]",
                                      "batch_matmul [1,5,6]"};
  const std::vector<std::string> keys{"slice [1,1,7,6]", "reshape [1,7,6]", "slice [1,1,7,6]", "reshape [1,7,6]"};
  std::vector<std::string> expected{"reshape [1,5,7]"};
  for (const auto* part : {&keys, &head, &head, &keys, &head, &head})
    expected.insert(expected.end(), part->begin(), part->end());
  expected.push_back("concat [1,5,24]");
  EXPECT_EQ(prefill.listing, expected);

  EagerSink decode;
  Expansion(Attention{}, Operands({2, 1, 1, 7, 6, true}, Mask::kOpen), Named(kAttentionPoints), decode);
  EXPECT_THAT(decode.listing,
              ElementsAre("reshape [1,7,6]", "reshape [1,7,6]",  //
                          "slice [1,1,1,6]", "reshape [1,1,6]", "batch_matmul [1,1,7]", "@logits_raw", "@logits",
                          "add [1,1,7]", "@mask_add", "softmax [1,1,7]", "@softmax", "batch_matmul [1,1,6]",
                          "@attn_out", "slice [1,1,1,6]", "reshape [1,1,6]", "batch_matmul [1,1,7]", "@logits_raw",
                          "@logits", "add [1,1,7]", "@mask_add", "softmax [1,1,7]", "@softmax", "batch_matmul [1,1,6]",
                          "@attn_out", "concat [1,1,12]", "@attn_out_h"));
}

// ---- Rope ---------------------------------------------------------------------------------------------------------

const std::vector<std::string> kRopePoints{"x1", "x2", "neg", "cat", "cos", "sin", "rot"};

std::vector<Tensor> RopeOperands(int64_t positions, int64_t heads, int64_t head_size) {
  return {NormalTensor({1, positions, heads, head_size}, 21), NormalTensor({1, positions, head_size}, 22),
          NormalTensor({1, positions, head_size}, 23)};
}

std::vector<Point> RopePointsOf(const Rope& op) {
  std::vector<Point> points = Named(kRopePoints);
  if (op.negated_sin) points[2].name.clear();
  return points;
}

// In float, and on grids where sums are of integers; slices that end within the last one.
TEST(GatedLinearTest, EqualsItsExpansion) {
  const QParams grid{.dtype = DType::kI16, .scale = {1e-4f}, .zero_point = {0}},
      packed{.dtype = DType::kU4, .scale = {0.1f}, .zero_point = {7}};
  for (const int64_t rows : {1, 3, 600})
    for (const bool of_codes : {false, true}) {
      const int64_t n = 2300, k = 34;
      Graph graph;
      const Builder b(graph);
      const ValueId x = b.Point("x", b.Input("x", {1, rows, k})), gate = b.Input("gate", {1, rows, n});
      std::vector<Builder::NamedPoint> points{{"product"}};
      b.Output("y", b.AddFused(GatedLinear{}, {gate, x, b.Weight("w", {n, k}, WeightKind::kLinear)}, points));
      Tensor w = NormalTensor({n, k}, 3);
      if (of_codes) {
        w = Tensor(TensorType{DType::kU4, {n, k}}).WithGrid(&packed);
        std::mt19937 random(4);
        for (int64_t i = 0; i < w.Bytes(); ++i) w.Raw()[i] = static_cast<std::byte>(random());
      }
      Grids grids({{"x", grid}, {"product", {.dtype = DType::kI16, .scale = {1e-3f}, .zero_point = {0}}}});
      const std::map<std::string, Tensor> inputs{{"x", NormalTensor({1, rows, k}, 1)},
                                                 {"gate", NormalTensor({1, rows, n}, 2)}};
      Executor whole(Expanded(graph), &grids), sliced(graph, &grids);
      const auto run = [&](Executor& executor) {
        return executor.Run(inputs, [&](const std::string&) { return w; }).at("y");
      };
      EXPECT_TRUE(SameBits(run(sliced).F32(), run(whole).F32())) << rows << " rows" << (of_codes ? ", codes" : "");
      if (rows == 600) EXPECT_LT(sliced.PlannedBytes(), whole.PlannedBytes() / 3 * 2);
    }
}

TEST(RopeTest, EqualsItsExpansion) {
  for (const auto& [positions, heads, head_size] : {std::tuple{1, 4, 32}, {70, 2, 12}, {300, 1, 64}, {24, 8, 256}})
    for (const Rope& op :
         {Rope{}, Rope{.negated_sin = false}, Rope{.parts = 2, .negated_sin = false}, Rope{.parts = 2}}) {
      SCOPED_TRACE(
          fmt::format("[1,{},{},{}], {} parts, negated {}", positions, heads, head_size, op.parts, op.negated_sin));
      const std::vector<Tensor> in = RopeOperands(positions, heads, head_size);
      EagerSink sink;
      const std::vector<float> expected = Expansion(op, in, {}, sink);
      EXPECT_TRUE(SameBits(Fused(op, in), expected));

      std::map<std::string, simd::Grid> grids;
      float range = 1.5f;
      for (const std::string& name : kRopePoints)
        grids[name] = {(range += 0.2f) / 127, 128, 0, 255, Rounding::kHalfEvenReciprocal};
      ExpectSameWhenSnapped(op, in, RopePointsOf(op), grids);
    }
}

TEST(RopeTest, ObserversSeeEveryValueAtItsPlace) {
  for (const Rope& op : {Rope{}, Rope{.negated_sin = false}}) {
    const std::vector<Tensor> in = RopeOperands(300, 3, 16);  // several blocks
    std::vector<Recorder> recorders(kRopePoints.size());
    std::vector<PointVisitor*> visitors;
    for (Recorder& recorder : recorders) visitors.push_back(&recorder);
    Fused(op, in, visitors);
    std::map<std::string, std::map<int64_t, float>> computed;
    EagerSink sink([&](const Point& point, Tensor& tensor) {
      for (int64_t i = 0; i < tensor.Elements(); ++i) computed[point.name][i] = tensor.F32()[static_cast<size_t>(i)];
    });
    Expansion(op, in, RopePointsOf(op), sink);
    for (size_t point = 0; point < kRopePoints.size(); ++point)
      EXPECT_EQ(recorders[point].seen, computed[kRopePoints[point]]) << kRopePoints[point];
  }
}

TEST(RopeTest, ExpandsInTheOrderOfTheReferencesFiles) {
  EagerSink text;
  Expansion(Rope{}, RopeOperands(3, 2, 8), Named({"x1", "x2", "", "cat", "cos", "sin", "rot"}), text);
  EXPECT_THAT(text.listing, ElementsAre("reshape [1,3,1,8]", "reshape [1,3,1,8]", "split [1,3,2,4] [1,3,2,4]", "@x1",
                                        "@x2", "concat [1,3,2,8]", "@cat", "mul [1,3,2,8]", "@cos", "mul [1,3,2,8]",
                                        "@sin", "add [1,3,2,8]", "@rot"));
  EagerSink vision;
  Expansion(Rope{.parts = 2, .negated_sin = false}, RopeOperands(3, 2, 8), {}, vision);
  EXPECT_THAT(vision.listing, ElementsAre("reshape [1,3,1,8]", "reshape [1,3,1,8]", "split [1,3,2,4] [1,3,2,4]",
                                          "split [1,3,1,4] [1,3,1,4]", "split [1,3,1,4] [1,3,1,4]",  //
                                          "split [1,3,2,2] [1,3,2,2]", "neg [1,3,2,2]", "concat [1,3,2,4]",
                                          "mul [1,3,2,4]", "mul [1,3,2,4]", "add [1,3,2,4]",  //
                                          "split [1,3,2,2] [1,3,2,2]", "neg [1,3,2,2]", "concat [1,3,2,4]",
                                          "mul [1,3,2,4]", "mul [1,3,2,4]", "add [1,3,2,4]", "concat [1,3,2,8]"));
}

}  // namespace
}  // namespace circlet
