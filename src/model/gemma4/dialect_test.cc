#include "circlet/quant/dialect.h"

#include <gmock/gmock.h>

#include <functional>
#include <map>
#include <regex>
#include <set>

#include "circlet/io/file.h"
#include "circlet/model/gemma4/config.h"
#include "circlet/model/gemma4/text.h"
#include "circlet/model/gemma4/vision.h"
#include "circlet/model/gemma4/weights.h"
#include "golden.h"
#include "paths.h"
#include "weight_kinds.h"

namespace circlet {
namespace {

constexpr char kModel[] = "golden/tiny_e2b/model";

using Switches = std::map<std::string, bool Dialect::*>;
const Switches kSwitches{
#define SWITCH(name) {#name, &Dialect::name}
    SWITCH(requantizing_points),  SWITCH(gather_requantizes),          SWITCH(fusion_points),
    SWITCH(whole_graph_points),   SWITCH(patch_bias_operand),          SWITCH(position_table_grid),
    SWITCH(pooler_masks_padding), SWITCH(run_padding_patches),         SWITCH(rank2_soft_tokens),
    SWITCH(observed_mask_range),  SWITCH(rope_piece_points),           SWITCH(negated_rope_values),
    SWITCH(observe_masked_keys),  SWITCH(signed_weights_as_reference), SWITCH(clamp_after_point),
    SWITCH(ple_float_holes),      SWITCH(explicit_k_transpose),        SWITCH(batched_vision_heads),
    SWITCH(exact_files),
#undef SWITCH
};

// A row of the page: "| `switch` | no / yes | `graph`, `graph` | ... |".
struct Row {
  std::string values;
  std::set<std::string> graphs;
};

std::map<std::string, Row> RowsOfThePage() {
  std::map<std::string, Row> rows;
  const std::string page = ReadFile(SourcePath("docs/dialects.md"));
  static const std::regex kRow(R"(\n\| `(\w+)` \| (yes / no|no / yes) \| ([^|]*) \|)");
  static const std::regex kName("`(\\w+)`");
  for (std::sregex_iterator row(page.begin(), page.end(), kRow), end; row != end; ++row) {
    Row& read = rows[(*row)[1]];
    read.values = (*row)[2];
    const std::string graphs = (*row)[3];
    for (std::sregex_iterator name(graphs.begin(), graphs.end(), kName); name != end; ++name)
      read.graphs.insert((*name)[1]);
  }
  return rows;
}

// Everything a graph says to its readings: operators and their points, with what the points are used for.
std::string TextOf(const Graph& graph) {
  const Graph primitive = Expanded(graph);
  std::string text = Dump(primitive);
  for (const Point& point : PointsOf(primitive))
    text += fmt::format("{} {} {}\n", point.name, static_cast<int>(point.use), point.headroom_below);
  return text;
}

// Every graph of a model with pictures, per-layer inputs and clipped linears, by the name of the function without
// "Build".
std::map<std::string, std::vector<Graph>> GraphsOf(const Gemma4Config& config, const Dialect& dialect) {
  const TextConfig& text = config.text;
  const VisionConfig& vision = *config.vision;
  constexpr int64_t kLength = 8;
  const int64_t k = vision.pooling_kernel_size;
  std::vector<int64_t> positions;
  for (int64_t i = 0; i < k * k; ++i) positions.insert(positions.end(), {i % k, i / k});
  positions.insert(positions.end(), 2 * k * k, -1);
  const int64_t patches = 2 * k * k;
  const ImageSlot slot{positions, 2};

  std::map<std::string, std::vector<Graph>> graphs;
  const auto add = [&](const std::string& name, const std::function<void(const BlockBuilder&)>& build) {
    build(BlockBuilder(graphs[name].emplace_back(), dialect));
  };
  add("TokenEmbedding", [&](const auto& b) { BuildTokenEmbedding(b, text, kLength, text.vocab_size); });
  add("MergedEmbedding", [&](const auto& b) { BuildMergedEmbedding(b, text, kLength, true); });
  add("PleEmbedding", [&](const auto& b) { BuildPleEmbedding(b, text, kLength, text.ple_vocab_size); });
  add("PleProjection", [&](const auto& b) { BuildPleProjection(b, text, kLength); });
  add("TextMlp", [&](const auto& b) { BuildTextMlp(b, text, 0, kLength); });
  for (const Phase phase : {Phase::kPrefill, Phase::kDecode})
    for (int i = 0; i < text.NumLayers(); ++i) {
      add("TextAttention", [&](const auto& b) { BuildTextAttention(b, text, i, phase, kLength); });
      add("DecoderLayer", [&](const auto& b) { BuildDecoderLayer(b, text, i, phase, kLength); });
    }
  add("TextModel", [&](const auto& b) { BuildTextModel(b, text, kLength); });
  add("Head", [&](const auto& b) { BuildHead(b, text, kLength); });
  add("VisionTables", [&](const auto& b) { BuildVisionTables(b, vision, patches); });
  add("PatchEmbedder", [&](const auto& b) { BuildPatchEmbedder(b, vision, patches); });
  add("VisionAttention", [&](const auto& b) { BuildVisionAttention(b, vision, 0, patches); });
  add("VisionLayer", [&](const auto& b) { BuildVisionLayer(b, vision, 0, patches); });
  add("VisionPooler", [&](const auto& b) { BuildVisionPooler(b, vision, positions); });
  add("VisionPost", [&](const auto& b) { BuildVisionPost(b, config, positions); });
  add("MultimodalEmbedder", [&](const auto& b) { BuildMultimodalEmbedder(b, config, 1); });
  add("VisionEncoder", [&](const auto& b) { BuildVisionEncoder(b, vision, positions); });
  add("VisionModel", [&](const auto& b) { BuildVisionModel(b, vision, positions); });
  add("VisionPrefill", [&](const auto& b) { BuildVisionPrefill(b, config, positions); });
  add("Fusion", [&](const auto& b) { BuildFusion(b, text, kLength, 2, 1); });
  if (!dialect.fusion_points) add("Gemma4Full", [&](const auto& b) { BuildGemma4Full(b, config, kLength, &slot); });
  return graphs;
}

TEST(DialectTest, ThePageListsEverySwitchWithItsTwoValues) {
  std::set<std::string> declared;
  const std::string header = ReadFile(SourcePath("include/circlet/quant/dialect.h"));
  static const std::regex kMember(R"(\n  bool (\w+);)");
  for (std::sregex_iterator member(header.begin(), header.end(), kMember), end; member != end; ++member)
    declared.insert((*member)[1]);
  const std::map<std::string, Row> rows = RowsOfThePage();
  std::set<std::string> listed, tested;
  for (const auto& [name, row] : rows) listed.insert(name);
  for (const auto& [name, member] : kSwitches) tested.insert(name);
  EXPECT_EQ(listed, declared);
  EXPECT_EQ(tested, declared);
  for (const auto& [name, member] : kSwitches)
    EXPECT_EQ(rows.at(name).values, kDefault.*member ? "yes / no" : "no / yes") << name;
  for (const auto& [name, member] : kSwitches) EXPECT_NE(kDefault.*member, kTico.*member) << name;
}

std::map<std::string, std::string> TextsOf(const Dialect& dialect) {
  std::map<std::string, std::string> texts;
  for (const auto& [name, graphs] : GraphsOf(ReadConfig(TestData(kModel)), dialect))
    for (const Graph& graph : graphs) texts[name] += TextOf(graph);
  return texts;
}

TEST(DialectTest, ASwitchChangesTheGraphsThatThePageNamesAndNoOther) {
  const std::map<std::string, std::string> before = TextsOf(kDefault);
  for (const auto& [name, row] : RowsOfThePage()) {
    Dialect dialect = kDefault;
    dialect.*kSwitches.at(name) = !(kDefault.*kSwitches.at(name));
    std::set<std::string> changed;
    for (const auto& [graph, text] : TextsOf(dialect))
      if (text != before.at(graph)) changed.insert(graph);
    EXPECT_EQ(changed, row.graphs) << name;
  }
}

// The list of parameters and the graphs both say what a weight is.
TEST(WeightKindTest, GraphsSayOfAParameterWhatTheListOfParametersSays) {
  const Gemma4Config config = ReadConfig(TestData(kModel));
  std::map<std::string, WeightKind> listed, left;
  for (const Parameter& parameter : Parameters(config)) listed[parameter.name] = parameter.kind;
  left = listed;
  for (const Dialect& dialect : {kDefault, kTico})
    for (const auto& [name, graphs] : GraphsOf(config, dialect))
      for (const Graph& graph : graphs)
        for (const Value& value : graph.Values()) {
          if (value.kind != ValueKind::kWeight) continue;
          left.erase(value.name);
          EXPECT_NE(value.weight_point.kind, WeightKind::kNone) << value.name;
          if (listed.contains(value.name)) EXPECT_EQ(value.weight_point.kind, listed.at(value.name)) << value.name;
        }
  EXPECT_THAT(left, testing::IsEmpty());
}

// Recorded names are told by PointNamed; it must not tell another story than the graphs.
TEST(WeightKindTest, PointsHaveTheKindsThatRecordedNamesStandFor) {
  std::set<WeightKind> met;
  for (const Dialect& dialect : {kDefault, kTico})
    for (const auto& [name, graphs] : GraphsOf(ReadConfig(TestData(kModel)), dialect))
      for (const Graph& graph : graphs)
        for (const Point& point : PointsOf(graph)) {
          if (point.use == PointUse::kBoundary) continue;  // repeats the producer's name
          EXPECT_EQ(point.kind, PointNamed(point.name).kind) << point.name;
          EXPECT_EQ(point.role, PointNamed(point.name).role) << point.name;
          met.insert(point.kind);
        }
  EXPECT_THAT(met, testing::UnorderedElementsAre(WeightKind::kNone, WeightKind::kLinear, WeightKind::kPatchProjection,
                                                 WeightKind::kHead, WeightKind::kEmbedding, WeightKind::kPositionTable,
                                                 WeightKind::kNorm));
}

}  // namespace
}  // namespace circlet
