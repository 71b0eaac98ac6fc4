#pragma once

// The text side of the model as export units. Without a verification sample they are written without codes.

#include <vector>

#include "pipeline/gemma4/context.h"
#include "pipeline/gemma4/text_tables.h"

namespace circlet::gemma4 {

// Must outlive its units.
class TextUnits {
 public:
  TextUnits(const Context& context, TextTables& tables);

  std::vector<UnitSpec> Embedding() const;
  std::vector<UnitSpec> PerLayerInputs() const;  // of models that have them
  std::vector<UnitSpec> Layer(int index) const;
  UnitSpec LmHead() const;
  UnitSpec Model() const;

 private:
  UnitValue Mask(const LayerConfig& layer) const;
  UnitValue Rope(int64_t start, int64_t length, const LayerConfig& layer, bool cosine) const;
  UnitValue Ids() const;
  // The per-layer inputs of all layers.
  UnitValue AllPle() const;
  UnitSpec Prefill(int index) const;
  UnitSpec Decode(int index) const;

  const Context& context_;
  const TextConfig& config_;
  TextTables& tables_;
  const bool prefill_decode_;
  const Item* const verify_;  // may be null
  int64_t last_ = 0;          // its last real position
};

}  // namespace circlet::gemma4
