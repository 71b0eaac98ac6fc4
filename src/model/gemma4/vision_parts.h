#pragma once

// The vision side as functions of values, for the graphs that put its parts together.

#include "circlet/model/gemma4/vision.h"

namespace circlet {

struct VisionTables {
  ValueId mask = -1;  // [1,1,P,P]
  ValueId cos = -1;   // [1,P,hd]
  ValueId sin = -1;
};

// Whether the patch projection adds its bias; else the position embeddings hold it. A grid that the checkpoint gives
// for the projection's output is that of the sum.
bool PatchBiasIsOperand(const Dialect& dialect);

// pixels [1,P,3 ps^2] -> [1,P,Dv], on the grid that the first layer reads.
ValueId PatchEmbeddings(const BlockBuilder& b, const VisionConfig& config, ValueId pixels);
// hidden [1,P,Dv] -> the same.
ValueId VisionLayer(const BlockBuilder& b, const VisionConfig& config, int index, ValueId hidden,
                    const VisionTables& tables);
// hidden [1,P,Dv] -> [1,V,Dv]. patch_mask [1,P,1] multiplies hidden ahead; -1: there is none.
ValueId PooledTokens(const BlockBuilder& b, const VisionConfig& config, std::span<const int64_t> positions,
                     ValueId hidden, ValueId patch_mask = -1);
// pooled [1,V,Dv] -> [1,tokens,Dv]; with rank2_soft_tokens [tokens,Dv].
ValueId FilledSlots(const BlockBuilder& b, const VisionConfig& config, const PatchLayout& layout, ValueId pooled);
// x [1,tokens,Dv] or [tokens,Dv] -> [tokens,D].
ValueId Projected(const BlockBuilder& b, const Gemma4Config& config, ValueId x);
// Mask and tables of a picture, on the grids of the encoder.
VisionTables ConstantTables(const BlockBuilder& b, const VisionConfig& config, std::span<const int64_t> positions);
// All layers with those tables.
ValueId EncodedPatches(const BlockBuilder& b, const VisionConfig& config, std::span<const int64_t> positions,
                       ValueId hidden);
// pixels -> what FilledSlots gives.
ValueId VisionTokens(const BlockBuilder& b, const VisionConfig& config, std::span<const int64_t> positions,
                     ValueId pixels);

}  // namespace circlet
