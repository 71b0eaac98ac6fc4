// The float text model, graph by graph, on the computable checkpoint of model.md 11 (Config A, 11.1).

#include <gmock/gmock.h>

#include <cmath>
#include <cstring>
#include <numeric>

#include "circlet/exec/executor.h"
#include "circlet/model/gemma4/tables.h"
#include "circlet/model/gemma4/text.h"
#include "fnv_checkpoint.h"
#include "temp_directory.h"

namespace circlet {
namespace {

using Values = std::map<std::string, Tensor>;
using GraphForm = std::function<Graph(const Graph&)>;

constexpr float kTolerance = 2e-5f;  // model.md 11; the table prints six decimals

// Row `row` of axis 1.
std::vector<float> Row(const Tensor& tensor, int64_t row) {
  const int64_t width = tensor.Elements() / tensor.GetShape()[1];
  const std::span<float> values = tensor.F32().subspan(row * width, width);
  return {values.begin(), values.end()};
}

void ExpectStartsWith(const std::vector<float>& found, const std::vector<float>& expected, const char* what) {
  ASSERT_GE(found.size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i)
    EXPECT_NEAR(found[i], expected[i], kTolerance) << what << " element " << i;
}

int64_t ArgMax(const std::vector<float>& values) { return std::ranges::max_element(values) - values.begin(); }

// [1,S,L,p] -> [1,S,p].
Tensor SliceOfLayer(const Tensor& ple, int layer) {
  const Shape& shape = ple.GetShape();
  Tensor slice(TensorType{DType::kF32, {1, shape[1], shape[3]}});
  for (int64_t s = 0; s < shape[1]; ++s)
    std::memcpy(slice.F32().data() + s * shape[3], ple.F32().data() + (s * shape[2] + layer) * shape[3],
                shape[3] * sizeof(float));
  return slice;
}

// One row of axis `axis` - 1 or 2, a prefix of `count` rows from `begin`.
Tensor Rows(const Tensor& tensor, int axis, int64_t begin, int64_t count) {
  Shape shape = tensor.GetShape();
  const int64_t rows = shape[axis];
  int64_t inner = 1;
  for (int i = axis + 1; i < shape.Rank(); ++i) inner *= shape[i];
  const int64_t outer = tensor.Elements() / (rows * inner);
  shape[axis] = count;
  Tensor part(TensorType{DType::kF32, shape});
  for (int64_t o = 0; o < outer; ++o)
    std::memcpy(part.F32().data() + o * count * inner, tensor.F32().data() + (o * rows + begin) * inner,
                count * inner * sizeof(float));
  return part;
}

class ConfigATest : public testing::Test {
 protected:
  ConfigATest() {
    WriteFnvCheckpoint(directory_.Path());
    config_ = ReadConfig(directory_.Path());
    weights_.emplace(ModelWeights::Open(config_, directory_.Path()));
  }

  const TextConfig& Text() const { return config_.text; }

  Values Run(const Dialect& dialect, const std::function<void(const BlockBuilder&)>& build, const Values& inputs,
             const GraphForm& form) const {
    Graph graph;
    build(BlockBuilder(graph, dialect));
    const Graph formed = form ? form(graph) : graph;
    Executor executor(formed, nullptr);
    return executor.Run(inputs, [&](const std::string& name) { return weights_->Float(name); });
  }

  struct Results {
    Tensor embedding, ple;
    std::vector<Tensor> hidden;  // behind each layer
    std::vector<Values> layers;  // all outputs of each
    Tensor last_hidden_state, logits;
  };

