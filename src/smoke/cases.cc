#include <fmt/ranges.h>

#include <algorithm>

#include "circlet/base/error.h"
#include "circlet/io/names.h"
#include "smoke/parts.h"

namespace circlet {
namespace {

using PartBuilder = std::function<std::vector<SmokePart>(const PartOptions&)>;

// `tiny` gives the sizes of quantization.md 11.3 where they differ between cases.
SmokeCase MakeCase(std::string name, std::string recipe, PartBuilder parts,
                   std::function<void(SmokeSizes&)> tiny = nullptr, bool with_static = true) {
  std::vector<std::string> profiles{"tiny", "e2b_dims"};
  if (with_static) profiles.push_back("e2b_static_runtime");
  return {.name = "gemma4_" + name,
          .profiles = std::move(profiles),
          .recipe = std::move(recipe),
          .build = [parts = std::move(parts), tiny = std::move(tiny)](const SmokeSize& size) {
            SmokeSizes sizes = SizesOf(size);
            if (tiny && size.profile == "tiny") tiny(sizes);
            if (!size.padding_patches) DropPadding(sizes);
            return parts({std::move(sizes), size.samples, size.seed});
          }};
}

std::vector<SmokeCase> MakeCases() {
  constexpr int kSliding = 0, kFull = 1, kShared = 2;
  constexpr char kU8[] = "smoke-u8", kI16[] = "default";
  const auto attention = [](int layer, Phase phase) {
    return [=](const PartOptions& options) { return AttentionParts(options, layer, phase); };
  };
  const auto decoder_layer = [](int layer, Phase phase) {
    return [=](const PartOptions& options) { return DecoderLayerParts(options, layer, phase); };
  };
  const auto whole = [](WholeModel what) {
    return [=](const PartOptions& options) { return WholeModelParts(options, what); };
  };
  const auto k_eq_v = [=](const PartOptions& options) {
    PartOptions changed = options;
    changed.sizes.config.text.layers[kFull].k_eq_v = true;
    return AttentionParts(changed, kFull, Phase::kPrefill);
  };
  // Ids below the placeholders': the calibration samples hold every row that the evaluated one asks for.
  const auto longer = [](SmokeSizes& sizes) {
    sizes.length = 16;
    sizes.id_limit = sizes.config.image_token_id;
  };
  const auto small_patches = [](SmokeSizes& sizes) { SetPicture(sizes, 4, 2, 4, 4); };
  const auto eight_patches = [](SmokeSizes& sizes) { SetPicture(sizes, 16, 2, 2, 4); };
  return {
      MakeCase("text_mlp", kU8, TextMlpParts),
      MakeCase("text_attention_prefill", kU8, attention(kFull, Phase::kPrefill)),
      MakeCase("text_attention_decode", kU8, attention(kFull, Phase::kDecode)),
      MakeCase("text_attention_sliding_prefill", kU8, attention(kSliding, Phase::kPrefill)),
      MakeCase("text_attention_sliding_decode", kU8, attention(kSliding, Phase::kDecode)),
      MakeCase("text_attention_k_eq_v_prefill", kU8, k_eq_v, nullptr, /*with_static=*/false),
      MakeCase("text_attention_shared_kv_prefill", kU8, attention(kShared, Phase::kPrefill)),
      MakeCase("text_attention_shared_kv_decode", kU8, attention(kShared, Phase::kDecode)),
      MakeCase("text_decoder_layer_prefill", kU8, decoder_layer(kFull, Phase::kPrefill)),
      MakeCase("text_decoder_layer_sliding_prefill", kU8, decoder_layer(kSliding, Phase::kPrefill)),
      MakeCase("text_decoder_layer_decode", kU8, decoder_layer(kFull, Phase::kDecode)),
      MakeCase("text_decoder_layer_shared_kv", kU8, decoder_layer(kShared, Phase::kPrefill)),
      MakeCase("text_scaled_word_embedding", kU8, WordEmbeddingParts),
      MakeCase("text_model", kU8, whole({.image = false})),
      MakeCase("vision_patch_embedder", kU8, PatchEmbedderParts, small_patches),
      MakeCase("vision_attention", kU8, VisionAttentionParts),
      MakeCase("vision_encoder_layer", kU8, VisionLayerParts),
      MakeCase("vision_encoder", kU8, VisionEncoderParts, eight_patches),
      MakeCase("vision_pooler", kU8, VisionPoolerParts, small_patches),
      MakeCase("vision_model", kU8, VisionModelParts),
      MakeCase("multimodal_embedder", kU8, EmbedderParts),
      MakeCase("model", kI16, whole({}), longer),
      MakeCase("for_conditional_generation", kI16, whole({.logits = true}), longer),
      MakeCase("for_causal_lm", kI16, whole({.image = false, .logits = true}), longer),
  };
}

}  // namespace

bool SmokeCase::Has(std::string_view profile) const { return std::ranges::find(profiles, profile) != profiles.end(); }

void SmokeCase::RequireProfile(std::string_view profile) const {
  if (!Has(profile)) Fail("{} has no profile {}; choose {}", name, profile, fmt::join(profiles, " or "));
}

const std::vector<SmokeCase>& SmokeCases() {
  static const std::vector<SmokeCase> cases = MakeCases();
  return cases;
}

const SmokeCase& FindSmokeCase(std::string_view name) {
  std::vector<std::string> names;
  for (const SmokeCase& known : SmokeCases()) {
    if (known.name == name) return known;
    names.push_back(known.name);
  }
  Fail("no case \"{}\"{}; `circlet smoke --list-cases` lists all", name, NearestHint(name, names));
}

}  // namespace circlet
