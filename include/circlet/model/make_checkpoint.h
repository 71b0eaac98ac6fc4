#pragma once

// Writes random checkpoints with the names, shapes, types and file layout of the released models, for tests and
// measurements without a download (gemma4.md 1, 2.4).

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace circlet {

// Names that MakeCheckpoint knows:
//   tiny       all features of E2B in a few hundred kilobytes
//   e2b-short  E2B's widths, 10 of its 35 layers (5 of them KV-shared), 4 vision layers, small vocabulary
//   e2b        E2B as released: 2011 tensors, 10.2 GB
//   e4b        E4B: 16 GB
std::vector<std::string> CheckpointPresets();

struct CheckpointSummary {
  int64_t tensors = 0;
  int64_t parameters = 0;
  int64_t bytes = 0;  // of all files
  std::vector<std::filesystem::path> files;
};

// done and total in bytes of tensor data.
using CheckpointProgress = std::function<void(int64_t done, int64_t total)>;

// Writes config.json, generation_config.json, processor_config.json, a byte-level tokenizer.json with Gemma 4's control
// tokens, and bf16 weights in shards of at most 2 GB into `directory` (created; an Error when it holds a config.json).
// Weights are N(0, 1/in) with outlier rows and columns, so that activations look like those of a model and not like
// noise of one width; the same preset and seed give the same bytes for any number of threads. No more than a block of
// rows is ever held. Throws Error for an unknown preset (listing the known ones) and when the disk is too small.
CheckpointSummary MakeCheckpoint(std::string_view preset, uint64_t seed, const std::filesystem::path& directory,
                                 const CheckpointProgress& progress = {});

}  // namespace circlet
