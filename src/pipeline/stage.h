#pragma once

// The streaming driver: all items through one stage before the next. A stage observes the calibration items in float,
// freezes its grids, and runs every item fake-quantized; its weights live only that long (docs/architecture.md).

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "circlet/pipeline/quantize.h"
#include "circlet/quant/calibration.h"
#include "pipeline/activations.h"

namespace circlet {

enum class ItemKind : uint8_t {
  kCalibration,  // observed; runs in both chains
  kEvaluation,   // not observed; runs in both chains
  kWindow,       // of the perplexity text: both chains, no error figures
  kCaption,      // a picture with its question and answer: both chains, no error figures
  kVerify,       // the padded sample whose codes go into verify.safetensors: fake-quantized chain only
};

// A sequence (or, in the vision stages, a picture) on its way through the stages.
struct Item {
  int id = 0;         // key in the ActivationStore
  ItemKind kind = ItemKind::kCalibration;
  int64_t index = 0;  // among its kind
  int64_t length = 0;  // positions or patches, padding included
  int64_t real = 0;    // leading positions that are no padding: those whose errors count
  std::string variant;  // what else shapes a graph: a picture's patch grid, whether a sequence has pictures
  std::string label;  // "calib.3", "eval.0"
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

// Values that --save-stages asks for, "float.eval.0.layers.3.out".
using Captured = std::map<std::string, Tensor>;

class StageRunner {
 public:
  StageRunner(Calibration& calibration, ActivationStore& store, const std::vector<Item>& items, Captured* captured)
      : calibration_(calibration), store_(store), items_(items), captured_(captured) {}

  // Runs both chains and appends the error of each step to `errors`. `advance` is called once an item and reading.
  void Run(const Stage& stage, std::vector<StageError>& errors, const std::function<void()>& advance);

  // Items times readings that Run will count.
  int64_t Work(const Stage& stage) const;

 private:
  class StepRuns;
  void Keep(const Step& step, const Item& item, Chain chain, const std::map<std::string, Tensor>& results);

  Calibration& calibration_;
  ActivationStore& store_;
  const std::vector<Item>& items_;
  Captured* captured_;
};

// A parameter as float32, converted once and kept until the source goes.
WeightSource CachedFloat(WeightSource stored);

}  // namespace circlet
