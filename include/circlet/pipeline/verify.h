#pragma once

#include <cstdio>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "circlet/base/tensor.h"

namespace circlet {

struct VerifyOptions {
  std::filesystem::path directory;  // an output directory of Quantize
  std::filesystem::path codes;      // instead of its verify.safetensors: same keys
  std::FILE* progress = nullptr;
};

struct UnitVerdict {
  std::string unit, file;
  int64_t operators = 0;
  int64_t values = 0;        // output codes compared; 0: the file was read and checked only
  int64_t different = 0;     // codes that differ
  int64_t largest_step = 0;  // largest difference in codes
  int64_t largest_code = 0;  // largest distance of a code from its zero point
  std::string first_difference;  // "out.0[1,3,17]: code 120, expected 121 (ADD, ...attn_residual_out)"
};

struct VerifyResult {
  std::string dialect;
  std::string made_with, this_set;  // instruction sets of the manifest and of this process
  std::vector<UnitVerdict> units;
  std::vector<std::string> broken_boundaries;  // "hidden.3: decoder_layer_prefill_2.out.0 has scale .., .. has .."
  bool exact = true;          // every compared code is equal
  // What the dialect promises: default exact; tico the reference's own bounds. On another instruction set than the files
  // were made with sums round in another order, and the default dialect has bounds too (docs/verification.md).
  bool within_bounds = true;
};

// Reads every file that pipeline.json names, checks it and the boundaries between units, runs it on the stored inputs and
// compares its outputs with the stored codes (docs/verification.md). Throws Error for files that are missing or damaged, and
// for a file whose hash is not that of manifest.json.
VerifyResult Verify(const VerifyOptions& options);
std::string VerifyText(const VerifyResult& result);

// One file on the tensors of a safetensors file: by input name, or "in.K". Outputs are named by tensor and as "out.K",
// float32 where quantized.
std::map<std::string, Tensor> RunFile(const std::filesystem::path& file, const std::map<std::string, Tensor>& inputs);

// The listing of `circlet show`: a description of the file, then its operators.
std::string ShowFile(const std::filesystem::path& file);

}  // namespace circlet
