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
  std::string fault;  // why the file could not be read or run; empty: it was
  int64_t operators = 0;
  int64_t values = 0;                // output codes compared
  std::string uncompared;            // what it had no codes for: "no input codes", "no codes of out.1"; empty: nothing
  int64_t different = 0;             // codes that differ
  int64_t largest_step = 0;          // largest difference in codes
  int64_t largest_code = 0;          // largest distance of a code from its zero point
  int64_t least = 0, greatest = 0;   // of the compared codes, less their zero points
  bool float_products = false;       // a linear that is no sum of integers: last bits depend on the processor
  bool judged = true;                // false: the dialect promises nothing of this unit
  std::string first_difference;      // "out.0[1,3,17]: code 120, expected 121 (tensor "...attn_residual_out")"
  std::vector<std::string> outside;  // "in.0: 3 of 1024 values are out of the grid"

  bool Within() const;  // few codes differ, or by little
};

struct VerifyResult {
  enum class Verdict : uint8_t {
    kExact,            // every compared code is equal
    kWithinBounds,     // codes differ, within the bounds of the tico dialect or of another instruction set
    kDifferent,        // a file does not compute what was simulated, or ends do not meet
    kDamaged,          // a file is missing, damaged or not the one that the manifest lists
    kNothingCompared,  // no unit had codes to be compared with: nothing is known
  };
  std::string dialect;
  std::string made_with, this_set;  // instruction sets of the manifest and of this process
  std::vector<UnitVerdict> units;
  // "hidden.3: decoder_layer_prefill_2.out.0 is .., .. expects .."; also ends that are not what pipeline.json says.
  std::vector<std::string> broken_boundaries;
  std::vector<std::string> notes;  // what could not be looked at
  int64_t stored_codes = 0;        // weights whose codes and scales are the packed checkpoint's, by checksum
  std::vector<std::string> lost_codes;  // of weights that the manifest lists: "NAME: what is wrong"
  bool exact = false;          // something was compared, and every compared code is equal
  bool within_bounds = false;  // the verdict is kExact or kWithinBounds
  Verdict verdict = Verdict::kNothingCompared;
};

// Reads every file that pipeline.json names, checks it and the boundaries between units, runs it on the stored inputs
// and compares its outputs with the stored codes (docs/verification.md). A file that is missing, damaged or has another
// hash than manifest.json lists is that unit's fault, and the others are looked at. Throws Error when `directory` is no
// output of Quantize, when manifest.json, pipeline.json or the codes cannot be trusted, and for keys that belong to no
// unit.
VerifyResult Verify(const VerifyOptions& options);
std::string VerifyText(const VerifyResult& result, int columns = 0);
// The same as JSON, "schema_version" 1 (docs/verification.md).
std::string VerifyJson(const VerifyResult& result);

struct RunOptions {
  std::filesystem::path file, inputs;  // a Circle file; a safetensors file
  // Empty: inputs are named by tensor name or "in.K", and a name that is neither is an Error. Else they are the unit's
  // "UNIT.in.K" in a file like verify.safetensors.
  std::string unit;
  bool codes = false;  // outputs as codes of their tensors' types; else float32 where quantized
};
struct RunResult {
  std::map<std::string, Tensor> outputs;  // "out.K"
  std::vector<std::string> outside;       // "in.0: 128 of 128 values are out of the grid (...)"
};
// Runs one file once. Throws Error for inputs that are missing, unknown, NaN or of the wrong type.
RunResult RunFile(const RunOptions& options);

}  // namespace circlet
