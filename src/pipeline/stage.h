#pragma once

// The streaming driver: all items through one stage before the next. A stage observes the calibration items in float,
// freezes its grids, and runs every item fake-quantized; its weights live only that long (docs/architecture.md).

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "circlet/base/communicator.h"
#include "circlet/pipeline/quantize.h"
#include "circlet/quant/calibration.h"
#include "pipeline/activations.h"
#include "pipeline/item.h"
#include "pipeline/phase.h"
#include "pipeline/watch.h"

namespace circlet {

// Values that --save-stages asks for, "float.eval.0.layers.3.out". Several threads may add to it.
class Captured {
 public:
  // Calls change(tensor) with the value of that name, empty the first time, alone.
  template <typename Change>
  void Update(Chain chain, const Item& item, const std::string& stage, const Change& change) {
    const std::lock_guard lock(mutex_);
    change(values_[fmt::format("{}.{}.{}", chain == Chain::kFloat ? "float" : "quant", item.label, stage)]);
  }
  const std::map<std::string, Tensor>& Values() const { return values_; }

 private:
  std::map<std::string, Tensor> values_;
  std::mutex mutex_;
};

class StepRounding;

// What a run of stages works with. Every process has all items and computes those of its rank.
struct StageContext {
  Calibration& calibration;
  ActivationStore& store;
  const ItemSet& items;
  const WeightSource& stored;     // parameters as in the checkpoint
  const RoundedWeights& rounded;  // the same on their grids, for as long as the phase
  Captured* captured;             // may be null
  Communicator& world;
  Compute compute;
  ComputeChange* change;                 // gathers what the control items tell; null without them
  std::function<void()> frozen = [] {};  // called when the phase's grids are, before anything is rounded to them
  std::function<void()> advance;         // called once an item and reading
  std::function<void(const std::string& what)> say = [](const std::string&) {};  // shown as what is at work
  std::vector<RoundedLinear>* linears = nullptr;  // gathers what rounding methods tell; may be null
  Watcher* watcher = nullptr;                     // sees the measured items; may be null

  bool IsMine(const Item& item) const { return item.rank == world.Rank(); }
  Passage PassageOf(const Item& item) const { return items.PassageOf(item); }
  ExecutorOptions ComputeOf(const Item& item) const {
    return {.compute = PassageOf(item).exact ? Compute::kFloat32 : compute};
  }
};

class StageRunner {
 public:
  explicit StageRunner(const StageContext& context) : c_(context) {}

  // Runs both chains and appends the error of each step to `errors`.
  void Run(const Stage& stage, std::vector<StageError>& errors);

  // Items times readings that Run will count.
  int64_t Work(const Stage& stage) const;

  // Runs the float chain alone, of all items, with readings of the caller's: one for each of a thread's executors,
  // which go before the call is over.
  void RunInFloat(const Stage& stage, const std::function<std::unique_ptr<PointReading>()>& make_reading);

 private:
  class StepRuns;
  void Observe(const Step& step, StepRounding& rounding);
  void CompareRanges(const ObserverMap& control, const ObserverMap& repeated);
  StageError Round(const Step& step, StepRounding& rounding);
  void Watch(const Step& step);
  bool Captures(const Step::Sink& sink) const { return c_.captured != nullptr && !sink.capture.empty(); }
  bool Keeps(const Step::Sink& sink) const { return !sink.keys.empty() || Captures(sink); }
  std::vector<std::string> Kept(const Step& step) const;
  Graph Build(const Step& step, const Item& item) const;
  void Keep(const Step& step, const Item& item, Chain chain, const std::map<std::string, Tensor>& results);

  const StageContext& c_;
};

// A graph with its reading, ready to run.
struct ReadyGraph {
  ReadyGraph(Graph graph, std::unique_ptr<PointReading> r, ExecutorOptions options)
      : reading(std::move(r)), executor(std::move(graph), reading.get(), options) {}
  std::unique_ptr<PointReading> reading;  // null: float
  Executor executor;
};

// The same source for several threads, one at a time.
WeightSource Shared(WeightSource source);

// A run of a step's graph, or of a part of it: `inputs` beside the step's own. Results as Executor::RunInPlace.
std::map<std::string, Tensor> RunItem(const StageContext& context, const Step& step, const Item& item, Chain chain,
                                      bool rounded, Executor& executor, const WeightSource& weights,
                                      std::map<std::string, Tensor> inputs = {});

// A value of the store as `read` asks for it: one tensor, or one of each item that it names.
std::vector<Tensor> Fetch(const ActivationStore& store, const Read& read, const Item& item, Chain chain);

// The values that Step::Sink::keys keep apart, [1,S,p] each, as one [1,S,L,p].
Tensor Joined(std::span<const Tensor> layers);

// Runs body(i, worker) for each of `count` items: side by side, each on one thread, or in turn on all threads.
void ForItems(int64_t count, bool side_by_side, const std::function<void(int64_t item, int worker)>& body);
// Whether items of such a graph are better computed side by side: their tensors are too short to share between threads.
bool SideBySide(const Graph& graph);

// Whether what a graph's points gather depends on the order of the samples.
bool OrderMatters(const Calibration& calibration, const Graph& graph);

// Each process has the errors of its items in `mine`, by position in `items`: those of all items, in all processes.
std::pair<ErrorMetrics, PositionSummary> ShareErrors(std::span<const PositionErrors> mine, const ItemSet& items,
                                                     Communicator& world);

// All processes take in what the others observed.
void ShareObservers(Calibration& calibration, Communicator& world);

}  // namespace circlet
