#include "pipeline/gemma4/head.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <tuple>

#include "circlet/base/threads.h"
#include "circlet/model/gemma4/text.h"
#include "ops/codes.h"
#include "pipeline/exchange.h"
#include "pipeline/gemma4/agreement.h"
#include "pipeline/gemma4/captions.h"
#include "pipeline/gemma4/keys.h"
#include "pipeline/gemma4/perplexity.h"
#include "pipeline/gemma4/tails.h"

namespace circlet::gemma4 {
namespace {

// Of one item, while its logits pass by; empty at padding.
using ErrorsSoFar = std::vector<ErrorMetrics>;

PositionErrors OfPositions(const ErrorsSoFar& so_far) {
  PositionErrors errors;
  for (const ErrorMetrics& position : so_far)
    if (position.count > 0) errors.Add(position);
  return errors;
}

// Adds logits [1,n,rows] of positions begin .. begin + n - 1, those that are no padding.
void AddErrors(const Item& item, int64_t begin, const Tensor& expected, const Tensor& found, ErrorsSoFar& errors) {
  errors.resize(item.length);
  const int64_t count = found.GetShape()[1], rows = found.GetShape()[2];
  for (const auto& [first, last] : item.real) {
    const int64_t from = std::max(first, begin), to = std::min(last, begin + count);
    ParallelFor(to - from, std::max<int64_t>(1, (1 << 16) / rows), [&](int64_t a, int64_t b) {
      for (int64_t position = from + a; position < from + b; ++position)
        for (int64_t column = 0; column < rows; column += kVocabularyBlock) {
          const int64_t at = (position - begin) * rows + column, width = std::min(kVocabularyBlock, rows - column);
          errors[position].Add(expected.F32().subspan(at, width), found.F32().subspan(at, width));
        }
    });
  }
}

// Figures of one item, in a form that can be sent.
struct Figures {
  WindowLoss loss;
  ItemAgreement agreement;
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

// Whether the head reads an item's float chain before the grids are known; and when they are, both chains, or what the
// files are verified with.
bool ReadInFloat(const Passage& passage) { return passage.observed || passage.control; }
bool ReadRounded(const Passage& passage) { return passage.measured || passage.followed || passage.exported; }

}  // namespace

Head::Head(const Context& context, int64_t slice_bytes)
    : context_(context), vocab_(context.config.text.vocab_size), width_(context.config.text.hidden_size) {
  int64_t longest = 1;
  for (const Item& item : context.texts) longest = std::max(longest, item.length);
  if (OrderMatters(context.calibration, Build(1, vocab_))) {
    rows_ = vocab_;
    positions_ = longest;
    return;
  }
  constexpr int64_t kSmallHidden = int64_t{1} << 20, kSmallLogits = int64_t{4} << 20;
  side_by_side_ = longest * width_ * 4 <= kSmallHidden;
  const int64_t blocks = std::max<int64_t>(1, slice_bytes / (4 * width_) / kVocabularyBlock);
  rows_ = std::min(vocab_, blocks * kVocabularyBlock);
  positions_ = std::max<int64_t>(1, (side_by_side_ ? kSmallLogits : slice_bytes) / (4 * rows_));
}

std::vector<std::string> Head::Reads() const { return {key::kNormed}; }

std::map<std::string, TensorType> Head::Makes() const {
  if (context_.Verify() == nullptr) return {};
  return {{key::kLogits, {DType::kF32, {1, 1, vocab_}}}};
}

Graph Head::Build(int64_t length, int64_t rows) const {
  return context_.Build([&](const BlockBuilder& b) { BuildLogits(b, context_.config.text, length, rows); });
}

template <typename Body>
void Head::ForVocabulary(const Body& body) const {
  const Tensor stored = context_.weights.Stored(kHeadWeight);
  for (int64_t first = 0; first < vocab_; first += rows_) {
    const int64_t end = std::min(vocab_, first + rows_);
    body(first, stored.Grid() != nullptr ? RowsOfCodes(stored, first, end) : stored.Slice(first, end, 0));
  }
}

int64_t Head::Work() const {
  int64_t work = 0;
  for (const Item& item : context_.texts) {
    const Passage passage = context_.texts.PassageOf(item);
    if (item.rank == context_.world_rank) work += ReadInFloat(passage) + ReadRounded(passage);
  }
  return work * ((vocab_ + rows_ - 1) / rows_);
}

StageEstimate Head::Estimate() const {
  StageEstimate estimate{.name = "logits"};
  int64_t longest = 0, measured_positions = 0, followed_positions = 0;  // whose figures are kept one by one
  for (const Item& item : context_.texts) {
    if (item.rank != context_.world_rank) continue;
    const Passage passage = context_.texts.PassageOf(item);
    estimate.flops +=
        2.0 * static_cast<double>(item.length * width_) * static_cast<double>(vocab_) * passage.HeadRuns();
    longest = std::max(longest, item.length);
    if (passage.measured) measured_positions += item.length;
    if (passage.followed) followed_positions += item.length;
  }
  // A slice of the head in float32 and rounded; the float logits of a slice, and the others' beside them.
  estimate.weight_bytes = 2 * 4 * rows_ * width_;
  estimate.working_bytes = 4 * (5 * rows_ * std::min(positions_, longest) + 4 * longest * width_) +
                           2 * static_cast<int64_t>(sizeof(ErrorMetrics)) * measured_positions +
                           static_cast<int64_t>(sizeof(TailPair)) * followed_positions;
  return estimate;
}

// One pass of all items through the head.
class Head::Measurement {
 public:
  Measurement(const Head& head, const StageContext& stage)
      : head_(head),
        c_(head.context_),
        s_(stage),
        vocab_(head.vocab_),
        figures_(stage.items.Size()),
        alone_(stage.items.Size()),
        accumulated_(stage.items.Size()),
        scatter_(stage.items.Size()),
        tails_(stage.items.Size()) {
    for (const Item& item : s_.items)
      if (s_.PassageOf(item).followed) tails_[item.id].resize(item.length);
  }

