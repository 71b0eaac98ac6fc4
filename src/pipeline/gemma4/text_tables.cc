#include "pipeline/gemma4/text_tables.h"

#include "circlet/model/gemma4/tables.h"

namespace circlet::gemma4 {

std::vector<LayerConfig> TextTables::Types() const {
  std::map<std::string, LayerConfig> types;
  for (const LayerConfig& layer : context_.config.text.layers) types.try_emplace(LayerTypeName(layer), layer);
  std::vector<LayerConfig> list;
  for (const auto& [name, layer] : types) list.push_back(layer);
  return list;
}

Tensor TextTables::Mask(const Sequence& sequence, const LayerConfig& layer) {
  const std::lock_guard lock(mutex_);
  std::string seen(sequence.keep.begin(), sequence.keep.end());
  std::span<const int64_t> places;
  if (layer.bidirectional_pictures) {
    places = sequence.places;
    for (const int64_t place : places) seen[place] += 2;
  }
  Tensor& mask = tables_[fmt::format("mask.{}.{}", LayerTypeName(layer), seen)];
  if (mask.Empty()) mask = PrefillMask(sequence.keep, layer.window, kMaskFill, places);
  return mask;
}

Tensor TextTables::Rope(int64_t start, int64_t length, const LayerConfig& layer, bool cosine) {
  const std::lock_guard lock(mutex_);
  const std::string name = fmt::format("{}.{}.{}", LayerTypeName(layer), start, length);
  Tensor& cos = tables_["cos." + name];
  Tensor& sin = tables_["sin." + name];
  if (cos.Empty()) {
    const RopeTables rope = TextRopeTables(layer.rope, layer.head_dim, start, length, /*negated_sin=*/true);
    cos = rope.cos;
    sin = rope.sin;
  }
  return cosine ? cos : sin;
}

}  // namespace circlet::gemma4
