#include "smoke/parts.h"

#include <cmath>

#include "circlet/base/threads.h"
#include "circlet/model/gemma4/tables.h"
#include "circlet/model/gemma4/vision.h"
#include "model/gemma4/text_parts.h"
#include "smoke/random.h"

namespace circlet {
namespace {

// Which sample a draw belongs to is part of its name; the evaluated sample is none of those calibrated on.
using Draw = std::function<SmokeValues(const std::string& sample)>;

SmokePart MakePart(const PartOptions& options, const std::function<void(const BlockBuilder&)>& build,
                   WeightSource stored, const Draw& draw, std::string name = "") {
  SmokePart part{.name = std::move(name), .stored = std::move(stored)};
  build(BlockBuilder(part.graph, kDefault));
  for (int i = 0; i < options.samples; ++i) part.calibration.push_back(draw(fmt::format("{}calib.{}.", part.name, i)));
  part.evaluation = draw(part.name + "eval.");
  return part;
}

std::vector<SmokePart> One(SmokePart part, int64_t real = 0) {
  part.real = real;
  std::vector<SmokePart> parts;
  parts.push_back(std::move(part));
  return parts;
}

WeightSource ModuleWeights(const PartOptions& options) {
  return RandomWeights(options.sizes.config, WeightLaw::kModule, options.seed);
}

// Tables of standard-normal angles, as the operator wants them: each of `axes` parts [f, f], the first f of its sines
// negated.
RopeTables RandomTables(const Shape& shape, int axes, uint64_t seed, const std::string& name) {
  const RopeTables tables{Tensor::Uninitialized({DType::kF32, shape}), Tensor::Uninitialized({DType::kF32, shape})};
  const int64_t half = shape[-1] / axes / 2;
  const Tensor angles = RandomNormal({shape.Elements() / 2}, seed, name + "angle");
  ParallelFor(angles.Elements(), 1 << 12, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / half * 2 * half + i % half, second = first + half;
      const float angle = angles.F32()[i], sine = std::sin(angle);
      tables.cos.F32()[first] = tables.cos.F32()[second] = std::cos(angle);
      tables.sin.F32()[first] = -sine;
      tables.sin.F32()[second] = sine;
    }
  });
  return tables;
}

// What attention and decoder layers take; `causal`: no key of the future (plain attention cases of quantization.md 11.3
// go without).
SmokeValues LayerValues(const PartOptions& options, int layer, Phase phase, bool causal, const std::string& sample) {
  const TextConfig& text = options.sizes.config.text;
  const LayerConfig& config = text.layers[layer];
  const int64_t slots = phase == Phase::kPrefill ? options.sizes.length : options.sizes.slots;
  const int64_t length = phase == Phase::kPrefill ? slots : 1;
  const auto normal = [&](const char* name, const Shape& shape) {
    return RandomNormal(shape, options.seed, sample + name);
  };
  const RopeTables rope = RandomTables({1, length, config.head_dim}, 1, options.seed, sample);
  SmokeValues values{{"hidden", normal("hidden", {1, length, text.hidden_size})},
                     {"cos", rope.cos},
                     {"sin", rope.sin}};
  if (phase == Phase::kDecode) {
    values["mask"] = DecodeMask(slots, slots - 1, config.window);
  } else {
    values["mask"] = causal || config.window > 0 ? PrefillMask(slots, slots, config.window)
                                                 : Tensor(TensorType{DType::kF32, {1, 1, slots, slots}});
  }
  const auto cache = [&](const std::string& kind, int64_t keys) {
    for (const char* side : {"key", "value"})
      values[kind + side] = normal((kind + side).c_str(), {1, config.kv_heads, keys, config.head_dim});
  };
  if (config.kv_shared) {
    cache("shared_", slots);
  } else if (phase == Phase::kDecode) {
    cache("past_", slots - 1);
  }
  return values;
}

int64_t SlotsOf(const PartOptions& options, Phase phase) {
  return phase == Phase::kPrefill ? options.sizes.length : options.sizes.slots;
}

// ---- Vision ---------------------------------------------------------------------------------------------------------

