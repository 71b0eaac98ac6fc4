#include "pipeline/gemma4/text_stages.h"

#include <algorithm>
#include <numeric>
#include <set>

#include "circlet/model/gemma4/vision.h"
#include "ops/table.h"
#include "pipeline/gemma4/keys.h"

namespace circlet::gemma4 {
namespace {

Tensor Iota(const Item& item, Chain, std::span<const Tensor>) {
  std::vector<int64_t> values(item.length);
  std::iota(values.begin(), values.end(), 0);
  return Tensor::Of<int64_t>({1, item.length}, values);
}

// The last `count` of all positions.
Tensor LastPositions(const Tensor& tensor, int64_t count, int axis) {
  const int64_t all = tensor.GetShape()[axis];
  return tensor.Slice(all - count, all, axis);
}

}  // namespace

Graph TextStages::TablesGraph(int64_t length) const {
  return context_.Build([&](const BlockBuilder& b) {
    for (const LayerConfig& layer : tables_.Types()) {
      const std::string type = LayerTypeName(layer);
      const auto pass = [&](const std::string& name, const std::string& point, Shape shape) {
        b.Output(name + type, b.Point(point, b.Input(name + type, std::move(shape))));
      };
      pass("mask.", MaskPoint(layer), {1, 1, length, length});
      pass("cos.", RopePoint(layer, true), {1, length, layer.head_dim});
      pass("sin.", RopePoint(layer, false), {1, length, layer.head_dim});
    }
  });
}

Tensor TextStages::TableRows(const std::string& name, const Item& item, const RoundedWeights* rounded) const {
  std::vector<int64_t> ids = context_.SequenceOf(item).ids;
  if (const int64_t groups = config_.ple_groups; groups > 1 && name == kPleTable) {
    std::vector<int64_t> rows;
    for (const int64_t id : ids)
      for (int64_t group = 0; group < groups; ++group) rows.push_back(id * groups + group);
    ids = std::move(rows);
  }
  if (rounded != nullptr) return rounded->Rows(name, ids);
  const Tensor table = context_.weights.Stored(name);
  return table.Grid() != nullptr ? DequantizedRows(table, ids) : ToF32(RowsOf(table, ids));
}

Tensor TextStages::Merged(const Item& item, std::span<const Tensor> read) const {
  Tensor merged = read[0];
  const std::vector<int64_t>& places = context_.SequenceOf(item).places;
  size_t used = 0;
  for (const Tensor& features : read.subspan(1)) {
    const int64_t rows = features.GetShape()[0];
    merged = FuseAt(merged, features, std::span(places).subspan(used, rows));
    used += rows;
  }
  return merged;
}

int64_t TextStages::FirstRead(const Item& item, int layer) const {
  const auto& layers = config_.layers;
  const bool shared = std::all_of(layers.begin() + layer, layers.end(), [](const auto& l) { return l.kv_shared; });
  return shared ? context_.SequenceOf(item).FirstRead() : 0;
}

Stage TextStages::Tables() {
  Step step{.name = "tables", .build = [this](const Item& item) { return TablesGraph(item.length); }};
  for (const LayerConfig& layer : tables_.Types()) {
    const std::string type = LayerTypeName(layer);
    step.inputs.push_back({.name = "mask." + type, .make = [this, layer](const Item& item, Chain, auto) {
                             return tables_.Mask(context_.SequenceOf(item), layer);
                           }});
    step.outputs.push_back({"mask." + type, {}, "attn_mask." + type});
    for (const bool cosine : {true, false}) {
      const std::string name = cosine ? "cos." : "sin.";
      step.inputs.push_back({.name = name + type, .make = [this, layer, cosine](const Item& item, Chain, auto) {
                               return tables_.Rope(0, item.length, layer, cosine);
                             }});
      step.outputs.push_back({name + type, {}, "rope_" + name + type});
    }
  }
  return {"tables", {std::move(step)}};
}

Stage TextStages::Embeddings() {
  // Placeholders are looked up as the pad id and then overwritten, so the errors that count are the merged sequence's.
  Step rows{.name = "embed_tokens",
            .build =
                [this](const Item& item) {
                  return context_.Build(
                      [&](const BlockBuilder& b) { BuildTokenEmbedding(b, config_, item.length, item.length); });
                },
            .inputs = {{.name = "ids", .make = Iota}},
            .outputs = {{"hidden", {key::kTextEmbeddings}, "embed.tokens"}},
            .measured = context_.images.Empty(),
            .own = [this](const auto&... arguments) { return TableRows(arguments...); },
            .fresh = true};
  Step merge{.name = "inputs_embeds",
             .build =
                 [this](const Item& item) {
                   return context_.Build([&](const BlockBuilder& b) {
                     BuildMergedEmbedding(b, config_, item.length, !context_.SequenceOf(item).pictures.empty());
                   });
                 },
             .inputs = {{.name = "hidden",
                         .reads = {{.key = key::kTextEmbeddings}},
                         .make = [this](const Item& item, Chain, auto read) { return Merged(item, read); }}},
             .outputs = {{"hidden", {key::Hidden(0)}, ""}, {"merged", {}, "inputs_embeds"}}};
  if (!context_.images.Empty())
    merge.inputs[0].reads.push_back(
        {.key = key::kVisionProjected, .of = [this](const Item& item) { return context_.SequenceOf(item).pictures; }});
  return {"embeddings", {std::move(rows), std::move(merge)}};
}

Stage TextStages::PerLayerInputs() {
  Step tokens{.name = "per_layer_token_inputs",
              .build =
                  [this](const Item& item) {
                    return context_.Build(
                        [&](const BlockBuilder& b) { BuildPleEmbedding(b, config_, item.length, item.length); });
                  },
              .inputs = {{.name = "ids", .make = Iota}},
              .outputs = {{"per_layer_token_inputs", {key::kTokenPle}, "ple.token_inputs"}},
              .own = [this](const auto&... arguments) { return TableRows(arguments...); },
              .fresh = true};
  Step projection{
      .name = "per_layer_inputs",
      .build =
          [this](const Item& item) {
            return context_.Build([&](const BlockBuilder& b) { BuildPleProjection(b, config_, item.length); });
          },
      .inputs = {{.name = "inputs_embeds", .reads = {{.key = key::Hidden(0)}}},
                 {.name = "per_layer_token_inputs", .reads = {{.key = key::kTokenPle}}}},
      .outputs = {{"per_layer_inputs", {}, "ple.inputs", /*by_layer=*/true}}};
  for (int i = 0; i < config_.NumLayers(); ++i) projection.outputs[0].keys.push_back(key::Ple(i));
  return {"per_layer_inputs", {std::move(tokens), std::move(projection)}};
}

Stage TextStages::Layer(int index) {
  const LayerConfig& layer = config_.layers[index];
  const std::string name = fmt::format("layers.{}", index);
  Step step{.name = name,
            .build =
                [this, index](const Item& item) {
                  return context_.Build([&](const BlockBuilder& b) {
                    BuildDecoderLayer(b, config_, index, Phase::kPrefill, item.length,
                                      {.inner_outputs = true, .first = FirstRead(item, index + 1)});
                  });
                },
            .inputs = {{.name = "hidden", .reads = {LastOf(key::Hidden(index), index)}},
                       {.name = "mask",
                        .make =
                            [this, &layer, index](const Item& item, Chain chain, auto) {
                              const Tensor whole = tables_.Mask(context_.SequenceOf(item), layer);
                              return LastPositions(chain_tables_.For(chain, MaskPoint(layer), whole),
                                                   LengthOf(item, index + 1), 2);
                            }}},
            .outputs = {{"hidden", {key::Hidden(index + 1)}, name + ".out"},
                        {"attn_out", {}, name + ".attn_out"},
                        {"mlp_out", {}, name + ".mlp_out"}}};
  for (const bool cosine : {true, false})
    step.inputs.push_back(
        {.name = cosine ? "cos" : "sin", .make = [this, &layer, index, cosine](const Item& item, Chain chain, auto) {
           const Tensor whole = tables_.Rope(0, item.length, layer, cosine);
           return LastPositions(chain_tables_.For(chain, RopePoint(layer, cosine), whole), LengthOf(item, index), 1);
         }});
  if (config_.HasPle())
    step.inputs.push_back({.name = "per_layer_input", .reads = {LastOf(key::Ple(index), index + 1)}});
  for (const key::Side side : {key::Side::kKey, key::Side::kValue}) {
    const std::string which = key::Name(side);
    if (layer.kv_shared) {
      step.inputs.push_back({.name = "shared_" + which, .reads = {{.key = key::Kv(layer.kv_source, side)}}});
    } else {
      step.outputs.push_back({"new_" + which, {key::Kv(index, side)}, ""});
    }
  }
  return {name, {std::move(step)}};
}

Stage TextStages::Norm() {
  const int layers = config_.NumLayers();
  Step step{
      .name = "norm",
      .build =
          [this, layers](const Item& item) {
            return context_.Build([&](const BlockBuilder& b) { BuildFinalNorm(b, config_, LengthOf(item, layers)); });
          },
      .inputs = {{.name = "hidden", .reads = {LastOf(key::Hidden(layers), layers)}}},
      .outputs = {{"last_hidden_state", {key::kNormed}, "last_hidden_state"}}};
  return {"norm", {std::move(step)}};
}

std::vector<Point> TextStages::Points() const {
  constexpr int64_t kLength = 4;
  std::vector<Point> points;
  std::set<std::string> seen;
  const auto collect = [&](const Graph& graph) {
    for (Point& point : PointsOf(graph))
      if (seen.insert(point.name).second) points.push_back(std::move(point));
  };
  const auto build = [&](const auto& body) { collect(context_.Build(body)); };
  collect(TablesGraph(kLength));
  build([&](const BlockBuilder& b) { BuildTokenEmbedding(b, config_, kLength, config_.vocab_size); });
  build([&](const BlockBuilder& b) { BuildMergedEmbedding(b, config_, kLength, !context_.images.Empty()); });
  if (config_.HasPle()) {
    build([&](const BlockBuilder& b) { BuildPleEmbedding(b, config_, kLength, config_.ple_vocab_size); });
    build([&](const BlockBuilder& b) { BuildPleProjection(b, config_, kLength); });
  }
  for (int i = 0; i < config_.NumLayers(); ++i)
    build([&](const BlockBuilder& b) { BuildDecoderLayer(b, config_, i, Phase::kPrefill, kLength); });
  build([&](const BlockBuilder& b) { BuildHead(b, config_, kLength); });
  return points;
}

}  // namespace circlet::gemma4
