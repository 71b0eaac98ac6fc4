#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "circlet/model/gemma4/tables.h"
#include "circlet/model/gemma4/vision.h"
#include "model/gemma4/text_parts.h"
#include "model/gemma4/vision_parts.h"

namespace circlet {
namespace {

// visual [V,D] over rows start .. start+V-1 of text [1,S,D]; Circle cannot hold empty slices.
ValueId FuseRows(const BlockBuilder& b, ValueId text, ValueId visual, int64_t start) {
  const Shape shape = b.ShapeOf(text);
  const int64_t end = start + b.ShapeOf(visual)[1];
  const auto rows = [&](int64_t first, int64_t last) {
    return b.Add(
        Slice{{0, static_cast<int32_t>(first), 0}, {1, static_cast<int32_t>(last), static_cast<int32_t>(shape[2])}},
        {text});
  };
  std::vector<ValueId> pieces;
  if (start > 0) pieces.push_back(rows(0, start));
  pieces.push_back(visual);
  if (end < shape[1]) pieces.push_back(rows(end, shape[1]));
  return pieces.size() == 1 ? visual : b.Concat(std::move(pieces), 1);
}

// The visual rows as [1,V,D] on the grid of the merged embeddings.
ValueId VisualRows(const BlockBuilder& b, ValueId visual) {
  const Shape shape = b.ShapeOf(visual);
  return b.Boundary(EmbeddingPoint(), b.Reshape(visual, {1, shape[0], shape[1]}));
}

void CheckSpan(int64_t length, int64_t start, int64_t tokens) {
  if (start < 0 || tokens < 1 || start + tokens > length)
    Fail(
        "fusion: image tokens [{},{}) do not fit into [0,{}); check visual_start_idx, num_visual_tokens and the "
        "sequence length",
        start, start + tokens, length);
}

int64_t CountOf(std::span<const int64_t> ids, int token) {
  return token < 0 ? 0 : std::count(ids.begin(), ids.end(), int64_t{token});
}

}  // namespace

void BuildFusion(const BlockBuilder& b, const TextConfig& config, int64_t length, int64_t start, int64_t tokens) {
  CheckSpan(length, start, tokens);
  ValueId text = b.Input("text", {1, length, config.hidden_size});
  ValueId visual = b.Input("visual", {tokens, config.hidden_size});
  if (!b.GetDialect().fusion_points) {
    text = b.Boundary(EmbeddingPoint(), text);
    b.Output("fused", FuseRows(b, text, VisualRows(b, b.Boundary(ProjectedPoint(), visual)), start));
    return;
  }
  // The reference's own file is float between its integer neighbours (quantization.md B5); this one rounds where the
  // reference's model does: both parts on the fusion's grid, the result on that of the text model's input.
  text = b.Boundary(kFusionPoint, b.Boundary(b.At(kTextRoot).At("embed_tokens").Path("act_out"), text));
  visual = b.Boundary(kFusionPoint, b.Boundary(ProjectedPoint(), visual));
  visual = b.Reshape(visual, {1, tokens, config.hidden_size});
  b.Output("fused", b.Boundary(EmbeddingPoint(), FuseRows(b, text, visual, start)));
}

void BuildGemma4Full(const BlockBuilder& b, const Gemma4Config& config, int64_t length, const ImageSlot* image) {
  CIRCLET_CHECK(!b.GetDialect().fusion_points, "dialect {} leaves values of the whole model without a grid",
                b.GetDialect().name);
  const TextConfig& text = config.text;
  const ValueId ids = b.Input("ids", {1, length}, DType::kI64);
  ValueId hidden = TokenEmbeddings(b, text, ids, text.vocab_size);
  std::vector<int64_t> places;
  if (image != nullptr) {
    const PatchLayout layout = LayoutOf(*config.vision, image->positions);
    CheckSpan(length, image->start, layout.tokens);
    places.resize(layout.tokens);
    std::iota(places.begin(), places.end(), image->start);
    const ValueId pixels = b.Input("pixel_values", {1, layout.patches, config.vision->PatchValues()});
    const ValueId tokens = VisionTokens(b, *config.vision, image->positions, pixels);
    hidden = FuseRows(b, hidden, VisualRows(b, Projected(b, config, tokens)), image->start);
  }
  ValueId ple = -1;
  if (text.HasPle()) ple = PerLayerInputs(b, text, hidden, TokenPle(b, text, ids, text.ple_vocab_size));

  std::map<std::string, TextTables> tables;
  for (const auto& [type, layer] : LayerTypes(text)) {
    const RopeTables rope = TextRopeTables(layer.rope, layer.head_dim, 0, length, /*negated_sin=*/true);
    const std::span<const int64_t> seen = layer.bidirectional_pictures ? places : std::span<const int64_t>();
    tables[type] = {
        b.Boundary(MaskPoint(layer), b.Constant(PrefillMask(length, length, layer.window, kMaskFill, seen))),
        b.Boundary(RopePoint(layer, true), b.Constant(rope.cos)),
        b.Boundary(RopePoint(layer, false), b.Constant(rope.sin))};
  }
  b.Output("last_hidden_state", TextStack(b, text, hidden, ple, tables));
}

std::vector<int64_t> CheckPlaceholders(const Gemma4Config& config, std::span<const int64_t> ids,
                                       std::span<const int64_t> image_tokens) {
  const auto refuse = [&](const char* kind, int token) {
    if (token < 0) return;
    const auto at = std::find(ids.begin(), ids.end(), int64_t{token});
    if (at != ids.end())
      Fail("position {}: {} placeholder (id {}); circlet runs text and images, take the {} out of the prompt",
           at - ids.begin(), kind, token, kind);
  };
  refuse("audio", config.audio_token_id);
  refuse("video", config.video_token_id);

  const int64_t found = CountOf(ids, config.image_token_id);
  const int64_t expected = std::accumulate(image_tokens.begin(), image_tokens.end(), int64_t{0});
  if (found > 0 && image_tokens.empty())
    Fail(
        "{} image placeholders (id {}) but no pixel_values; give the image, or take the placeholders out of the prompt",
        found, config.image_token_id);
  if (found == 0 && !image_tokens.empty())
    Fail("pixel_values of {} images but no image placeholder (id {}) in the prompt; write one for each image token",
         image_tokens.size(), config.image_token_id);
  if (found != expected)
    Fail("image placeholders: expected {} ({} image tokens), got {}; write as many as the images have tokens", expected,
         fmt::join(image_tokens, " + "), found);

  std::vector<int64_t> at;
  for (size_t i = 0; i < ids.size(); ++i)
    if (config.image_token_id >= 0 && ids[i] == config.image_token_id) at.push_back(static_cast<int64_t>(i));
  return at;
}

std::vector<std::vector<int64_t>> CheckPlaceholders(const Gemma4Config& config, const Tensor& ids,
                                                    const std::vector<std::vector<int64_t>>& image_tokens) {
  const Shape& shape = ids.GetShape();
  if (shape.Rank() != 2) Fail("input_ids has shape {}; expected [prompts, positions]", shape.ToString());
  if (shape[0] != static_cast<int64_t>(image_tokens.size()))
    Fail("input_ids has {} prompts, the images belong to {}; list each prompt's images, none where it has none",
         shape[0], image_tokens.size());
  std::vector<std::vector<int64_t>> at;
  for (int64_t row = 0; row < shape[0]; ++row)
    at.push_back(Within(fmt::format("prompt {}", row), [&] {
      return CheckPlaceholders(config, ids.I64().subspan(row * shape[1], shape[1]), image_tokens[row]);
    }));
  return at;
}

std::vector<int64_t> WithoutPlaceholders(const Gemma4Config& config, std::span<const int64_t> ids) {
  std::vector<int64_t> plain(ids.begin(), ids.end());
  for (const int token : {config.image_token_id, config.video_token_id, config.audio_token_id})
    if (token >= 0) std::ranges::replace(plain, int64_t{token}, int64_t{config.text.pad_token_id});
  return plain;
}

Tensor FuseAt(const Tensor& text, const Tensor& visual, std::span<const int64_t> at) {
  const Shape &t = text.GetShape(), &v = visual.GetShape();
  if (t.Rank() != 3 || t[0] != 1 || v.Rank() != 2 || t[2] != v[1])
    Fail("fusion: text {} and visual {} do not belong together; expected [1,S,D] and [V,D]", t.ToString(),
         v.ToString());
  if (v[0] != static_cast<int64_t>(at.size()))
    Fail("fusion: expected {} visual rows (one a placeholder), got {}", at.size(), v[0]);
  Tensor fused = text.Clone();
  const size_t width = static_cast<size_t>(t[2]);
  for (size_t i = 0; i < at.size(); ++i) {
    if (at[i] < 0 || at[i] >= t[1]) Fail("fusion: placeholder {} is outside [0,{})", at[i], t[1]);
    std::memcpy(fused.F32().data() + static_cast<size_t>(at[i]) * width, visual.F32().data() + i * width,
                width * sizeof(float));
  }
  return fused;
}

void CheckStaticLayout(const Gemma4Config& config, std::span<const int64_t> ids, int64_t start, int64_t tokens) {
  const int64_t length = static_cast<int64_t>(ids.size());
  CheckSpan(length, start, tokens);
  for (int64_t i = 0; i < length; ++i) {
    const bool expected = i >= start && i < start + tokens;
    if ((ids[i] == config.image_token_id) == expected) continue;
    Fail(
        "position {}: {} image placeholder; the static layout has them at [{},{}) and nowhere else: choose the profile "
        "that fits the image, or set validate_static_layout to false",
        i, expected ? "no" : "an", start, start + tokens);
  }
}

}  // namespace circlet
