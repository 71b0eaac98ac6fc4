#pragma once

// Rounds the weights of a step's linears with the second moments of what they are multiplied with (quant/weights),
// where the recipe asks for it. Linears that read the same values are one group. Groups are rounded in the order in
// which they compute: what a group reads is computed from codes as far as they are made, so that each makes up for
// those before it.
//
// The chain of rounded values is cut in front of each group. Calibration items run from cut to cut, what lies on a cut
// waits in the store, and no linear is computed twice for that: the chain goes on from the last cut.

#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "circlet/graph/graph.h"
#include "circlet/quant/weight_rounding.h"
#include "graph/norms_behind.h"
#include "ops/tally.h"
#include "pipeline/stage.h"

namespace circlet {

// Linears of one graph that read the same value, by the names of their weights.
struct LinearGroup {
  ValueId input;
  std::vector<std::string> weights;
  // Of their outputs. Without a gain where the sum's other operand is the step's input itself.
  NormsBehind behind;
};

// What is to be rounded with moments, in order of computation; none where the recipe does not ask for it.
std::vector<LinearGroup> LinearGroupsOf(const Graph& graph, const Calibration& calibration);

// What that adds to a stage's memory, products and values in the store.
void AddRounding(const Stage& stage, const ItemSet& items, const Calibration& calibration, int rank,
                 StageEstimate& estimate);

// What a run that rounds with moments is held against: the float32 products of two forward runs of the items that are
// observed, and of each item's moments as they are defined, sum x x^T and sum (x_f - x) x^T, all columns by all.
void AddPlainProducts(const Stage& stage, const ItemSet& items, const Calibration& calibration, int rank,
                      gemm::Tally& tally);

class StepRounding {
 public:
  // `context` and `step` must stay valid; `outputs` are those of the step's graph that its chain will need.
  StepRounding(const StageContext& context, const Step& step, std::vector<std::string> outputs);

  // Items times cuts that Run will count.
  int64_t Work() const;

  // The float chain is only computed once: with these outputs more, whose values KeepInputs takes.
  Graph WithInputs(Graph graph, const Item& item) const;
  void KeepInputs(const Item& item, const std::map<std::string, Tensor>& results);

  // Behind Calibration::Freeze, in front of the first run that multiplies rounded weights. Collective.
  void Run();

  // After that: items that wait in front of the last group, the graph of what is left of the step, and its outputs from
  // an executor of it that reads grid to grid. Drop when all of them have finished.
  bool Waits(const Item& item) const;
  Graph Rest(const Item& item) const;
  std::map<std::string, Tensor> Finish(const Item& item, Executor& executor) const;
  void Drop();

 private:
  struct Moments;

  bool Corrects() const;
  bool MakesUp() const;
  WeightRounding::TokenWeights TokenWeights() const;
  Graph Segment(const Item& item, size_t group) const;  // up to a group's cut; group = their number: up to the outputs
  std::map<std::string, Tensor> Given(const Item& item, size_t group) const;
  void Advance(size_t group);
  Moments Gather(size_t group) const;
  void Solve(size_t group, Moments moments);
  Tensor FloatRows(const Item& item, size_t group) const;
  Tensor ResidualRows(const Item& item, size_t group) const;

  const StageContext& c_;
  const Step& step_;
  std::vector<std::string> outputs_;
  std::vector<const Item*> items_;                 // of this process, that grids are taken from
  std::vector<std::vector<std::string>> weights_;  // by group; none: nothing is to be done
  std::vector<std::pair<int64_t, int64_t>> sizes_;  // of all a group's matrices, one below the other
  // Of LinearGroup, what token weights and targets need.
  struct BehindGroup {
    size_t norms = 0;
    double eps = 0;
    std::string gain;  // empty: the target makes up for inputs alone
    size_t place = 0;  // of the sum's other operand on the cut
  };
  std::vector<BehindGroup> behind_;  // by group
  // By group: the largest magnitudes of its inputs in the float and in the rounded chain, and how many positions.
  struct Bounds {
    float in_float = 0, rounded = 0;
    int64_t positions = 0;
  };
  std::vector<Bounds> bounds_;
  std::mutex mutex_;    // of bounds_
  size_t waiting_ = 0;  // values of the last cut
};

}  // namespace circlet
