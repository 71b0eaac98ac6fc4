#pragma once

// The text side as functions of values, for the graphs that put its parts together.

#include <map>
#include <string>

#include "circlet/model/gemma4/text.h"

namespace circlet {

// Of the sequence with the pictures' features in it, ahead of the text model's input; where the dialect has
// fusion_points.
inline constexpr char kFusionPoint[] = "model.mm_fusion";

struct TextTables {
  ValueId mask = -1;  // [1,1,S,S]
  ValueId cos = -1;   // [1,S,h]
  ValueId sin = -1;
};

// ids [1,S] -> [1,S,D] and [1,S,L,p].
ValueId TokenEmbeddings(const BlockBuilder& b, const TextConfig& config, ValueId ids, int64_t rows);
ValueId TokenPle(const BlockBuilder& b, const TextConfig& config, ValueId ids, int64_t rows);
// embeds [1,S,D], tokens [1,S,L,p] -> [1,S,L,p].
ValueId PerLayerInputs(const BlockBuilder& b, const TextConfig& config, ValueId embeds, ValueId tokens);
// All layers and the final norm. `tables` by LayerTypeName; `ple` [1,S,L,p] is ignored without per-layer embeddings.
ValueId TextStack(const BlockBuilder& b, const TextConfig& config, ValueId hidden, ValueId ple,
                  const std::map<std::string, TextTables>& tables);
// The final norm's output [1,S,D] -> soft-capped logits [1,S,rows].
ValueId Logits(const BlockBuilder& b, const TextConfig& config, ValueId normed, int64_t rows);
// A layer of each type that the model has, by LayerTypeName.
std::map<std::string, LayerConfig> LayerTypes(const TextConfig& config);

}  // namespace circlet
