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

namespace circlet {

enum class ItemKind : uint8_t {
  kCalibration,  // observed; runs in both chains
  kEvaluation,   // not observed; runs in both chains
  kWindow,       // of the perplexity text: both chains, no error figures
  kCaption,      // a picture with its question and answer: both chains, no error figures
  kControl,      // with bf16 products: a calibration sample once more in float32, float chain only
  kVerify,       // the padded sample whose codes go into verify.safetensors: fake-quantized chain only
};

// A sequence (or, in the vision stages, a picture) on its way through the stages.
struct Item {
  int id = 0;         // key in the ActivationStore
  ItemKind kind = ItemKind::kCalibration;
  int64_t index = 0;  // among its kind
  int64_t length = 0;  // positions or patches, padding included
  // Runs [begin, end) of positions that are no padding: those whose errors count.
  std::vector<std::pair<int64_t, int64_t>> real;
  std::string variant;  // what else shapes a graph: a picture's patch grid, whether a sequence has pictures
  std::string label;  // "calib.3", "eval.0"
  int rank = 0;       // the process that runs it
  int control_of = -1;  // kControl: the item that it repeats
  bool alone = false;   // stages are measured on its float inputs too
};

// One graph of a stage.
struct Step {
  std::string name;
  // Items with the same length and variant share one graph.
  std::function<Graph(const Item&)> build;
  using Source = std::function<Tensor(const Item&, Chain)>;
  std::vector<std::pair<std::string, Source>> inputs;  // by graph input
  struct Sink {
    std::string output;   // of the graph
    std::string key;      // in the store; empty: not kept
    std::string capture;  // name among the saved stages; empty: none
    bool by_layer = false;  // [1,S,L,p] is kept as "KEY.0" .. "KEY.L-1" of [1,S,p] each, which are read one at a time
  };
  std::vector<Sink> outputs;  // the first one's error is the step's
  bool measured = true;
  WeightSource stored;  // parameters as in the checkpoint
  // Parameters that differ from item to item (rows of a table, baked positions), float32, in the fake-quantized reading
  // rounded; an empty tensor leaves the name to `stored`. `fresh`: asked again for every item, not once a graph.
  std::function<Tensor(const std::string& name, const Item&, bool rounded)> own;
  bool fresh = false;
};

struct Stage {
  std::string name;
  std::vector<Step> steps;
};

// The kind whose errors are reported: evaluation items when there are any, else those of calibration.
ItemKind MeasuredKind(const std::vector<Item>& items);
// Sets `alone` of at most kAloneItems measured items, spread evenly: which stage loses most is seen on a few.
inline constexpr int64_t kAloneItems = 8;
void ChooseAlone(std::vector<Item>& items);

// Values that --save-stages asks for, "float.eval.0.layers.3.out".
using Captured = std::map<std::string, Tensor>;

std::string CapturedName(Chain chain, const Item& item, const std::string& stage);

// What a run of stages works with. Every process has all items and computes those of its rank.
struct StageContext {
  Calibration& calibration;
  ActivationStore& store;
  const std::vector<Item>& items;
  Captured* captured;  // may be null
  Communicator& world;
  Compute compute;
  ComputeChange* change;          // gathers what the control items tell; null without them
  std::function<void()> advance;  // called once an item and reading

  ExecutorOptions ComputeOf(const Item& item) const {
    const bool exact = item.kind == ItemKind::kVerify || item.kind == ItemKind::kControl;
    return {.compute = exact ? Compute::kFloat32 : compute};
  }
};

class StageRunner {
 public:
  explicit StageRunner(StageContext context) : c_(std::move(context)) {}

  // Runs both chains and appends the error of each step to `errors`.
  void Run(const Stage& stage, std::vector<StageError>& errors);

  // Items times readings that Run will count.
  int64_t Work(const Stage& stage) const;

 private:
  class StepRuns;
  void Observe(const Step& step);
  void CompareRanges(const ObserverMap& control, const ObserverMap& repeated);
  StageError Round(const Step& step);
  bool Captures(const Step::Sink& sink) const { return c_.captured != nullptr && !sink.capture.empty(); }
  bool Keeps(const Step::Sink& sink) const { return !sink.key.empty() || Captures(sink); }
  Graph Build(const Step& step, const Item& item) const;
  void Keep(const Step& step, const Item& item, Chain chain, const std::map<std::string, Tensor>& results);

  StageContext c_;
};

// A graph with its reading, ready to run.
struct ReadyGraph {
  ReadyGraph(Graph graph, std::unique_ptr<PointReading> r, ExecutorOptions options)
      : reading(std::move(r)), executor(std::move(graph), reading.get(), options) {}
  std::unique_ptr<PointReading> reading;  // null: float
  Executor executor;
};

// The item that a control item among `items` repeats; null: there is none.
const Item* Repeated(const std::vector<Item>& items);

// A parameter as float32, converted once and kept until the source goes.
WeightSource CachedFloat(WeightSource stored);
// The same source for several threads, one at a time.
WeightSource Shared(WeightSource source);

// Runs body(i, worker) for each of `count` items: side by side, each on one thread, or in turn on all threads.
void ForItems(int64_t count, bool side_by_side, const std::function<void(int64_t item, int worker)>& body);
// Whether items of such a graph are better computed side by side: their tensors are too short to share between threads.
bool SideBySide(const Graph& graph);

// Whether what a graph's points gather depends on the order of the samples.
bool OrderMatters(const Calibration& calibration, const Graph& graph);

// Positions [begin, end) of a [1,S,..] tensor, sharing its bytes; of [1,1,S,..] with `axis` 2.
Tensor Positions(const Tensor& tensor, int64_t begin, int64_t end, int axis = 1);
// Tables that all layers and many items share, as the two chains read them: rounded once. The tables must outlive it.
class ChainTables {
 public:
  explicit ChainTables(const Calibration& calibration) : calibration_(calibration) {}
  Tensor For(Chain chain, const std::string& point, const Tensor& table);

 private:
  const Calibration& calibration_;
  std::map<const std::byte*, Tensor> rounded_;  // by the table's bytes
  std::mutex mutex_;
};

// [1,S,L,p] -> [1,S,p] of one layer.
Tensor LayerSlice(const Tensor& tensor, int64_t layer);
// The whole tensor from the parts that Sink::by_layer keeps.
Tensor JoinLayers(const ActivationStore& store, const Item& item, Chain chain, const std::string& key, int64_t layers);

// All processes take in what the others observed.
void ShareObservers(Calibration& calibration, Communicator& world);
// Each process has the figures of its items in `mine`, by position in `items`; the figures of all in all processes.
std::vector<ErrorMetrics> ShareMetrics(std::vector<ErrorMetrics> mine, const std::vector<Item>& items,
                                       Communicator& world);

}  // namespace circlet
