#include "circlet/model/gemma4/vision.h"

#include <cmath>

#include "circlet/model/gemma4/blocks.h"
#include "model/gemma4/vision_parts.h"

namespace circlet {
namespace {

Builder Tower(const Builder& b) { return b.At(kVisionRoot); }

// The reference negates values (quantization.md B3), we negate sines.
bool NegatedSin(const Dialect& dialect) { return !dialect.rope_piece_points; }

// model.md 5, items 3 and 4; points of quantization.md 6.9.
ValueId SelfAttention(const Builder& b, const VisionConfig& config, ValueId x, VisionTables tables, LinearBlock linear,
                      const Dialect& dialect) {
  x = ReferencePoint(b, "hidden", x, dialect);
  tables.cos = ReferencePoint(b, "cos", tables.cos, dialect);
  tables.sin = ReferencePoint(b, "sin", tables.sin, dialect);
  const auto heads = [&](const char* name, int count) {
    return SplitHeads(b, linear(b.At(name), x, int64_t{count} * config.head_dim, dialect), count);
  };
  const auto rotated = [&](const std::string& letter, int count) {
    const ValueId normed =
        Norm(b.At(letter + "_norm"), heads((letter + "_proj").c_str(), count), config.rms_norm_eps, true, dialect);
    return HeadsFirst(b, Rotate(b, normed, tables.cos, tables.sin, letter, Rope{2, NegatedSin(dialect)}, dialect));
  };
  const ValueId query = rotated("q", config.num_heads);
  const ValueId key = rotated("k", config.kv_heads);
  const ValueId value =
      HeadsFirst(b, Norm(b.At("v_norm"), heads("v_proj", config.kv_heads), config.rms_norm_eps, false, dialect));
  const ValueId mask = ReferencePoint(b, "attn_mask", tables.mask, dialect);
  const Attention::Form form = dialect.explicit_k_transpose ? Attention::Form::kBatched : Attention::Form::kByHead;
  return linear(b.At("o_proj"), Attend(b, query, key, value, mask, form, dialect), config.hidden_size, dialect);
}

// x - bias, times scale, each a parameter of the tower.
ValueId Standardized(const Builder& tower, ValueId x, const VisionConfig& config) {
  const auto parameter = [&](const char* name) {
    return tower.Point(name, tower.graph().AddWeight(tower.Path(name), {config.hidden_size}, {}, -1));
  };
  const ValueId centered = tower.Point("minus_bias", tower.Add(Sub{}, {x, parameter("std_bias")}));
  return tower.Point("last_hidden_state", tower.Add(Mul{}, {centered, parameter("std_scale")}));
}

ValueId Rank2(const Builder& b, ValueId x) {
  const Shape& shape = b.ShapeOf(x);
  return shape.Rank() == 2 ? x : b.Reshape(x, {shape[1], shape[2]});
}

}  // namespace

// ---- Parts --------------------------------------------------------------------------------------------------------

// h = x (2 W)^T - sum_k W + positions (quantization.md 6.8).
ValueId PatchEmbeddings(const Builder& b, const VisionConfig& config, ValueId pixels, const Dialect& dialect) {
  const Builder embedder = Tower(b).At("patch_embedder");
  const int64_t patches = b.ShapeOf(pixels)[1];
  ValueId x = embedder.Point("act_in", pixels);
  const Builder projection = embedder.At("input_proj");
  x = ReferencePoint(projection, "act_in", x, dialect);
  std::vector<ValueId> operands{x, projection.Weight("weight", {config.hidden_size, config.PatchValues()}, /*axis=*/0)};
  if (dialect.duplicate_points) {
    operands.push_back(b.graph().AddWeight(projection.Path("bias"), {config.hidden_size}, {}, -1));
    // Only the table's range is needed here: its rows come in as position_embeddings.
    embedder.Weight("position_embedding_table", {2, config.position_embedding_size, config.hidden_size});
  }
  ValueId hidden = projection.Point("act_out", b.Add(FullyConnected{}, std::move(operands)));
  hidden = ReferencePoint(embedder, "hidden_states", hidden, dialect);
  const ValueId positions = embedder.Point(
      "position_embeddings",
      b.graph().AddWeight(VisionWeights::PositionEmbeddingsName(), {1, patches, config.hidden_size}, {}, -1));
  hidden = embedder.Point("output", b.Add(Add{}, {hidden, positions}));
  return ReferencePoint(Tower(b).At("encoder"), "act_in", hidden, dialect);
}

ValueId VisionLayer(const Builder& b, const VisionConfig& config, int index, ValueId hidden, const VisionTables& tables,
                    const Dialect& dialect) {
  const Builder encoder = Tower(b).At("encoder");
  const Builder layer = encoder.At(fmt::format("layers.{}", index));
  const LinearBlock linear = config.use_clipped_linears ? ClippedLinear : UnclippedLinear;
  const auto norm = [&](const char* name, ValueId x) {
    return Norm(layer.At(name), x, config.rms_norm_eps, true, dialect);
  };
  const auto residual = [&](const char* point, ValueId x, ValueId branch) {
    return layer.Point(point, b.Add(Add{}, {x, branch}));
  };
  const ValueId h0 = ReferencePoint(layer, "act_in", hidden, dialect);
  const ValueId attention =
      SelfAttention(layer.At("self_attn"), config, norm("input_layernorm", h0), tables, linear, dialect);
  const ValueId h1 = residual("attn_residual_out", h0, norm("post_attention_layernorm", attention));
  const ValueId mlp =
      Mlp(layer.At("mlp"), norm("pre_feedforward_layernorm", h1), config.intermediate_size, dialect, linear);
  const ValueId h2 = residual("mlp_residual_out", h1, norm("post_feedforward_layernorm", mlp));
  return index + 1 == config.num_layers ? ReferencePoint(encoder, "encoder_out", h2, dialect) : h2;
}

ValueId PooledTokens(const Builder& b, const VisionConfig& config, std::span<const int64_t> positions, ValueId hidden,
                     VisionUse use, const Dialect& dialect) {
  const Builder pooler = Tower(b).At("pooler");
  const PatchLayout layout = LayoutOf(config, positions);
  if (dialect.duplicate_points) {
    hidden = pooler.Point("act_in", hidden);
    if (use == VisionUse::kRun && layout.valid < layout.patches) {
      std::vector<float> real(layout.patches, 0.0f);
      std::fill_n(real.begin(), layout.valid, 1.0f);
      hidden = b.Add(Mul{}, {hidden, b.Constant(Tensor::Of<float>({1, layout.patches, 1}, real))});
    }
    hidden = pooler.Point("pool_in", hidden);
  }
  const ValueId weight = pooler.Point("pool_weight", b.Constant(PoolMatrix(config, positions)));
  const ValueId mean = pooler.Point("pool_matmul_out", b.Add(BatchMatMul{}, {weight, hidden}));
  const float root = std::sqrt(static_cast<float>(config.hidden_size));
  const ValueId factor = pooler.Point("root_hidden_size", b.Constant(Tensor::Scalar(root)));
  return pooler.Point("pool_out", b.Add(Mul{}, {mean, factor}));
}

// Rank 3 as long as possible in our dialect: the Circle runtimes take RMS_NORM of rank 3 and 4 only (quantization.md
// A4).
ValueId FilledSlots(const Builder& b, const VisionConfig& config, const PatchLayout& layout, ValueId pooled,
                    const Dialect& dialect) {
  const Builder tower = Tower(b);
  const auto size = [](int64_t value) { return static_cast<int32_t>(value); };
  ValueId x = pooled;
  if (layout.tokens < layout.slots) x = b.Add(Slice{{0, 0, 0}, {1, size(layout.tokens), config.hidden_size}}, {x});
  if (dialect.duplicate_points) x = tower.Point("strip_padding", Rank2(b, x));
  if (config.standardize) return Standardized(tower, x, config);
  return ReferencePoint(tower, "last_hidden_state", x, dialect);
}

ValueId Projected(const Builder& b, const Gemma4Config& config, ValueId x, const Dialect& dialect) {
  const Builder embedder = b.At(kProjectorRoot);
  x = Norm(embedder.At("embedding_pre_projection_norm"), x, config.vision->rms_norm_eps, false, dialect);
  return Rank2(b, Linear(embedder.At("embedding_projection"), x, config.text.hidden_size, dialect));
}

VisionTables ConstantTables(const Builder& b, const VisionConfig& config, std::span<const int64_t> positions,
                            const Dialect& dialect) {
  const RopeTables rope = VisionRopeTables(config, positions, dialect);
  const auto on_grid = [&](const std::string& point, Tensor tensor) {
    return b.Boundary(point, b.Constant(std::move(tensor)));
  };
  return {on_grid(VisionMaskPoint(), VisionMask(positions)), on_grid(VisionRopePoint(true), rope.cos),
          on_grid(VisionRopePoint(false), rope.sin)};
}

ValueId EncodedPatches(const Builder& b, const VisionConfig& config, std::span<const int64_t> positions, ValueId hidden,
                       const Dialect& dialect) {
  const VisionTables tables = ConstantTables(b, config, positions, dialect);
  for (int i = 0; i < config.num_layers; ++i) hidden = VisionLayer(b, config, i, hidden, tables, dialect);
  return hidden;
}

ValueId VisionTokens(const Builder& b, const VisionConfig& config, std::span<const int64_t> positions, ValueId pixels,
                     VisionUse use, const Dialect& dialect) {
  const ValueId patches = PatchEmbeddings(b, config, pixels, dialect);
  const ValueId encoded = EncodedPatches(b, config, positions, patches, dialect);
  const ValueId pooled = PooledTokens(b, config, positions, encoded, use, dialect);
  return FilledSlots(b, config, LayoutOf(config, positions), pooled, dialect);
}

RopeTables VisionRopeTables(const VisionConfig& config, std::span<const int64_t> positions, const Dialect& dialect) {
  return VisionRopeTables(config.rope_theta, config.head_dim, positions, NegatedSin(dialect));
}

// ---- Names --------------------------------------------------------------------------------------------------------

std::string VisionMaskPoint() { return fmt::format("{}.encoder.attention_mask", kVisionRoot); }

std::string VisionRopePoint(bool cosine) {
  return fmt::format("{}.encoder.position_embeddings_{}", kVisionRoot, cosine ? "cos" : "sin");
}

std::string VisionLayerInputPoint(int layer, const Dialect& dialect) {
  if (dialect.duplicate_points) return fmt::format("{}.encoder.layers.{}.act_in", kVisionRoot, layer);
  if (layer == 0) return fmt::format("{}.patch_embedder.output", kVisionRoot);
  return fmt::format("{}.encoder.layers.{}.mlp_residual_out", kVisionRoot, layer - 1);
}

std::string PoolerInputPoint(const VisionConfig& config, const Dialect& dialect) {
  if (dialect.duplicate_points) return fmt::format("{}.encoder.encoder_out", kVisionRoot);
  return VisionLayerInputPoint(config.num_layers, dialect);
}

std::string PooledPoint() { return fmt::format("{}.pooler.pool_out", kVisionRoot); }

std::string VisionTokensPoint(const VisionConfig& config, const Dialect& dialect) {
  const bool own = config.standardize || dialect.duplicate_points;
  return own ? fmt::format("{}.last_hidden_state", kVisionRoot) : PooledPoint();
}

std::string ProjectedPoint() { return fmt::format("{}.embedding_projection.act_out", kProjectorRoot); }

// ---- Graphs -------------------------------------------------------------------------------------------------------

namespace {

ValueId PixelInput(const Builder& b, const VisionConfig& config, int64_t patches) {
  return b.Input("pixel_values", {1, patches, config.PatchValues()});
}

ValueId HiddenInput(const Builder& b, const VisionConfig& config, int64_t rows, const std::string& point) {
  return b.Boundary(point, b.Input("hidden", {1, rows, config.hidden_size}));
}

}  // namespace

void BuildVisionTables(const Builder& b, const VisionConfig& config, int64_t patches, const Dialect& dialect) {
  const auto pass = [&](const char* name, const std::string& point, Shape shape) {
    b.Output(name, b.Point(point, b.Input(name, std::move(shape))));
  };
  pass("mask", VisionMaskPoint(), {1, 1, patches, patches});
  pass("cos", VisionRopePoint(true), {1, patches, config.head_dim});
  pass("sin", VisionRopePoint(false), {1, patches, config.head_dim});
  if (dialect.observe_masked_keys) return;
  const std::vector<float> both{0.0f, kMaskFill};
  b.Output("mask_values", b.Point(VisionMaskPoint(), b.Constant(Tensor::Of<float>({1, 1, 1, 2}, both))));
}

void BuildPatchEmbedder(const Builder& b, const VisionConfig& config, int64_t patches, const Dialect& dialect) {
  b.Output("hidden", PatchEmbeddings(b, config, PixelInput(b, config, patches), dialect));
}

namespace {

VisionTables TableInputs(const Builder& b, const VisionConfig& config, int64_t patches) {
  return {.mask = b.Boundary(VisionMaskPoint(), b.Input("mask", {1, 1, patches, patches})),
          .cos = b.Boundary(VisionRopePoint(true), b.Input("cos", {1, patches, config.head_dim})),
          .sin = b.Boundary(VisionRopePoint(false), b.Input("sin", {1, patches, config.head_dim}))};
}

}  // namespace

void BuildVisionLayer(const Builder& b, const VisionConfig& config, int layer, int64_t patches,
                      const Dialect& dialect) {
  ValueId hidden = b.Input("hidden", {1, patches, config.hidden_size});
  // The reference's layer rounds its input at a point of its own.
  if (!dialect.duplicate_points) hidden = b.Boundary(VisionLayerInputPoint(layer, dialect), hidden);
  b.Output("hidden", VisionLayer(b, config, layer, hidden, TableInputs(b, config, patches), dialect));
}

void BuildVisionAttention(const Builder& b, const VisionConfig& config, int layer, int64_t patches,
                          const Dialect& dialect) {
  const Builder scope = Tower(b).At("encoder").At(fmt::format("layers.{}", layer));
  ValueId hidden = b.Input("hidden", {1, patches, config.hidden_size});
  if (!dialect.duplicate_points) hidden = b.Boundary(scope.At("input_layernorm").Path("act_out"), hidden);
  const LinearBlock linear = config.use_clipped_linears ? ClippedLinear : UnclippedLinear;
  b.Output("hidden",
           SelfAttention(scope.At("self_attn"), config, hidden, TableInputs(b, config, patches), linear, dialect));
}

void BuildVisionPooler(const Builder& b, const VisionConfig& config, std::span<const int64_t> positions, VisionUse use,
                       const Dialect& dialect) {
  const ValueId hidden = HiddenInput(b, config, LayoutOf(config, positions).patches, PoolerInputPoint(config, dialect));
  b.Output("pooled", PooledTokens(b, config, positions, hidden, use, dialect));
}

void BuildVisionTokens(const Builder& b, const VisionConfig& config, std::span<const int64_t> positions,
                       const Dialect& dialect) {
  const PatchLayout layout = LayoutOf(config, positions);
  const ValueId pooled = b.Boundary(PooledPoint(), b.Input("pooled", {1, layout.slots, config.hidden_size}));
  b.Output("last_hidden_state", Rank2(b, FilledSlots(b, config, layout, pooled, dialect)));
}

void BuildMultimodalEmbedder(const Builder& b, const Gemma4Config& config, int64_t tokens, const Dialect& dialect) {
  const VisionConfig& vision = *config.vision;
  ValueId hidden = b.Boundary(VisionTokensPoint(vision, dialect), b.Input("hidden", {tokens, vision.hidden_size}));
  if (!dialect.duplicate_points) hidden = b.Reshape(hidden, {1, tokens, vision.hidden_size});
  b.Output("projected", Projected(b, config, hidden, dialect));
}

void BuildVisionPost(const Builder& b, const Gemma4Config& config, std::span<const int64_t> positions,
                     const Dialect& dialect) {
  const VisionConfig& vision = *config.vision;
  const PatchLayout layout = LayoutOf(vision, positions);
  const ValueId pooled = b.Boundary(PooledPoint(), b.Input("pooled", {1, layout.slots, vision.hidden_size}));
  const ValueId tokens = FilledSlots(b, vision, layout, pooled, dialect);
  b.Output("projected", Projected(b, config, tokens, dialect));
  b.Output("last_hidden_state", Rank2(b, tokens));
}

void BuildVisionEncoder(const Builder& b, const VisionConfig& config, std::span<const int64_t> positions,
                        const Dialect& dialect) {
  const std::string point =
      dialect.duplicate_points ? fmt::format("{}.encoder.act_in", kVisionRoot) : VisionLayerInputPoint(0, dialect);
  const ValueId hidden = HiddenInput(b, config, LayoutOf(config, positions).patches, point);
  b.Output("hidden", EncodedPatches(b, config, positions, hidden, dialect));
}

void BuildVisionModel(const Builder& b, const VisionConfig& config, std::span<const int64_t> positions, VisionUse use,
                      const Dialect& dialect) {
  const ValueId pixels = PixelInput(b, config, LayoutOf(config, positions).patches);
  b.Output("last_hidden_state", Rank2(b, VisionTokens(b, config, positions, pixels, use, dialect)));
}

void BuildVisionPrefill(const Builder& b, const Gemma4Config& config, std::span<const int64_t> positions, VisionUse use,
                        const Dialect& dialect) {
  const ValueId pixels = PixelInput(b, *config.vision, LayoutOf(*config.vision, positions).patches);
  b.Output("projected",
           Projected(b, config, VisionTokens(b, *config.vision, positions, pixels, use, dialect), dialect));
}

std::vector<Point> VisionPoints(const Gemma4Config& config, const Dialect& dialect) {
  const VisionConfig& vision = *config.vision;
  const int64_t k = vision.pooling_kernel_size;
  std::vector<int64_t> positions;
  for (int64_t i = 0; i < k * k; ++i) positions.insert(positions.end(), {i % k, i / k});
  Graph graph;
  const Builder b(graph);
  BuildVisionTables(b, vision, k * k, dialect);
  BuildVisionPrefill(b, config, positions, VisionUse::kRun, dialect);
  std::vector<Point> points = PointsOf(graph);
  // Boundaries repeat points that their producers list.
  std::erase_if(points, [](const Point& point) { return point.use == PointUse::kBoundary; });
  return points;
}

}  // namespace circlet