WeightSource VisionStored(const PartOptions& options, WeightLaw law) {
  const VisionConfig& vision = *options.sizes.config.vision;
  const WeightSource stored = RandomWeights(options.sizes.config, law, options.seed);
  return VisionWeights(vision, stored, kDefault).For(options.sizes.positions);
}

PatchLayout PictureOf(const PartOptions& options) {
  return LayoutOf(*options.sizes.config.vision, options.sizes.positions);
}

int64_t PatchesOf(const PartOptions& options) { return static_cast<int64_t>(options.sizes.positions.size()) / 2; }

Draw NormalInput(const PartOptions& options, const char* name, const Shape& shape) {
  return [=](const std::string& sample) {
    return SmokeValues{{name, RandomNormal(shape, options.seed, sample + name)}};
  };
}

// A module of the vision tower that reads hidden patches of its picture.
SmokePart HiddenPatchesPart(const PartOptions& options, const std::function<void(const BlockBuilder&)>& build) {
  return MakePart(options, build, VisionStored(options, WeightLaw::kModule),
                  NormalInput(options, "hidden", {1, PatchesOf(options), options.sizes.config.vision->hidden_size}));
}

Draw VisionLayerDraw(const PartOptions& options) {
  return [&options](const std::string& sample) {
    const VisionConfig& vision = *options.sizes.config.vision;
    const int64_t patches = options.sizes.patches;
    const RopeTables rope = RandomTables({1, patches, vision.head_dim}, 2, options.seed, sample);
    return SmokeValues{{"hidden", RandomNormal({1, patches, vision.hidden_size}, options.seed, sample + "hidden")},
                       {"mask", Tensor(TensorType{DType::kF32, {1, 1, patches, patches}})},
                       {"cos", rope.cos},
                       {"sin", rope.sin}};
  };
}

}  // namespace

std::vector<SmokePart> TextMlpParts(const PartOptions& options) {
  const SmokeSizes& sizes = options.sizes;
  return One(MakePart(
      options, [&](const BlockBuilder& b) { BuildTextMlp(b, sizes.config.text, 0, sizes.length); },
      ModuleWeights(options), NormalInput(options, "hidden", {1, sizes.length, sizes.config.text.hidden_size})));
}

std::vector<SmokePart> AttentionParts(const PartOptions& options, int layer, Phase phase) {
  return One(MakePart(
      options,
      [&](const BlockBuilder& b) {
        BuildTextAttention(b, options.sizes.config.text, layer, phase, SlotsOf(options, phase));
      },
      ModuleWeights(options),
      [&](const std::string& sample) { return LayerValues(options, layer, phase, options.sizes.causal, sample); }));
}

std::vector<SmokePart> DecoderLayerParts(const PartOptions& options, int layer, Phase phase) {
  const TextConfig& text = options.sizes.config.text;
  return One(MakePart(
      options, [&](const BlockBuilder& b) { BuildDecoderLayer(b, text, layer, phase, SlotsOf(options, phase)); },
      ModuleWeights(options),
      [&](const std::string& sample) {
        SmokeValues values = LayerValues(options, layer, phase, /*causal=*/true, sample);
        const int64_t length = values.at("hidden").GetShape()[1];
        if (text.HasPle())
          values["per_layer_input"] = RandomNormal({1, length, text.ple_dim}, options.seed, sample + "ple");
        return values;
      }));
}

std::vector<SmokePart> WordEmbeddingParts(const PartOptions& options) {
  const SmokeSizes& sizes = options.sizes;
  const int64_t length = 2 * sizes.length;
  return One(MakePart(
      options,
      [&](const BlockBuilder& b) { BuildTokenEmbedding(b, sizes.config.text, length, sizes.config.text.vocab_size); },
      RandomWeights(sizes.config, WeightLaw::kModel, options.seed),
      [&](const std::string& sample) {
        return SmokeValues{{"ids", RandomIds(sizes.config, sizes.id_limit, length, options.seed, sample + "ids")}};
      }));
}

std::vector<SmokePart> PatchEmbedderParts(const PartOptions& options) {
  const VisionConfig& vision = *options.sizes.config.vision;
  const int64_t patches = PatchesOf(options);
  return One(MakePart(
                 options, [&](const BlockBuilder& b) { BuildPatchEmbedder(b, vision, patches); },
                 VisionStored(options, WeightLaw::kModule),
                 NormalInput(options, "pixel_values", {1, patches, vision.PatchValues()})),
             PictureOf(options).valid);
}