  // Every prefill graph of the text side, in order. `form` may rewrite the graphs.
  Results Prefill(const std::vector<int64_t>& ids, const Dialect& dialect, const GraphForm& form = {}) const {
    const int64_t length = static_cast<int64_t>(ids.size());
    const Values input{{"ids", Tensor::Of<int64_t>({1, length}, ids)}};
    Results results;
    const Tensor tokens =
        Run(
            dialect, [&](const BlockBuilder& b) { BuildTokenEmbedding(b, Text(), length, Text().vocab_size); }, input,
            form)
            .at("hidden");
    results.embedding = Run(
                            dialect, [&](const BlockBuilder& b) { BuildMergedEmbedding(b, Text(), length, false); },
                            {{"hidden", tokens}}, form)
                            .at("hidden");
    const Tensor token_ple =
        Run(
            dialect, [&](const BlockBuilder& b) { BuildPleEmbedding(b, Text(), length, Text().ple_vocab_size); }, input,
            form)
            .at("per_layer_token_inputs");
    results.ple = Run(
                      dialect, [&](const BlockBuilder& b) { BuildPleProjection(b, Text(), length); },
                      {{"inputs_embeds", results.embedding}, {"per_layer_token_inputs", token_ple}}, form)
                      .at("per_layer_inputs");
    Tensor hidden = results.embedding;
    for (int i = 0; i < Text().NumLayers(); ++i) {
      const LayerConfig& layer = Text().layers[i];
      const RopeTables rope = TextRopeTables(layer.rope, layer.head_dim, 0, length, true);
      Values inputs{{"hidden", hidden},
                    {"mask", PrefillMask(length, length, layer.window)},
                    {"cos", rope.cos},
                    {"sin", rope.sin},
                    {"per_layer_input", SliceOfLayer(results.ple, i)}};
      if (layer.kv_shared) {
        inputs["shared_key"] = results.layers[layer.kv_source].at("new_key");
        inputs["shared_value"] = results.layers[layer.kv_source].at("new_value");
      }
      results.layers.push_back(Run(
          dialect, [&](const BlockBuilder& b) { BuildDecoderLayer(b, Text(), i, Phase::kPrefill, length); }, inputs,
          form));
      hidden = results.layers.back().at("hidden");
      results.hidden.push_back(hidden);
    }
    const Values head = Run(
        dialect, [&](const BlockBuilder& b) { BuildHead(b, Text(), length); }, {{"hidden", hidden}}, form);
    results.last_hidden_state = head.at("last_hidden_state");
    results.logits = head.at("logits");
    return results;
  }

