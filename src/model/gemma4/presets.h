#pragma once

// The files of make-checkpoint's presets, but for the weights.

#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "circlet/model/gemma4/weights.h"

namespace circlet {

// Sizes of the released E2B: its checkpoints, and parts of it that run by themselves.
struct E2b {
  static constexpr int kHidden = 1536, kIntermediate = 6144, kHeads = 8, kKvHeads = 1, kHeadDim = 256,
                       kGlobalHeadDim = 512, kPleDim = 256, kWindow = 512, kMaxPositions = 131072;
  static constexpr int kVisionHidden = 768, kVisionIntermediate = 3072, kVisionHeads = 12, kVisionHeadDim = 64,
                       kVisionPositions = 10240;
};

std::vector<std::string> PresetNames();

// JSON files by name: config.json, generation_config.json, processor_config.json, tokenizer.json,
// tokenizer_config.json. Throws Error for an unknown preset, listing the known ones.
std::map<std::string, nlohmann::json> PresetFiles(std::string_view preset);

// Every tensor that the released checkpoint of this config.json holds, sorted by name: also K/V of KV-shared layers and
// the audio tower, which no run reads (model.md 1.2, 1.4).
std::vector<Parameter> StoredTensors(const nlohmann::json& config);

// A tensor of a file: what of which parameter it holds.
struct StoredTensor {
  enum class Part : uint8_t {
    kValues,
    kCodes,      // packed as Google packs them
    kScales,     // of the codes, a group each
    kInputStep,  // of int8 activations
    kOutputStep,
    kCacheStep,
  };
  std::string name;
  TensorType type;
  Parameter parameter;
  Part part = Part::kValues;
  int bits = 0;       // of the codes
  size_t groups = 1;  // scales a row
};

// The same as they are stored: bfloat16, or, where config.json has a quantization_config, packed (docs/packed.md).
// Those come by falling size of their elements, so that each is aligned.
std::vector<StoredTensor> TensorsOfFile(const nlohmann::json& config);

// Tensors in order, cut where a bfloat16 shard would pass `limit_bytes`; a larger tensor is a shard by itself.
std::vector<std::vector<Parameter>> SplitIntoShards(const std::vector<Parameter>& tensors, int64_t limit_bytes);

}  // namespace circlet
