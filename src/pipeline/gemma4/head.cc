#include "pipeline/gemma4/head.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>

#include "circlet/base/threads.h"
#include "circlet/model/gemma4/text.h"
#include "ops/simd.h"
#include "pipeline/exchange.h"

namespace circlet::gemma4 {
namespace {

// What is left of one position's logits once a slice of the vocabulary is gone.
struct Tail {
  float top = -std::numeric_limits<float>::infinity();  // largest logit so far
  int64_t choice = 0;                                   // its token
  double sum = 0;                                       // of exp(logit - top)
  float target = 0;                                     // logit of the next token
};
using Tails = std::vector<Tail>;

// Columns of the vocabulary that are summed at a time. Slices are whole blocks, and sums of a position grow from block
// to block, so that no figure depends on where the head is cut, and so on the memory limit.
constexpr int64_t kBlock = 512;

// Errors of one item by position.
using PositionErrors = std::vector<ErrorMetrics>;

ErrorMetrics Total(const PositionErrors& of_positions) {
  ErrorMetrics total;
  for (const ErrorMetrics& errors : of_positions) total.Merge(errors);
  return total;
}

// Adds logits [1,n,rows] of positions begin .. begin + n - 1, those that are no padding.
void AddErrors(const Item& item, int64_t begin, const Tensor& expected, const Tensor& found, PositionErrors& errors) {
  errors.resize(item.length);
  const int64_t count = found.GetShape()[1], rows = found.GetShape()[2];
  for (const auto& [first, last] : item.real) {
    const int64_t from = std::max(first, begin), to = std::min(last, begin + count);
    ParallelFor(to - from, std::max<int64_t>(1, (1 << 16) / rows), [&](int64_t a, int64_t b) {
      for (int64_t position = from + a; position < from + b; ++position)
        for (int64_t column = 0; column < rows; column += kBlock) {
          const int64_t at = (position - begin) * rows + column, width = std::min(kBlock, rows - column);
          errors[position].Add(expected.F32().subspan(at, width), found.F32().subspan(at, width));
        }
    });
  }
}

// Figures of one item, in a form that can be sent.
struct Figures {
  ErrorMetrics alone, accumulated;
  double float_nll = 0, quantized_nll = 0;
  bool float_exact = false, quantized_exact = false;
};

struct ScatterPoint {
  int64_t item = 0;
  float reference = 0, quantized = 0;
};

bool IsReal(const Item& item, int64_t position) {
  return std::ranges::any_of(item.real,
                             [&](const auto& run) { return run.first <= position && position < run.second; });
}

enum class Reading { kFloat, kObserve, kRound };

Graph LogitsGraph(const RunContext& context, int64_t length, int64_t rows) {
  Graph graph;
  BuildLogits(Builder(graph), context.config.text, length, rows, context.GetDialect());
  return graph;
}

bool Observes(const RunContext& context, const Item& item) {
  return item.kind == ItemKind::kCalibration && !context.calibration.Frozen();
}
bool Follows(const Item& item) { return item.kind == ItemKind::kWindow || item.kind == ItemKind::kCaption; }
bool ReadInFloat(const RunContext& context, const Item& item) {
  return Observes(context, item) || Follows(item) || item.kind == ItemKind::kControl;
}
bool ReadRoundedToo(const Item& item, ItemKind measured) { return item.kind == measured || Follows(item); }

class Head {
 public:
  Head(const RunContext& context, const StageContext& stage)
      : c_(context), s_(stage), stored_(context.weights.Stored(kHeadWeight)), vocab_(context.config.text.vocab_size) {
    slices_ = SlicesOf(context);
  }

  HeadResult Run() {
    figures_.resize(c_.items.size());
    alone_.resize(c_.items.size());
    accumulated_.resize(c_.items.size());
    scatter_.resize(c_.items.size());
    float_tails_.resize(c_.items.size());
    quantized_tails_.resize(c_.items.size());
    for (const Item& item : c_.items) {
      if (Follows(item)) float_tails_[item.id] = quantized_tails_[item.id] = Tails(item.length);
    }
    ReadFloat();
    ShareObservers(c_.calibration, s_.world);
    c_.calibration.Freeze(Build(1, vocab_), c_.Stored());
    ReadRounded();
    return Result();
  }

