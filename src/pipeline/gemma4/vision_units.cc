#include "pipeline/gemma4/vision_units.h"

#include "pipeline/gemma4/keys.h"

namespace circlet::gemma4 {

VisionUnits::VisionUnits(const Context& context, PictureTables& tables, Tensor pixels)
    : context_(context),
      config_(*context.config.vision),
      tables_(tables),
      verify_(*context.Verify()),
      picture_(*context.VerifyPicture()),
      positions_(context.PictureOf(picture_.id).positions),
      places_(context.SequenceOf(verify_).places),
      pixels_(std::move(pixels)) {}

UnitSpec VisionUnits::OfPicture(std::string name, std::function<void(const BlockBuilder&)> build) const {
  return {.name = std::move(name),
          .build = [this, build = std::move(build)] { return context_.Build(build); },
          .item = &picture_,
          .own =
              [this](const std::string& parameter) {
                return parameter == VisionWeights::PositionEmbeddingsName() ? tables_.PositionEmbeddings(picture_, true)
                                                                            : Tensor();
              }};
}

UnitSpec VisionUnits::Whole(std::string name, std::function<void(const BlockBuilder&)> build, const char* output,
                            std::string stages_key) const {
  UnitSpec spec = OfPicture(std::move(name), std::move(build));
  spec.whole_graph = true;
  if (!context_.GetDialect().whole_graph_points) spec.outputs[output] = Stored(std::move(stages_key));
  return spec;
}

std::vector<UnitSpec> VisionUnits::Split() const {
  const int layers = config_.num_layers;
  std::vector<UnitSpec> units;
  UnitSpec patches = OfPicture("vision_patch_embedder",
                               [this](const BlockBuilder& b) { BuildPatchEmbedder(b, config_, picture_.length); });
  patches.inputs = {{"pixel_values", Pixels()}};
  patches.outputs = {{"hidden", Stored(key::VisionHidden(0))}};
  patches.output_keys = {{"hidden", key::VisionHidden(0)}};
  units.push_back(std::move(patches));

  for (int i = 0; i < layers; ++i) {
    UnitSpec layer = OfPicture(fmt::format("vision_encoder_layer_{:02}", i),
                               [this, i](const BlockBuilder& b) { BuildVisionLayer(b, config_, i, picture_.length); });
    layer.keys = {
        {"hidden", key::VisionHidden(i)}, {"mask", "vision.mask"}, {"cos", "vision.cos"}, {"sin", "vision.sin"}};
    layer.inputs = {{"hidden", Stored(key::VisionHidden(i))},
                    {"mask", Table("mask")},
                    {"cos", Table("cos")},
                    {"sin", Table("sin")}};
    layer.outputs = {{"hidden", Stored(key::VisionHidden(i + 1))}};
    layer.output_keys = {{"hidden", key::VisionHidden(i + 1)}};
    units.push_back(std::move(layer));
  }

  // The stage's pooler may have a mask that the file goes without (pooler_masks_padding), so this one is run for its
  // codes.
  UnitSpec pooler =
      OfPicture("vision_pooler", [this](const BlockBuilder& b) { BuildVisionPooler(b, config_, positions_); });
  pooler.keys = {{"hidden", key::VisionHidden(layers)}, {"pooled", key::kVisionPooled}};
  pooler.inputs = {{"hidden", Stored(key::VisionHidden(layers))}};
  units.push_back(std::move(pooler));

  UnitSpec post = OfPicture("vision_post_projection",
                            [this](const BlockBuilder& b) { BuildVisionPost(b, context_.config, positions_); });
  post.build = [build = post.build] { return WithOutputs(build(), {"projected"}); };
  post.keys = {{"pooled", key::kVisionPooled}, {"projected", key::kVisionProjected}};
  post.inputs = {{"pooled", Stored(key::kVisionPooled)}};
  post.outputs = {{"projected", Stored(key::kVisionProjected)}};
  units.push_back(std::move(post));
  return units;
}

std::map<std::string, Tensor> VisionUnits::Tables() const {
  std::map<std::string, Tensor> tables;
  for (const char* which : {"mask", "cos", "sin"}) tables[which] = tables_.Table(picture_, which);
  return tables;
}

UnitSpec VisionUnits::Prefill() const {
  UnitSpec spec = Whole(
      "vision_prefill", [this](const BlockBuilder& b) { BuildVisionPrefill(b, context_.config, positions_); },
      "projected", key::kVisionProjected);
  spec.keys = {{"projected", key::kVisionProjected}};
  spec.inputs = {{"pixel_values", Pixels()}};
  return spec;
}

std::vector<UnitSpec> VisionUnits::Parts() const {
  UnitSpec model = Whole(
      "vision_model", [this](const BlockBuilder& b) { BuildVisionModel(b, config_, positions_); }, "last_hidden_state",
      key::kVisionLast);
  model.keys = {{"last_hidden_state", key::kVisionLast}};
  model.inputs = {{"pixel_values", Pixels()}};

  UnitSpec encoder = Whole(
      "vision_encoder", [this](const BlockBuilder& b) { BuildVisionEncoder(b, config_, positions_); }, "hidden",
      key::VisionHidden(config_.num_layers));
  encoder.inputs = {{"hidden", Stored(key::VisionHidden(0))}};

  const int64_t tokens = LayoutOf(config_, positions_).tokens;
  UnitSpec embedder = Whole(
      "multimodal_embedder",
      [this, tokens](const BlockBuilder& b) { BuildMultimodalEmbedder(b, context_.config, tokens); }, "projected",
      key::kVisionProjected);
  embedder.whole_graph = false;
  embedder.keys = {{"hidden", key::kVisionLast}, {"projected", key::kVisionProjected}};
  embedder.inputs = {{"hidden", Stored(key::kVisionLast)}};
  std::vector<UnitSpec> units;
  for (UnitSpec* unit : {&model, &encoder, &embedder}) units.push_back(std::move(*unit));
  return units;
}

UnitSpec VisionUnits::Fusion() const {
  const bool prefill_decode = context_.settings.export_options.prefill_decode;
  const bool apart = context_.GetDialect().fusion_points;
  return {.name = prefill_decode ? "multimodal_fusion_prefill" : "multimodal_fusion",
          .build =
              [this] {
                return context_.Build([&](const BlockBuilder& b) {
                  BuildFusion(b, context_.config.text, context_.max_seq_len, places_[0],
                              static_cast<int64_t>(places_.size()));
                });
              },
          .keys = {{"text", apart ? key::kTextEmbeddings : key::Hidden(0)},
                   {"visual", key::kVisionProjected},
                   {"fused", key::Hidden(0)}},
          .item = &verify_,
          .inputs = {{"text", Stored(key::kTextEmbeddings)},
                     {"visual", {.reads = {{.key = key::kVisionProjected, .of = [this](const Item&) {
                                              return std::vector{picture_.id};
                                            }}}}}}};
}

UnitSpec VisionUnits::Full() const {
  UnitSpec spec = OfPicture("gemma4_model_full", [this](const BlockBuilder& b) {
    const ImageSlot slot{positions_, places_[0]};
    BuildGemma4Full(b, context_.config, context_.max_seq_len, &slot);
  });
  spec.whole_graph = true;
  // Not the stages' values: this graph's mask keeps all positions, also those behind the sample's end.
  spec.inputs = {{"ids", Given([this] {
                    return Tensor::Of<int64_t>({1, context_.max_seq_len}, context_.SequenceOf(verify_).ids);
                  })},
                 {"pixel_values", Pixels()}};
  return spec;
}

}  // namespace circlet::gemma4
