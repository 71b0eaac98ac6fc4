#pragma once

// Masks and rotary tables of sequences: what a host computes for the exported units.

#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "pipeline/gemma4/context.h"

namespace circlet::gemma4 {

class TextTables {
 public:
  explicit TextTables(const Context& context) : context_(context) {}

  // One layer of each type, by the type's name.
  std::vector<LayerConfig> Types() const;

  // Each is made once and may be asked for by several threads.
  Tensor Mask(const Sequence& sequence, const LayerConfig& layer);                    // [1,1,S,S]
  Tensor Rope(int64_t start, int64_t length, const LayerConfig& layer, bool cosine);  // [1,length,h]

 private:
  const Context& context_;
  std::map<std::string, Tensor> tables_;  // by kind, type, length, kept positions and pictures
  std::mutex mutex_;
};

}  // namespace circlet::gemma4