  HeadResult Run() {
    ReadFloatChain();
    ShareObservers(s_.calibration, s_.world);
    s_.calibration.Freeze(head_.Build(1, vocab_), s_.stored);
    s_.frozen();
    ReadRoundedHead();
    c_.weights.Release(kHeadWeight);
    return Result();
  }

 private:
  // A weight in the form that products take, converted once for all lengths; codes stay codes.
  Tensor Operand(const Tensor& rows) const {
    if (IsInteger(rows.GetDType())) return s_.calibration.OperandOf(rows);
    return s_.compute == Compute::kBf16 ? ToBF16(rows) : ToF32(rows);
  }
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
    if (reading == Reading::kObserve) points = std::make_unique<ObserveReading>(s_.calibration, worker.observers);
    if (reading == Reading::kFloat) points = ObserveReading::Reference(s_.calibration);
    if (reading == Reading::kRound) points = std::make_unique<FakeQuantReading>(s_.calibration);
    plan = std::make_unique<ReadyGraph>(head_.Build(length, rows), std::move(points), options);
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
    for (const Item& item : s_.items)
      if (s_.IsMine(item) && wanted(s_.PassageOf(item))) items.push_back(&item);
    head_.ForVocabulary([&](int64_t first, const Tensor& rows) {
      begin(first, rows);
      std::vector<Worker> workers(Threads());
      ForItems(static_cast<int64_t>(items.size()), head_.side_by_side_, [&](int64_t i, int w) {
        body(*items[i], first, rows.GetShape()[0], workers[w]);
        s_.advance();
      });
      for (Worker& worker : workers) s_.calibration.Absorb(std::move(worker.observers));
    });
  }

  // body(begin, part) for each slice of the positions that are read of an item: the first of them, and what cuts it out
  // of a normed tensor as stored.
  template <typename Body>
  void ForPositions(const Item& item, const Body& body) const {
    const int64_t first = c_.SequenceOf(item).FirstRead(), count = item.length - first;
    for (int64_t begin = 0; begin < count; begin += head_.positions_) {
      const int64_t end = std::min(count, begin + head_.positions_);
      body(first + begin, [=](const Tensor& normed) { return normed.Slice(begin, end, 1); });
    }
  }
  Tensor Normed(const Item& item, Chain chain) const { return s_.store.Get(item.id, chain, key::kNormed); }

  void ReadFloatChain() {
    Tensor weight, operand;
    ForAll(
        ReadInFloat,
        [&](int64_t, const Tensor& rows) {
          weight = s_.calibration.ReferenceOperand(rows);
          operand = Operand(rows);
        },
        [&](const Item& item, int64_t first, int64_t rows, Worker& worker) {
          if (s_.PassageOf(item).control) return MeasureControl(item, rows, worker, weight, operand);
          const Tensor whole = Normed(item, Chain::kFloat);
          ForPositions(item, [&](int64_t begin, const auto& part) {
            const Tensor normed = part(whole);
            ReadyGraph& plan = PlanFor(worker, item, normed.GetShape()[1], rows, Reading::kObserve);
            plan.reading->Begin(item.index, PointReading::Slice{begin, item.length, first, rows, vocab_});
            Logits(plan, normed, operand);
            plan.reading->End();
          });
        });
  }

