#pragma once

// Writes random checkpoints with the names, shapes, types and file layout of the released models, for tests and
// measurements without a download (model.md 1, 2.4).

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace circlet {

// Names that MakeCheckpoint knows:
//   tiny       every structural feature of E2B in 0.8 MB
//   e2b-short  E2B's widths with 5 of its 35 layers (2 of them KV-shared), 2 vision layers, a vocabulary of 8192: 0.6
//   GB e2b        E2B as released: 2011 tensors, 10.2 GB e4b        E4B: 16 GB
//   e2b-qat-mobile, e2b-qat-mobile-short  the same as Google's mobile checkpoint stores it: codes of 2, 4 and 8 bits
//   with
//                                         scales and int8 steps of activations, one file of 2780 tensors, 2.5 GB
std::vector<std::string> CheckpointPresets();

struct CheckpointSummary {
  int64_t tensors = 0;
  int64_t parameters = 0;
  int64_t bytes = 0;  // of all files
  std::vector<std::filesystem::path> files;
};

// done and total in bytes of tensor data.
using CheckpointProgress = std::function<void(int64_t done, int64_t total)>;

// Writes a checkpoint into `directory`, which is created when needed and must not hold a config.json: bf16 weights in
// shards of at most 2 GB (a larger table is a shard by itself), the index, generation_config.json,
// processor_config.json, tokenizer.json with Gemma 4's control tokens and a token for each byte, tokenizer_config.json,
// and config.json last. There is no chat template: chat formats take their default. Weights are N(0, 1/in) with outlier
// rows and columns, so that activations look like a model's and not like noise of one width. The same preset and seed
// give the same bytes for any number of threads. Two blocks of 16 MiB are all that is ever held. Throws Error for an
// unknown preset (listing the known ones), a directory in use, and a disk too small.
CheckpointSummary MakeCheckpoint(std::string_view preset, uint64_t seed, const std::filesystem::path& directory,
                                 const CheckpointProgress& progress = {});

}  // namespace circlet
