#include "circlet/model/gemma4/vision.h"

#include <cmath>

#include "circlet/model/gemma4/blocks.h"
#include "model/gemma4/vision_parts.h"

namespace circlet {
namespace {

BlockBuilder Tower(const BlockBuilder& b) { return b.At(kVisionRoot); }

// model.md 5, items 3 and 4; points of quantization.md 6.9.
ValueId SelfAttention(const BlockBuilder& b, const VisionConfig& config, ValueId x, VisionTables tables,
                      LinearBlock linear) {
  x = b.RequantizingPoint("hidden", x);
  tables.cos = b.RequantizingPoint("cos", tables.cos);
  tables.sin = b.RequantizingPoint("sin", tables.sin);
  const auto heads = [&](const char* name, int count) {
    return SplitHeads(b, linear(b.At(name), x, int64_t{count} * config.head_dim), count);
  };
  const auto rotated = [&](const std::string& letter, int count) {
    const ValueId normed =
        Norm(b.At(letter + "_norm"), heads((letter + "_proj").c_str(), count), config.rms_norm_eps, true);
    return HeadsFirst(b,
                      Rotate(b, normed, tables.cos, tables.sin, letter, Rope{2, !b.GetDialect().negated_rope_values}));
  };
  const ValueId query = rotated("q", config.num_heads);
  const ValueId key = rotated("k", config.kv_heads);
  const ValueId value =
      HeadsFirst(b, Norm(b.At("v_norm"), heads("v_proj", config.kv_heads), config.rms_norm_eps, false));
  const ValueId mask = b.RequantizingPoint("attn_mask", tables.mask);
  const Attention::Form form =
      b.GetDialect().batched_vision_heads ? Attention::Form::kBatched : Attention::Form::kByHead;
  return linear(b.At("o_proj"), Attend(b, query, key, value, mask, form), config.hidden_size);
}

// x - bias, times scale, each a parameter of the tower.
ValueId Standardized(const BlockBuilder& tower, ValueId x, const VisionConfig& config) {
  const auto parameter = [&](const char* name, WeightKind kind) {
    return tower.Point(name, tower.FloatWeight(name, {config.hidden_size}, kind));
  };
  const ValueId centered = tower.Point("minus_bias", tower.Add(Sub{}, {x, parameter("std_bias", WeightKind::kBias)}));
  return tower.Point("last_hidden_state", tower.Add(Mul{}, {centered, parameter("std_scale", WeightKind::kScale)}));
}

ValueId Rank2(const BlockBuilder& b, ValueId x) {
  const Shape& shape = b.ShapeOf(x);
  return shape.Rank() == 2 ? x : b.Reshape(x, {shape[1], shape[2]});
}

}  // namespace

// ---- Parts --------------------------------------------------------------------------------------------------------

bool PatchBiasIsOperand(const Dialect& dialect) {
  static const std::string output = fmt::format("{}.patch_embedder.input_proj.act_out", kVisionRoot);
  return dialect.patch_bias_operand || (dialect.given != nullptr && dialect.given->outputs.contains(output));
}

// h = x (2 W)^T - sum_k W + positions (quantization.md 6.8).
ValueId PatchEmbeddings(const BlockBuilder& b, const VisionConfig& config, ValueId pixels) {
  const BlockBuilder embedder = Tower(b).At("patch_embedder");
  const int64_t patches = b.ShapeOf(pixels)[1];
  ValueId x = embedder.Point("act_in", pixels);
  const BlockBuilder projection = embedder.At("input_proj");
  x = projection.RequantizingPoint("act_in", x);
  std::vector<ValueId> operands{
      x, projection.Weight("weight", {config.hidden_size, config.PatchValues()}, WeightKind::kPatchProjection)};
  if (PatchBiasIsOperand(b.GetDialect()))
    operands.push_back(projection.FloatWeight("bias", {config.hidden_size}, WeightKind::kBias));
  // Only the table's range is needed here: its rows come in as position_embeddings.
  if (b.GetDialect().position_table_grid)
    embedder.Weight("position_embedding_table", {2, config.position_embedding_size, config.hidden_size},
                    WeightKind::kPositionTable);
  ValueId hidden = projection.Point("act_out", b.Add(FullyConnected{}, std::move(operands)));
  hidden = embedder.RequantizingPoint("hidden_states", hidden);
  const ValueId positions = embedder.Point(
      "position_embeddings",
      embedder.FloatWeight("position_embeddings", {1, patches, config.hidden_size}, WeightKind::kPositionTable));
  hidden = embedder.Point("output", b.Add(Add{}, {hidden, positions}));
  return Tower(b).At("encoder").RequantizingPoint("act_in", hidden);
}

ValueId VisionLayer(const BlockBuilder& b, const VisionConfig& config, int index, ValueId hidden,
                    const VisionTables& tables) {
  const BlockBuilder encoder = Tower(b).At("encoder");
  const BlockBuilder layer = encoder.At(fmt::format("layers.{}", index));
  const LinearBlock linear = config.use_clipped_linears ? ClippedLinear : UnclippedLinear;
  const auto norm = [&](const char* name, ValueId x) { return Norm(layer.At(name), x, config.rms_norm_eps, true); };
  const auto residual = [&](const char* point, ValueId x, ValueId branch) {
    return layer.Point(point, b.Add(Add{}, {x, branch}));
  };
  const ValueId h0 = layer.RequantizingPoint("act_in", hidden);
  const ValueId attention = SelfAttention(layer.At("self_attn"), config, norm("input_layernorm", h0), tables, linear);
  const ValueId h1 = residual("attn_residual_out", h0, norm("post_attention_layernorm", attention));
  const ValueId mlp = Mlp(layer.At("mlp"), norm("pre_feedforward_layernorm", h1), config.intermediate_size, linear);
  const ValueId h2 = residual("mlp_residual_out", h1, norm("post_feedforward_layernorm", mlp));
  return index + 1 == config.num_layers ? encoder.RequantizingPoint("encoder_out", h2) : h2;
}

ValueId PooledTokens(const BlockBuilder& b, const VisionConfig& config, std::span<const int64_t> positions,
                     ValueId hidden, ValueId patch_mask) {
  const BlockBuilder pooler = Tower(b).At("pooler");
  hidden = pooler.RequantizingPoint("act_in", hidden);
  if (patch_mask >= 0) hidden = b.Add(Mul{}, {hidden, patch_mask});
  hidden = pooler.RequantizingPoint("pool_in", hidden);
  const ValueId weight = pooler.Point("pool_weight", b.Constant(PoolMatrix(config, positions)));
  const ValueId mean = pooler.Point("pool_matmul_out", b.Add(BatchMatMul{}, {weight, hidden}));
  const float root = std::sqrt(static_cast<float>(config.hidden_size));
  const ValueId factor = pooler.Point("root_hidden_size", b.Constant(Tensor::Scalar(root)));
  return pooler.Point("pool_out", b.Add(Mul{}, {mean, factor}));
}

// Rank 3 as long as possible, if the dialect lets it: the Circle runtimes take RMS_NORM of rank 3 and 4 only
// (quantization.md A4).
ValueId FilledSlots(const BlockBuilder& b, const VisionConfig& config, const PatchLayout& layout, ValueId pooled) {
  const BlockBuilder tower = Tower(b);
  const auto size = [](int64_t value) { return static_cast<int32_t>(value); };
  ValueId x = pooled;
  if (layout.tokens < layout.slots) x = b.Add(Slice{{0, 0, 0}, {1, size(layout.tokens), config.hidden_size}}, {x});
  if (b.GetDialect().rank2_soft_tokens) x = Rank2(b, x);
  x = tower.RequantizingPoint("strip_padding", x);
  if (config.standardize) return Standardized(tower, x, config);
  return tower.RequantizingPoint("last_hidden_state", x);
}

ValueId Projected(const BlockBuilder& b, const Gemma4Config& config, ValueId x) {
  const BlockBuilder embedder = b.At(kProjectorRoot);
  x = Norm(embedder.At("embedding_pre_projection_norm"), x, config.vision->rms_norm_eps, false);
  return Rank2(b, Linear(embedder.At("embedding_projection"), x, config.text.hidden_size));
}

VisionTables ConstantTables(const BlockBuilder& b, const VisionConfig& config, std::span<const int64_t> positions) {
  const RopeTables rope = VisionRopeTables(config, positions, b.GetDialect());
  const auto on_grid = [&](const std::string& point, Tensor tensor) {
    return b.Boundary(point, b.Constant(std::move(tensor)));
  };
  return {on_grid(VisionMaskPoint(), VisionMask(positions)), on_grid(VisionRopePoint(true), rope.cos),
          on_grid(VisionRopePoint(false), rope.sin)};
}

ValueId EncodedPatches(const BlockBuilder& b, const VisionConfig& config, std::span<const int64_t> positions,
                       ValueId hidden) {
  const VisionTables tables = ConstantTables(b, config, positions);
  for (int i = 0; i < config.num_layers; ++i) hidden = VisionLayer(b, config, i, hidden, tables);
  return hidden;
}

ValueId VisionTokens(const BlockBuilder& b, const VisionConfig& config, std::span<const int64_t> positions,
                     ValueId pixels) {
  const ValueId patches = PatchEmbeddings(b, config, pixels);
  const ValueId encoded = EncodedPatches(b, config, positions, patches);
  const ValueId pooled = PooledTokens(b, config, positions, encoded);
  return FilledSlots(b, config, LayoutOf(config, positions), pooled);
}

RopeTables VisionRopeTables(const VisionConfig& config, std::span<const int64_t> positions, const Dialect& dialect) {
  return VisionRopeTables(config.rope_theta, config.head_dim, positions, !dialect.negated_rope_values);
}

// ---- Names --------------------------------------------------------------------------------------------------------

std::string VisionMaskPoint() { return fmt::format("{}.encoder.attention_mask", kVisionRoot); }

std::string VisionRopePoint(bool cosine) {
  return fmt::format("{}.encoder.position_embeddings_{}", kVisionRoot, cosine ? "cos" : "sin");
}

std::string VisionLayerInputPoint(int layer, const Dialect& dialect) {
  if (dialect.requantizing_points) return fmt::format("{}.encoder.layers.{}.act_in", kVisionRoot, layer);
  if (layer == 0) return fmt::format("{}.patch_embedder.output", kVisionRoot);
  return fmt::format("{}.encoder.layers.{}.mlp_residual_out", kVisionRoot, layer - 1);
}

std::string PoolerInputPoint(const VisionConfig& config, const Dialect& dialect) {
  if (dialect.requantizing_points) return fmt::format("{}.encoder.encoder_out", kVisionRoot);
  return VisionLayerInputPoint(config.num_layers, dialect);
}

std::string PooledPoint() { return fmt::format("{}.pooler.pool_out", kVisionRoot); }

std::string VisionTokensPoint(const VisionConfig& config, const Dialect& dialect) {
  const bool own = config.standardize || dialect.requantizing_points;
  return own ? fmt::format("{}.last_hidden_state", kVisionRoot) : PooledPoint();
}

std::string ProjectedPoint() { return fmt::format("{}.embedding_projection.act_out", kProjectorRoot); }

// ---- Graphs -------------------------------------------------------------------------------------------------------

namespace {

ValueId PixelInput(const BlockBuilder& b, const VisionConfig& config, int64_t patches) {
  return b.Input("pixel_values", {1, patches, config.PatchValues()});
}

ValueId HiddenInput(const BlockBuilder& b, const VisionConfig& config, int64_t rows, const std::string& point) {
  return b.Boundary(point, b.Input("hidden", {1, rows, config.hidden_size}));
}

}  // namespace

void BuildVisionTables(const BlockBuilder& b, const VisionConfig& config, int64_t patches) {
  const auto pass = [&](const char* name, const std::string& point, Shape shape) {
    b.Output(name, b.Point(point, b.Input(name, std::move(shape))));
  };
  pass("mask", VisionMaskPoint(), {1, 1, patches, patches});
  pass("cos", VisionRopePoint(true), {1, patches, config.head_dim});
  pass("sin", VisionRopePoint(false), {1, patches, config.head_dim});
  if (b.GetDialect().observed_mask_range) return;
  const std::vector<float> both{0.0f, kMaskFill};
  b.Output("mask_values", b.Point(VisionMaskPoint(), b.Constant(Tensor::Of<float>({1, 1, 1, 2}, both))));
}

void BuildPatchEmbedder(const BlockBuilder& b, const VisionConfig& config, int64_t patches) {
  b.Output("hidden", PatchEmbeddings(b, config, PixelInput(b, config, patches)));
}

namespace {

VisionTables TableInputs(const BlockBuilder& b, const VisionConfig& config, int64_t patches) {
  return {.mask = b.Boundary(VisionMaskPoint(), b.Input("mask", {1, 1, patches, patches})),
          .cos = b.Boundary(VisionRopePoint(true), b.Input("cos", {1, patches, config.head_dim})),
          .sin = b.Boundary(VisionRopePoint(false), b.Input("sin", {1, patches, config.head_dim}))};
}

}  // namespace

void BuildVisionLayer(const BlockBuilder& b, const VisionConfig& config, int layer, int64_t patches) {
  ValueId hidden = b.Input("hidden", {1, patches, config.hidden_size});
  // With requantizing points the layer begins with one of its own.
  const Dialect& dialect = b.GetDialect();
  if (!dialect.requantizing_points) hidden = b.Boundary(VisionLayerInputPoint(layer, dialect), hidden);
  b.Output("hidden", VisionLayer(b, config, layer, hidden, TableInputs(b, config, patches)));
}

void BuildVisionAttention(const BlockBuilder& b, const VisionConfig& config, int layer, int64_t patches) {
  const BlockBuilder scope = Tower(b).At("encoder").At(fmt::format("layers.{}", layer));
  ValueId hidden = b.Input("hidden", {1, patches, config.hidden_size});
  if (!b.GetDialect().requantizing_points) hidden = b.Boundary(scope.At("input_layernorm").Path("act_out"), hidden);
  const LinearBlock linear = config.use_clipped_linears ? ClippedLinear : UnclippedLinear;
  b.Output("hidden", SelfAttention(scope.At("self_attn"), config, hidden, TableInputs(b, config, patches), linear));
}

void BuildVisionPooler(const BlockBuilder& b, const VisionConfig& config, std::span<const int64_t> positions,
                       const VisionPoolerOptions& options) {
  const int64_t patches = LayoutOf(config, positions).patches;
  const ValueId hidden = HiddenInput(b, config, patches, PoolerInputPoint(config, b.GetDialect()));
  const ValueId mask = options.patch_mask ? b.Input("patch_mask", {1, patches, 1}) : -1;
  b.Output("pooled", PooledTokens(b, config, positions, hidden, mask));
}

void BuildMultimodalEmbedder(const BlockBuilder& b, const Gemma4Config& config, int64_t tokens) {
  const VisionConfig& vision = *config.vision;
  ValueId hidden =
      b.Boundary(VisionTokensPoint(vision, b.GetDialect()), b.Input("hidden", {tokens, vision.hidden_size}));
  if (!b.GetDialect().rank2_soft_tokens) hidden = b.Reshape(hidden, {1, tokens, vision.hidden_size});
  b.Output("projected", Projected(b, config, hidden));
}

void BuildVisionPost(const BlockBuilder& b, const Gemma4Config& config, std::span<const int64_t> positions) {
  const VisionConfig& vision = *config.vision;
  const PatchLayout layout = LayoutOf(vision, positions);
  const ValueId pooled = b.Boundary(PooledPoint(), b.Input("pooled", {1, layout.slots, vision.hidden_size}));
  const ValueId tokens = FilledSlots(b, vision, layout, pooled);
  b.Output("projected", Projected(b, config, tokens));
  b.Output("last_hidden_state", Rank2(b, tokens));
}

void BuildVisionEncoder(const BlockBuilder& b, const VisionConfig& config, std::span<const int64_t> positions) {
  const Dialect& dialect = b.GetDialect();
  const std::string point =
      dialect.requantizing_points ? fmt::format("{}.encoder.act_in", kVisionRoot) : VisionLayerInputPoint(0, dialect);
  const ValueId hidden = HiddenInput(b, config, LayoutOf(config, positions).patches, point);
  b.Output("hidden", EncodedPatches(b, config, positions, hidden));
}

void BuildVisionModel(const BlockBuilder& b, const VisionConfig& config, std::span<const int64_t> positions) {
  const ValueId pixels = PixelInput(b, config, LayoutOf(config, positions).patches);
  b.Output("last_hidden_state", Rank2(b, VisionTokens(b, config, positions, pixels)));
}

void BuildVisionPrefill(const BlockBuilder& b, const Gemma4Config& config, std::span<const int64_t> positions) {
  const ValueId pixels = PixelInput(b, *config.vision, LayoutOf(*config.vision, positions).patches);
  b.Output("projected", Projected(b, config, VisionTokens(b, *config.vision, positions, pixels)));
}

std::vector<Point> VisionPoints(const Gemma4Config& config, const Dialect& dialect) {
  const VisionConfig& vision = *config.vision;
  const int64_t k = vision.pooling_kernel_size;
  std::vector<int64_t> positions;
  for (int64_t i = 0; i < k * k; ++i) positions.insert(positions.end(), {i % k, i / k});
  Graph graph;
  const BlockBuilder b(graph, dialect);
  BuildVisionTables(b, vision, k * k);
  BuildVisionPrefill(b, config, positions);
  std::vector<Point> points = PointsOf(graph);
  // Boundaries repeat points that their producers list.
  std::erase_if(points, [](const Point& point) { return point.use == PointUse::kBoundary; });
  return points;
}

}  // namespace circlet
