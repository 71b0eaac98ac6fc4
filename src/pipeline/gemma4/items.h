#pragma once

// From samples to what runs through the stages.

#include <optional>
#include <string>
#include <vector>

#include "pipeline/gemma4/context.h"
#include "pipeline/gemma4/data.h"

namespace circlet::gemma4 {

// An item before it is one of a context's.
struct NewItem {
  ItemKind kind = ItemKind::kCalibration;
  int64_t index = 0;  // among its kind
  std::string label;
  std::vector<int64_t> ids, keep;  // no `keep`: every position is real
  const Sample* sample = nullptr;  // whose pictures come with it; may be null
  int64_t answer = 0;              // kCaption: index of the answer's first token
  int control_of = -1;             // kControl: the item that it repeats
};

// Adds a sequence, and its pictures, to a context's items.
void AddItem(NewItem item, Context& context);

// Fills items and max_seq_len of `context`; order: calibration, evaluation, windows, captions, control. Throws Error
// for samples that do not fit the model or the length.
void MakeItems(const RunData& data, Compute compute, std::optional<int64_t> max_seq_len, Context& context);

}  // namespace circlet::gemma4