std::vector<SmokePart> VisionAttentionParts(const PartOptions& options) {
  return One(MakePart(
      options,
      [&](const BlockBuilder& b) { BuildVisionAttention(b, *options.sizes.config.vision, 0, options.sizes.patches); },
      VisionStored(options, WeightLaw::kModule), VisionLayerDraw(options)));
}

std::vector<SmokePart> VisionLayerParts(const PartOptions& options) {
  return One(MakePart(
      options,
      [&](const BlockBuilder& b) { BuildVisionLayer(b, *options.sizes.config.vision, 0, options.sizes.patches); },
      VisionStored(options, WeightLaw::kModule), VisionLayerDraw(options)));
}

std::vector<SmokePart> VisionEncoderParts(const PartOptions& options) {
  const auto build = [&](const BlockBuilder& b) {
    BuildVisionEncoder(b, *options.sizes.config.vision, options.sizes.positions);
  };
  return One(HiddenPatchesPart(options, build), PictureOf(options).valid);
}

std::vector<SmokePart> VisionPoolerParts(const PartOptions& options) {
  const auto build = [&](const BlockBuilder& b) {
    BuildVisionPooler(b, *options.sizes.config.vision, options.sizes.positions);
  };
  return One(HiddenPatchesPart(options, build), PictureOf(options).tokens);
}

std::vector<SmokePart> VisionModelParts(const PartOptions& options) {
  const SmokeSizes& sizes = options.sizes;
  const VisionConfig& vision = *sizes.config.vision;
  return One(MakePart(
      options, [&](const BlockBuilder& b) { BuildVisionModel(b, vision, sizes.positions); },
      VisionStored(options, WeightLaw::kModel),
      NormalInput(options, "pixel_values", {1, PatchesOf(options), vision.PatchValues()})));
}

std::vector<SmokePart> EmbedderParts(const PartOptions& options) {
  const SmokeSizes& sizes = options.sizes;
  const int64_t tokens = sizes.causal ? PictureOf(options).tokens : 16;
  return One(MakePart(
      options, [&](const BlockBuilder& b) { BuildMultimodalEmbedder(b, sizes.config, tokens); }, ModuleWeights(options),
      NormalInput(options, "hidden", {tokens, sizes.config.vision->hidden_size})));
}

std::vector<SmokePart> WholeModelParts(const PartOptions& options, WholeModel what) {
  PartOptions whole = options;
  Gemma4Config& config = whole.sizes.config;
  config.text.layers.pop_back();
  config.text.layers.back().stores_kv = false;
  config.text.num_kv_shared_layers = 0;
  if (what.logits) config.text.final_logit_softcapping = 30.0f;
  const SmokeSizes& sizes = whole.sizes;
  const ImageSlot slot{sizes.positions, sizes.start};
  const int64_t tokens = PictureOf(whole).tokens;
  const WeightSource stored = VisionStored(whole, WeightLaw::kModel);

  const auto part = [&](const char* name, const ImageSlot* image) {
    const auto build = [&](const BlockBuilder& b) {
      BuildGemma4Full(b, config, sizes.length, image);
      if (!what.logits) return;
      const ValueId normed = b.graph().Outputs().front().value;
      b.Output("logits", Logits(b, config.text, normed, config.text.vocab_size));
      b.graph().KeepOutputs({"logits"});
    };
    return MakePart(
        whole, build, stored,
        [&](const std::string& sample) {
          SmokeValues values{{"ids", RandomIds(config, sizes.id_limit, sizes.length, whole.seed, sample + "ids")}};
          if (image == nullptr) return values;
          for (int64_t i = 0; i < tokens; ++i) values["ids"].I64()[sizes.start + i] = config.text.pad_token_id;
          values["pixel_values"] = RandomUniform({1, PatchesOf(whole), config.vision->PatchValues()}, whole.seed,
                                                 sample + "pixels", 0.0f, 1.0f);
          return values;
        },
        name);
  };
  std::vector<SmokePart> parts;
  if (what.text) parts.push_back(part("text", nullptr));
  if (what.image) parts.push_back(part("image", &slot));
  return parts;
}

}  // namespace circlet
