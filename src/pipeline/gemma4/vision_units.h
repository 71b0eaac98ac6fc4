#pragma once

// The vision side of the model as export units, in the layout of the verification sample's one picture.

#include <vector>

#include "circlet/preprocess/image.h"
#include "pipeline/gemma4/context.h"
#include "pipeline/gemma4/vision_stages.h"

namespace circlet::gemma4 {

// Must outlive its units.
class VisionUnits {
 public:
  // The verification sample has one picture, of these pixels.
  VisionUnits(const Context& context, PictureTables& tables, Tensor pixels);

  // Layer by layer; pixels to projected tokens in one; encoder, model and embedder as parts.
  std::vector<UnitSpec> Split() const;
  UnitSpec Prefill() const;
  std::vector<UnitSpec> Parts() const;
  // text and picture features -> fused sequence; ids and pixels -> last hidden state (dialects without fusion_points).
  UnitSpec Fusion() const;
  UnitSpec Full() const;
  // What a host gives the split units: "mask", "cos", "sin".
  std::map<std::string, Tensor> Tables() const;

 private:
  // Its inputs and outputs are values of the picture.
  UnitSpec OfPicture(std::string name, std::function<void(const BlockBuilder&)> build) const;
  // A graph of several stages: its output is theirs, unless it has points that they lack (whole_graph_points).
  UnitSpec Whole(std::string name, std::function<void(const BlockBuilder&)> build, const char* output,
                 std::string stages_key) const;
  UnitValue Pixels() const {
    return Given([this] { return PixelValues(pixels_); });
  }
  UnitValue Table(const char* which) const {
    return Given([this, which] { return tables_.Table(picture_, which); });
  }

  const Context& context_;
  const VisionConfig& config_;
  PictureTables& tables_;
  const Item& verify_;
  const Item& picture_;
  const std::vector<int64_t>& positions_;  // of its patches
  const std::vector<int64_t>& places_;     // of its tokens in the sequence
  Tensor pixels_;
};

}  // namespace circlet::gemma4
