#include "pipeline/gemma4/vision_stages.h"

#include <mutex>
#include <nlohmann/json.hpp>

#include "circlet/io/json.h"
#include "circlet/io/safetensors.h"
#include "circlet/model/gemma4/tables.h"

namespace circlet::gemma4 {
namespace {

std::string HiddenKey(int layer) { return fmt::format("vision.hidden.{}", layer); }

using Values = std::map<std::string, Tensor>;

}  // namespace

struct VisionRun::State {
  explicit State(RunContext& c)
      : context(c), config(*c.config.vision), weights(config, c.Stored(), c.GetDialect()), stored(weights.Folded()) {}

  RunContext& context;
  const VisionConfig& config;
  VisionWeights weights;
  WeightSource stored;
  std::map<std::string, Tensor> tables;  // by kind and layout
  std::mutex tables_mutex;
  ChainTables chain_tables{context.calibration};

  const Dialect& GetDialect() const { return context.GetDialect(); }
  const ImageItem& ImageOf(const Item& item) const { return context.ImageOf(item.id); }

  // The verification sample and its one picture; none: no picture, or several.
  const TextItem* Verify() const {
    const TextItem* text = context.VerifyText();
    return text != nullptr && text->images.size() == 1 ? text : nullptr;
  }
  const ImageItem& VerifyImage() const { return context.ImageOf(Verify()->images[0]); }
  Tensor Kept(const std::string& key) const { return context.store.Get(Verify()->images[0], Chain::kQuant, key); }

  Graph Build(const std::function<void(const Builder&)>& body) const {
    Graph graph;
    body(Builder(graph));
    return graph;
  }

  Tensor Table(const ImageItem& image, const std::string& which) {
    const std::lock_guard lock(tables_mutex);
    Tensor& table = tables[which + image.item.variant];
    if (table.Empty()) {
      const RopeTables rope = VisionRopeTables(config, image.positions, GetDialect());
      tables["cos" + image.item.variant] = rope.cos;
      tables["sin" + image.item.variant] = rope.sin;
      tables["mask" + image.item.variant] = VisionMask(image.positions);
    }
    return tables[which + image.item.variant];
  }
  // The same as a layer of the chain reads it.
  Tensor Table(const ImageItem& image, const std::string& which, Chain chain) {
    const std::string point = which == "mask" ? VisionMaskPoint() : VisionRopePoint(which == "cos");
    return chain_tables.For(chain, point, Table(image, which));
  }

  // The reference rounds the position table before it looks positions up.
  const QParams* TableGrid() const {
    return GetDialect().duplicate_points ? context.calibration.GridOf(VisionWeights::PositionTablePoint()) : nullptr;
  }

  Step MakeStep(std::string name, std::function<void(const Builder&, const ImageItem&)> build) {
    return {.name = std::move(name),
            .build = [this, build = std::move(build)](const Item& item) {
              return Build([&](const Builder& b) { build(b, ImageOf(item)); });
            },
            .stored = stored};
  }

  Step::Source FromStore(std::string key) const {
    return [this, key = std::move(key)](const Item& item, Chain chain) { return context.store.Get(item.id, chain, key); };
  }
  void AddTables(Step& step) {
    for (const char* which : {"mask", "cos", "sin"})
      step.inputs.emplace_back(
          which, [this, which](const Item& item, Chain chain) { return Table(ImageOf(item), which, chain); });
  }

  Values RunRounded(const Graph& graph, const Values& inputs) {
    FakeQuantReading reading(context.calibration);
    Executor executor(graph, &reading);
    const WeightSource rounded = context.calibration.RoundedWeights(stored);
    const ImageItem& image = VerifyImage();
    return executor.Run(inputs, [&](const std::string& name) {
      return name == VisionWeights::PositionEmbeddingsName() ? weights.PositionEmbeddings(image.positions, TableGrid())
                                                             : rounded(name);
    });
  }
  // Parameters of the verification picture's units.
  WeightSource UnitWeights() const { return weights.For(VerifyImage().positions, TableGrid()); }

