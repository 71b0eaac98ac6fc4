#pragma once

// The vision side as functions of values, for the graphs that put its parts together.

#include "circlet/model/gemma4/vision.h"

namespace circlet {

struct VisionTables {
  ValueId mask = -1;  // [1,1,P,P]
  ValueId cos = -1;   // [1,P,hd]
  ValueId sin = -1;
};

// pixels [1,P,3 ps^2] -> [1,P,Dv], on the grid that the first layer reads.
ValueId PatchEmbeddings(const Builder& b, const VisionConfig& config, ValueId pixels, const Dialect& dialect);
// hidden [1,P,Dv] -> the same.
ValueId VisionLayer(const Builder& b, const VisionConfig& config, int index, ValueId hidden, const VisionTables& tables,
                    const Dialect& dialect);
// hidden [1,P,Dv] -> [1,V,Dv].
ValueId PooledTokens(const Builder& b, const VisionConfig& config, std::span<const int64_t> positions, ValueId hidden,
                     VisionUse use, const Dialect& dialect);
// pooled [1,V,Dv] -> [1,tokens,Dv], the reference [tokens,Dv].
ValueId FilledSlots(const Builder& b, const VisionConfig& config, const PatchLayout& layout, ValueId pooled,
                    const Dialect& dialect);
// x [1,tokens,Dv] or [tokens,Dv] -> [tokens,D].
ValueId Projected(const Builder& b, const Gemma4Config& config, ValueId x, const Dialect& dialect);
// Mask and tables of a picture, on the grids of the encoder.
VisionTables ConstantTables(const Builder& b, const VisionConfig& config, std::span<const int64_t> positions,
                            const Dialect& dialect);
// All layers with those tables.
ValueId EncodedPatches(const Builder& b, const VisionConfig& config, std::span<const int64_t> positions, ValueId hidden,
                       const Dialect& dialect);
// pixels -> what FilledSlots gives.
ValueId VisionTokens(const Builder& b, const VisionConfig& config, std::span<const int64_t> positions, ValueId pixels,
                     VisionUse use, const Dialect& dialect);

}  // namespace circlet
