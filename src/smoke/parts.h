#pragma once

// Builders of a case's graphs and samples at given sizes.

#include "circlet/model/gemma4/text.h"
#include "circlet/smoke/smoke.h"
#include "smoke/sizes.h"

namespace circlet {

struct PartOptions {
  SmokeSizes sizes;
  int samples = 3;
  uint64_t seed = 123;
};

std::vector<SmokePart> TextMlpParts(const PartOptions& options);
// `layer` 0 sliding, 1 full, 2 KV-shared.
std::vector<SmokePart> AttentionParts(const PartOptions& options, int layer, Phase phase);
std::vector<SmokePart> DecoderLayerParts(const PartOptions& options, int layer, Phase phase);
std::vector<SmokePart> WordEmbeddingParts(const PartOptions& options);
std::vector<SmokePart> PatchEmbedderParts(const PartOptions& options);
std::vector<SmokePart> VisionAttentionParts(const PartOptions& options);
std::vector<SmokePart> VisionLayerParts(const PartOptions& options);
std::vector<SmokePart> VisionEncoderParts(const PartOptions& options);
std::vector<SmokePart> VisionPoolerParts(const PartOptions& options);
std::vector<SmokePart> VisionModelParts(const PartOptions& options);
std::vector<SmokePart> EmbedderParts(const PartOptions& options);
// A sliding and a full layer; part "text" from ids alone, part "image" from ids and a picture.
struct WholeModel {
  bool text = true;
  bool image = true;
  bool logits = false;
};
std::vector<SmokePart> WholeModelParts(const PartOptions& options, WholeModel what);

}  // namespace circlet
