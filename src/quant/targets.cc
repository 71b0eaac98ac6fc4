#include "quant/targets.h"

#include <charconv>

namespace circlet {
namespace {

bool Consume(std::string_view& text, std::string_view prefix) {
  if (!text.starts_with(prefix)) return false;
  text.remove_prefix(prefix.size());
  return true;
}

}  // namespace

std::string_view LeafOf(std::string_view point) { return point.substr(point.rfind('.') + 1); }

std::string_view ModuleOf(std::string_view point) {
  const size_t dot = point.rfind('.');
  std::string_view module = dot == point.npos ? std::string_view() : point.substr(0, dot);
  if (module.ends_with(".linear")) module.remove_suffix(std::string_view(".linear").size());
  return module;
}

std::optional<LayerPoint> LayerPointOf(std::string_view point) {
  constexpr std::string_view kLayers = ".layers.";
  bool vision = false;
  if (!Consume(point, kLayers.substr(1))) {
    const size_t layers = point.find(kLayers);
    if (layers == point.npos) return std::nullopt;
    const std::string_view part = point.substr(0, layers);
    vision = part.starts_with("vision") || part.find(".vision") != part.npos;
    point.remove_prefix(layers + kLayers.size());
  }
  int64_t layer = 0;
  const auto [end, error] = std::from_chars(point.data(), point.data() + point.size(), layer);
  if (error != std::errc()) return std::nullopt;
  point.remove_prefix(end - point.data());
  if (!Consume(point, ".")) return std::nullopt;
  return LayerPoint{vision, layer, ModuleOf(point), LeafOf(point)};
}

bool PathNames(std::string_view path, std::string_view point) {
  if (path == point) return true;
  if (!Consume(point, "model.")) return false;
  return path == point || (Consume(point, "language_model.") && path == point);
}

}  // namespace circlet