  // Calls `body` with each slice of the vocabulary: its first row, and its rows as stored.
  template <typename Body>
  void ForVocabulary(const Body& body) const {
    const int64_t row_bytes = stored_.Bytes() / vocab_;
    for (int64_t first = 0; first < vocab_; first += slices_.rows) {
      const int64_t rows = std::min(slices_.rows, vocab_ - first);
      body(first, Tensor({stored_.GetDType(), {rows, stored_.GetShape()[1]}}, stored_.Raw() + first * row_bytes,
                         std::make_shared<Tensor>(stored_)));
    }
  }

  // A weight in the form that products take, converted once for all lengths; codes stay codes.
  Tensor Operand(const Tensor& rows) const {
    if (rows.Grid() != nullptr) return rows;
    return s_.compute == Compute::kBf16 ? ToBF16(rows) : ToF32(rows);
  }
  Tensor Rounded(const Tensor& rows, int64_t first) const {
    return c_.calibration.RoundedRows(kHeadWeight, rows, first);
  }

  Graph Build(int64_t length, int64_t rows) const { return LogitsGraph(c_, length, rows); }

 private:
  // One thread's executors for one slice of the vocabulary.
  struct Worker {
    std::map<std::tuple<int64_t, Reading, Compute>, std::unique_ptr<ReadyGraph>> plans;
    ObserverMap observers;
  };
  ReadyGraph& PlanFor(Worker& worker, const Item& item, int64_t length, int64_t rows, Reading reading) const {
    const ExecutorOptions options = s_.ComputeOf(item);
    auto& plan = worker.plans[{length, reading, options.compute}];
    if (plan != nullptr) return *plan;
    std::unique_ptr<PointReading> points;
    if (reading == Reading::kObserve) points = std::make_unique<ObserveReading>(c_.calibration, worker.observers);
    if (reading == Reading::kRound) points = std::make_unique<FakeQuantReading>(c_.calibration);
    plan = std::make_unique<ReadyGraph>(Build(length, rows), std::move(points), options);
    return *plan;
  }

  // Valid until the calling thread asks for other logits.
  static Tensor Logits(ReadyGraph& plan, const Tensor& normed, const Tensor& weight) {
    return plan.executor.RunInPlace({{"last_hidden_state", normed}}, [&](const std::string&) { return weight; })
        .at("logits");
  }

  // The items of this process that `wanted` takes, for each slice of the vocabulary. body(item, first, rows, worker).
  template <typename Wanted, typename Begin, typename Body>
  void ForAll(const Wanted& wanted, const Begin& begin, const Body& body) {
    std::vector<const Item*> items;
    for (const Item& item : c_.items)
      if (item.rank == s_.world.Rank() && wanted(item)) items.push_back(&item);
    ForVocabulary([&](int64_t first, const Tensor& rows) {
      begin(first, rows);
      std::vector<Worker> workers(Threads());
      ForItems(static_cast<int64_t>(items.size()), slices_.side_by_side, [&](int64_t i, int w) {
        body(*items[i], first, rows.GetShape()[0], workers[w]);
        s_.advance();
      });
      for (Worker& worker : workers) c_.calibration.Absorb(std::move(worker.observers));
    });
  }

  // body(begin, normed of positions [begin, ..)) for each slice of what is read of an item.
  template <typename Body>
  void ForPositions(const Item& item, Chain chain, const Body& body) const {
    const Tensor normed = c_.store.Get(item.id, chain, kNormedKey);
    const int64_t first = c_.TextOf(item).FirstRead(), count = item.length - first;
    for (int64_t begin = 0; begin < count; begin += slices_.positions)
      body(first + begin, Positions(normed, begin, std::min(count, begin + slices_.positions)));
  }

