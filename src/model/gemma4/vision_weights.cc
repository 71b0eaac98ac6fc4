#include <algorithm>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"
#include "circlet/model/gemma4/vision.h"
#include "circlet/quant/affine.h"
#include "model/gemma4/vision_parts.h"
#include "ops/codes.h"

namespace circlet {
namespace {

std::string InputProjection() { return fmt::format("{}.patch_embedder.input_proj.weight", kVisionRoot); }
std::string InputBias() { return fmt::format("{}.patch_embedder.input_proj.bias", kVisionRoot); }

}  // namespace

PatchLayout LayoutOf(const VisionConfig& config, std::span<const int64_t> positions) {
  CIRCLET_CHECK(positions.size() % 2 == 0, "{} values are no (x, y) pairs", positions.size());
  const int64_t patches = static_cast<int64_t>(positions.size()) / 2;
  const int64_t k = config.pooling_kernel_size;
  if (patches % (k * k) != 0)
    Fail("image_position_ids: {} patches are no multiple of {} (pooling kernel {} x {}); pad them with (-1,-1)",
         patches, k * k, k, k);
  PatchLayout layout{.patches = patches, .slots = patches / (k * k)};
  for (int64_t i = 0; i < patches; ++i) {
    const int64_t x = positions[2 * i], y = positions[2 * i + 1];
    if (x == -1 && y == -1) continue;
    if (x < 0 || y < 0 || x >= config.position_embedding_size || y >= config.position_embedding_size)
      Fail(
          "image_position_ids: patch {} is at ({},{}); both must lie in [0,{}) (the position table), or both be -1 for "
          "padding",
          i, x, y, config.position_embedding_size);
    if (layout.valid != i)
      Fail("image_position_ids: patch {} at ({},{}) stands after padding; real patches come first", i, x, y);
    layout.valid = i + 1;
    layout.grid_width = std::max(layout.grid_width, x + 1);
  }
  if (layout.valid == 0) Fail("image_position_ids: all {} patches are padding; an image has at least one", patches);

  std::vector<bool> filled(layout.slots, false);
  for (int64_t i = 0; i < layout.valid; ++i) {
    const int64_t x = positions[2 * i], y = positions[2 * i + 1];
    const int64_t slot = x / k + layout.grid_width / k * (y / k);
    if (slot >= layout.slots)
      Fail(
          "image_position_ids: patch {} at ({},{}) falls into soft token {} of {}; grid and number of patches do not "
          "belong together",
          i, x, y, slot, layout.slots);
    filled[slot] = true;
  }
  layout.tokens = std::find(filled.begin(), filled.end(), false) - filled.begin();
  const auto later = std::find(filled.begin() + layout.tokens, filled.end(), true);
  if (later != filled.end())
    Fail("image_position_ids: no patch falls into soft token {}, but some do into {}; the grid must be whole",
         layout.tokens, later - filled.begin());
  return layout;
}

Tensor PoolMatrix(const VisionConfig& config, std::span<const int64_t> positions) {
  const PatchLayout layout = LayoutOf(config, positions);
  const int64_t k = config.pooling_kernel_size;
  Tensor matrix(TensorType{DType::kF32, {1, layout.slots, layout.patches}});
  for (int64_t i = 0; i < layout.valid; ++i) {
    const int64_t slot = positions[2 * i] / k + layout.grid_width / k * (positions[2 * i + 1] / k);
    matrix.F32()[slot * layout.patches + i] = 1.0f / static_cast<float>(k * k);
  }
  return matrix;
}

Tensor PatchMask(const VisionConfig& config, std::span<const int64_t> positions) {
  const PatchLayout layout = LayoutOf(config, positions);
  Tensor mask(TensorType{DType::kF32, {1, layout.patches, 1}});
  std::fill_n(mask.F32().begin(), layout.valid, 1.0f);
  return mask;
}

struct VisionWeights::State {
  VisionConfig config;
  WeightSource stored;
  Dialect dialect;

  Tensor Float(const std::string& name) const {
    const Tensor tensor = stored(name);
    if (tensor.Grid() == nullptr) return ToF32(tensor);
    const Tensor values = Tensor::Uninitialized({DType::kF32, tensor.GetShape()});
    Dequantize(tensor, *tensor.Grid(), 0, values.F32());
    return values;
  }

  // Of codes the scales are doubled.
  Tensor FoldedProjection() const {
    const Tensor projection = stored(InputProjection());
    if (projection.Grid() != nullptr) {
      auto grid = std::make_shared<QParams>(*projection.Grid());
      for (float& scale : grid->scale) scale *= 2.0f;
      return projection.WithGrid(std::shared_ptr<const QParams>(std::move(grid)));
    }
    const Tensor doubled = ToF32(projection).Clone();
    for (float& value : doubled.F32()) value *= 2.0f;
    return doubled;
  }

  Tensor Bias() const {
    const Tensor weight = Float(InputProjection());
    const int64_t columns = weight.GetShape()[1];
    Tensor bias(TensorType{DType::kF32, {weight.GetShape()[0]}});
    for (int64_t row = 0; row < bias.Elements(); ++row) {
      double sum = 0;
      for (const float value : weight.F32().subspan(row * columns, columns)) sum += value;
      bias.F32()[row] = static_cast<float>(-sum);
    }
    return bias;
  }
};

VisionWeights::VisionWeights(const VisionConfig& config, WeightSource stored, const Dialect& dialect)
    : state_(std::make_shared<State>(State{config, std::move(stored), dialect})) {}

std::string VisionWeights::PositionEmbeddingsName() {
  return fmt::format("{}.patch_embedder.position_embeddings", kVisionRoot);
}

std::string VisionWeights::PositionTablePoint() {
  return fmt::format("{}.patch_embedder.position_embedding_table", kVisionRoot);
}

Tensor VisionWeights::PositionEmbeddings(std::span<const int64_t> positions, const QParams* table_grid) const {
  const Tensor stored = ToF32(state_->stored(PositionTablePoint()));
  const Tensor table =
      table_grid == nullptr ? stored : FakeQuantizeWeight(stored, *table_grid, state_->dialect.rounding);
  const int64_t patches = LayoutOf(state_->config, positions).patches;
  const int64_t rows = table.GetShape()[1], width = table.GetShape()[2];
  Tensor result(TensorType{DType::kF32, {1, patches, width}});
  const Tensor bias = PatchBiasIsOperand(state_->dialect) ? Tensor() : state_->Bias();
  for (int64_t i = 0; i < patches; ++i) {
    float* out = result.F32().data() + i * width;
    if (positions[2 * i] >= 0) {
      const float* at_x = table.F32().data() + positions[2 * i] * width;
      const float* at_y = table.F32().data() + (rows + positions[2 * i + 1]) * width;
      for (int64_t j = 0; j < width; ++j) out[j] = at_x[j] + at_y[j];
    }
    for (int64_t j = 0; j < width && !bias.Empty(); ++j) out[j] += bias.F32()[j];
  }
  return result;
}

WeightSource VisionWeights::Folded() const {
  return [state = state_](const std::string& name) {
    if (name == InputProjection()) return state->FoldedProjection();
    if (name == InputBias()) return state->Bias();
    return state->stored(name);
  };
}

WeightSource VisionWeights::For(std::span<const int64_t> positions, const QParams* table_grid) const {
  return [embeddings = PositionEmbeddings(positions, table_grid), folded = Folded()](const std::string& name) {
    return name == PositionEmbeddingsName() ? embeddings : folded(name);
  };
}

}  // namespace circlet