  void ReadRoundedHead() {
    Tensor stored, weight, exact, rounded;
    const auto begin_slice = [&](int64_t first, const Tensor& rows) {
      stored = rows;
      weight = Operand(rows);
      exact = s_.rounded.Slice(kHeadWeight, first, first + rows.GetShape()[0]);
      rounded = Operand(exact);
    };
    ForAll(ReadRounded, begin_slice, [&](const Item& item, int64_t first, int64_t rows, Worker& worker) {
      if (s_.PassageOf(item).exported) return Export(item, first, rows, worker, exact);
      Compare(item, first, rows, worker, weight, rounded);
      if (s_.watcher != nullptr && s_.PassageOf(item).measured) Watch(item, first, stored, exact, weight, rounded);
    });
  }

  // Shows a slice of the vocabulary, rows of the head's weight from `first` on, to the watcher.
  void Watch(const Item& item, int64_t first, const Tensor& stored, const Tensor& exact, const Tensor& weight,
             const Tensor& rounded) const {
    ForPositions(item, [&](int64_t begin, const auto& part) {
      const Tensor reference = part(Normed(item, Chain::kFloat)), quantized = part(Normed(item, Chain::kQuant));
      const int64_t rows = stored.GetShape()[0];
      const Graph graph = head_.Build(reference.GetShape()[1], rows);
      s_.watcher->See(
          {.name = "logits",
           .graph = graph,
           .calibration = s_.calibration,
           .reads = {{"last_hidden_state", {key::kNormed}}},
           .slice = PointReading::Slice{begin, item.length, first, rows, vocab_},
           .parameter = [&](const std::string&, bool as_rounded) { return as_rounded ? exact : stored; },
           .run =
               [&](Chain chain, PointReading& reading) {
                 const bool is_float = chain == Chain::kFloat;
                 Executor(graph, &reading, s_.ComputeOf(item))
                     .RunInPlace({{"last_hidden_state", is_float ? reference : quantized}},
                                 [&](const std::string&) { return is_float ? weight : rounded; });
               }});
    });
  }

  // The logits behind the verification sample's last token, as its file has to give them.
  void Export(const Item& item, int64_t first, int64_t rows, Worker& worker, const Tensor& weight) {
    const int64_t last = c_.SequenceOf(item).Last();
    const Tensor normed = s_.store.Get(item.id, Chain::kQuant, key::kNormed).Slice(last, last + 1, 1);
    const Tensor logits = Logits(PlanFor(worker, item, 1, rows, Reading::kRound), normed, weight);
    if (exported_.Empty()) exported_ = Tensor::Uninitialized({DType::kF32, {1, 1, vocab_}});
    std::memcpy(exported_.F32().data() + first, logits.F32().data(), rows * sizeof(float));
    if (first + rows == vocab_) s_.store.Put(item.id, Chain::kQuant, key::kLogits, exported_);
  }

  // Float logits against those of the rounded head on float inputs, and of the chain that is rounded from the start.
  void Compare(const Item& item, int64_t first, int64_t rows, Worker& worker, const Tensor& weight,
               const Tensor& rounded) {
    const Tensor reference = Normed(item, Chain::kFloat), quantized = Normed(item, Chain::kQuant);
    const Passage passage = s_.PassageOf(item);
    ForPositions(item, [&](int64_t begin, const auto& part) {
      const Tensor normed = part(reference);
      const int64_t length = normed.GetShape()[1];
      ReadyGraph& rounding = PlanFor(worker, item, length, rows, Reading::kRound);
      const Tensor expected = Logits(PlanFor(worker, item, length, rows, Reading::kFloat), normed, weight).Clone();
      if (passage.alone) AddErrors(item, begin, expected, Logits(rounding, normed, rounded), alone_[item.id]);
      const Tensor found = Logits(rounding, part(quantized), rounded);
      if (passage.followed) Follow(expected, found, begin, first, c_.SequenceOf(item).ids, tails_[item.id]);
      if (!passage.measured) return;
      AddErrors(item, begin, expected, found, accumulated_[item.id]);
      Scatter(item, expected, found, begin, first);
      Capture(item, Chain::kFloat, expected, begin, first);
      Capture(item, Chain::kQuant, found, begin, first);
    });
  }

  // What products in bf16 change in the float model.
  void MeasureControl(const Item& control, int64_t rows, Worker& worker, const Tensor& weight, const Tensor& operand) {
    const Item& repeated = s_.items[control.control_of];
    const Tensor of_control = Normed(control, Chain::kFloat), other = Normed(repeated, Chain::kFloat);
    ForPositions(control, [&](int64_t begin, const auto& part) {
      const Tensor normed = part(of_control);
      const int64_t length = normed.GetShape()[1];
      const Tensor exact = Logits(PlanFor(worker, control, length, rows, Reading::kFloat), normed, weight).Clone();
      AddErrors(control, begin, exact,
                Logits(PlanFor(worker, repeated, length, rows, Reading::kFloat), part(other), operand),
                accumulated_[control.id]);
    });
  }