  // `kept` is the key of what the stages one after the other computed for the unit's only output. In the reference's
  // dialect a file may differ from them (VisionUse).
  void WriteWhole(UnitWriter& writer, std::string name, const std::function<void(const Builder&)>& build,
                  std::map<std::string, std::string> keys, const Values& inputs, const std::string& kept) {
    UnitSpec spec{.name = std::move(name), .graph = Build(build), .keys = std::move(keys), .inputs = inputs};
    CIRCLET_CHECK(spec.graph.Outputs().size() == 1, "{} has {} outputs", spec.name, spec.graph.Outputs().size());
    spec.outputs = GetDialect().duplicate_points ? RunRounded(spec.graph, inputs)
                                                 : Values{{spec.graph.Outputs()[0].name, Kept(kept)}};
    writer.Write(std::move(spec), UnitWeights());
  }
};

VisionRun::VisionRun(RunContext& context) : state_(std::make_unique<State>(context)) {}
VisionRun::~VisionRun() = default;

std::vector<Stage> VisionRun::Stages() {
  State& s = *state_;
  std::vector<Stage> stages;
  const auto add = [&](Step step) { stages.push_back({step.name, {step}}); };

  Step tables = s.MakeStep("vision.tables", [&s](const Builder& b, const ImageItem& image) {
    BuildVisionTables(b, s.config, image.item.length, s.GetDialect());
  });
  s.AddTables(tables);
  tables.outputs = {{"mask", "", "vision.attn_mask"}, {"cos", "", "vision.rope_cos"}, {"sin", "", "vision.rope_sin"}};
  add(std::move(tables));

  Step patches = s.MakeStep("vision.patch_embed", [&s](const Builder& b, const ImageItem& image) {
    BuildPatchEmbedder(b, s.config, image.item.length, s.GetDialect());
  });
  patches.inputs = {{"pixel_values", [&s](const Item& item, Chain) { return PixelValues(s.ImageOf(item).pixel_values); }}};
  patches.outputs = {{"hidden", HiddenKey(0), "vision.patch_embed"}};
  patches.own = [&s](const std::string& name, const Item& item, bool rounded) -> Tensor {
    if (name != VisionWeights::PositionEmbeddingsName()) return {};
    return s.weights.PositionEmbeddings(s.ImageOf(item).positions, rounded ? s.TableGrid() : nullptr);
  };
  add(std::move(patches));

  for (int i = 0; i < s.config.num_layers; ++i) {
    const std::string name = fmt::format("vision.layers.{}", i);
    Step layer = s.MakeStep(name, [&s, i](const Builder& b, const ImageItem& image) {
      BuildVisionLayer(b, s.config, i, image.item.length, s.GetDialect());
    });
    layer.inputs = {{"hidden", s.FromStore(HiddenKey(i))}};
    s.AddTables(layer);
    layer.outputs = {{"hidden", HiddenKey(i + 1), name + ".out"}};
    add(std::move(layer));
  }

  Step pooler = s.MakeStep("vision.pooled", [&s](const Builder& b, const ImageItem& image) {
    BuildVisionPooler(b, s.config, image.positions, VisionUse::kRun, s.GetDialect());
  });
  pooler.inputs = {{"hidden", s.FromStore(HiddenKey(s.config.num_layers))}};
  pooler.outputs = {{"pooled", "vision.pooled", "vision.pooled"}};
  add(std::move(pooler));

  Step post = s.MakeStep("vision.projected", [&s](const Builder& b, const ImageItem& image) {
    BuildVisionPost(b, s.context.config, image.positions, s.GetDialect());
  });
  post.inputs = {{"pooled", s.FromStore("vision.pooled")}};
  post.outputs = {{"projected", "vision.projected", "vision.projected"},
                  {"last_hidden_state", "vision.last_hidden_state", "vision.last_hidden_state"}};
  add(std::move(post));
  return stages;
}

void VisionRun::DropAfter(size_t stage) {
  // Stage 2 + i is layer i. The units are written at the end and read every boundary of the verification picture.
  State& s = *state_;
  if (stage == 1)
    for (ImageItem& image : s.context.images)
      if (image.item.kind != ItemKind::kVerify) image.pixel_values = Tensor();
  if (stage < 2) return;
  const int kept = s.Verify() == nullptr ? -1 : s.Verify()->images[0];
  s.context.store.Drop(HiddenKey(static_cast<int>(stage) - 2), kept);
}

void VisionRun::DropAll() {
  State& s = *state_;
  for (int i = 0; i <= s.config.num_layers; ++i) s.context.store.Drop(HiddenKey(i));
  for (const char* key : {"vision.pooled", "vision.projected", "vision.last_hidden_state"}) s.context.store.Drop(key);
}

void VisionRun::WriteSplitUnits(UnitWriter& writer) {
  State& s = *state_;
  if (s.Verify() == nullptr) return;
  const ImageItem& image = s.VerifyImage();
  const int64_t patches = image.item.length;
  const WeightSource weights = s.UnitWeights();
  const auto write = [&](std::string name, Graph graph, std::map<std::string, std::string> keys, Values inputs,
                         Values outputs, std::map<std::string, std::string> output_keys) {
    writer.Write({.name = std::move(name),
                  .graph = std::move(graph),
                  .keys = std::move(keys),
                  .output_keys = std::move(output_keys),
                  .inputs = std::move(inputs),
                  .outputs = std::move(outputs)},
                 weights);
  };
  write("vision_patch_embedder",
        s.Build([&](const Builder& b) { BuildPatchEmbedder(b, s.config, patches, s.GetDialect()); }), {},
        {{"pixel_values", PixelValues(image.pixel_values)}}, {{"hidden", s.Kept(HiddenKey(0))}},
        {{"hidden", HiddenKey(0)}});
  for (int i = 0; i < s.config.num_layers; ++i)
    write(fmt::format("vision_encoder_layer_{:02}", i),
          s.Build([&](const Builder& b) { BuildVisionLayer(b, s.config, i, patches, s.GetDialect()); }),
          {{"hidden", HiddenKey(i)}, {"mask", "vision.mask"}, {"cos", "vision.cos"}, {"sin", "vision.sin"}},
          {{"hidden", s.Kept(HiddenKey(i))},
           {"mask", s.Table(image, "mask")},
           {"cos", s.Table(image, "cos")},
           {"sin", s.Table(image, "sin")}},
          {{"hidden", s.Kept(HiddenKey(i + 1))}}, {{"hidden", HiddenKey(i + 1)}});
  const int layers = s.config.num_layers;
  const Graph pooler = s.Build([&](const Builder& b) {
    BuildVisionPooler(b, s.config, image.positions, VisionUse::kExport, s.GetDialect());
  });
  const Values pooled_in{{"hidden", s.Kept(HiddenKey(layers))}};
  write("vision_pooler", pooler, {{"hidden", HiddenKey(layers)}, {"pooled", "vision.pooled"}}, pooled_in,
        s.RunRounded(pooler, pooled_in), {});
  const Graph post = WithOutputs(
      s.Build([&](const Builder& b) { BuildVisionPost(b, s.context.config, image.positions, s.GetDialect()); }),
      {"projected"});
  write("vision_post_projection", post, {{"pooled", "vision.pooled"}, {"projected", "vision.projected"}},
        {{"pooled", s.Kept("vision.pooled")}}, {{"projected", s.Kept("vision.projected")}}, {});
  writer.WriteTensors("vision_context.safetensors", {{"mask", s.Table(image, "mask")},
                                                     {"cos", s.Table(image, "cos")},
                                                     {"sin", s.Table(image, "sin")}});
}

void VisionRun::WritePrefillUnit(UnitWriter& writer) {
  State& s = *state_;
  if (s.Verify() == nullptr) return;
  const ImageItem& image = s.VerifyImage();
  s.WriteWhole(
      writer, "vision_prefill",
      [&](const Builder& b) {
        BuildVisionPrefill(b, s.context.config, image.positions, VisionUse::kExport, s.GetDialect());
      },
      {{"projected", "vision.projected"}}, {{"pixel_values", PixelValues(image.pixel_values)}}, "vision.projected");
}

void VisionRun::WritePartUnits(UnitWriter& writer) {
  State& s = *state_;
  if (s.Verify() == nullptr) return;
  const ImageItem& image = s.VerifyImage();
  const int64_t tokens = LayoutOf(s.config, image.positions).tokens;
  s.WriteWhole(
      writer, "vision_model",
      [&](const Builder& b) { BuildVisionModel(b, s.config, image.positions, VisionUse::kExport, s.GetDialect()); },
      {{"last_hidden_state", "vision.last_hidden_state"}}, {{"pixel_values", PixelValues(image.pixel_values)}},
      "vision.last_hidden_state");
  s.WriteWhole(
      writer, "vision_encoder",
      [&](const Builder& b) { BuildVisionEncoder(b, s.config, image.positions, s.GetDialect()); }, {},
      {{"hidden", s.Kept(HiddenKey(0))}}, HiddenKey(s.config.num_layers));
  s.WriteWhole(
      writer, "multimodal_embedder",
      [&](const Builder& b) { BuildMultimodalEmbedder(b, s.context.config, tokens, s.GetDialect()); },
      {{"hidden", "vision.last_hidden_state"}, {"projected", "vision.projected"}},
      {{"hidden", s.Kept("vision.last_hidden_state")}}, "vision.projected");
}

void VisionRun::WriteFusionUnit(UnitWriter& writer) {
  State& s = *state_;
  const TextItem* verify = s.Verify();
  if (verify == nullptr) return;
  const int64_t tokens = static_cast<int64_t>(verify->places.size());
  const bool prefill_decode = s.context.calibration.GetRecipe().export_options.prefill_decode;
  UnitSpec spec{.name = prefill_decode ? "multimodal_fusion_prefill" : "multimodal_fusion",
                .graph = s.Build([&](const Builder& b) {
                  BuildFusion(b, s.context.config.text, s.context.max_seq_len, verify->places[0], tokens, s.GetDialect());
                }),
                .keys = {{"text", s.GetDialect().duplicate_points ? "text_embeds" : "inputs_embeds"},
                         {"visual", "vision.projected"},
                         {"fused", "inputs_embeds"}},
                .inputs = {{"text", s.context.store.Get(verify->item.id, Chain::kQuant, "text_embeds")},
                           {"visual", s.Kept("vision.projected")}}};
  spec.outputs = s.RunRounded(spec.graph, spec.inputs);
  writer.Write(std::move(spec), s.stored);
}

void VisionRun::WriteFullUnit(UnitWriter& writer) {
  State& s = *state_;
  const TextItem* verify = s.Verify();
  if (verify == nullptr || s.GetDialect().duplicate_points) return;
  const ImageItem& image = s.VerifyImage();
  const ImageSlot slot{image.positions, verify->places[0]};
  UnitSpec spec{.name = "gemma4_model_full",
                .graph = s.Build([&](const Builder& b) {
                  BuildGemma4Full(b, s.context.config, s.context.max_seq_len, &slot, s.GetDialect());
                }),
                .inputs = {{"ids", Tensor::Of<int64_t>({1, s.context.max_seq_len}, verify->ids)},
                           {"pixel_values", PixelValues(image.pixel_values)}}};
  // Not the stages' values: this graph's mask keeps all positions, also those behind the sample's end.
  spec.outputs = s.RunRounded(spec.graph, spec.inputs);
  writer.Write(std::move(spec), s.UnitWeights());
}

}  // namespace circlet::gemma4
