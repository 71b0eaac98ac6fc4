#pragma once

// What the names of a Gemma 4 model say about its points, for tests of recorded names; the program itself says a
// weight's kind where it is born.

#include <algorithm>
#include <array>
#include <string>
#include <string_view>

#include "circlet/ops/op.h"

namespace circlet {

inline Point PointNamed(const std::string& name) {
  constexpr std::array<std::string_view, 11> kLinears{"q_proj",
                                                      "k_proj",
                                                      "v_proj",
                                                      "o_proj",
                                                      "gate_proj",
                                                      "up_proj",
                                                      "down_proj",
                                                      "per_layer_input_gate",
                                                      "per_layer_projection",
                                                      "per_layer_model_projection",
                                                      "embedding_projection"};
  const auto leaf_of = [](std::string_view path) { return path.substr(path.rfind('.') + 1); };
  const std::string_view leaf = leaf_of(name);
  std::string_view module = leaf == name ? std::string_view() : std::string_view(name).substr(0, name.rfind('.'));
  if (module.ends_with(".linear")) module.remove_suffix(7);
  module = leaf_of(module);
  Point point{.name = name};
  if (leaf == "weight" || leaf == "position_embedding_table") point.role = PointRole::kWeight;
  if (leaf == "position_embedding_table") point.kind = WeightKind::kPositionTable;
  if (leaf != "weight" && leaf != "act_in" && leaf != "act_out") return point;
  if (std::ranges::find(kLinears, module) != kLinears.end()) point.kind = WeightKind::kLinear;
  if (module == "lm_head") point.kind = WeightKind::kHead;
  if (leaf != "weight") return point;
  if (module == "input_proj") point.kind = WeightKind::kPatchProjection;
  if (module == "embed_tokens" || module == "embed_tokens_per_layer") point.kind = WeightKind::kEmbedding;
  if (module.ends_with("norm")) point.kind = WeightKind::kNorm;
  return point;
}

}  // namespace circlet
