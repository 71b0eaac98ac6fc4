#include "pipeline/gemma4/text_stages.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <numeric>
#include <set>

#include "circlet/model/gemma4/tables.h"
#include "circlet/model/gemma4/vision.h"
#include "circlet/quant/affine.h"
#include "pipeline/gemma4/head.h"

namespace circlet::gemma4 {
namespace {

std::string HiddenKey(int layer) { return layer == 0 ? "inputs_embeds" : fmt::format("hidden.{}", layer); }
// In the reference's dialect the fusion stands between a token's embedding and the merged sequence, on another grid.
std::string EmbeddingKey(const RunContext& context) {
  return context.GetDialect().duplicate_points && !context.images.empty() ? "text_embeds" : HiddenKey(0);
}

std::string KvKey(int layer, const char* which) { return fmt::format("kv.{}.{}", layer, which); }

// Rows of a table in the order of `ids`, as stored.
Tensor RowsOf(const Tensor& table, std::span<const int64_t> ids) {
  const int64_t row_bytes = table.Bytes() / table.GetShape()[0];
  Tensor rows(TensorType{table.GetDType(), {static_cast<int64_t>(ids.size()), table.GetShape()[1]}});
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= table.GetShape()[0])
      Fail("token id {} at position {} is outside the table of {} rows", ids[i], i, table.GetShape()[0]);
    std::memcpy(rows.Raw() + static_cast<int64_t>(i) * row_bytes, table.Raw() + ids[i] * row_bytes, row_bytes);
  }
  return rows;
}

Tensor Iota(int64_t count) {
  std::vector<int64_t> values(count);
  std::iota(values.begin(), values.end(), 0);
  return Tensor::Of<int64_t>({1, count}, values);
}

// [1,KV,S-1,h]: every position but the last slot, which the new token takes.
Tensor PastOf(const Tensor& cache) {
  const int64_t heads = cache.GetShape()[1], slots = cache.GetShape()[2], width = cache.GetShape()[3];
  Tensor past(TensorType{DType::kF32, {1, heads, slots - 1, width}});
  for (int64_t h = 0; h < heads; ++h)
    std::memcpy(past.F32().data() + h * (slots - 1) * width, cache.F32().data() + h * slots * width,
                (slots - 1) * width * sizeof(float));
  return past;
}

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

// The last `count` of all positions.
Tensor LastPositions(const Tensor& tensor, int64_t count, int axis = 1) {
  const int64_t all = tensor.GetShape()[axis];
  return Positions(tensor, all - count, all, axis);
}

using Values = std::map<std::string, Tensor>;

}  // namespace

int64_t TextItem::FirstRead() const { return std::max<int64_t>(0, answer - 1); }

int64_t TextItem::Last() const {
  for (int64_t i = static_cast<int64_t>(keep.size()) - 1; i > 0; --i)
    if (keep[i] != 0) return i;
  return 0;
}

const TextItem* RunContext::VerifyText() const {
  for (const TextItem& text : texts)
    if (text.item.kind == ItemKind::kVerify) return &text;
  return nullptr;
}

WeightSource RunContext::Stored() const {
  return [this](const std::string& name) { return weights.Stored(name); };
}

struct TextRun::State {
  explicit State(RunContext& c) : context(c) {}

  RunContext& context;
  std::map<std::string, Tensor> tables;  // by kind, type, length and kept positions
  std::mutex tables_mutex;
  ChainTables chain_tables{context.calibration};

  const TextConfig& Config() const { return context.config.text; }
  const Dialect& GetDialect() const { return context.GetDialect(); }
  const ExportOptions& Exports() const { return context.calibration.GetRecipe().export_options; }

  const TextItem* Verify() const { return context.VerifyText(); }
  int VerifyId() const { return Verify() == nullptr ? -1 : Verify()->item.id; }

