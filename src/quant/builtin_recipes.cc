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
  std::string_view stage;          // keys of the ptq stage
  std::string_view method = {};    // the stage in front of it; none: weights are rounded to the nearest
  std::string_view more = {};      // keys of that
  std::string_view first = {};     // keys of the ptq stage in front of those
  std::string_view policies = {};  // and behind them
};

constexpr std::string_view kW4 = R"(    activation: int16
    weight: int16
    linear_weight: uint4
    embedding_weight: uint8
    lm_head_weight: uint8
    vision_patch_embed_weight: uint8
    norm_weight: int16
)";

constexpr std::string_view kStored = R"(    packed_weights: uint4 # of codes of up to 4 bits; or int4
)";

constexpr std::string_view kW8 = R"(    activation: int16
    weight: int16
    linear_weight: uint8
    embedding_weight: uint8
    lm_head_weight: uint8
    vision_patch_embed_weight: uint8
    norm_weight: int16
)";

// Behind the keys of kW4.
constexpr std::string_view kW4Mixed = R"(    override_policies:
      - name: keys_and_values # few weights, and every head reads them
        target: {component: text, modules: [self_attn.k_proj, self_attn.v_proj], observer_role: parameter}
        spec: uint8
      - name: per_layer_inputs
        target: {component: text, modules: [per_layer_input_gate, per_layer_projection], observer_role: parameter}
        spec: uint8
        allow_empty: true
      - name: per_layer_model_projection
        target: {layers: none, module: per_layer_model_projection, observer_role: parameter}
        spec: uint8
        allow_empty: true
)";

constexpr std::string_view kW8A8Mixed = R"(    activation: uint8
    weight: uint8
    linear_weight: uint8
    embedding_weight: uint8
    lm_head_weight: uint8
    norm_weight: int16
    override_policies:
      - name: stream # sums, and what is added to them
        target:
          module: layer
          observers: [attn_residual_out, mlp_residual_out, per_layer_residual_out, layer_scalar_out]
        spec: int16
      - name: embeddings
        target: {layers: none, module: language_model, observers: [inputs_embeds]}
        spec: int16
      - name: branches
        target:
          modules: [post_attention_layernorm, post_feedforward_layernorm, post_per_layer_input_norm]
          observers: [act_out]
        spec: int16
      - name: attention_inputs
        target: {module: input_layernorm, observers: [act_out]}
        spec: int16
      - name: outer_linears
        target: {modules: [self_attn.o_proj, mlp.down_proj], observers: [act_out]}
        spec: int16
      - name: products
        target: {module: mlp, observers: [mul]}
        spec: int16
)";

// Keys of all recipes that round with second moments (docs/recipes.md).
constexpr std::string_view kGptq = R"(  - name: gptq
    range: moments # of a row: factors of its extremes, errors weighed by the inputs' second moments
    range_factors: 25
    lowest_factor: 0.4
    percdamp: 0.05
    actorder: true
    descent_passes: 2
    scale_refits: 1
)";
constexpr std::string_view kCorrected =
    R"(    correct_inputs: true # also make up for what rounding has changed in the inputs, where that helps
    correction_damping: 0.3
)";
constexpr std::string_view kThreeBits =
    R"(    correct_inputs: true # also make up for what rounding has changed in the inputs, where that helps
    correction_damping: 0.3
    weight_bits: 3
)";
// Rows of 8 bits have next to no error of their own, and would follow whatever the samples' inputs have lost.
constexpr std::string_view kNotCorrected =
    R"(    correct_inputs: false # on real weights it makes up for what only the samples have lost
)";

// What a real model's outliers need; a model without them stays as it is.
constexpr std::string_view kWidened = R"(    widen: auto
)";

constexpr std::array<Builtin, 12> kBuiltins{{
    {"default", "# 16-bit activations and weights: the most accurate integer model.\n",
     R"(    activation: int16
    weight: int16
)"},
    {"w4a16",
     "# 4-bit linear weights, 8-bit tables, head and patch embedder, 16-bit activations: the smallest model.\n", kW4},
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
    {"w8a16", "# 8-bit weights, 16-bit activations: between default and w4a16 in size.\n", kW8},
    {"w4a16-gptq", "# w4a16 with weights that make up for each other's errors, by second moments of their inputs.\n",
     kW4, kGptq, kCorrected, kWidened},
    {"w3a16-gptq", "# The same with 3 bits of linear weights, in the 4-bit type.\n", kW4, kGptq, kThreeBits, kWidened},
    {"w8a16-gptq", "# w8a16 with the rounding of w4a16-gptq.\n", kW8, kGptq, kCorrected, kWidened},
    {"w4a16-mixed", "# w4a16-gptq with 8 bits where few weights do most of the damage: recommended.\n", kW4, kGptq,
     kNotCorrected, kWidened, kW4Mixed},
    {"w8a8-mixed",
     "# 8-bit activations with 16 bits for the stream of the layers: the least that real weights live on.\n",
     kW8A8Mixed, "", "", kWidened},
    {"as-checkpoint",
     "# Codes and int8 grids of a checkpoint that was trained with them, 16 bits and 8-bit weights elsewhere.\n", kW8,
     "", "", kStored},
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
)";

constexpr std::string_view kPtq = "  - name: ptq\n";

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
    if (builtin.name == name)
      return fmt::format("{}{}{}{}{}{}{}{}{}", builtin.comment, kBefore, builtin.method, builtin.more, kPtq,
                         builtin.first, builtin.stage, builtin.policies, kAfter);
  const std::vector<std::string> names = BuiltinNames();
  Fail("unknown recipe \"{}\"{}; known are {}", name, NearestHint(name, names), fmt::join(names, ", "));
}

}  // namespace circlet