  void ReadFloat() {
    Tensor weight, operand;
    const auto wanted = [&](const Item& item) { return ReadInFloat(c_, item); };
    ForAll(
        wanted,
        [&](int64_t, const Tensor& rows) {
          weight = ToF32(rows);
          operand = Operand(rows);
        },
        [&](const Item& item, int64_t first, int64_t rows, Worker& worker) {
          const bool observe = Observes(c_, item);
          if (item.kind == ItemKind::kControl) return MeasureControl(item, rows, worker, weight, operand);
          ForPositions(item, Chain::kFloat, [&](int64_t begin, const Tensor& normed) {
            ReadyGraph& plan =
                PlanFor(worker, item, normed.GetShape()[1], rows, observe ? Reading::kObserve : Reading::kFloat);
            auto* reading = static_cast<ObserveReading*>(plan.reading.get());
            if (observe) reading->Begin(item.index, ObserveReading::Slice{begin, item.length, first, rows, vocab_});
            const Tensor logits = Logits(plan, normed, operand);
            if (observe) reading->End();
            Follow(item, logits, begin, first, float_tails_[item.id]);
          });
        });
  }

  void ReadRounded() {
    const ItemKind shown = MeasuredKind(c_.items);
    Tensor weight, rounded;
    const auto wanted = [&](const Item& item) { return ReadRoundedToo(item, shown); };
    const auto begin_slice = [&](int64_t first, const Tensor& rows) {
      weight = Operand(rows);
      rounded = Operand(Rounded(rows, first));
    };
    ForAll(wanted, begin_slice, [&](const Item& item, int64_t first, int64_t rows, Worker& worker) {
      if (item.kind == shown) return Measure(item, first, rows, worker, weight, rounded);
      ForPositions(item, Chain::kQuant, [&](int64_t begin, const Tensor& normed) {
        ReadyGraph& plan = PlanFor(worker, item, normed.GetShape()[1], rows, Reading::kRound);
        Follow(item, Logits(plan, normed, rounded), begin, first, quantized_tails_[item.id]);
      });
    });
  }

  // Float logits against those of the rounded head on float inputs, and of the chain that is rounded from the start.
  void Measure(const Item& item, int64_t first, int64_t rows, Worker& worker, const Tensor& weight,
               const Tensor& rounded) {
    const Tensor quantized = c_.store.Get(item.id, Chain::kQuant, kNormedKey);
    ForPositions(item, Chain::kFloat, [&](int64_t begin, const Tensor& normed) {
      const int64_t length = normed.GetShape()[1];
      ReadyGraph& rounding = PlanFor(worker, item, length, rows, Reading::kRound);
      const Tensor expected = Logits(PlanFor(worker, item, length, rows, Reading::kFloat), normed, weight).Clone();
      if (item.alone) AddErrors(item, begin, expected, Logits(rounding, normed, rounded), alone_[item.id]);
      const Tensor found = Logits(rounding, Positions(quantized, begin, begin + length), rounded);
      AddErrors(item, begin, expected, found, accumulated_[item.id]);
      Scatter(item, expected, found, begin, first);
      Capture(item, Chain::kFloat, expected, begin, first);
      Capture(item, Chain::kQuant, found, begin, first);
    });
  }

  // What products in bf16 change in the float model.
  void MeasureControl(const Item& control, int64_t rows, Worker& worker, const Tensor& weight, const Tensor& operand) {
    const Item& repeated = c_.items[control.control_of];
    const Tensor other = c_.store.Get(repeated.id, Chain::kFloat, kNormedKey);
    ForPositions(control, Chain::kFloat, [&](int64_t begin, const Tensor& normed) {
      const int64_t length = normed.GetShape()[1];
      const Tensor exact = Logits(PlanFor(worker, control, length, rows, Reading::kFloat), normed, weight).Clone();
      AddErrors(control, begin, exact,
                Logits(PlanFor(worker, repeated, length, rows, Reading::kFloat),
                       Positions(other, begin, begin + length), operand),
                accumulated_[control.id]);
    });
  }

  // Some 4096 pairs, evenly spread over all logits.
  void Scatter(const Item& item, const Tensor& expected, const Tensor& found, int64_t begin, int64_t first) {
    constexpr int64_t kPoints = 4096;
    const int64_t stride = std::max<int64_t>(1, item.length * vocab_ * static_cast<int64_t>(c_.items.size()) / kPoints);
    const int64_t rows = expected.GetShape()[2];
    for (int64_t row = 0; row < expected.GetShape()[1]; ++row) {
      if (!IsReal(item, begin + row)) continue;
      const int64_t flat = (begin + row) * vocab_ + first;
      for (int64_t column = (stride - flat % stride) % stride; column < rows; column += stride)
        scatter_[item.id].push_back({item.id, expected.F32()[row * rows + column], found.F32()[row * rows + column]});
    }
  }