  const std::vector<int64_t> ids_{2, 10, 11, 12, 13, 14, 15, 16, 17, 18};
  TempDirectory directory_;
  Gemma4Config config_;
  std::optional<ModelWeights> weights_;
};

class ConfigADialectTest : public ConfigATest, public testing::WithParamInterface<Dialect> {};
INSTANTIATE_TEST_SUITE_P(Both, ConfigADialectTest, testing::Values(kDefault, kTico),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(ConfigADialectTest, EveryPrintedNumberOfThePrefillIsReproduced) {
  const Results results = Prefill(ids_, GetParam());
  ExpectStartsWith(Row(results.embedding, 0), {-1.086846, -0.015681, 1.234101, 0.164388}, "embedding of token 0");
  const std::vector<float> ple = Row(results.ple, 1);
  ExpectStartsWith(ple, {-0.371041, -1.361857, 0.920388, -0.803465}, "ple of token 1, layer 0");
  ExpectStartsWith({ple.begin() + 5 * 4, ple.end()}, {-1.128085, -0.184603, -0.280077, -1.153746}, "ple, layer 5");
  const std::vector<std::vector<float>> hidden{{0.481540, -3.321681, 1.753036, 4.133062},
                                               {-0.832468, 0.287756, -0.669628, 2.008881},
                                               {0.328779, -0.495510, 0.514458, 2.905405},
                                               {0.381615, 0.852157, -0.764260, 1.515781},
                                               {0.263265, 3.013953, -1.119179, 1.828671}};
  for (size_t i = 0; i < hidden.size(); ++i)
    ExpectStartsWith(Row(results.hidden[i], 9), hidden[i], fmt::format("layer {}, token 9", i).c_str());
  ExpectStartsWith(Row(results.last_hidden_state, 9), {-0.174776, 0.532483, -0.127539, 0.847875}, "norm, token 9");
  ExpectStartsWith(Row(results.last_hidden_state, 0), {-0.829285, 0.722205, -0.101684, 0.885287}, "norm, token 0");
  double sum = 0, magnitude = 0;
  for (const float value : results.last_hidden_state.F32()) {
    sum += value;
    magnitude += std::fabs(value);
  }
  // Sums of 320 values, each within the tolerance; the errors do not all point the same way.
  EXPECT_NEAR(sum, 44.36909, 20 * kTolerance);
  EXPECT_NEAR(magnitude, 242.61955, 20 * kTolerance);
  ExpectStartsWith(Row(results.logits, 9), {-0.178740, 0.816418, -1.164248, -0.702052, 1.164356, 0.835570}, "logits");
  std::vector<int64_t> best;
  for (int64_t position = 0; position < 10; ++position) best.push_back(ArgMax(Row(results.logits, position)));
  EXPECT_THAT(best, testing::ElementsAre(33, 32, 19, 35, 23, 32, 45, 27, 25, 52));
}

TEST_F(ConfigATest, GreedyContinuationEndsAsPrinted) {
  std::vector<int64_t> ids = ids_;
  for (const int64_t expected : {52, 16, 63}) {
    const Tensor logits = Prefill(ids, kDefault).logits;
    ids.push_back(ArgMax(Row(logits, logits.GetShape()[1] - 1)));
    EXPECT_EQ(ids.back(), expected);
  }
}

// Fused operators stand for primitive graphs; export writes those.
TEST_P(ConfigADialectTest, GraphsOfPrimitiveOperatorsComputeTheSame) {
  const Results fused = Prefill(ids_, GetParam());
  int replaced = 0;
  const Results unrolled = Prefill(ids_, GetParam(), [&](const Graph& graph) {
    Graph expanded = Expanded(graph);
    replaced += expanded.Nodes().size() > graph.Nodes().size();
    for (const Node& node : expanded.Nodes()) EXPECT_FALSE(node.op.Fused()) << node.op.Name();
    return expanded;
  });
  EXPECT_EQ(replaced, Text().NumLayers());
  for (size_t i = 0; i < fused.hidden.size(); ++i)
    for (int64_t position = 0; position < 10; ++position)
      ExpectStartsWith(Row(unrolled.hidden[i], position), Row(fused.hidden[i], position), "layer");
}

TEST_P(ConfigADialectTest, TheWholeStackInOneGraphComputesWhatItsLayersDo) {
  const Results results = Prefill(ids_, GetParam());
  Values inputs{{"inputs_embeds", results.embedding}, {"per_layer_inputs", results.ple}};
  for (const LayerConfig& layer : {Text().layers[0], Text().layers[1]}) {
    const std::string type = LayerTypeName(layer);
    const RopeTables rope = TextRopeTables(layer.rope, layer.head_dim, 0, 10, true);
    inputs["mask." + type] = PrefillMask(10, 10, layer.window);
    inputs["cos." + type] = rope.cos;
    inputs["sin." + type] = rope.sin;
  }
  const Values whole = Run(GetParam(), [&](const BlockBuilder& b) { BuildTextModel(b, Text(), 10); }, inputs, {});
  for (int64_t position = 0; position < 10; ++position)
    EXPECT_EQ(Row(whole.at("last_hidden_state"), position), Row(results.last_hidden_state, position)) << position;
}

// Token 9 with the past of tokens 0 to 8 in a cache of 13 slots. A slot without a token holds garbage that no key may
// see.
TEST_P(ConfigADialectTest, DecodingTheLastTokenGivesWhatPrefillGave) {
  constexpr int64_t kSlots = 13, kPast = 9;
  const Results prefill = Prefill(ids_, GetParam());
  Tensor hidden = Rows(prefill.embedding, 1, kPast, 1);
  const Tensor ple = Rows(prefill.ple, 1, kPast, 1);
  std::map<int, std::pair<Tensor, Tensor>> present;
  const auto padded = [&](const Tensor& fresh) {
    const Shape& shape = fresh.GetShape();
    Tensor past(TensorType{DType::kF32, {1, shape[1], kSlots - 1, shape[3]}});
    // The reference adds -120 to a masked logit, so what lies there may not be large; ours never reads it.
    std::ranges::fill(past.F32(), GetParam().observe_masked_keys ? 1.0f : 77.0f);
    for (int64_t head = 0; head < shape[1]; ++head)
      std::memcpy(past.F32().data() + head * (kSlots - 1) * shape[3], fresh.F32().data() + head * shape[2] * shape[3],
                  kPast * shape[3] * sizeof(float));
    return past;
  };
  const auto appended = [&](const Tensor& past, const Tensor& fresh) {
    const Shape& shape = past.GetShape();
    Tensor all(TensorType{DType::kF32, {1, shape[1], kSlots, shape[3]}});
    for (int64_t head = 0; head < shape[1]; ++head) {
      float* row = all.F32().data() + head * kSlots * shape[3];
      std::memcpy(row, past.F32().data() + head * (kSlots - 1) * shape[3], (kSlots - 1) * shape[3] * sizeof(float));
      std::memcpy(row + (kSlots - 1) * shape[3], fresh.F32().data() + head * shape[3], shape[3] * sizeof(float));
    }
    return all;
  };
  for (int i = 0; i < Text().NumLayers(); ++i) {
    const LayerConfig& layer = Text().layers[i];
    const RopeTables rope = TextRopeTables(layer.rope, layer.head_dim, kPast, 1, true);
    Values inputs{{"hidden", hidden},
                  {"mask", DecodeMask(kSlots, kPast, layer.window)},
                  {"cos", rope.cos},
                  {"sin", rope.sin},
                  {"per_layer_input", SliceOfLayer(ple, i)}};
    if (layer.kv_shared) {
      inputs["shared_key"] = present.at(layer.kv_source).first;
      inputs["shared_value"] = present.at(layer.kv_source).second;
    } else {
      inputs["past_key"] = padded(prefill.layers[i].at("new_key"));
      inputs["past_value"] = padded(prefill.layers[i].at("new_value"));
    }
    const Values outputs =
        Run(GetParam(), [&](const BlockBuilder& b) { BuildDecoderLayer(b, Text(), i, Phase::kDecode, kSlots); }, inputs,
            {});
    if (!layer.kv_shared) {
      ExpectStartsWith(Row(Rows(outputs.at("new_key"), 2, 0, 1), 0),
                       Row(Rows(prefill.layers[i].at("new_key"), 2, kPast, 1), 0), "new key");
      present[i] = {appended(inputs.at("past_key"), outputs.at("new_key")),
                    appended(inputs.at("past_value"), outputs.at("new_value"))};
    }
    hidden = outputs.at("hidden");
    ExpectStartsWith(Row(hidden, 0), Row(prefill.hidden[i], kPast), fmt::format("layer {}", i).c_str());
  }
}

// What captions are evaluated with: a layer whose first positions nobody reads on.
TEST_P(ConfigADialectTest, ALayerOfTheLastPositionsGivesTheirRows) {
  const int64_t length = static_cast<int64_t>(ids_.size()), first = 6, count = length - first;
  const Results whole = Prefill(ids_, GetParam());
  for (int i = 0; i < Text().NumLayers(); ++i) {
    const LayerConfig& layer = Text().layers[i];
    const RopeTables rope = TextRopeTables(layer.rope, layer.head_dim, 0, length, true);
    Values inputs{{"hidden", i == 0 ? whole.embedding : whole.hidden[i - 1]},
                  {"mask", Rows(PrefillMask(length, length, layer.window), 2, first, count)},
                  {"cos", rope.cos},
                  {"sin", rope.sin},
                  {"per_layer_input", Rows(SliceOfLayer(whole.ple, i), 1, first, count)}};
    if (layer.kv_shared) {
      for (const char* name : {"hidden", "cos", "sin"}) inputs[name] = Rows(inputs[name], 1, first, count);
      inputs["shared_key"] = whole.layers[layer.kv_source].at("new_key");
      inputs["shared_value"] = whole.layers[layer.kv_source].at("new_value");
    }
    const Values outputs =
        Run(GetParam(),
            [&](const BlockBuilder& b) { BuildDecoderLayer(b, Text(), i, Phase::kPrefill, length, {.first = first}); },
            inputs, {});
    ASSERT_EQ(outputs.at("hidden").GetShape()[1], count);
    for (int64_t row = 0; row < count; ++row)
      EXPECT_EQ(Row(outputs.at("hidden"), row), Row(whole.hidden[i], first + row)) << "layer " << i << " row " << row;
    if (!layer.kv_shared)
      EXPECT_EQ(Row(outputs.at("new_key"), 0), Row(whole.layers[i].at("new_key"), 0)) << "layer " << i;
  }
}

}  // namespace
}  // namespace circlet
