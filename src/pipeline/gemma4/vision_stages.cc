#include "pipeline/gemma4/vision_stages.h"

#include "circlet/model/gemma4/tables.h"
#include "circlet/preprocess/image.h"
#include "pipeline/gemma4/keys.h"

namespace circlet::gemma4 {

Tensor PictureTables::Table(const Item& image, const std::string& which) {
  const std::lock_guard lock(mutex_);
  Tensor& table = tables_[which + image.variant];
  if (table.Empty()) {
    const std::vector<int64_t>& positions = context_.PictureOf(image.id).positions;
    const RopeTables rope = VisionRopeTables(config_, positions, context_.GetDialect());
    tables_["cos" + image.variant] = rope.cos;
    tables_["sin" + image.variant] = rope.sin;
    tables_["mask" + image.variant] = VisionMask(positions);
  }
  return tables_[which + image.variant];
}

Tensor PictureTables::PositionEmbeddings(const Item& image, bool rounded) const {
  const bool rounds_table = rounded && context_.GetDialect().position_table_grid;
  return weights_.PositionEmbeddings(
      context_.PictureOf(image.id).positions,
      rounds_table ? context_.calibration.GridOf(VisionWeights::PositionTablePoint()) : nullptr);
}

Step VisionStages::MakeStep(std::string name, std::function<void(const BlockBuilder&, const Item&)> build) const {
  return {.name = std::move(name), .build = [this, build = std::move(build)](const Item& item) {
            return context_.Build([&](const BlockBuilder& b) { build(b, item); });
          }};
}

void VisionStages::AddTables(Step& step) {
  for (const char* which : {"mask", "cos", "sin"})
    step.inputs.push_back({.name = which, .make = [this, which](const Item& image, Chain chain, auto) {
                             const std::string name = which;
                             const std::string point =
                                 name == "mask" ? VisionMaskPoint() : VisionRopePoint(name == "cos");
                             return chain_tables_.For(chain, point, tables_.Table(image, name));
                           }});
}

std::vector<Stage> VisionStages::All(std::map<int, Tensor> pixels) {
  std::vector<Stage> stages;
  const auto add = [&](Step step) { stages.push_back({step.name, {std::move(step)}}); };
  const bool masks_padding = context_.GetDialect().pooler_masks_padding;

  Step tables = MakeStep("vision.tables", [this](const BlockBuilder& b, const Item& image) {
    BuildVisionTables(b, config_, image.length);
  });
  AddTables(tables);
  tables.outputs = {{"mask", {}, "vision.attn_mask"}, {"cos", {}, "vision.rope_cos"}, {"sin", {}, "vision.rope_sin"}};
  add(std::move(tables));

  Step patches = MakeStep("vision.patch_embed", [this](const BlockBuilder& b, const Item& image) {
    BuildPatchEmbedder(b, config_, image.length);
  });
  patches.inputs = {{.name = "pixel_values",
                     .make = [pixels = std::make_shared<std::map<int, Tensor>>(std::move(pixels))](
                                 const Item& image, Chain, auto) { return PixelValues(pixels->at(image.id)); }}};
  patches.outputs = {{"hidden", {key::VisionHidden(0)}, "vision.patch_embed"}};
  patches.own = [this](const std::string& name, const Item& image, const RoundedWeights* rounded) {
    return name == VisionWeights::PositionEmbeddingsName() ? tables_.PositionEmbeddings(image, rounded != nullptr)
                                                           : Tensor();
  };
  add(std::move(patches));

  for (int i = 0; i < config_.num_layers; ++i) {
    const std::string name = fmt::format("vision.layers.{}", i);
    Step layer = MakeStep(
        name, [this, i](const BlockBuilder& b, const Item& image) { BuildVisionLayer(b, config_, i, image.length); });
    layer.inputs = {{.name = "hidden", .reads = {{.key = key::VisionHidden(i)}}}};
    AddTables(layer);
    layer.outputs = {{"hidden", {key::VisionHidden(i + 1)}, name + ".out"}};
    add(std::move(layer));
  }

  Step pooler = MakeStep("vision.pooled", [this, masks_padding](const BlockBuilder& b, const Item& image) {
    BuildVisionPooler(b, config_, PositionsOf(image), {.patch_mask = masks_padding});
  });
  pooler.inputs = {{.name = "hidden", .reads = {{.key = key::VisionHidden(config_.num_layers)}}}};
  if (masks_padding)
    pooler.inputs.push_back({.name = "patch_mask", .make = [this](const Item& image, Chain, auto) {
                               return PatchMask(config_, PositionsOf(image));
                             }});
  pooler.outputs = {{"pooled", {key::kVisionPooled}, "vision.pooled"}};
  add(std::move(pooler));

  Step post = MakeStep("vision.projected", [this](const BlockBuilder& b, const Item& image) {
    BuildVisionPost(b, context_.config, PositionsOf(image));
  });
  post.inputs = {{.name = "pooled", .reads = {{.key = key::kVisionPooled}}}};
  post.outputs = {{"projected", {key::kVisionProjected}, "vision.projected"},
                  {"last_hidden_state", {key::kVisionLast}, "vision.last_hidden_state"}};
  add(std::move(post));
  return stages;
}

}  // namespace circlet::gemma4
