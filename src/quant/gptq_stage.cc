#include <fmt/ranges.h>

#include <map>
#include <nlohmann/json.hpp>

#include "circlet/io/json.h"
#include "circlet/io/names.h"
#include "quant/recipe_reader.h"

namespace circlet {
namespace {

// A key of the reference whose other values have no counterpart.
template <typename T>
void Only(const JsonObject& stage, const char* key, const T& value, const char* why) {
  if (stage.Optional<T>(key, value) != value) stage.FailAt(key, fmt::format("only {} is possible: {}", value, why));
}

template <typename T>
T Choice(const JsonObject& stage, const char* key, const std::map<std::string, T>& choices) {
  const auto name = stage.Required<std::string>(key);
  if (const auto it = choices.find(name); it != choices.end()) return it->second;
  std::vector<std::string> names;
  for (const auto& [known, value] : choices) names.push_back(known);
  stage.FailAt(key,
               fmt::format("unknown \"{}\"{}; known are {}", name, NearestHint(name, names), fmt::join(names, ", ")));
}

template <typename T>
void Read(const JsonObject& stage, const char* key, T& value, T least, T most) {
  value = stage.Optional<T>(key, value);
  if (!(value >= least && value <= most)) stage.FailAt(key, fmt::format("is {}, must be {} to {}", value, least, most));
}

// Both ends of ranges are searched by the reference in its own words.
void ReadMse(const JsonObject& stage, WeightRounding& method) {
  using Range = WeightRounding::Range;
  constexpr int kSolvedRanges = 10;
  if (!stage.Has("mse")) return;
  if (stage.Has("range")) stage.FailAt("mse", "and range say the same thing in two ways; leave one of them out");
  const auto [range, solved] = Choice<std::pair<Range, int>>(stage, "mse",
                                                             {{"mse", {Range::kMse, 0}},
                                                              {"smse", {Range::kMoments, 0}},
                                                              {"mse_for_gptq", {Range::kMse, kSolvedRanges}},
                                                              {"smse_for_gptq", {Range::kMoments, kSolvedRanges}}});
  method.range = range;
  method.solved_ranges = solved;
}

}  // namespace

WeightRounding ReadGptqStage(const JsonObject& stage) {
  WeightRounding method;
  ReadMse(stage, method);
  Read(stage, "percdamp", method.damping, 0.0, 1.0);
  method.order_by_moment = stage.Optional<bool>("actorder", method.order_by_moment);
  Read(stage, "weight_bits", method.bits, 0, 8);

  using Range = WeightRounding::Range;
  if (stage.Has("range"))
    method.range =
        Choice<Range>(stage, "range", {{"minmax", Range::kMinMax}, {"mse", Range::kMse}, {"moments", Range::kMoments}});
  Read(stage, "range_factors", method.range_factors, 2, 1000);
  Read(stage, "lowest_factor", method.lowest_factor, 0.01, 1.0);
  Read(stage, "solved_ranges", method.solved_ranges, 0, 1000);
  method.compensate = stage.Optional<bool>("compensate", method.compensate);
  Read(stage, "descent_passes", method.descent_passes, 0, 1000);
  Read(stage, "scale_refits", method.scale_refits, 0, 1000);
  method.correct_inputs = stage.Optional<bool>("correct_inputs", method.correct_inputs);
  Read(stage, "correction_damping", method.correction_damping, 0.0, 100.0);
  using Weights = WeightRounding::TokenWeights;
  if (stage.Has("token_weights"))
    method.token_weights =
        Choice<Weights>(stage, "token_weights",
                        {{"none", Weights::kNone}, {"outputs", Weights::kOutputs}, {"stream", Weights::kStream}});
  double residual_target = 0;
  Read(stage, "residual_target", residual_target, 0.0, 1.0);
  method.residual_target = static_cast<float>(residual_target);
  if (method.residual_target > 0 && !method.correct_inputs)
    stage.FailAt("residual_target", "is a part of the corrected target; set correct_inputs to true");

  Only<std::string>(stage, "variant", "default", "every linear of the model is rounded");
  Only(stage, "perchannel", true, "a row of a weight has a grid of its own; the grids of tensors are the ptq stage's");
  Only<int64_t>(stage, "groupsize", -1, "a Circle tensor has one scale a row");
  Only(stage, "static_groups", false, "there are no groups");
  Only(stage, "quantize_lm_head", false, "the head is rounded to the nearest, at 8 or 16 bits");
  Only(stage, "use_orig_model_inference", false,
       "inputs are those of the quantized model, corrected to the float model");
  if (stage.Has("weight_bits_overrides") && !stage.Raw("weight_bits_overrides").empty())
    stage.FailAt("weight_bits_overrides", "the ptq stage says how many bits a weight has: use override_policies there");
  if (stage.Has("sensitivity"))
    stage.FailAt("sensitivity", "is not supported; mse: smse weighs columns by their inputs");
  for (const char* part : {"quantize_vision", "quantize_text", "quantize_vision_patch_embed", "quantize_vision_blocks",
                           "quantize_vision_pooler", "quantize_multimodal_embedder", "quantize_text_layers"})
    Only(stage, part, true, "leave a part in float, or to the nearest, with override_policies of the ptq stage");
  // Which scheme a weight has, the ptq stage says; how the reference runs, and what it shows, changes no value.
  for (const char* key : {"symmetric", "verbose", "show_progress", "move_cache_to_cpu"}) stage.Optional<bool>(key);
  stage.Raw("cache_dtype");
  stage.RejectUnknownKeys();
  return method;
}

}  // namespace circlet