  // The decode step of the verification sample: the newest token's values, stage by stage.
  Tensor Decode(const std::string& name) const { return Kept("decode." + name); }
  void KeepDecode(const std::string& name, const Tensor& tensor) {
    context.store.Drop("decode." + name);
    context.store.Put(VerifyId(), Chain::kQuant, "decode." + name, tensor);
  }

  std::vector<LayerConfig> Types() const {
    std::map<std::string, LayerConfig> types;
    for (const LayerConfig& layer : Config().layers) types.try_emplace(LayerTypeName(layer), layer);
    std::vector<LayerConfig> list;
    for (const auto& [name, layer] : types) list.push_back(layer);
    return list;
  }

  Tensor Mask(const TextItem& text, const LayerConfig& layer) {
    const std::lock_guard lock(tables_mutex);
    const std::string kept(text.keep.begin(), text.keep.end());
    Tensor& mask = tables[fmt::format("mask.{}.{}", LayerTypeName(layer), kept)];
    if (mask.Empty()) mask = PrefillMask(text.keep, layer.window);
    return mask;
  }

  Tensor RopeTable(int64_t start, int64_t length, const LayerConfig& layer, bool cosine) {
    const std::lock_guard lock(tables_mutex);
    const std::string name = fmt::format("{}.{}.{}", LayerTypeName(layer), start, length);
    Tensor& cos = tables["cos." + name];
    Tensor& sin = tables["sin." + name];
    if (cos.Empty()) {
      const RopeTables rope = TextRopeTables(layer.rope, layer.head_dim, start, length, /*negated_sin=*/true);
      cos = rope.cos;
      sin = rope.sin;
    }
    return cosine ? cos : sin;
  }

  // Token embeddings with the pictures' features written over their placeholders.
  Tensor Merged(const Item& item, Chain chain) const {
    Tensor merged = context.store.Get(item.id, chain, "text_embeds");
    const TextItem& text = context.TextOf(item);
    size_t used = 0;
    for (const int image : text.images) {
      const Tensor features = context.store.Get(image, chain, "vision.projected");
      const int64_t rows = features.GetShape()[0];
      merged = FuseAt(merged, features, std::span(text.places).subspan(used, rows));
      used += rows;
    }
    return merged;
  }

  Step::Source FromStore(std::string key) const {
    return [this, key = std::move(key)](const Item& item, Chain chain) { return context.store.Get(item.id, chain, key); };
  }

  // The first position that the layers from `layer` on take of an item: of a caption only the answer once none of them
  // makes K and V.
  int64_t FirstRead(const Item& item, int layer) const {
    const auto& layers = Config().layers;
    const bool shared = std::all_of(layers.begin() + layer, layers.end(), [](const auto& l) { return l.kv_shared; });
    return shared ? context.TextOf(item).FirstRead() : 0;
  }
  int64_t LengthOf(const Item& item, int layer) const { return item.length - FirstRead(item, layer); }
  // A stored value of all positions, or of those that are still needed, for a layer's input.
  Step::Source LastOf(std::string key, int layer) const {
    return [this, key = std::move(key), layer](const Item& item, Chain chain) {
      return LastPositions(context.store.Get(item.id, chain, key), LengthOf(item, layer));
    };
  }

  // Rows of an embedding table for one item.
  std::function<Tensor(const std::string&, const Item&, bool)> TableRows() const {
    return [this](const std::string& name, const Item& item, bool rounded) -> Tensor {
      const Tensor& table = context.weights.Stored(name);
      const std::vector<int64_t>& ids = context.TextOf(item).ids;
      const PointParams* params = rounded ? context.calibration.Params().Find(name) : nullptr;
      if (params == nullptr || params->spec.kind == QuantKind::kNone) return ToF32(RowsOf(table, ids));
      if (params->spec.kind == QuantKind::kMx) {
        Tensor rows = ToF32(RowsOf(table, ids)).Clone();
        MxFakeQuantize(rows, params->spec.mx);
        return rows;
      }
      return FakeQuantizeRows(table, ids, params->qparams, GetDialect().rounding);
    };
  }

