#pragma once

// The text side as functions of values, for the graphs that put its parts together.

#include <map>
#include <string>

#include "circlet/model/gemma4/text.h"

namespace circlet {

struct TextTables {
  ValueId mask = -1;  // [1,1,S,S]
  ValueId cos = -1;   // [1,S,h]
  ValueId sin = -1;
};

// ids [1,S] -> [1,S,D] and [1,S,L,p].
ValueId TokenEmbeddings(const Builder& b, const TextConfig& config, ValueId ids, int64_t rows, const Dialect& dialect);
ValueId TokenPle(const Builder& b, const TextConfig& config, ValueId ids, int64_t rows, const Dialect& dialect);
// embeds [1,S,D], tokens [1,S,L,p] -> [1,S,L,p].
ValueId PerLayerInputs(const Builder& b, const TextConfig& config, ValueId embeds, ValueId tokens,
                       const Dialect& dialect);
// All layers and the final norm. `tables` by LayerTypeName; `ple` [1,S,L,p] is ignored without per-layer embeddings.
ValueId TextStack(const Builder& b, const TextConfig& config, ValueId hidden, ValueId ple,
                  const std::map<std::string, TextTables>& tables, const Dialect& dialect);
// The final norm's output [1,S,D] -> soft-capped logits [1,S,rows].
ValueId Logits(const Builder& b, const TextConfig& config, ValueId normed, int64_t rows, const Dialect& dialect);
// A layer of each type that the model has, by LayerTypeName.
std::map<std::string, LayerConfig> LayerTypes(const TextConfig& config);

}  // namespace circlet
