#pragma once

// What runs through the stages, and the one table of what each kind of it goes through.

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace circlet {

enum class ItemKind : uint8_t {
  kCalibration,  // sets the grids
  kEvaluation,   // measured, and not calibrated on
  kWindow,       // of the perplexity text
  kCaption,      // a picture with its question and answer
  kControl,      // with bf16 products: a calibration sample once more in float32
  kVerify,       // the padded sample whose codes go into verify.safetensors
};

// A sequence (or, in the vision stages, a picture) on its way through the stages. The only copy of it; what a model's
// family knows besides is found by `id`.
struct Item {
  int id = 0;  // key in the ActivationStore
  ItemKind kind = ItemKind::kCalibration;
  int64_t index = 0;   // among its kind
  int64_t length = 0;  // positions or patches, padding included
  // Runs [begin, end) of positions that are no padding: those whose errors count.
  std::vector<std::pair<int64_t, int64_t>> real;
  std::string variant;  // what else shapes a graph: a picture's patch grid, whether a sequence has pictures
  std::string label;    // "calib.3", "eval.0"
  int rank = 0;         // the process that runs it
  int control_of = -1;  // kControl: the item that it repeats
  bool alone = false;   // stages are measured on its float inputs too
};

// What an item goes through in every stage.
struct Passage {
  bool observed = false;  // the float reading sets grids
  bool in_float = false;  // runs in the float chain
  bool rounded = false;   // runs in the chain that is fake-quantized from the first stage on
  bool measured = false;  // its errors are the figures of the report
  bool alone = false;     // also rounded on float inputs, stage by stage
  bool followed = false;  // the head tells at each position of both chains what comes next
  bool control = false;   // the float chain is compared with that of the item that it repeats
  bool exact = false;     // products are float32 whatever --compute says
  bool exported = false;  // its rounded values are what the files are verified with

  // How often a stage's graph runs.
  int StageRuns() const { return in_float + rounded + alone; }
  // How often the head's does: observed; followed in both chains; measured in both; the control and what it repeats.
  int HeadRuns() const { return observed + 2 * followed + (measured ? 2 + alone : 0) + 2 * control; }
};

// Whether thing i of `count` is one of the `chosen` that are spread evenly over them.
constexpr bool IsSpread(int64_t i, int64_t chosen, int64_t count) {
  return (i + 1) * chosen / count > i * chosen / count;
}

// All items of one kind of stage (sequences, or pictures), and what each goes through.
class ItemSet {
 public:
  // Grids come from a file: nothing is observed.
  void SetFrozen() { frozen_ = true; }
  bool Frozen() const { return frozen_; }

  void Add(Item item) {
    has_evaluation_ |= item.kind == ItemKind::kEvaluation;
    items_.push_back(std::move(item));
  }
  // Sets `alone` of at most kAloneItems measured items, spread evenly: which stage loses most is seen on a few.
  static constexpr int64_t kAloneItems = 8;
  void ChooseAlone();

  const std::vector<Item>& All() const { return items_; }
  bool Empty() const { return items_.empty(); }
  auto begin() const { return items_.begin(); }
  auto end() const { return items_.end(); }
  const Item& operator[](size_t i) const { return items_[i]; }
  size_t Size() const { return items_.size(); }

  // The kind whose errors are reported: evaluation items when there are any, else those of calibration.
  ItemKind MeasuredKind() const { return has_evaluation_ ? ItemKind::kEvaluation : ItemKind::kCalibration; }
  Passage PassageOf(const Item& item) const;
  // The item that a control item repeats; null: there is none.
  const Item* Repeated() const;

 private:
  std::vector<Item> items_;
  bool frozen_ = false, has_evaluation_ = false;
};

}  // namespace circlet
