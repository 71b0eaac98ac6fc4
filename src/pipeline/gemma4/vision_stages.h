#pragma once

// The vision side of the model as stages. Pictures are items of their own; sequences fetch their features.

#include <map>
#include <mutex>
#include <vector>

#include "circlet/model/gemma4/vision.h"
#include "pipeline/gemma4/context.h"
#include "pipeline/phase.h"

namespace circlet::gemma4 {

// Masks and rotary tables of pictures, and the parameters that depend on them.
class PictureTables {
 public:
  // context.config.vision is set.
  explicit PictureTables(const Context& context)
      : context_(context),
        config_(*context.config.vision),
        weights_(
            config_, [&context](const std::string& name) { return context.weights.Stored(name); },
            context.GetDialect()) {}

  // "mask", "cos", "sin" of a picture's layout. May be asked for by several threads.
  Tensor Table(const Item& image, const std::string& which);
  // All parameters of the model, the patch projection folded.
  WeightSource Parameters() const { return weights_.Folded(); }
  // Position embeddings of a picture; `rounded`: as the rounded chain takes them. The reference rounds the position
  // table before it looks positions up.
  Tensor PositionEmbeddings(const Item& image, bool rounded) const;

 private:
  const Context& context_;
  const VisionConfig& config_;
  VisionWeights weights_;
  std::map<std::string, Tensor> tables_;  // by kind and layout
  std::mutex mutex_;
};

// Must outlive its stages.
class VisionStages {
 public:
  VisionStages(const Context& context, PictureTables& tables)
      : context_(context), config_(*context.config.vision), tables_(tables), chain_tables_(context.calibration) {}

  // Tables, patch embedder, encoder layers, pooler, projection. `pixels` by picture: they live as long as the patch
  // embedder's stage.
  std::vector<Stage> All(std::map<int, Tensor> pixels);

 private:
  Step MakeStep(std::string name, std::function<void(const BlockBuilder&, const Item&)> build) const;
  void AddTables(Step& step);
  std::span<const int64_t> PositionsOf(const Item& image) const { return context_.PictureOf(image.id).positions; }

  const Context& context_;
  const VisionConfig& config_;
  PictureTables& tables_;
  ChainTables chain_tables_;
};

}  // namespace circlet::gemma4