  // Some 4096 pairs, evenly spread over all logits.
  void Scatter(const Item& item, const Tensor& expected, const Tensor& found, int64_t begin, int64_t first) {
    constexpr int64_t kPoints = 4096;
    const int64_t stride = std::max<int64_t>(1, item.length * vocab_ * static_cast<int64_t>(s_.items.Size()) / kPoints);
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
    s_.captured->Update(chain, item, "logits", [&](Tensor& whole) {
      if (whole.Empty()) whole = Tensor(TensorType{DType::kF32, {1, item.length, vocab_}});
      const int64_t rows = logits.GetShape()[2];
      for (int64_t row = 0; row < logits.GetShape()[1]; ++row)
        std::memcpy(whole.F32().data() + (begin + row) * vocab_ + first, logits.F32().data() + row * rows,
                    rows * sizeof(float));
    });
  }

  HeadResult Result() {
    std::vector<PositionErrors> alone(s_.items.Size()), accumulated(s_.items.Size());
    for (const Item& item : s_.items) {
      Figures& own = figures_[item.id];
      if (!s_.IsMine(item)) continue;
      alone[item.id] = OfPositions(alone_[item.id]);
      accumulated[item.id] = OfPositions(accumulated_[item.id]);
      if (s_.PassageOf(item).control) s_.change->logits.Merge(std::exchange(accumulated[item.id], {}).total);
      const Tails& tails = tails_[item.id];
      if (s_.PassageOf(item).followed) own.agreement = AgreementOf(tails, c_.SequenceOf(item).FirstRead());
      if (item.kind == ItemKind::kWindow) own.loss = LossOf(tails);
      if (item.kind == ItemKind::kCaption) {
        const std::span<const int> stops = c_.config.eos_token_ids;
        own.float_exact = Answers(c_.SequenceOf(item), stops, tails, &TailPair::reference);
        own.quantized_exact = Answers(c_.SequenceOf(item), stops, tails, &TailPair::quantized);
      }
    }
    const auto figures = AllGather<Figures>(s_.world, figures_);
    std::vector<ScatterPoint> points;
    for (const auto& of_item : scatter_) points.insert(points.end(), of_item.begin(), of_item.end());
    std::vector<std::vector<ScatterPoint>> by_item(s_.items.Size());
    for (const auto& of_rank : AllGather<ScatterPoint>(s_.world, points))
      for (const ScatterPoint& point : of_rank) by_item[point.item].push_back(point);

    HeadResult result{.error = {.stage = "logits"}};
    std::tie(result.error.alone, result.error.alone_by_position) = ShareErrors(alone, s_.items, s_.world);
    std::tie(result.error.accumulated, result.error.accumulated_by_position) =
        ShareErrors(accumulated, s_.items, s_.world);
    std::vector<WindowLoss> losses;
    std::vector<ItemAgreement> windows, answers;
    Captions captions;
    for (const Item& item : s_.items) {
      const Figures& own = figures[item.rank][item.id];
      if (item.kind == ItemKind::kWindow) {
        losses.push_back(own.loss);
        windows.push_back(own.agreement);
      } else if (item.kind == ItemKind::kCaption) {
        ++captions.pictures;
        captions.float_exact += own.float_exact;
        captions.quantized_exact += own.quantized_exact;
        answers.push_back(own.agreement);
      }
      if (s_.PassageOf(item).measured) result.shape = {1, item.length, vocab_};
      for (const ScatterPoint& point : by_item[item.id]) result.scatter.emplace_back(point.reference, point.quantized);
    }
    if (!windows.empty()) {
      result.perplexity = PerplexityOf(losses);
      result.agreement = AgreementOf(windows);
    }
    if (!answers.empty()) {
      captions.agreement = AgreementOf(answers);
      result.captions = captions;
    }
    return result;
  }

  const Head& head_;
  const Context& c_;
  const StageContext& s_;
  const int64_t vocab_;
  std::vector<Figures> figures_;  // by item id, like the following
  std::vector<ErrorsSoFar> alone_, accumulated_;
  std::vector<std::vector<ScatterPoint>> scatter_;
  std::vector<Tails> tails_;
  Tensor exported_;
};

HeadResult Head::Run(const StageContext& stage) { return Measurement(*this, stage).Run(); }

}  // namespace circlet::gemma4
