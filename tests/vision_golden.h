#pragma once

// The recorded models' pictures through the vision steps, one graph after the other. For tests.

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "circlet/exec/executor.h"
#include "circlet/model/gemma4/tables.h"
#include "circlet/model/gemma4/vision.h"
#include "circlet/model/gemma4/weights.h"
#include "circlet/quant/calibration.h"
#include "golden.h"

namespace circlet {

struct Picture {
  Tensor pixels;  // [1,P,3 ps^2]
  std::vector<int64_t> positions;
};

struct GoldenModel {
  explicit GoldenModel(const std::string& name)
      : config(ReadConfig(TestData("golden/" + name + "/model"))),
        weights(ModelWeights::Open(config, TestData("golden/" + name + "/model"))),
        inputs(OpenGolden("golden/" + name + "/inputs.safetensors.xz")) {}

  // The pictures of one sample, each as a batch of one; none for text samples.
  std::vector<Picture> Pictures(const std::string& sample) const {
    std::vector<Picture> pictures;
    const Tensor* pixels = inputs.Find(sample + ".pixel_values");
    if (pixels == nullptr) return pictures;
    const Tensor* positions = inputs.Find(sample + ".image_position_ids");
    const int64_t patches = pixels->GetShape()[1], width = pixels->GetShape()[2];
    for (int64_t i = 0; i < pixels->GetShape()[0]; ++i) {
      const auto pairs = positions->I64().subspan(i * patches * 2, patches * 2);
      pictures.push_back(
          {Tensor::Of<float>({1, patches, width}, pixels->F32().subspan(i * patches * width, patches * width)),
           {pairs.begin(), pairs.end()}});
    }
    return pictures;
  }

  WeightSource Stored() const {
    return [this](const std::string& name) { return weights.Float(name); };
  }
  VisionWeights Vision(const Dialect& dialect) const { return VisionWeights(*config.vision, Stored(), dialect); }

