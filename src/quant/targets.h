#pragma once

// What a point's name says about it: the layer coordinates that recipes speak of
// (quantization.md 4.5, 4.8).

#include <cstdint>
#include <optional>
#include <string_view>

namespace circlet {

// The last part: "act_in", "weight".
std::string_view LeafOf(std::string_view point);
// All before it, without the ".linear" that a clipped linear keeps its linear under: "model...layers.3.mlp.up_proj".
std::string_view ModuleOf(std::string_view point);

// A point of a decoder or vision encoder layer; nothing for the others. Points of a bare text model lack the prefix.
struct LayerPoint {
  bool vision;
  int64_t layer;
  std::string_view module;  // within the layer: "self_attn.q_proj"; empty: the layer's own point
  std::string_view leaf;
};
std::optional<LayerPoint> LayerPointOf(std::string_view point);

// Whether a path of a recipe names the point: the full name, or without "model." or "model.language_model.", as the
// trees of the reference's builder spell it.
bool PathNames(std::string_view path, std::string_view point);

}  // namespace circlet
