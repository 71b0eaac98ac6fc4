#include "pipeline/gemma4/text_units.h"

#include <cstring>

#include "circlet/model/gemma4/tables.h"
#include "pipeline/gemma4/keys.h"
#include "pipeline/stage.h"

namespace circlet::gemma4 {
namespace {

constexpr key::Side kSides[] = {key::Side::kKey, key::Side::kValue};

// [1,KV,S,h] of a past and the newest position behind it.
Tensor Appended(const Tensor& past, const Tensor& newest) {
  const int64_t heads = past.GetShape()[1], slots = past.GetShape()[2] + 1, width = past.GetShape()[3];
  Tensor all(TensorType{DType::kF32, {1, heads, slots, width}});
  for (int64_t h = 0; h < heads; ++h) {
    float* row = all.F32().data() + h * slots * width;
    std::memcpy(row, past.F32().data() + h * (slots - 1) * width, (slots - 1) * width * sizeof(float));
    std::memcpy(row + (slots - 1) * width, newest.F32().data() + h * width, width * sizeof(float));
  }
  return all;
}

}  // namespace

TextUnits::TextUnits(const Context& context, TextTables& tables)
    : context_(context),
      config_(context.config.text),
      tables_(tables),
      prefill_decode_(context.settings.export_options.prefill_decode),
      verify_(context.Verify()) {
  if (verify_ != nullptr) last_ = context.SequenceOf(*verify_).Last();
}

UnitValue TextUnits::Mask(const LayerConfig& layer) const {
  return Given([this, &layer] { return tables_.Mask(context_.SequenceOf(*verify_), layer); });
}

UnitValue TextUnits::Rope(int64_t start, int64_t length, const LayerConfig& layer, bool cosine) const {
  return Given([=, this, &layer] { return tables_.Rope(start, length, layer, cosine); });
}

UnitValue TextUnits::Ids() const {
  return Given([this] { return Tensor::Of<int64_t>({1, context_.max_seq_len}, context_.SequenceOf(*verify_).ids); });
}

UnitValue TextUnits::AllPle() const {
  UnitValue value{.make = Joined};
  for (int i = 0; i < config_.NumLayers(); ++i) value.reads.push_back({.key = key::Ple(i)});
  return value;
}

std::vector<UnitSpec> TextUnits::Embedding() const {
  // With points of its own the fusion stands between a token's embedding and the merged sequence, on another grid.
  const bool apart = context_.GetDialect().fusion_points && !context_.images.Empty();
  return {{.name = "token_embedding",
           .written_first = true,
           .build =
               [this] {
                 return context_.Build(
                     [&](const BlockBuilder& b) { BuildTokenEmbedding(b, config_, 1, config_.vocab_size); });
               },
           .dynamic_length = true,
           .keys = {{"hidden", apart ? key::kTextEmbeddings : key::Hidden(0)}},
           .item = verify_,
           .inputs = {{"ids", Ids()}},
           .outputs = {{"hidden", Stored(key::kTextEmbeddings)}}}};
}

std::vector<UnitSpec> TextUnits::PerLayerInputs() const {
  std::vector<UnitSpec> units{{.name = "ple_embedding",
                               .written_first = true,
                               .build =
                                   [this] {
                                     return context_.Build([&](const BlockBuilder& b) {
                                       BuildPleEmbedding(b, config_, 1, config_.ple_vocab_size);
                                     });
                                   },
                               .dynamic_length = true,
                               .keys = {{"per_layer_token_inputs", key::kTokenPle}},
                               .item = verify_,
                               .inputs = {{"ids", Ids()}},
                               .outputs = {{"per_layer_token_inputs", Stored(key::kTokenPle)}}}};
  for (const bool decode : {false, true}) {
    if (decode && !prefill_decode_) break;
    const int64_t length = decode ? 1 : context_.max_seq_len;
    UnitSpec spec{.name = decode            ? "ple_projection_decode"
                          : prefill_decode_ ? "ple_projection_prefill"
                                            : "ple_projection",
                  .build =
                      [this, length] {
                        return context_.Build([&](const BlockBuilder& b) { BuildPleProjection(b, config_, length); });
                      },
                  .keys = {{"inputs_embeds", key::Hidden(0)},
                           {"per_layer_token_inputs", key::kTokenPle},
                           {"per_layer_inputs", key::kPle}},
                  .item = verify_};
    const auto input = [&](const std::string& key) { return decode ? StoredAt(key, last_) : Stored(key); };
    spec.inputs = {{"inputs_embeds", input(key::Hidden(0))}, {"per_layer_token_inputs", input(key::kTokenPle)}};
    if (decode) {
      spec.keeps.push_back({key::Decode(key::kPle),
                            {DType::kF32, {1, 1, config_.NumLayers(), config_.ple_dim}},
                            [](const auto&, const auto& outputs) { return outputs.at("per_layer_inputs"); }});
    } else {
      spec.outputs["per_layer_inputs"] = AllPle();
    }
    units.push_back(std::move(spec));
  }
  return units;
}

UnitSpec TextUnits::Prefill(int index) const {
  const LayerConfig& layer = config_.layers[index];
  const int64_t slots = context_.max_seq_len;
  UnitSpec spec{.name = fmt::format("decoder_layer_prefill_{}", index),
                .build =
                    [this, index, slots] {
                      return context_.Build(
                          [&](const BlockBuilder& b) { BuildDecoderLayer(b, config_, index, Phase::kPrefill, slots); });
                    },
                .item = verify_,
                .inputs = {{"hidden", Stored(key::Hidden(index))},
                           {"mask", Mask(layer)},
                           {"cos", Rope(0, slots, layer, true)},
                           {"sin", Rope(0, slots, layer, false)}},
                .outputs = {{"hidden", Stored(key::Hidden(index + 1))}}};
  if (config_.HasPle()) spec.inputs["per_layer_input"] = Stored(key::Ple(index));
  for (const key::Side side : kSides) {
    const std::string which = key::Name(side);
    if (layer.kv_shared) {
      spec.inputs["shared_" + which] = Stored(key::Kv(layer.kv_source, side));
    } else if (prefill_decode_ || layer.stores_kv) {
      spec.outputs["new_" + which] = Stored(key::Kv(index, side));
    }
  }
  if (prefill_decode_) return spec;
  // One graph a layer, for whole sequences only: nothing but later layers takes the K/V of its positions.
  spec.name = fmt::format("decoder_layer_{}", index);
  std::vector<std::string> kept{"hidden"};
  if (layer.stores_kv) kept.insert(kept.end(), {"new_key", "new_value"});
  spec.build = [build = spec.build, kept] { return WithOutputs(build(), kept); };
  return spec;
}

// The newest token's step, computed by the unit itself.
UnitSpec TextUnits::Decode(int index) const {
  const LayerConfig& layer = config_.layers[index];
  const int64_t slots = context_.max_seq_len;
  UnitSpec spec{
      .name = fmt::format("decoder_layer_decode_{}", index),
      .build =
          [this, index, slots] {
            return context_.Build(
                [&](const BlockBuilder& b) { BuildDecoderLayer(b, config_, index, Phase::kDecode, slots); });
          },
      .item = verify_,
      .inputs = {{"hidden", index == 0 ? StoredAt(key::Hidden(0), last_) : Stored(key::Decode(key::Hidden(index)))},
                 {"mask", Given([this, &layer, slots] { return DecodeMask(slots, last_, layer.window); })},
                 {"cos", Rope(last_, 1, layer, true)},
                 {"sin", Rope(last_, 1, layer, false)}},
      .keeps = {{key::Decode(key::Hidden(index + 1)),
                 {DType::kF32, {1, 1, config_.hidden_size}},
                 [](const auto&, const auto& outputs) { return outputs.at("hidden"); }}}};
  if (config_.HasPle())
    spec.inputs["per_layer_input"] = {.reads = {{.key = key::Decode(key::kPle)}},
                                      .make = [this, index](std::span<const Tensor> read) {
                                        return read[0].Slice(index, index + 1, 2).Reshaped({1, 1, config_.ple_dim});
                                      }};
  for (const key::Side side : kSides) {
    const std::string which = key::Name(side);
    if (layer.kv_shared) {
      spec.inputs["shared_" + which] = Stored(key::Decode(key::Kv(layer.kv_source, side)));
      continue;
    }
    // Every position but the last slot, which the new token takes.
    spec.inputs["past_" + which] = {.reads = {{.key = key::Kv(index, side)}}, .make = [](std::span<const Tensor> read) {
                                      return read[0].Slice(0, read[0].GetShape()[2] - 1, 2);
                                    }};
    if (layer.stores_kv)
      spec.keeps.push_back({key::Decode(key::Kv(index, side)),
                            {DType::kF32, {1, layer.kv_heads, slots, layer.head_dim}},
                            [which](const auto& inputs, const auto& outputs) {
                              return Appended(inputs.at("past_" + which), outputs.at("new_" + which));
                            }});
  }
  return spec;
}

std::vector<UnitSpec> TextUnits::Layer(int index) const {
  const LayerConfig& layer = config_.layers[index];
  const std::string type = LayerTypeName(layer);
  std::vector<UnitSpec> units{Prefill(index)};
  if (prefill_decode_) units.push_back(Decode(index));
  for (UnitSpec& unit : units) {
    unit.keys = {{"hidden", key::Hidden(index)},
                 {"mask", "mask." + type},
                 {"cos", "cos." + type},
                 {"sin", "sin." + type},
                 {"per_layer_input", key::kPle}};
    for (const key::Side side : kSides) {
      const std::string which = key::Name(side);
      unit.keys["new_" + which] = unit.keys["past_" + which] = key::Kv(index, side);
      unit.keys["shared_" + which] = key::Kv(layer.kv_source, side);
    }
    // A layer's output has its successor's key; input and output share the graph's name "hidden".
    unit.output_keys = {{"hidden", key::Hidden(index + 1)}};
  }
  return units;
}

UnitSpec TextUnits::LmHead() const {
  const int layers = config_.NumLayers();
  return {.name = "lm_head",
          .written_first = true,
          .build =
              [this] {
                return WithOutputs(context_.Build([&](const BlockBuilder& b) { BuildHead(b, config_, 1); }),
                                   {"logits"});
              },
          .keys = {{"hidden", key::Hidden(layers)}, {"logits", key::kLogits}},
          .item = verify_,
          .inputs = {{"hidden", StoredAt(key::Hidden(layers), last_)}},
          .outputs = {{"logits", Stored(key::kLogits)}}};
}

UnitSpec TextUnits::Model() const {
  const int64_t length = context_.max_seq_len;
  UnitSpec spec{
      .name = "gemma4_model",
      .whole_graph = true,
      .build = [this,
                length] { return context_.Build([&](const BlockBuilder& b) { BuildTextModel(b, config_, length); }); },
      .keys = {{"inputs_embeds", key::Hidden(0)}, {"per_layer_inputs", key::kPle}},
      .item = verify_,
      .inputs = {{"inputs_embeds", Stored(key::Hidden(0))}}};
  if (config_.HasPle()) spec.inputs["per_layer_inputs"] = AllPle();
  for (int i = 0; i < config_.NumLayers(); ++i) {
    const LayerConfig& layer = config_.layers[i];
    const std::string type = LayerTypeName(layer);
    for (const char* table : {"mask.", "cos.", "sin."}) spec.keys[table + type] = table + type;
    spec.inputs.try_emplace("mask." + type, Mask(layer));
    spec.inputs.try_emplace("cos." + type, Rope(0, length, layer, true));
    spec.inputs.try_emplace("sin." + type, Rope(0, length, layer, false));
  }
  // Without points of its own the whole graph is its layers one after the other.
  if (!context_.GetDialect().whole_graph_points) spec.outputs["last_hidden_state"] = Stored(key::kNormed);
  return spec;
}

}  // namespace circlet::gemma4