  void Capture(const Item& item, Chain chain, const Tensor& logits, int64_t begin, int64_t first) {
    if (s_.captured == nullptr || item.kind != ItemKind::kEvaluation) return;
    const std::lock_guard lock(captured_mutex_);
    Tensor& whole = (*s_.captured)[CapturedName(chain, item, "logits")];
    if (whole.Empty()) whole = Tensor(TensorType{DType::kF32, {1, item.length, vocab_}});
    const int64_t rows = logits.GetShape()[2];
    for (int64_t row = 0; row < logits.GetShape()[1]; ++row)
      std::memcpy(whole.F32().data() + (begin + row) * vocab_ + first, logits.F32().data() + row * rows,
                  rows * sizeof(float));
  }

  // Takes a slice of logits into the tails of its positions.
  void Follow(const Item& item, const Tensor& logits, int64_t begin, int64_t first, Tails& tails) const {
    if (tails.empty()) return;
    const TextItem& text = c_.TextOf(item);
    const int64_t rows = logits.GetShape()[2];
    for (int64_t row = 0; row < logits.GetShape()[1]; ++row) {
      const int64_t position = begin + row, next = position + 1;
      const std::span<const float> values = logits.F32().subspan(row * rows, rows);
      Tail& tail = tails[position];
      for (int64_t column = 0; column < rows; column += kBlock)
        FollowBlock(values.subspan(column, std::min(kBlock, rows - column)), first + column, tail);
      const int64_t target = next < item.length ? text.ids[next] - first : -1;
      if (target >= 0 && target < rows) tail.target = values[target];
    }
  }

  static void FollowBlock(std::span<const float> values, int64_t first, Tail& tail) {
    const auto count = static_cast<int64_t>(values.size());
    const float top = simd::MinMax(values.data(), count).max;
    const double larger = std::max(tail.top, top);
    tail.sum =
        tail.sum * std::exp(tail.top - larger) + simd::SumOfExp(values.data(), count, top) * std::exp(top - larger);
    if (top <= tail.top) return;
    tail.top = top;
    tail.choice = first + (std::ranges::find(values, top) - values.begin());
  }

  double NegativeLogLikelihood(const Tails& tails) const {
    double sum = 0;
    for (size_t i = 0; i + 1 < tails.size(); ++i) sum += std::log(tails[i].sum) + tails[i].top - tails[i].target;
    return sum;
  }

  // Whether the greedy choice at every position of the answer is the answer's next token, and at its end a stop token.
  bool Answers(const TextItem& text, const Tails& tails) const {
    const auto& stops = c_.config.eos_token_ids;
    bool exact = true;
    for (int64_t position = text.FirstRead(); position + 1 < text.item.length; ++position) {
      const int64_t choice = tails[position].choice;
      const bool stop = std::find(stops.begin(), stops.end(), choice) != stops.end();
      exact &= position + 2 == text.item.length ? stop : choice == text.ids[position + 1];
    }
    return exact;
  }