  Graph Build(const std::function<void(const Builder&)>& body) const {
    Graph graph;
    body(Builder(graph));
    return graph;
  }

  Graph TablesGraph(int64_t length) const {
    return Build([&](const Builder& b) {
      for (const LayerConfig& layer : Types()) {
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

  // Runs a unit's graph on the verification sample in the fake-quantize reading.
  Values RunRounded(const Graph& graph, const Values& inputs) {
    FakeQuantReading reading(context.calibration);
    Executor executor(graph, &reading);
    return executor.Run(inputs, context.calibration.RoundedWeights(context.Stored()));
  }

  Tensor Kept(const std::string& key) const { return context.store.Get(VerifyId(), Chain::kQuant, key); }
  Tensor KeptPle() const {
    return JoinLayers(context.store, Verify()->item, Chain::kQuant, "ple", Config().NumLayers());
  }
};

TextRun::TextRun(RunContext& context) : state_(std::make_unique<State>(context)) {}
TextRun::~TextRun() = default;

Stage TextRun::Tables() {
  State& s = *state_;
  Step step{.name = "tables", .build = [&s](const Item& item) { return s.TablesGraph(item.length); }};
  for (const LayerConfig& layer : s.Types()) {
    const std::string type = LayerTypeName(layer);
    step.inputs.emplace_back("mask." + type, [&s, layer](const Item& item, Chain) {
      return s.Mask(s.context.TextOf(item), layer);
    });
    step.outputs.push_back({"mask." + type, "", "attn_mask." + type});
    for (const bool cosine : {true, false}) {
      const std::string name = cosine ? "cos." : "sin.";
      step.inputs.emplace_back(name + type, [&s, layer, cosine](const Item& item, Chain) {
        return s.RopeTable(0, item.length, layer, cosine);
      });
      step.outputs.push_back({name + type, "", "rope_" + name + type});
    }
  }
  return {"tables", {std::move(step)}};
}

Stage TextRun::Embeddings() {
  State& s = *state_;
  // Placeholders are looked up as the pad id and then overwritten, so the errors that count are the merged sequence's.
  Step rows{.name = "embed_tokens",
            .build = [&s](const Item& item) {
              return s.Build([&](const Builder& b) {
                BuildTokenEmbedding(b, s.Config(), item.length, item.length, s.GetDialect());
              });
            },
            .inputs = {{"ids", [](const Item& item, Chain) { return Iota(item.length); }}},
            .outputs = {{"hidden", "text_embeds", "embed.tokens"}},
            .measured = s.context.images.empty(),
            .stored = s.context.Stored(),
            .own = s.TableRows(),
            .fresh = true};
  Step merge{.name = "inputs_embeds",
             .build = [&s](const Item& item) {
               return s.Build([&](const Builder& b) {
                 BuildMergedEmbedding(b, s.Config(), item.length, !s.context.TextOf(item).images.empty(), s.GetDialect());
               });
             },
             .inputs = {{"hidden", [&s](const Item& item, Chain chain) { return s.Merged(item, chain); }}},
             .outputs = {{"hidden", HiddenKey(0), ""}, {"merged", "", "inputs_embeds"}},
             .stored = s.context.Stored()};
  return {"embeddings", {std::move(rows), std::move(merge)}};
}

Stage TextRun::PerLayerInputs() {
  State& s = *state_;
  Step tokens{.name = "per_layer_token_inputs",
              .build = [&s](const Item& item) {
                return s.Build([&](const Builder& b) {
                  BuildPleEmbedding(b, s.Config(), item.length, item.length, s.GetDialect());
                });
              },
              .inputs = {{"ids", [](const Item& item, Chain) { return Iota(item.length); }}},
              .outputs = {{"per_layer_token_inputs", "ple.tokens", "ple.token_inputs"}},
              .stored = s.context.Stored(),
              .own = s.TableRows(),
            .fresh = true};
  Step projection{
      .name = "per_layer_inputs",
      .build =
          [&s](const Item& item) {
            return s.Build([&](const Builder& b) { BuildPleProjection(b, s.Config(), item.length, s.GetDialect()); });
          },
      .inputs = {{"inputs_embeds", s.FromStore(HiddenKey(0))}, {"per_layer_token_inputs", s.FromStore("ple.tokens")}},
      .outputs = {{"per_layer_inputs", "ple", "ple.inputs", /*by_layer=*/true}},
      .stored = s.context.Stored()};
  return {"per_layer_inputs", {std::move(tokens), std::move(projection)}};
}

Stage TextRun::Layer(int index) {
  State& s = *state_;
  const LayerConfig layer = s.Config().layers[index];
  const std::string name = fmt::format("layers.{}", index);
  Step step{.name = name,
            .build = [&s, index](const Item& item) {
              return s.Build([&](const Builder& b) {
                BuildDecoderLayer(b, s.Config(), index, Phase::kPrefill, item.length, s.GetDialect(),
                                  {.inner_outputs = true, .first = s.FirstRead(item, index + 1)});
              });
            },
            .inputs = {{"hidden", s.LastOf(HiddenKey(index), index)},
                       {"mask",
                        [&s, layer, index](const Item& item, Chain chain) {
                          const Tensor whole = s.Mask(s.context.TextOf(item), layer);
                          const Tensor mask = s.chain_tables.For(chain, MaskPoint(layer), whole);
                          return LastPositions(mask, s.LengthOf(item, index + 1), 2);
                        }}},
            .outputs = {{"hidden", HiddenKey(index + 1), name + ".out"},
                        {"attn_out", "", name + ".attn_out"},
                        {"mlp_out", "", name + ".mlp_out"}},
            .stored = s.context.Stored()};
  for (const bool cosine : {true, false})
    step.inputs.emplace_back(cosine ? "cos" : "sin", [&s, layer, index, cosine](const Item& item, Chain chain) {
      const Tensor whole = s.RopeTable(0, item.length, layer, cosine);
      return LastPositions(s.chain_tables.For(chain, RopePoint(layer, cosine), whole), s.LengthOf(item, index));
    });
  if (s.Config().HasPle()) step.inputs.emplace_back("per_layer_input", s.LastOf(fmt::format("ple.{}", index), index + 1));
  if (layer.kv_shared) {
    step.inputs.emplace_back("shared_key", s.FromStore(KvKey(layer.kv_source, "key")));
    step.inputs.emplace_back("shared_value", s.FromStore(KvKey(layer.kv_source, "value")));
  } else {
    step.outputs.push_back({"new_key", KvKey(index, "key"), ""});
    step.outputs.push_back({"new_value", KvKey(index, "value"), ""});
  }
  return {name, {std::move(step)}};
}

void TextRun::DropAfterLayer(int index) {
  State& s = *state_;
  ActivationStore& store = s.context.store;
  // The whole-graph unit at the end reads what went into the layers once more.
  store.Drop(HiddenKey(index), index == 0 ? s.VerifyId() : -1);
  store.Drop(fmt::format("ple.{}", index), s.VerifyId());
  if (index == 0) {
    store.Drop("text_embeds");
    store.Drop("ple.tokens");
  }
  for (int source = 0; source <= index; ++source) {
    bool read_later = false;
    for (int later = index + 1; later < s.Config().NumLayers(); ++later)
      read_later |= s.Config().layers[later].kv_shared && s.Config().layers[later].kv_source == source;
    if (read_later) continue;
    store.Drop(KvKey(source, "key"));
    store.Drop(KvKey(source, "value"));
  }
  s.context.calibration.DropWeights();
}

Stage TextRun::Norm() {
  State& s = *state_;
  Step step{.name = "norm",
            .build =
                [&s](const Item& item) {
                  return s.Build([&](const Builder& b) {
                    BuildFinalNorm(b, s.Config(), s.LengthOf(item, s.Config().NumLayers()), s.GetDialect());
                  });
                },
            .inputs = {{"hidden", s.LastOf(HiddenKey(s.Config().NumLayers()), s.Config().NumLayers())}},
            .outputs = {{"last_hidden_state", kNormedKey, "last_hidden_state"}},
            .stored = s.context.Stored()};
  return {"norm", {std::move(step)}};
}

void TextRun::DropAfterNorm() {
  State& s = *state_;
  s.context.store.Drop(HiddenKey(s.Config().NumLayers()), s.VerifyId());
}

// ---- Units --------------------------------------------------------------------------------------------------------

void TextRun::WriteEmbeddingUnits(UnitWriter& writer) {
  State& s = *state_;
  const TextItem* verify = s.Verify();
  const int64_t vocab = s.Config().vocab_size;
  UnitSpec spec{.name = "token_embedding",
                .graph = s.Build([&](const Builder& b) { BuildTokenEmbedding(b, s.Config(), 1, vocab, s.GetDialect()); }),
                .dynamic_length = true,
                .keys = {{"hidden", EmbeddingKey(s.context)}}};
  if (verify != nullptr) {
    spec.inputs["ids"] = Tensor::Of<int64_t>({1, s.context.max_seq_len}, verify->ids);
    spec.outputs["hidden"] = s.Kept("text_embeds");
    const int64_t last = verify->Last();
    s.KeepDecode("hidden", Positions(s.Kept(HiddenKey(0)), last, last + 1).Clone());
  }
  writer.Write(std::move(spec), s.context.Stored());
}

void TextRun::WritePleUnits(UnitWriter& writer) {
  State& s = *state_;
  const TextItem* verify = s.Verify();
  UnitSpec tokens{.name = "ple_embedding",
                  .graph = s.Build([&](const Builder& b) {
                    BuildPleEmbedding(b, s.Config(), 1, s.Config().ple_vocab_size, s.GetDialect());
                  }),
                  .dynamic_length = true,
                  .keys = {{"per_layer_token_inputs", "ple.tokens"}}};
  if (verify != nullptr) {
    tokens.inputs["ids"] = Tensor::Of<int64_t>({1, s.context.max_seq_len}, verify->ids);
    tokens.outputs["per_layer_token_inputs"] = s.Kept("ple.tokens");
  }
  writer.Write(std::move(tokens), s.context.Stored());

  const std::map<std::string, std::string> keys{{"inputs_embeds", HiddenKey(0)},
                                                {"per_layer_token_inputs", "ple.tokens"},
                                                {"per_layer_inputs", "ple"}};
  const bool both = s.Exports().prefill_decode;
  for (const bool decode : {false, true}) {
    if (decode && !both) break;
    const int64_t length = decode ? 1 : s.context.max_seq_len;
    UnitSpec spec{.name = decode ? "ple_projection_decode" : both ? "ple_projection_prefill" : "ple_projection",
                  .graph = s.Build([&](const Builder& b) { BuildPleProjection(b, s.Config(), length, s.GetDialect()); }),
                  .keys = keys};
    if (verify != nullptr) {
      const int64_t last = verify->Last();
      const auto input = [&](const std::string& key) {
        return decode ? Positions(s.Kept(key), last, last + 1).Clone() : s.Kept(key);
      };
      spec.inputs = {{"inputs_embeds", input(HiddenKey(0))}, {"per_layer_token_inputs", input("ple.tokens")}};
      if (decode) {
        spec.outputs = s.RunRounded(spec.graph, spec.inputs);
        s.KeepDecode("ple", spec.outputs.at("per_layer_inputs"));
      } else {
        spec.outputs["per_layer_inputs"] = s.KeptPle();
      }
    }
    writer.Write(std::move(spec), s.context.Stored());
  }
}

void TextRun::WriteLayerUnits(UnitWriter& writer, int index) {
  State& s = *state_;
  const TextConfig& config = s.Config();
  const LayerConfig& layer = config.layers[index];
  const TextItem* verify = s.Verify();
  const int64_t slots = s.context.max_seq_len;
  const std::string type = LayerTypeName(layer);
  std::map<std::string, std::string> keys{{"hidden", HiddenKey(index)},         {"mask", "mask." + type},
                                          {"cos", "cos." + type},               {"sin", "sin." + type},
                                          {"per_layer_input", "ple"},           {"new_key", KvKey(index, "key")},
                                          {"new_value", KvKey(index, "value")}, {"past_key", KvKey(index, "key")},
                                          {"past_value", KvKey(index, "value")}};
  keys["shared_key"] = KvKey(layer.kv_source, "key");
  keys["shared_value"] = KvKey(layer.kv_source, "value");

  UnitSpec prefill{.name = fmt::format("decoder_layer_prefill_{}", index),
                   .graph = s.Build([&](const Builder& b) {
                     BuildDecoderLayer(b, config, index, Phase::kPrefill, slots, s.GetDialect());
                   }),
                   .keys = keys};
  UnitSpec decode{.name = fmt::format("decoder_layer_decode_{}", index),
                  .graph = s.Build([&](const Builder& b) {
                    BuildDecoderLayer(b, config, index, Phase::kDecode, slots, s.GetDialect());
                  }),
                  .keys = keys};
  if (verify != nullptr) {
    prefill.inputs = {{"hidden", s.Kept(HiddenKey(index))},
                      {"mask", s.Mask(*verify, layer)},
                      {"cos", s.RopeTable(0, slots, layer, true)},
                      {"sin", s.RopeTable(0, slots, layer, false)}};
    prefill.outputs["hidden"] = s.Kept(HiddenKey(index + 1));

    const int64_t last = verify->Last();
    decode.inputs = {{"hidden", s.Decode("hidden")},
                     {"mask", DecodeMask(slots, last, layer.window)},
                     {"cos", s.RopeTable(last, 1, layer, true)},
                     {"sin", s.RopeTable(last, 1, layer, false)}};
    if (config.HasPle()) {
      prefill.inputs["per_layer_input"] = s.Kept(fmt::format("ple.{}", index));
      if (s.Exports().prefill_decode) decode.inputs["per_layer_input"] = LayerSlice(s.Decode("ple"), index);
    }
    for (const char* which : {"key", "value"}) {
      const std::string name = which;
      if (layer.kv_shared) {
        prefill.inputs["shared_" + name] = s.Kept(KvKey(layer.kv_source, which));
        if (s.Exports().prefill_decode) decode.inputs["shared_" + name] = s.Decode(KvKey(layer.kv_source, which));
      } else {
        prefill.outputs["new_" + name] = s.Kept(KvKey(index, which));
        decode.inputs["past_" + name] = PastOf(s.Kept(KvKey(index, which)));
      }
    }
    if (s.Exports().prefill_decode) decode.outputs = s.RunRounded(decode.graph, decode.inputs);
  }
  if (verify != nullptr && s.Exports().prefill_decode) {
    s.KeepDecode("hidden", decode.outputs.at("hidden"));
    if (layer.stores_kv)
      for (const char* which : {"key", "value"})
        s.KeepDecode(KvKey(index, which), Appended(decode.inputs.at(std::string("past_") + which),
                                                   decode.outputs.at(std::string("new_") + which)));
  }
  // A layer's output has its successor's key; input and output share the graph's name "hidden".
  const CalibratedGrids grids(s.context.calibration, s.context.Stored());
  const auto write = [&](UnitSpec spec) {
    spec.output_keys = {{"hidden", HiddenKey(index + 1)}};
    writer.Write(std::move(spec), grids);
  };
  if (!s.Exports().prefill_decode) {
    // One graph a layer, for whole sequences only: nothing takes the K/V of its positions.
    prefill.name = fmt::format("decoder_layer_{}", index);
    prefill.graph = WithOutputs(std::move(prefill.graph), {"hidden"});
    return write(std::move(prefill));
  }
  write(std::move(prefill));
  write(std::move(decode));
}

void TextRun::WriteHeadUnit(UnitWriter& writer) {
  State& s = *state_;
  const int layers = s.Config().NumLayers();
  UnitSpec spec{.name = "lm_head", .keys = {{"hidden", HiddenKey(layers)}, {"logits", "logits"}}};
  const Graph head = s.Build([&](const Builder& b) { BuildHead(b, s.Config(), 1, s.GetDialect()); });
  spec.graph = WithOutputs(head, {"logits"});
  if (const TextItem* verify = s.Verify(); verify != nullptr) {
    const int64_t last = verify->Last();
    const auto newest = [&](const std::string& key) { return Positions(s.Kept(key), last, last + 1).Clone(); };
    spec.inputs["hidden"] = newest(HiddenKey(layers));
    spec.outputs["logits"] = RoundedLogits(s.context, newest(kNormedKey));
  }
  writer.Write(std::move(spec), s.context.Stored());
}

void TextRun::WriteModelUnit(UnitWriter& writer) {
  State& s = *state_;
  const TextConfig& config = s.Config();
  const int64_t length = s.context.max_seq_len;
  UnitSpec spec{.name = "gemma4_model",
                .graph = s.Build([&](const Builder& b) { BuildTextModel(b, config, length, s.GetDialect()); }),
                .keys = {{"inputs_embeds", HiddenKey(0)}, {"per_layer_inputs", "ple"}}};
  for (const LayerConfig& layer : s.Types()) {
    const std::string type = LayerTypeName(layer);
    for (const char* table : {"mask.", "cos.", "sin."}) spec.keys[table + type] = table + type;
  }
  if (const TextItem* verify = s.Verify(); verify != nullptr) {
    spec.inputs["inputs_embeds"] = s.Kept(HiddenKey(0));
    if (config.HasPle()) spec.inputs["per_layer_inputs"] = s.KeptPle();
    for (const LayerConfig& layer : s.Types()) {
      const std::string type = LayerTypeName(layer);
      spec.inputs["mask." + type] = s.Mask(*verify, layer);
      spec.inputs["cos." + type] = s.RopeTable(0, length, layer, true);
      spec.inputs["sin." + type] = s.RopeTable(0, length, layer, false);
    }
    // In our dialect the layers one after the other are the whole graph; the reference rounds its input anew.
    spec.outputs = s.GetDialect().duplicate_points ? s.RunRounded(spec.graph, spec.inputs)
                                                   : Values{{"last_hidden_state", s.Kept(kNormedKey)}};
  }
  writer.Write(std::move(spec), s.context.Stored());
}

std::vector<Point> TextRun::Points() {
  State& s = *state_;
  const TextConfig& config = s.Config();
  constexpr int64_t kLength = 4;
  std::vector<Point> points;
  std::set<std::string> seen;
  const auto collect = [&](const Graph& graph) {
    for (Point& point : PointsOf(graph))
      if (seen.insert(point.name).second) points.push_back(std::move(point));
  };
  collect(s.TablesGraph(kLength));
  collect(s.Build([&](const Builder& b) { BuildTokenEmbedding(b, config, kLength, config.vocab_size, s.GetDialect()); }));
  collect(s.Build(
      [&](const Builder& b) { BuildMergedEmbedding(b, config, kLength, !s.context.images.empty(), s.GetDialect()); }));
  if (config.HasPle()) {
    collect(s.Build([&](const Builder& b) {
      BuildPleEmbedding(b, config, kLength, config.ple_vocab_size, s.GetDialect());
    }));
    collect(s.Build([&](const Builder& b) { BuildPleProjection(b, config, kLength, s.GetDialect()); }));
  }
  for (int i = 0; i < config.NumLayers(); ++i)
    collect(s.Build([&](const Builder& b) {
      BuildDecoderLayer(b, config, i, Phase::kPrefill, kLength, s.GetDialect());
    }));
  collect(s.Build([&](const Builder& b) { BuildHead(b, config, kLength, s.GetDialect()); }));
  return points;
}

}  // namespace circlet::gemma4