  Gemma4Config config;
  ModelWeights weights;
  SafetensorsFile inputs;
};

inline ParameterStore GoldenGrids(const std::string& model, const std::string& recipe) {
  return ParseParameters(GoldenText(fmt::format("golden/{}/{}.qparams.json.xz", model, recipe)), recipe);
}

using Stages = std::map<std::string, Tensor>;  // by the README's names of stages

struct VisionStep {
  std::string name;
  Graph graph;
  std::map<std::string, std::string> inputs;   // graph input -> stage
  std::map<std::string, std::string> outputs;  // graph output -> stage
};

template <typename Build>
Graph GraphOf(const Dialect& dialect, const Build& build) {
  Graph graph;
  build(BlockBuilder(graph, dialect));
  return graph;
}

// As a run takes the steps; `pooler` = {}: as files hold them.
inline VisionPoolerOptions PoolerOf(const Dialect& dialect) { return {.patch_mask = dialect.pooler_masks_padding}; }

inline std::vector<VisionStep> VisionSteps(const Gemma4Config& config, std::span<const int64_t> positions,
                                           const Dialect& dialect, const VisionPoolerOptions& pooler) {
  const VisionConfig& vision = *config.vision;
  const int64_t patches = static_cast<int64_t>(positions.size()) / 2;
  std::vector<VisionStep> steps;
  steps.push_back({"tables",
                   GraphOf(dialect, [&](const BlockBuilder& b) { BuildVisionTables(b, vision, patches); }),
                   {{"mask", "vision.attn_mask"}, {"cos", "vision.rope_cos"}, {"sin", "vision.rope_sin"}},
                   {{"mask", "vision.attn_mask"}, {"cos", "vision.rope_cos"}, {"sin", "vision.rope_sin"}}});
  steps.push_back({"vision_patch_embedder",
                   GraphOf(dialect, [&](const BlockBuilder& b) { BuildPatchEmbedder(b, vision, patches); }),
                   {{"pixel_values", "pixel_values"}},
                   {{"hidden", "vision.patch_embed"}}});
  std::string hidden = "vision.patch_embed";
  for (int i = 0; i < vision.num_layers; ++i) {
    const std::string out = fmt::format("vision.layers.{}.out", i);
    steps.push_back(
        {fmt::format("vision_encoder_layer_{:02}", i),
         GraphOf(dialect, [&](const BlockBuilder& b) { BuildVisionLayer(b, vision, i, patches); }),
         {{"hidden", hidden}, {"mask", "vision.attn_mask"}, {"cos", "vision.rope_cos"}, {"sin", "vision.rope_sin"}},
         {{"hidden", out}}});
    hidden = out;
  }
  steps.push_back({"vision_pooler",
                   GraphOf(dialect, [&](const BlockBuilder& b) { BuildVisionPooler(b, vision, positions, pooler); }),
                   {{"hidden", hidden}},
                   {{"pooled", "vision.pooled"}}});
  if (pooler.patch_mask) steps.back().inputs["patch_mask"] = "vision.patch_mask";
  steps.push_back({"vision_post_projection",
                   GraphOf(dialect, [&](const BlockBuilder& b) { BuildVisionPost(b, config, positions); }),
                   {{"pooled", "vision.pooled"}},
                   {{"projected", "vision.projected"}, {"last_hidden_state", "vision.last_hidden_state"}}});
  return steps;
}

// The parameters of one picture in the reading of `grids` (null: float).
inline WeightSource PictureWeights(const GoldenModel& model, const Picture& picture, const Dialect& dialect,
                                   const Calibration* grids) {
  const bool rounded_table = grids != nullptr && dialect.position_table_grid;
  return model.Vision(dialect).For(picture.positions,
                                   rounded_table ? grids->GridOf(VisionWeights::PositionTablePoint()) : nullptr);
}

// All stages of one picture. `given`: a stage that replaces the computed one as input of later steps, or null.
inline Stages RunVision(const GoldenModel& model, const Picture& picture, const Dialect& dialect, PointReading* reading,
                        Calibration* grids, const std::function<const Tensor*(const std::string&)>& given = nullptr) {
  const RopeTables rope = VisionRopeTables(*model.config.vision, picture.positions, dialect);
  Stages stages{{"pixel_values", picture.pixels},
                {"vision.attn_mask", VisionMask(picture.positions)},
                {"vision.patch_mask", PatchMask(*model.config.vision, picture.positions)},
                {"vision.rope_cos", rope.cos},
                {"vision.rope_sin", rope.sin}};
  WeightSource weights = PictureWeights(model, picture, dialect, grids);
  if (grids != nullptr) weights = RoundedWeights(*grids, weights);
  for (const VisionStep& step : VisionSteps(model.config, picture.positions, dialect, PoolerOf(dialect))) {
    std::map<std::string, Tensor> inputs;
    for (const auto& [name, stage] : step.inputs) {
      const Tensor* replacement = given ? given(stage) : nullptr;
      inputs[name] = replacement != nullptr ? *replacement : stages.at(stage);
    }
    const auto results = Executor(step.graph, reading).Run(inputs, weights);
    for (const auto& [name, stage] : step.outputs) stages[stage] = results.at(name);
  }
  return stages;
}

// Observes all calibration pictures and freezes every grid of the vision side.
inline void CalibrateVision(const GoldenModel& model, Calibration& calibration) {
  const Dialect& dialect = calibration.GetDialect();
  std::vector<VisionStep> last;
  for (int sample = 0; sample < 8; ++sample) {
    for (const Picture& picture : model.Pictures(fmt::format("calib.{}", sample))) {
      const RopeTables rope = VisionRopeTables(*model.config.vision, picture.positions, dialect);
      Stages stages{{"pixel_values", picture.pixels},
                    {"vision.attn_mask", VisionMask(picture.positions)},
                    {"vision.patch_mask", PatchMask(*model.config.vision, picture.positions)},
                    {"vision.rope_cos", rope.cos},
                    {"vision.rope_sin", rope.sin}};
      const WeightSource weights = PictureWeights(model, picture, dialect, nullptr);
      last = VisionSteps(model.config, picture.positions, dialect, PoolerOf(dialect));
      for (const VisionStep& step : last) {
        ObserveReading observe(calibration);
        Executor executor(step.graph, &observe);
        std::map<std::string, Tensor> inputs;
        for (const auto& [name, stage] : step.inputs) inputs[name] = stages.at(stage);
        observe.Begin(sample);
        const auto results = executor.Run(inputs, weights);
        observe.End();
        for (const auto& [name, stage] : step.outputs) stages[stage] = results.at(name);
      }
    }
  }
  for (const VisionStep& step : last) calibration.Freeze(step.graph, model.Vision(dialect).Folded());
}

// The point on which a stage lies in the reference.
inline std::string PointOfStage(const std::string& stage, const VisionConfig& config) {
  if (stage == "vision.patch_embed") return VisionLayerInputPoint(0, kTico);
  if (stage == "vision.pooled") return PooledPoint();
  if (stage == "vision.last_hidden_state") return VisionTokensPoint(config, kTico);
  if (stage == "vision.projected") return ProjectedPoint();
  const int layer = std::stoi(stage.substr(std::string("vision.layers.").size()));
  return layer + 1 == config.num_layers ? PoolerInputPoint(config, kTico) : VisionLayerInputPoint(layer + 1, kTico);
}

}  // namespace circlet
