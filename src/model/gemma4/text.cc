#include "circlet/model/gemma4/text.h"

#include <cmath>
#include <map>
#include <numeric>

#include "circlet/model/gemma4/blocks.h"
#include "model/gemma4/text_parts.h"

namespace circlet {
namespace {

// Of the per-layer inputs of a whole graph, where the dialect has whole_graph_points.
constexpr char kWholePlePoint[] = "model.per_layer_inputs";

BlockBuilder LayerBuilder(const BlockBuilder& b, int layer) {
  return b.At(kTextRoot).At(fmt::format("layers.{}", layer));
}

struct KeyValue {
  ValueId key = -1, value = -1;
  bool Given() const { return key >= 0; }
};

struct LayerValues {
  ValueId hidden, mask, cos, sin;
  ValueId ple = -1;
  KeyValue past, shared;
  int64_t first = 0;  // of hidden, cos and sin: the first position that asks
};

// Positions from `first` on of [1,S,..].
ValueId From(const BlockBuilder& b, ValueId x, int64_t first) {
  if (first == 0) return x;
  const Shape& shape = b.ShapeOf(x);
  return b.Add(Slice{{0, static_cast<int32_t>(first), 0},
                     {1, static_cast<int32_t>(shape[1]), static_cast<int32_t>(shape[2])}},
               {x});
}

struct LayerResults {
  ValueId hidden, attn_out, mlp_out;
  KeyValue fresh;    // of this call's positions
  KeyValue present;  // with the past in front
};

// K and V of this call's positions: norms, RoPE on K only, heads first.
KeyValue FreshKeyValue(const BlockBuilder& b, const LayerConfig& layer, const LayerValues& in, ValueId x, float eps) {
  const int64_t width = int64_t{layer.kv_heads} * layer.head_dim;
  const ValueId raw_key = SplitHeads(b, Linear(b.At("k_proj"), x, width), layer.kv_heads);
  const ValueId raw_value = layer.k_eq_v ? raw_key : SplitHeads(b, Linear(b.At("v_proj"), x, width), layer.kv_heads);
  ValueId key = Norm(b.At("k_norm"), raw_key, eps, true);
  key = HeadsFirst(b, Rotate(b, key, in.cos, in.sin, "k", Rope{1, true}));
  ValueId value = HeadsFirst(b, Norm(b.At("v_norm"), raw_value, eps, false));
  key = b.RequantizingPoint("new_k", key);
  value = b.RequantizingPoint("new_v", value);
  return {key, value};
}

KeyValue Present(const BlockBuilder& b, const KeyValue& past, const KeyValue& fresh) {
  const auto join = [&](const char* name, ValueId before, ValueId now) {
    if (before < 0) return b.RequantizingPoint(name, now);
    return b.RequantizingPoint(name, b.Concat({b.RequantizingPoint(name, before), now}, 2));
  };
  return {join("present_key", past.key, fresh.key), join("present_value", past.value, fresh.value)};
}

struct AttentionResults {
  ValueId out;
  KeyValue fresh, present;
};

// model.md 3.5; points of quantization.md 6.5.
AttentionResults SelfAttention(const BlockBuilder& b, const TextConfig& config, const LayerConfig& layer,
                               const LayerValues& in, ValueId x) {
  x = b.RequantizingPoint("hidden", x);
  LayerValues tables = in;
  tables.cos = b.RequantizingPoint("cos", in.cos);
  tables.sin = b.RequantizingPoint("sin", in.sin);

  ValueId query = Linear(b.At("q_proj"), From(b, x, in.first), int64_t{config.num_heads} * layer.head_dim);
  query = Norm(b.At("q_norm"), SplitHeads(b, query, config.num_heads), config.rms_norm_eps, true);
  query =
      HeadsFirst(b, Rotate(b, query, From(b, tables.cos, in.first), From(b, tables.sin, in.first), "q", Rope{1, true}));

  AttentionResults results;
  if (in.shared.Given()) {
    results.present = Present(b, {}, in.shared);
  } else {
    results.fresh = FreshKeyValue(b, layer, tables, x, config.rms_norm_eps);
    results.present = Present(b, in.past, results.fresh);
  }
  const ValueId mask = b.RequantizingPoint("attn_mask", in.mask);
  const ValueId heads = Attend(b, query, results.present.key, results.present.value, mask, Attention::Form::kByHead);
  results.out = Linear(b.At("o_proj"), heads, config.hidden_size);
  return results;
}

// model.md 3.4; points of quantization.md 6.6.
LayerResults Layer(const BlockBuilder& b, const TextConfig& config, int index, const LayerValues& in) {
  const LayerConfig& layer = config.layers[index];
  const auto norm = [&](const char* name, ValueId x) { return Norm(b.At(name), x, config.StreamEps(), true); };
  const auto residual = [&](const char* point, ValueId x, ValueId branch) {
    return b.Point(point, b.Add(Add{}, {x, branch}));
  };

  const ValueId h0 = b.RequantizingPoint("act_in", in.hidden);
  const AttentionResults attention = SelfAttention(b.At("self_attn"), config, layer, in, norm("input_layernorm", h0));
  const ValueId h1 =
      residual("attn_residual_out", From(b, h0, in.first), norm("post_attention_layernorm", attention.out));

  const ValueId mlp = Mlp(b.At("mlp"), norm("pre_feedforward_layernorm", h1), layer.intermediate);
  ValueId h = residual("mlp_residual_out", h1, norm("post_feedforward_layernorm", mlp));

  if (config.HasPle()) {
    const ValueId gate = Linear(b.At("per_layer_input_gate"), h, config.ple_dim);
    const ValueId act = b.Point("per_layer_gate_act", b.Add(Gelu{}, {gate}));
    const ValueId product = b.Point("per_layer_mul", b.Add(Mul{}, {act, in.ple}));
    const ValueId projected = Linear(b.At("per_layer_projection"), product, config.hidden_size);
    h = residual("per_layer_residual_out", h, norm("post_per_layer_input_norm", projected));
  }
  // The scalar is a tensor of the checkpoint but rounds like an activation (quantization.md 4.2).
  const ValueId raw_scalar = b.FloatWeight("layer_scalar", {1}, WeightKind::kLayerScalar);
  const ValueId scalar = b.Point("layer_scalar", raw_scalar);
  const ValueId out = b.Point("layer_scalar_out", b.Add(Mul{}, {h, scalar}));
  return {out, attention.out, mlp, attention.fresh, attention.present};
}

// Rows of a table times sqrt(width) (quantization.md 6.4), up to the point that the caller puts behind the product.
// `groups`: rows of the table that make up one.
ValueId ScaledRows(const BlockBuilder& b, ValueId ids, int64_t rows, int64_t row_width, float scale,
                   int64_t groups = 1) {
  const int64_t length = b.ShapeOf(ids)[1];
  if (groups > 1) {
    std::vector<int64_t> of_group(groups);
    std::iota(of_group.begin(), of_group.end(), 0);
    const std::vector<int64_t> count{groups};
    const ValueId first = b.Add(Mul{}, {b.Reshape(ids, {1, length, 1}), b.Constant(Tensor::Of<int64_t>({1}, count))});
    ids = b.Add(Add{}, {first, b.Constant(Tensor::Of<int64_t>({1, 1, groups}, of_group))});
  }
  const Shape table{rows * groups, row_width / groups};
  ValueId row = b.Add(Gather{}, {b.Weight("weight", table, WeightKind::kEmbedding), ids});
  // Every row of the table has a grid of its own; the file says where they meet the common one (quantization.md B14).
  if (!b.GetDialect().gather_requantizes) row = b.Add(Requantize{}, {row});
  row = b.Point("embedding", row);
  return b.Add(Mul{}, {row, b.Point("embed_scale", b.Constant(Tensor::Scalar(scale)))});
}

ValueId FinalNorm(const BlockBuilder& b, const TextConfig& config, ValueId hidden) {
  return Norm(b.At(kTextRoot).At("norm"), hidden, config.StreamEps(), true);
}

}  // namespace

// ---- Parts --------------------------------------------------------------------------------------------------------

ValueId TokenEmbeddings(const BlockBuilder& b, const TextConfig& config, ValueId ids, int64_t rows) {
  const BlockBuilder table = b.At(kTextRoot).At("embed_tokens");
  const float scale = std::sqrt(static_cast<float>(config.ModelWidth()));
  const ValueId hidden = ScaledRows(table, ids, rows, config.hidden_size, scale);
  // In decode the next layer takes the embedding as it is, so it lies on the grid of the merged sequence.
  return b.GetDialect().fusion_points ? table.Point("act_out", hidden) : b.Boundary(EmbeddingPoint(), hidden);
}

ValueId TokenPle(const BlockBuilder& b, const TextConfig& config, ValueId ids, int64_t rows) {
  const BlockBuilder root = b.At(kTextRoot);
  const BlockBuilder table = root.At("embed_tokens_per_layer");
  const int64_t length = b.ShapeOf(ids)[1], layers = config.NumLayers();
  ValueId row = ScaledRows(table, ids, rows, layers * config.ple_dim, std::sqrt(static_cast<float>(config.ple_dim)),
                           config.ple_groups);
  row = b.Reshape(table.Point("act_out", row), {1, length, layers, config.ple_dim});
  // The grid of a whole graph's input is that of this part, not of the sum that comes in (quantization.md B6).
  if (b.GetDialect().whole_graph_points) row = b.Point(kWholePlePoint, row, PointUse::kExportOnly);
  return root.RequantizingPoint("per_layer_token_inputs", row);
}

ValueId PerLayerInputs(const BlockBuilder& b, const TextConfig& config, ValueId embeds, ValueId tokens) {
  const BlockBuilder root = b.At(kTextRoot);
  ValueId context = Linear(root.At("per_layer_model_projection"), embeds, config.NumLayers() * int64_t{config.ple_dim});
  context =
      Scale(root, context, 1.0f / std::sqrt(static_cast<float>(config.ModelWidth())), "per_layer_projection_scale");
  const BlockBuilder norm = root.At("per_layer_projection_norm");
  // Where no norm has a point of its own on what comes in, the scaled product gets it here.
  if (!b.GetDialect().requantizing_points) context = norm.Point("act_in", context);
  context = Norm(norm, b.Reshape(context, b.ShapeOf(tokens)), config.rms_norm_eps, true);
  context = root.RequantizingPoint("per_layer_projection", context);

  const PointUse sum_use = b.GetDialect().ple_float_holes ? PointUse::kExportOnly : PointUse::kNormal;
  const ValueId sum = root.Point("per_layer_sum", b.Add(Add{}, {context, tokens}), sum_use);
  return b.Point(PlePoint(), Scale(root, sum, std::sqrt(0.5f), "per_layer_input_scale"));
}

ValueId TextStack(const BlockBuilder& b, const TextConfig& config, ValueId hidden, ValueId ple,
                  const std::map<std::string, TextTables>& tables) {
  const int64_t length = b.ShapeOf(hidden)[1];
  std::map<int, KeyValue> stored;
  for (int i = 0; i < config.NumLayers(); ++i) {
    const LayerConfig& layer = config.layers[i];
    const TextTables& table = tables.at(LayerTypeName(layer));
    LayerValues in{.hidden = hidden, .mask = table.mask, .cos = table.cos, .sin = table.sin};
    if (config.HasPle()) {
      const Slice of_layer{{0, 0, i, 0}, {1, static_cast<int32_t>(length), i + 1, config.ple_dim}};
      const ValueId slice = config.NumLayers() == 1 ? ple : b.Add(of_layer, {ple});
      in.ple = b.Reshape(slice, {1, length, config.ple_dim});
    }
    if (layer.kv_shared) in.shared = stored.at(layer.kv_source);
    const LayerResults out = Layer(LayerBuilder(b, i), config, i, in);
    if (layer.stores_kv) stored[i] = out.present;
    hidden = out.hidden;
  }
  return FinalNorm(b, config, hidden);
}

ValueId Logits(const BlockBuilder& b, const TextConfig& config, ValueId normed, int64_t rows) {
  ValueId logits = LinearOf(WeightKind::kHead, b.At("lm_head"), normed, rows);
  if (!config.final_logit_softcapping) return b.RequantizingPoint("logits", logits);
  const float cap = *config.final_logit_softcapping;
  logits = b.Point("logit_softcapping_div", Scale(b, logits, 1.0f / cap, "logit_softcapping_div_scale"));
  logits = b.Point("logit_softcapping_tanh", b.Add(Tanh{}, {logits}));
  return b.Point("logits", Scale(b, logits, cap, "logit_softcapping_scale"));
}

std::map<std::string, LayerConfig> LayerTypes(const TextConfig& config) {
  std::map<std::string, LayerConfig> types;
  for (const LayerConfig& layer : config.layers) types.try_emplace(LayerTypeName(layer), layer);
  return types;
}

// ---- Names --------------------------------------------------------------------------------------------------------

std::string LayerTypeName(const LayerConfig& layer) { return layer.full ? "full_attention" : "sliding_attention"; }

std::string MaskPoint(const LayerConfig& layer) {
  return fmt::format("{}.attention_mask_{}", kTextRoot, LayerTypeName(layer));
}

std::string RopePoint(const LayerConfig& layer, bool cosine) {
  return fmt::format("{}.position_embeddings_{}_{}", kTextRoot, LayerTypeName(layer), cosine ? "cos" : "sin");
}

std::string LayerInputPoint(int layer, const Dialect& dialect) {
  if (dialect.requantizing_points) return fmt::format("{}.layers.{}.act_in", kTextRoot, layer);
  return layer == 0 ? EmbeddingPoint() : fmt::format("{}.layers.{}.layer_scalar_out", kTextRoot, layer - 1);
}

std::string KeyPoint(int layer, const Dialect& dialect) {
  return fmt::format("{}.layers.{}.self_attn.{}", kTextRoot, layer,
                     dialect.requantizing_points ? "present_key" : "k_rot");
}

std::string ValuePoint(int layer, const Dialect& dialect) {
  return fmt::format("{}.layers.{}.self_attn.{}", kTextRoot, layer,
                     dialect.requantizing_points ? "present_value" : "v_norm.act_out");
}

std::string EmbeddingPoint() { return fmt::format("{}.inputs_embeds", kTextRoot); }

std::string TokenPlePoint(const Dialect& dialect) {
  return fmt::format("{}.{}", kTextRoot,
                     dialect.requantizing_points ? "per_layer_token_inputs" : "embed_tokens_per_layer.act_out");
}

std::string PlePoint() { return fmt::format("{}.per_layer_inputs", kTextRoot); }

std::string HeadInputPoint(const TextConfig& config, const Dialect& dialect) {
  if (dialect.requantizing_points) return fmt::format("{}.norm.act_in", kTextRoot);
  return LayerInputPoint(config.NumLayers(), dialect);
}

// ---- Graphs -------------------------------------------------------------------------------------------------------

void BuildTokenEmbedding(const BlockBuilder& b, const TextConfig& config, int64_t length, int64_t rows) {
  b.Output("hidden", TokenEmbeddings(b, config, b.Input("ids", {1, length}, DType::kI64), rows));
}

void BuildMergedEmbedding(const BlockBuilder& b, const TextConfig& config, int64_t length, bool has_image) {
  ValueId hidden = b.Input("hidden", {1, length, config.hidden_size});
  if (has_image && b.GetDialect().fusion_points) hidden = b.Point(kFusionPoint, hidden);
  b.Output("merged", hidden);
  b.Output("hidden", b.Point(EmbeddingPoint(), hidden));
}

void BuildPleEmbedding(const BlockBuilder& b, const TextConfig& config, int64_t length, int64_t rows) {
  b.Output("per_layer_token_inputs", TokenPle(b, config, b.Input("ids", {1, length}, DType::kI64), rows));
}

void BuildPleProjection(const BlockBuilder& b, const TextConfig& config, int64_t length) {
  const ValueId embeds = b.Boundary(EmbeddingPoint(), b.Input("inputs_embeds", {1, length, config.hidden_size}));
  const ValueId tokens = b.Boundary(TokenPlePoint(b.GetDialect()),
                                    b.Input("per_layer_token_inputs", {1, length, config.NumLayers(), config.ple_dim}));
  b.Output("per_layer_inputs", PerLayerInputs(b, config, embeds, tokens));
}

namespace {

// Hidden states that come in and go out.
struct Lengths {
  int64_t in, out;
};

// What a unit of one layer takes besides the hidden states, in the order of its inputs.
LayerValues LayerInputs(const BlockBuilder& b, const TextConfig& config, int index, Phase phase, Lengths length,
                        int64_t slots, bool ple) {
  const LayerConfig& layer = config.layers[index];
  const bool decode = phase == Phase::kDecode;
  const auto cache = [&](const char* name, const std::string& point, int64_t keys) {
    return b.Boundary(point, b.Input(name, {1, layer.kv_heads, keys, layer.head_dim}));
  };
  LayerValues in;
  in.mask = b.Boundary(MaskPoint(layer), b.Input("mask", decode ? Shape{1, 1, slots} : Shape{1, 1, length.out, slots}));
  in.cos = b.Boundary(RopePoint(layer, true), b.Input("cos", {1, length.in, layer.head_dim}));
  in.sin = b.Boundary(RopePoint(layer, false), b.Input("sin", {1, length.in, layer.head_dim}));
  in.first = length.in - length.out;
  if (decode && !layer.kv_shared) {
    in.past.key = cache("past_key", KeyPoint(index, b.GetDialect()), slots - 1);
    in.past.value = cache("past_value", ValuePoint(index, b.GetDialect()), slots - 1);
  }
  if (ple) in.ple = b.Boundary(PlePoint(), b.Input("per_layer_input", {1, length.out, config.ple_dim}));
  if (layer.kv_shared) {
    in.shared.key = cache("shared_key", KeyPoint(layer.kv_source, b.GetDialect()), slots);
    in.shared.value = cache("shared_value", ValuePoint(layer.kv_source, b.GetDialect()), slots);
  }
  return in;
}

void LayerOutputs(const BlockBuilder& b, ValueId hidden, const KeyValue& fresh) {
  b.Output("hidden", hidden);
  if (!fresh.Given()) return;
  b.Output("new_key", fresh.key);
  b.Output("new_value", fresh.value);
}

// A block's own input, on the grid of the norm of the layer that feeds it.
ValueId NormedInput(const BlockBuilder& b, const TextConfig& config, int layer, int64_t length, const char* norm) {
  const ValueId hidden = b.Input("hidden", {1, length, config.hidden_size});
  return b.GetDialect().requantizing_points ? hidden
                                            : b.Boundary(LayerBuilder(b, layer).At(norm).Path("act_out"), hidden);
}

}  // namespace

void BuildTextMlp(const BlockBuilder& b, const TextConfig& config, int layer, int64_t length) {
  const ValueId x = NormedInput(b, config, layer, length, "pre_feedforward_layernorm");
  b.Output("hidden", Mlp(LayerBuilder(b, layer).At("mlp"), x, config.layers[layer].intermediate));
}

void BuildTextAttention(const BlockBuilder& b, const TextConfig& config, int layer, Phase phase, int64_t slots) {
  const int64_t length = phase == Phase::kDecode ? 1 : slots;
  const ValueId x = NormedInput(b, config, layer, length, "input_layernorm");
  const LayerValues in = LayerInputs(b, config, layer, phase, {length, length}, slots, /*ple=*/false);
  const AttentionResults out =
      SelfAttention(LayerBuilder(b, layer).At("self_attn"), config, config.layers[layer], in, x);
  LayerOutputs(b, out.out, out.fresh);
}

void BuildDecoderLayer(const BlockBuilder& b, const TextConfig& config, int index, Phase phase, int64_t slots,
                       const DecoderLayerOptions& options) {
  const int64_t asking = phase == Phase::kDecode ? 1 : slots - options.first;
  const Lengths length{asking + (config.layers[index].kv_shared ? 0 : options.first), asking};
  const ValueId hidden = b.Input("hidden", {1, length.in, config.hidden_size});
  // With requantizing points the layer begins with one of its own.
  const Dialect& dialect = b.GetDialect();
  const ValueId on_grid = dialect.requantizing_points ? hidden : b.Boundary(LayerInputPoint(index, dialect), hidden);
  LayerValues in = LayerInputs(b, config, index, phase, length, slots, config.HasPle());
  in.hidden = on_grid;
  const LayerResults out = Layer(LayerBuilder(b, index), config, index, in);
  LayerOutputs(b, out.hidden, out.fresh);
  if (options.inner_outputs) {
    b.Output("attn_out", out.attn_out);
    b.Output("mlp_out", out.mlp_out);
  }
}

void BuildTextModel(const BlockBuilder& b, const TextConfig& config, int64_t length) {
  ValueId hidden = b.Input("inputs_embeds", {1, length, config.hidden_size});
  if (!b.GetDialect().requantizing_points) hidden = b.Boundary(EmbeddingPoint(), hidden);
  const std::string ple_point = b.GetDialect().whole_graph_points ? kWholePlePoint : PlePoint();
  const ValueId ple =
      config.HasPle()
          ? b.Boundary(ple_point, b.Input("per_layer_inputs", {1, length, config.NumLayers(), config.ple_dim}))
          : -1;
  const std::map<std::string, LayerConfig> types = LayerTypes(config);
  std::map<std::string, TextTables> tables;
  for (const auto& [type, layer] : types)
    tables[type].mask = b.Boundary(MaskPoint(layer), b.Input("mask." + type, {1, 1, length, length}));
  for (const auto& [type, layer] : types) {
    tables[type].cos = b.Boundary(RopePoint(layer, true), b.Input("cos." + type, {1, length, layer.head_dim}));
    tables[type].sin = b.Boundary(RopePoint(layer, false), b.Input("sin." + type, {1, length, layer.head_dim}));
  }
  b.Output("last_hidden_state", TextStack(b, config, hidden, ple, tables));
}

namespace {

ValueId NormedHidden(const BlockBuilder& b, const TextConfig& config, int64_t length) {
  ValueId hidden = b.Input("hidden", {1, length, config.hidden_size});
  const Dialect& dialect = b.GetDialect();
  if (!dialect.requantizing_points) hidden = b.Boundary(HeadInputPoint(config, dialect), hidden);
  return FinalNorm(b, config, hidden);
}

}  // namespace

void BuildHead(const BlockBuilder& b, const TextConfig& config, int64_t length) {
  const ValueId normed = NormedHidden(b, config, length);
  b.Output("logits", Logits(b, config, normed, config.vocab_size));
  b.Output("last_hidden_state", normed);
}

void BuildFinalNorm(const BlockBuilder& b, const TextConfig& config, int64_t length) {
  b.Output("last_hidden_state", NormedHidden(b, config, length));
}

void BuildLogits(const BlockBuilder& b, const TextConfig& config, int64_t length, int64_t rows) {
  const ValueId normed = b.Boundary(b.At(kTextRoot).At("norm").Path("act_out"),
                                    b.Input("last_hidden_state", {1, length, config.hidden_size}));
  b.Output("logits", Logits(b, config, normed, rows));
}

}  // namespace circlet
