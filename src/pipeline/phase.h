#pragma once

// What a model's family declares of a run: stages, the units that are written behind them, and for both which values of
// the store they read and make. Who reads a value last, what is dropped when and what must be kept follows from that
// (schedule.h); nobody says it twice.

#include <algorithm>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "circlet/graph/graph.h"
#include "circlet/pipeline/quantize.h"
#include "pipeline/activations.h"
#include "pipeline/item.h"
#include "pipeline/measures.h"

namespace circlet {

class RoundedWeights;

// A value of the store.
struct Read {
  std::string key;
  // How many of the last positions (axis 1 of [1,S,..]) are taken; null: all that there are.
  std::function<int64_t(const Item&)> last;
  // Whose values, where not the item's own: a sequence reads those of its pictures.
  std::function<std::vector<int>(const Item&)> of;
};

// An input of a step's graph.
struct Input {
  std::string name;
  std::vector<Read> reads;
  // Null: the one value read, as it is. Else made of the values read, in order.
  std::function<Tensor(const Item&, Chain, std::span<const Tensor> read)> make;
};

// One graph of a stage.
struct Step {
  std::string name;
  // Items with the same length and variant share one graph.
  std::function<Graph(const Item&)> build;
  std::vector<Input> inputs;
  struct Sink {
    std::string output;             // of the graph
    std::vector<std::string> keys;  // in the store; none: not kept
    std::string capture;            // name among the saved stages; empty: none
    bool by_layer = false;          // [1,S,L,p] is kept as L values of [1,S,p], which are read one at a time
  };
  std::vector<Sink> outputs;  // the first one's error is the step's
  bool measured = true;
  // Parameters that differ from item to item (rows of a table, baked positions), float32, in the fake-quantized reading
  // on their grid: `rounded` are the phase's, null in the float reading. An empty tensor leaves the name to the
  // checkpoint. `fresh`: asked again for every item, not once a graph.
  std::function<Tensor(const std::string& name, const Item&, const RoundedWeights* rounded)> own;
  bool fresh = false;
};

struct Stage {
  std::string name;
  std::vector<Step> steps;
};

// What a phase needs beside the activations.
struct StageEstimate {
  std::string name;
  int64_t weight_bytes = 0;   // parameters in float32
  int64_t working_bytes = 0;  // values of the longest item that live at a time, its inputs and outputs with them
  int64_t rounding_bytes = 0;  // what rounding its weights takes, when no item runs
  int64_t waiting_bytes = 0;  // values that its rounding of weights keeps in the store meanwhile
  double flops = 0;           // of the matrix products of all readings of all items

  // The weights of a stage live once, in float32 or rounded, with their codes beside them while its files are written.
  int64_t RunningBytes() const { return weight_bytes * 3 / 2 + working_bytes; }
  int64_t MemoryBytes() const { return weight_bytes * 3 / 2 + std::max(working_bytes, rounding_bytes); }
};

struct StageContext;

// The stage whose outputs are the model's answer, too large to be kept: it measures them on the way.
class OutputStage {
 public:
  virtual ~OutputStage() = default;
  virtual std::vector<std::string> Reads() const = 0;  // keys
  virtual StageEstimate Estimate() const = 0;
  // What it leaves in the store of the verification sample, for the units.
  virtual std::map<std::string, TensorType> Makes() const { return {}; }
  // Items times readings times slices that Run will count.
  virtual int64_t Work() const = 0;
  virtual HeadResult Run(const StageContext& stage) = 0;
};

// The verification sample's value at an end of a unit: of the store's rounded chain, or made of what is read there.
struct UnitValue {
  std::vector<Read> reads;
  std::function<Tensor(std::span<const Tensor> read)> make;  // null: the one value read, as it is
};

// An export unit. Without `item` it is written without codes, and no input or output counts.
struct UnitSpec {
  std::string name;
  // The graph of many layers in one file, beside the files of its parts: what verification may expect of it differs.
  bool whole_graph = false;
  // Its parameters are coded into its file before the stage's rounded chain runs, which reads them back from there: for
  // tables too large to stand in memory.
  bool written_first = false;
  std::function<Graph()> build;
  bool dynamic_length = false;
  std::map<std::string, std::string> keys;         // of the graph's ends by name; ends with one key lie on one grid
  std::map<std::string, std::string> output_keys;  // where an output's key is not that of an input with its name
  const Item* item = nullptr;                      // whose values `inputs` and `outputs` are
  std::map<std::string, UnitValue> inputs;
  // What the stages computed. An output that is not here is computed by the unit's graph in the rounded reading.
  std::map<std::string, UnitValue> outputs;
  // What units further on read: the key, and the value made of this unit's inputs and outputs.
  using Values = std::map<std::string, Tensor>;
  struct Keep {
    std::string key;
    TensorType type;
    std::function<Tensor(const Values& inputs, const Values& outputs)> make;
  };
  std::vector<Keep> keeps;
  // Parameters of this unit alone, by name, on their grid already; null or an empty tensor: the checkpoint's.
  std::function<Tensor(const std::string& name)> own;
};

// A stage, and what is written behind it.
struct PhaseSpec {
  std::string name;
  const ItemSet* items = nullptr;
  Stage stage;  // without steps: `output` instead
  std::shared_ptr<OutputStage> output;
  std::vector<UnitSpec> units;
  // Files of another kind, by name.
  std::map<std::string, std::function<void(const std::filesystem::path&)>> files;
};

}  // namespace circlet
