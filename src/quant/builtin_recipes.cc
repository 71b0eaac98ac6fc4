// The built-in recipes as complete files; recipes/ holds the same texts to start one's own from.

#include <fmt/ranges.h>

#include <array>

#include "circlet/base/error.h"
#include "circlet/io/names.h"
#include "circlet/quant/recipe.h"

namespace circlet {
namespace {

struct Builtin {
  std::string_view name;
  std::string_view comment;
  std::string_view stage;  // keys of the ptq stage
};

constexpr std::array<Builtin, 6> kBuiltins{{
    {"default", "# 16-bit activations and weights: the most accurate integer model.\n",
     R"(    activation: int16
    weight: int16
)"},
    {"w4a16",
     "# 4-bit linear weights, 8-bit tables, head and patch embedder, 16-bit activations: the smallest model.\n",
     R"(    activation: int16
    weight: int16
    linear_weight: uint4
    embedding_weight: uint8
    lm_head_weight: uint8
    vision_patch_embed_weight: uint8
    norm_weight: int16
)"},
    {"w8a8", "# 8-bit activations and weights, 16-bit norm weights.\n",
     R"(    activation: uint8
    weight: uint8
    linear_weight: uint8
    embedding_weight: uint8
    lm_head_weight: uint8
    norm_weight: int16
)"},
    {"mixed8", "# 8-bit activations, signed 8-bit weights, a 4-bit head: exercises signed and symmetric grids.\n",
     R"(    activation: uint8
    weight: uint8
    linear_weight: {kind: affine, dtype: int8, qscheme: per_channel_symm}
    embedding_weight: int8
    lm_head_weight: {kind: affine, dtype: int4, qscheme: per_channel_symm}
    norm_weight: uint8
)"},
    {"w8a16", "# 8-bit weights, 16-bit activations: between default and w4a16 in size.\n",
     R"(    activation: int16
    weight: int16
    linear_weight: uint8
    embedding_weight: uint8
    lm_head_weight: uint8
    vision_patch_embed_weight: uint8
    norm_weight: int16
)"},
    {"smoke-u8", "# 8 bits everywhere: what a wrapper-smoke case without a recipe of its own uses.\n",
     R"(    activation: uint8
    weight: uint8
)"},
}};

constexpr std::string_view kBefore = R"(model:
  family: gemma4
  name_or_path: null # given on the command line
runtime:
  dtype: float32
  seed: 42
calibration:
  datasets: null # or --data
  seq_len: null
pipeline:
  - name: ptq
)";

constexpr std::string_view kAfter = R"(export:
  enabled: true
  output_dir: null # or --output
  artifacts: [circle_per_layer]
  max_seq_len: null # or --max-seq-len; else the longest sample
  prefill_decode: true
  vision:
    granularity: monolithic # or layer, or both
evaluation:
  enabled: false
)";

}  // namespace

std::vector<std::string> Recipe::BuiltinNames() {
  std::vector<std::string> names;
  for (const Builtin& builtin : kBuiltins) names.emplace_back(builtin.name);
  return names;
}

std::string Recipe::BuiltinText(std::string_view name) {
  for (const Builtin& builtin : kBuiltins)
    if (builtin.name == name) return fmt::format("{}{}{}{}", builtin.comment, kBefore, builtin.stage, kAfter);
  const std::vector<std::string> names = BuiltinNames();
  Fail("unknown recipe \"{}\"{}; known are {}", name, NearestHint(name, names), fmt::join(names, ", "));
}

}  // namespace circlet
