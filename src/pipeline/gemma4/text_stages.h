#pragma once

// The text side of the model as stages.

#include <vector>

#include "pipeline/gemma4/context.h"
#include "pipeline/gemma4/text_tables.h"
#include "pipeline/phase.h"

namespace circlet::gemma4 {

// Must outlive its stages.
class TextStages {
 public:
  TextStages(const Context& context, TextTables& tables)
      : context_(context), config_(context.config.text), tables_(tables), chain_tables_(context.calibration) {}

  Stage Tables();
  Stage Embeddings();
  Stage PerLayerInputs();  // of models that have them
  Stage Layer(int index);
  Stage Norm();

  // Every point and parameter of the text side, from graphs of a short length (checks before the run).
  std::vector<Point> Points() const;

 private:
  Graph TablesGraph(int64_t length) const;
  // Rows of an embedding table for one item.
  Tensor TableRows(const std::string& name, const Item& item, const RoundedWeights* rounded) const;
  // Token embeddings, and the features of an item's pictures over their placeholders.
  Tensor Merged(const Item& item, std::span<const Tensor> read) const;
  // The first position that the layers from `layer` on take of an item: of a caption only the answer once none of them
  // makes K and V.
  int64_t FirstRead(const Item& item, int layer) const;
  int64_t LengthOf(const Item& item, int layer) const { return item.length - FirstRead(item, layer); }
  // The positions that the layers from `layer` on take of a value.
  Read LastOf(std::string key, int layer) const {
    return {.key = std::move(key), .last = [this, layer](const Item& item) { return LengthOf(item, layer); }};
  }

  const Context& context_;
  const TextConfig& config_;
  TextTables& tables_;
  ChainTables chain_tables_;
};

}  // namespace circlet::gemma4
