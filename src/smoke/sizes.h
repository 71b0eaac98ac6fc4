#pragma once

#include <vector>

#include "circlet/model/gemma4/config.h"
#include "circlet/smoke/smoke.h"

namespace circlet {

// The sizes of a profile as a model. Text layers: 0 sliding, 1 full, 2 full on the K/V of layer 1.
struct SmokeSizes {
  Gemma4Config config;
  int64_t length = 8;               // S of prefill
  int64_t slots = 8;                // T of decode
  int64_t patches = 8;              // P of single vision layers
  std::vector<int64_t> positions;   // of the picture
  int64_t start = 1;                // of its tokens
  int64_t id_limit = 0;             // token ids are below it; 0 = the vocabulary
  bool causal = true;               // plain attention cases are masked too
};

SmokeSizes SizesOf(const SmokeSize& size);
// Whether the counts change nothing of what the profile is without them.
bool CountsAreStandard(const SmokeSize& size);
// Of the examples (quantization.md 10.4).
SmokeSizes ExampleSizes();

// Gives the tower other patches, and a picture of grid_height x grid_width of them followed by `padding`.
void SetPicture(SmokeSizes& sizes, int patch_size, int pooling_kernel, int64_t grid_height, int64_t grid_width,
                int64_t padding = 0);
void DropPadding(SmokeSizes& sizes);

}  // namespace circlet