  HeadResult Result() {
    for (const Item& item : c_.items) {
      Figures& own = figures_[item.id];
      if (item.rank != s_.world.Rank()) continue;
      own.alone = Total(alone_[item.id]);
      own.accumulated = Total(accumulated_[item.id]);
      if (item.kind == ItemKind::kControl) s_.change->logits.Merge(std::exchange(own.accumulated, {}));
      if (item.kind == ItemKind::kWindow) {
        own.float_nll = NegativeLogLikelihood(float_tails_[item.id]);
        own.quantized_nll = NegativeLogLikelihood(quantized_tails_[item.id]);
      } else if (item.kind == ItemKind::kCaption) {
        own.float_exact = Answers(c_.TextOf(item), float_tails_[item.id]);
        own.quantized_exact = Answers(c_.TextOf(item), quantized_tails_[item.id]);
      }
    }
    const auto figures = AllGather<Figures>(s_.world, figures_);
    std::vector<ScatterPoint> points;
    for (const auto& of_item : scatter_) points.insert(points.end(), of_item.begin(), of_item.end());
    std::vector<std::vector<ScatterPoint>> by_item(c_.items.size());
    for (const auto& of_rank : AllGather<ScatterPoint>(s_.world, points))
      for (const ScatterPoint& point : of_rank) by_item[point.item].push_back(point);

    HeadResult result{.error = {.stage = "logits"}};
    for (const Item& item : c_.items) {
      const Figures& own = figures[item.rank][item.id];
      result.error.alone.Merge(own.alone);
      result.error.accumulated.Merge(own.accumulated);
      result.float_nll += own.float_nll;
      result.quantized_nll += own.quantized_nll;
      result.float_exact += own.float_exact;
      result.quantized_exact += own.quantized_exact;
      result.captions += item.kind == ItemKind::kCaption;
      if (item.kind == ItemKind::kWindow) result.window_tokens += item.length - 1;
      if (item.kind == MeasuredKind(c_.items)) result.shape = {1, item.length, vocab_};
      for (const ScatterPoint& point : by_item[item.id]) result.scatter.emplace_back(point.reference, point.quantized);
    }
    return result;
  }

  const RunContext& c_;
  const StageContext& s_;
  const Tensor& stored_;
  const int64_t vocab_;
  HeadSlices slices_;
  std::vector<Figures> figures_;  // by item id, like the following
  std::vector<PositionErrors> alone_, accumulated_;
  std::vector<std::vector<ScatterPoint>> scatter_;
  std::vector<Tails> float_tails_, quantized_tails_;
  std::mutex captured_mutex_;
};

}  // namespace

HeadResult RunHead(const RunContext& context, const StageContext& stage) { return Head(context, stage).Run(); }

Tensor RoundedLogits(const RunContext& context, const Tensor& normed) {
  const int64_t length = normed.GetShape()[1], vocab = context.config.text.vocab_size;
  Tensor logits = Tensor::Uninitialized({DType::kF32, {1, length, vocab}});
  const StageContext alone{context.calibration, context.store, context.items, nullptr, World(),
                           Compute::kFloat32,   nullptr,       [] {}};
  const Head head(context, alone);
  head.ForVocabulary([&](int64_t first, const Tensor& stored) {
    const int64_t rows = stored.GetShape()[0];
    FakeQuantReading reading(context.calibration);
    const Graph graph = head.Build(length, rows);
    Executor executor(graph, &reading);
    const Tensor part =
        executor.Run({{"last_hidden_state", normed}}, [&](const std::string&) { return head.Rounded(stored, first); })
            .at("logits");
    for (int64_t row = 0; row < length; ++row)
      std::memcpy(logits.F32().data() + row * vocab + first, part.F32().data() + row * rows, rows * sizeof(float));
  });
  return logits;
}

int64_t HeadWork(const RunContext& context) {
  const ItemKind measured = MeasuredKind(context.items);
  int64_t work = 0;
  for (const Item& item : context.items)
    if (item.rank == context.world.Rank()) work += ReadInFloat(context, item) + ReadRoundedToo(item, measured);
  const int64_t rows = SlicesOf(context).rows;
  return work * ((context.config.text.vocab_size + rows - 1) / rows);
}

HeadSlices SlicesOf(const RunContext& context) {
  const int64_t width = context.config.text.hidden_size, vocab = context.config.text.vocab_size;
  int64_t longest = 1;
  for (const Item& item : context.items) longest = std::max(longest, item.length);
  if (OrderMatters(context.calibration, LogitsGraph(context, 1, vocab))) return {vocab, longest, false};
  constexpr int64_t kSmallHidden = int64_t{1} << 20, kSmallLogits = int64_t{4} << 20;
  const bool side_by_side = longest * width * 4 <= kSmallHidden;
  const int64_t rows = std::min(vocab, std::max<int64_t>(1, context.head_slice_bytes / (4 * width) / kBlock) * kBlock);
  const int64_t logit_bytes = side_by_side ? kSmallLogits : context.head_slice_bytes;
  return {rows, std::max<int64_t>(1, logit_bytes / (4 * rows)), side_by_side};
}

}  // namespace circlet::gemma4
