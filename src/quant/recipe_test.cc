#include "circlet/quant/recipe.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "circlet/io/file.h"
#include "error_text.h"
#include "golden.h"
#include "paths.h"
#include "quant/targets.h"
#include "temp_directory.h"
#include "weight_kinds.h"

namespace circlet {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

// Points as they are called in a full model.
const std::vector<std::string> kPoints{
    "lm_head.act_in",
    "lm_head.weight",
    "logits",
    "model.embed_vision.embedding_projection.weight",
    "model.language_model.embed_tokens.weight",
    "model.language_model.layers.0.act_in",
    "model.language_model.layers.0.input_layernorm.weight",
    "model.language_model.layers.0.mlp.down_proj.act_in",
    "model.language_model.layers.0.mlp.down_proj.weight",
    "model.language_model.layers.0.self_attn.softmax",
    "model.language_model.layers.1.mlp.down_proj.act_in",
    "model.language_model.layers.1.mlp.down_proj.act_out",
    "model.language_model.layers.1.mlp.down_proj.weight",
    "model.language_model.layers.1.self_attn.softmax",
    "model.language_model.per_layer_projection",
    "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.act_in",
    "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight",
    "model.vision_tower.encoder.layers.0.self_attn.softmax",
    "model.vision_tower.patch_embedder.input_proj.weight",
    "model.vision_tower.patch_embedder.position_embedding_table",
};

std::vector<Point> Points() {
  std::vector<Point> points;
  for (const std::string& name : kPoints) points.push_back(PointNamed(name));
  return points;
}

Recipe WithStage(const std::string& stage) { return Recipe::Parse("pipeline:\n  - name: ptq\n" + stage, "quant.yaml"); }

std::string LoadError(const std::string& text) {
  return ErrorText([&] { Recipe::Parse(text, "quant.yaml"); });
}

PointSpec SpecOf(const Recipe& recipe, const std::string& point) { return recipe.SpecFor(PointNamed(point), kTico); }

std::string TypeOf(const Recipe& recipe, const std::string& point) {
  return std::string(Name(SpecOf(recipe, point).dtype));
}

// The points whose type is `dtype`.
std::vector<std::string> Having(const Recipe& recipe, DType dtype) {
  std::vector<std::string> found;
  for (const std::string& point : kPoints)
    if (SpecOf(recipe, point).dtype == dtype) found.push_back(point);
  return found;
}

TEST(RecipeTest, TheFilesUnderRecipesAreTheBuiltInOnes) {
  const std::filesystem::path directory = SourcePath("recipes");
  size_t files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory))
    files += entry.path().extension() == ".yaml" && entry.path().stem() != "wrapper_smoke";  // settings of inspect
  EXPECT_EQ(files, Recipe::BuiltinNames().size());
  for (const std::string& name : Recipe::BuiltinNames()) {
    EXPECT_EQ(ReadFile(directory / (name + ".yaml")), Recipe::BuiltinText(name)) << name;
    const Recipe recipe = Recipe::Load(name);
    EXPECT_TRUE(recipe.quantizes) << name;
    EXPECT_EQ(Recipe::Load((directory / (name + ".yaml")).string()).EffectiveYaml(), recipe.EffectiveYaml()) << name;
  }
}

TEST(RecipeTest, W8a16DiffersFromW4a16OnlyInLinearWeights) {
  const Recipe four = Recipe::Load("w4a16");
  const Recipe eight = Recipe::Load("w8a16");
  for (const std::string& point : kPoints) {
    PointSpec expected = SpecOf(four, point);
    if (expected.dtype == DType::kU4) expected.dtype = DType::kU8;
    EXPECT_EQ(SpecOf(eight, point), expected) << point;
  }
  EXPECT_EQ(Having(four, DType::kU4).size(), 4u);
}

TEST(RecipeTest, SmokeU8IsEightBitsEverywhereButInThePositionTable) {
  EXPECT_THAT(Having(Recipe::Load("smoke-u8"), DType::kI16),
              ElementsAre("model.vision_tower.patch_embedder.position_embedding_table"));
  EXPECT_EQ(Having(Recipe::Load("smoke-u8"), DType::kU8).size(), kPoints.size() - 1);
}

TEST(RecipeTest, UnknownNamesNameTheNearest) {
  EXPECT_THAT(ErrorText([] { Recipe::Load("w4a61"); }),
              HasSubstr("unknown recipe \"w4a61\"; nearest: \"w4a16\"; known are default, w4a16, w8a8, mixed8, w8a16, "
                        "w4a16-gptq, w3a16-gptq, w8a16-gptq, w4a16-mixed, w8a8-mixed, as-checkpoint, smoke-u8, or give "
                        "the path of a YAML file"));
  EXPECT_THAT(ErrorText([] { Recipe::BuiltinText("w8a61"); }), HasSubstr("nearest: \"w8a16\""));
  EXPECT_THAT(ErrorText([] { Recipe::Load("/no/such/quant.yaml"); }), HasSubstr("/no/such/quant.yaml"));
}

TEST(RecipeTest, OtherSectionsOfAFileAreLeftToTheSettings) {
  const Recipe recipe = Recipe::Parse("runtime: {sed: 3}\npipeline: [{name: ptq, activation: uint8}]\n", "quant.yaml");
  EXPECT_EQ(recipe.specs.activation, QuantSpec::Affine(DType::kU8));
}

TEST(RecipeTest, FoldsAreOffUnlessAskedFor) {
  const auto fold = [](const std::string& value) {
    return Recipe::Parse("pipeline: [{name: ptq, fold: " + value + "}]", "quant.yaml").fold;
  };
  EXPECT_EQ(fold("null"), 0);
  EXPECT_EQ(fold("false"), 0);
  EXPECT_EQ(fold("0.5"), 0.5f);
  for (const std::string& name : Recipe::BuiltinNames()) EXPECT_EQ(Recipe::Load(name).fold, 0) << name;
  EXPECT_THAT(ErrorText([&] { fold("1.5"); }), HasSubstr("fold: is 1.5, must be 0 (off) to 1"));
}

TEST(RecipeTest, AGptqStageSaysHowWeightsAreRounded) {
  const auto method = [](const std::string& keys, const std::string& bits = "uint4") {
    return *Recipe::Parse("pipeline:\n  - {name: gptq" + keys +
                              "}\n  - {name: ptq, weight: int16, linear_weight: " + bits + "}\n",
                          "quant.yaml")
                .rounding;
  };
  EXPECT_EQ(method(""), WeightRounding());
  EXPECT_EQ(*Recipe::Load("w4a16-gptq").rounding, WeightRounding());
  EXPECT_EQ(*Recipe::Load("w3a16-gptq").rounding, WeightRounding{.bits = 3});
  EXPECT_FALSE(Recipe::Load("w4a16").rounding);
  // The reference's words.
  using Range = WeightRounding::Range;
  EXPECT_EQ(method(", mse: mse, percdamp: 0.01, actorder: false"),
            (WeightRounding{.range = Range::kMse, .damping = 0.01, .order_by_moment = false}));
  EXPECT_EQ(method(", mse: smse").range, Range::kMoments);
  EXPECT_EQ(method(", mse: mse_for_gptq"), (WeightRounding{.range = Range::kMse, .solved_ranges = 10}));
  EXPECT_EQ(method(", mse: smse_for_gptq").solved_ranges, 10);
  using Weights = WeightRounding::TokenWeights;
  EXPECT_EQ(method("").token_weights, Weights::kNone);
  EXPECT_EQ(method(", token_weights: outputs").token_weights, Weights::kOutputs);
  EXPECT_EQ(method(", token_weights: stream, residual_target: 0.5"),
            (WeightRounding{.token_weights = Weights::kStream, .residual_target = 0.5f}));
  EXPECT_EQ(method(", weight_bits: 4").bits, 0);
  EXPECT_EQ(method(", weight_bits: 8", "uint8").bits, 0);
  const auto error = [&](const std::string& keys, const std::string& bits = "uint4") {
    return ErrorText([&] { method(keys, bits); });
  };
  EXPECT_THAT(error(", weight_bits: 8"), HasSubstr("quant.yaml: gptq: weight_bits is 8, but linear_weight of the ptq "
                                                   "stage has 4 bits; make them the same, or take 2 or 3"));
  EXPECT_THAT(error(", percdamp: 1.5"), HasSubstr("percdamp: is 1.5, must be 0 to 1"));
  EXPECT_THAT(error(", mse: min"), HasSubstr("mse: unknown \"min\""));
  EXPECT_THAT(error(", mse: mse, range: moments"),
              HasSubstr("mse: and range say the same thing in two ways; leave one of them out"));
  EXPECT_THAT(error(", token_weights: fisher"), HasSubstr("token_weights: unknown \"fisher\""));
  EXPECT_THAT(error(", residual_target: 1.5"), HasSubstr("residual_target: is 1.5, must be 0 to 1"));
  EXPECT_THAT(error(", residual_target: 0.5, correct_inputs: false"),
              HasSubstr("residual_target: is a part of the corrected target; set correct_inputs to true"));
  EXPECT_THAT(error(", groupsize: 128"),
              HasSubstr("groupsize: only -1 is possible: a Circle tensor has one scale a row"));
  EXPECT_THAT(error(", perc_damp: 1"), HasSubstr("nearest: \"percdamp\""));
  EXPECT_THAT(ErrorText([] { Recipe::Parse("pipeline: [{name: ptq, weight: uint8}, {name: gptq}]", "quant.yaml"); }),
              HasSubstr("one gptq stage goes in front of the ptq stage"));
}

// ---- Overrides ------------------------------------------------------------------------------------------------------

TEST(RecipeOverrideTest, PathsMayBeDottedNestedAndShortened) {
  const Recipe recipe = WithStage(R"(    raw_overrides:
      model.language_model.layers.0.act_in: uint8
      language_model.layers.1.self_attn: {softmax: uint8}
      layers:
        0: {mlp.down_proj.act_in: {kind: affine, dtype: uint8, observer: ema}}
      vision_tower.encoder.layers.0.self_attn.softmax: 8
      logits: uint8
)");
  EXPECT_THAT(Having(recipe, DType::kU8), ElementsAre("logits", "model.language_model.layers.0.act_in",
                                                      "model.language_model.layers.0.mlp.down_proj.act_in",
                                                      "model.language_model.layers.1.self_attn.softmax",
                                                      "model.vision_tower.encoder.layers.0.self_attn.softmax"));
  EXPECT_EQ(SpecOf(recipe, "model.language_model.layers.0.mlp.down_proj.act_in").ObserverName(), "EMAObserver");
  EXPECT_THAT(recipe.UnusedOverrides(Points()), IsEmpty());
  recipe.CheckAllUsed(Points());
}

TEST(RecipeOverrideTest, TheFullerPathWins) {
  const Recipe recipe = WithStage(R"(    raw_overrides:
      model.language_model.layers.0.act_in: uint8
      layers.0.act_in: int8
)");
  EXPECT_EQ(TypeOf(recipe, "model.language_model.layers.0.act_in"), "uint8");
  EXPECT_EQ(recipe.PlaceOf({.name = "model.language_model.layers.0.act_in"}), "quant.yaml:4");
}

TEST(RecipeOverrideTest, APlaceIsThatOfWhatDecides) {
  const Recipe recipe = WithStage(R"(    raw_overrides:
      layers.0.act_in: uint8
)");
  EXPECT_EQ(recipe.PlaceOf({.name = "model.language_model.layers.0.act_in"}), "quant.yaml:4");
  EXPECT_EQ(recipe.PlaceOf({.name = "model.language_model.layers.1.act_in"}), "");
}

TEST(RecipeOverrideTest, APartialOverrideKeepsTheBuildersType) {
  const Recipe recipe = WithStage(R"(    linear_weight: uint4
    raw_overrides:
      layers.0.mlp.down_proj.weight: {observer: ema}
)");
  const PointSpec spec = SpecOf(recipe, "model.language_model.layers.0.mlp.down_proj.weight");
  EXPECT_EQ(spec.dtype, DType::kU4);
  EXPECT_EQ(spec.ObserverName(), "EMAObserver");
}

TEST(RecipeOverrideTest, PathsThatNameNoPointSayWhereAndWhatIsNearest) {
  const Recipe recipe = WithStage(R"(    raw_overrides:
      layers.0.self_atn.softmax: uint8
      model.languge_model.layers.0.act_in: uint8
      layers.0.mlp.down_proj: uint8
)");
  EXPECT_THAT(
      recipe.UnusedOverrides(Points()),
      ElementsAre(
          "quant.yaml:4: no point \"layers.0.self_atn.softmax\"; nearest: \"layers.0.self_attn.softmax\"; qparams.json "
          "of a run has all, `circlet trace MODEL_DIR --samples FILE` lists those of activations",
          "quant.yaml:5: no point \"model.languge_model.layers.0.act_in\"; nearest: "
          "\"model.language_model.layers.0.act_in\"; qparams.json of a run has all, `circlet trace MODEL_DIR --samples "
          "FILE` lists those of activations",
          "quant.yaml:6: \"layers.0.mlp.down_proj\" is a module, no point; name one of its points: act_in, weight"));
  EXPECT_THAT(ErrorText([&] { recipe.CheckAllUsed(Points()); }), HasSubstr("self_atn.softmax\"; nearest"));
}

TEST(RecipeOverrideTest, DuplicateAndEmptyPathsAreErrors) {
  EXPECT_THAT(LoadError("pipeline:\n  - name: ptq\n    raw_overrides:\n      a.b: uint8\n      a: {b: int8}\n"),
              HasSubstr("quant.yaml:5: raw_overrides: \"a.b\" stands twice; remove one"));
  EXPECT_THAT(LoadError("pipeline: [{name: ptq, raw_overrides: {a..b: uint8}}]"),
              HasSubstr("\"a..b\" has an empty part"));
  EXPECT_THAT(LoadError("pipeline: [{name: ptq, raw_overrides: {a.b: uint9}}]"),
              HasSubstr("raw_overrides.a.b: \"uint9\" is no grid type"));
  EXPECT_THAT(LoadError("pipeline: [{name: ptq, raw_overrides: {a.b: null}}]"),
              HasSubstr("raw_overrides.a.b: is empty"));
}

// ---- Policies -------------------------------------------------------------------------------------------------------

Recipe WithPolicy(const std::string& target, const std::string& more = "") {
  return WithStage("    override_policies:\n      - {name: p, target: " + target + ", spec: uint8" + more + "}\n");
}

TEST(RecipePolicyTest, APlaceIsThatOfThePolicy) {
  EXPECT_EQ(WithPolicy("{module: self_attn, observers: [softmax]}")
                .PlaceOf({.name = "model.language_model.layers.0.self_attn.softmax"}),
            "quant.yaml:4");
}

TEST(RecipePolicyTest, SelectorsChooseComponentLayersModulesAndPoints) {
  EXPECT_THAT(
      Having(WithPolicy("{module: self_attn, observers: [softmax]}"), DType::kU8),
      ElementsAre("model.language_model.layers.0.self_attn.softmax", "model.language_model.layers.1.self_attn.softmax",
                  "model.vision_tower.encoder.layers.0.self_attn.softmax"));
  EXPECT_THAT(Having(WithPolicy("{component: vision, module: self_attn, observers: [softmax]}"), DType::kU8),
              ElementsAre("model.vision_tower.encoder.layers.0.self_attn.softmax"));
  EXPECT_THAT(
      Having(WithPolicy("{component: text, layers: 1, op_type: linear, observer_role: activation}"), DType::kU8),
      ElementsAre("model.language_model.layers.1.mlp.down_proj.act_in",
                  "model.language_model.layers.1.mlp.down_proj.act_out"));
  EXPECT_THAT(Having(WithPolicy("{layers: [1], op_type: linear, observer_role: output_activation}"), DType::kU8),
              ElementsAre("model.language_model.layers.1.mlp.down_proj.act_out"));
  EXPECT_THAT(
      Having(WithPolicy("{layers: \"1:\", modules: [mlp.down_proj], observer_role: input_activation}"), DType::kU8),
      ElementsAre("model.language_model.layers.1.mlp.down_proj.act_in"));
  EXPECT_THAT(Having(WithPolicy("{layers: \"0:9:2\", op_type: linear, observer_role: parameter}"), DType::kU8),
              ElementsAre("model.language_model.layers.0.mlp.down_proj.weight",
                          "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight"));
}

TEST(RecipePolicyTest, NameALayersOwnPointsAndThoseOfNoLayer) {
  EXPECT_THAT(Having(WithPolicy("{module: layer, observers: [act_in]}"), DType::kU8),
              ElementsAre("model.language_model.layers.0.act_in"));
  EXPECT_TRUE(WithPolicy("{layers: none, module: language_model, observers: [inputs_embeds]}")
                  .policies[0]
                  .Matches(PointNamed("model.language_model.inputs_embeds")));
  const OverridePolicy linears = WithPolicy("{layers: none, op_type: linear, observer_role: parameter}").policies[0];
  EXPECT_TRUE(linears.Matches(PointNamed("model.language_model.per_layer_model_projection.weight")));
  EXPECT_FALSE(linears.Matches(PointNamed("model.language_model.layers.0.mlp.down_proj.weight")));
  EXPECT_FALSE(linears.Matches(PointNamed("model.language_model.embed_tokens.weight")));
  EXPECT_THAT(ErrorText([] { WithPolicy("{component: text, layers: none, module: x, observers: [y]}"); }),
              HasSubstr("with layers: none name the module's whole path"));
}

TEST(RecipePolicyTest, TheMixedRecipesSetApartWhatCostsMost) {
  const Recipe four = Recipe::Load("w4a16-mixed"), eight = Recipe::Load("w8a8-mixed");
  EXPECT_EQ(*four.rounding, WeightRounding{.correct_inputs = false});
  EXPECT_EQ(TypeOf(four, "model.language_model.layers.3.self_attn.k_proj.weight"), "uint8");
  EXPECT_EQ(TypeOf(four, "model.language_model.layers.3.self_attn.q_proj.weight"), "uint4");
  EXPECT_EQ(TypeOf(four, "model.language_model.layers.3.per_layer_projection.weight"), "uint8");
  EXPECT_EQ(TypeOf(four, "model.language_model.per_layer_model_projection.weight"), "uint8");
  EXPECT_EQ(TypeOf(eight, "model.language_model.layers.3.layer_scalar_out"), "int16");
  EXPECT_EQ(TypeOf(eight, "model.language_model.layers.3.mlp.down_proj.act_out"), "int16");
  EXPECT_EQ(TypeOf(eight, "model.language_model.layers.3.self_attn.q_proj.act_out"), "uint8");
  EXPECT_EQ(TypeOf(eight, "model.language_model.inputs_embeds"), "int16");
}

TEST(RecipePolicyTest, TheMoreSpecificWinsThenTheLaterThenRawOverrides) {
  const Recipe recipe = WithStage(R"(    specs: {eight: uint8, signed: int8, four: int4}
    override_policies:
      - {name: one_layer, target: {layers: 1, module: mlp.down_proj, observers: [act_in]}, spec: signed}
      - {name: all, target: {module: mlp.down_proj, observers: [act_in]}, spec: eight}
      - {name: later, target: {op_type: linear, observer_role: output_activation}, spec: eight}
      - {name: latest, target: {op_type: linear, observer_role: output_activation}, spec: four}
      - {name: off, enabled: false, target: {layers: 0, module: self_attn, observers: [softmax]}, spec: four}
    raw_overrides: {layers.0.mlp.down_proj.act_in: uint4}
)");
  EXPECT_EQ(TypeOf(recipe, "model.language_model.layers.1.mlp.down_proj.act_in"), "int8");
  EXPECT_EQ(TypeOf(recipe, "model.language_model.layers.0.mlp.down_proj.act_in"), "uint4");
  EXPECT_EQ(TypeOf(recipe, "model.language_model.layers.1.mlp.down_proj.act_out"), "int4");
  EXPECT_EQ(TypeOf(recipe, "model.language_model.layers.0.self_attn.softmax"), "int16");
  EXPECT_THAT(recipe.UnusedOverrides(Points()), IsEmpty());
}

TEST(RecipePolicyTest, APolicyThatMatchesNothingIsReportedUnlessItMayBeEmpty) {
  EXPECT_THAT(WithPolicy("{module: self_atn, observers: [softmax]}").UnusedOverrides(Points()),
              ElementsAre("quant.yaml:4: policy \"p\" matches no point; no layer has a module \"self_atn\"; nearest: "
                          "\"self_attn\"; mend its target, or set allow_empty"));
  EXPECT_THAT(WithPolicy("{module: self_attn, observers: [sofmax]}").UnusedOverrides(Points()),
              ElementsAre(HasSubstr("the module has no point \"sofmax\"; nearest: \"softmax\"")));
  EXPECT_THAT(WithPolicy("{layers: [1, 7], module: self_attn, observers: [softmax]}").UnusedOverrides(Points()),
              ElementsAre("quant.yaml:4: policy \"p\" matches no point in layer 7; take the layer out of its list"));
  EXPECT_THAT(WithPolicy("{module: self_atn, observers: [softmax]}", ", allow_empty: true").UnusedOverrides(Points()),
              IsEmpty());
}

TEST(RecipePolicyTest, BadTargetsNameTheKey) {
  const auto error = [](const std::string& target) { return ErrorText([&] { WithPolicy(target); }); };
  EXPECT_THAT(error("{module: a, op_type: linear, observers: [b]}"),
              HasSubstr("target.op_type: stands beside module; give exactly one of module, modules, op_type"));
  EXPECT_THAT(error("{observers: [b]}"), HasSubstr("target: gives none of module, modules, op_type; give exactly one"));
  EXPECT_THAT(error("{module: a}"), HasSubstr("gives none of observers, observer_role"));
  EXPECT_THAT(
      error("{module: a, observer_role: weights}"),
      HasSubstr("\"weights\" is no known value; use activation, parameter, input_activation, output_activation"));
  EXPECT_THAT(error("{component: audio, module: a, observers: [b]}"), HasSubstr("use all, text, vision"));
  EXPECT_THAT(error("{layers: \"3:1\", module: a, observers: [b]}"), HasSubstr("layers: \"3:1\" selects no layers"));
  EXPECT_THAT(error("{layers: \"three\", module: a, observers: [b]}"), HasSubstr("\"three\" selects no layers"));
  EXPECT_THAT(error("{layers: -1, module: a, observers: [b]}"), HasSubstr("-1 is negative; layers count from 0"));
  EXPECT_THAT(error("{layrs: 1, module: a, observers: [b]}"), HasSubstr("layrs: is no known key; nearest: \"layers\""));
  EXPECT_THAT(LoadError("pipeline: [{name: ptq, override_policies: [{name: p, target: {module: a, observers: [b]}}]}]"),
              HasSubstr("spec: is missing"));
  EXPECT_THAT(
      LoadError("pipeline: [{name: ptq, override_policies: [{name: p, target: {module: a, observers: [b]}, spec: 8}, "
                "{name: p, target: {module: a, observers: [b]}, spec: 8}]}]"),
      HasSubstr("two policies are called \"p\"; rename one"));
}

TEST(RecipeTest, CutRangesAreCautionedAgainst) {
  const auto cautions = [](const std::string& text) { return Recipe::Parse(text, "quant.yaml").Cautions(); };
  EXPECT_THAT(cautions("pipeline:\n  - {name: ptq, activation: {dtype: int16, observer: percentile}}\n"),
              testing::ElementsAre(HasSubstr("activation: percentile observers cut the largest values off")));
  EXPECT_THAT(cautions("pipeline:\n  - name: ptq\n    override_policies:\n"
                       "      - {name: stream, target: {module: layer, observers: [layer_scalar_out]},"
                       " spec: {dtype: int16, observer: percentile}}\n"),
              testing::ElementsAre(HasSubstr("stream: percentile")));
  EXPECT_THAT(cautions("pipeline:\n  - name: ptq\n    raw_overrides: {layers.0.mlp.mul: {dtype: int16,"
                       " observer: percentile}}\n"),
              testing::ElementsAre(HasSubstr("layers.0.mlp.mul: percentile")));
  EXPECT_THAT(cautions("pipeline: [{name: gptq, range: mse, compensate: false}, {name: ptq, linear_weight: uint4}]\n"),
              testing::ElementsAre(HasSubstr("take range: moments")));
  EXPECT_THAT(cautions("pipeline: [{name: gptq, range: mse}, {name: ptq, linear_weight: uint4}]\n"),
              testing::IsEmpty());
  for (const std::string& name : Recipe::BuiltinNames())
    EXPECT_THAT(Recipe::Load(name).Cautions(), testing::IsEmpty()) << name;
}

TEST(RecipeTest, KindsTellWhatAWeightIsRoundedTo) {
  EXPECT_EQ(WrapperDefaultOf(WeightKind::kNorm), WrapperDefault::kNone);
  EXPECT_EQ(WrapperDefaultOf(WeightKind::kHead), WrapperDefault::kPerRow);
  EXPECT_EQ(WrapperDefaultOf(WeightKind::kEmbedding), WrapperDefault::kPerRow);
  EXPECT_EQ(WrapperDefaultOf(WeightKind::kPositionTable), WrapperDefault::kFixedInt16);
  const Recipe recipe = WithStage("    activation: int16\n    weight: uint8\n    lm_head_weight: uint4\n");
  const auto dtype = [&](PointRole role, WeightKind kind) {
    return recipe.SpecFor({.name = "a.weight", .role = role, .kind = kind}, kDefault).dtype;
  };
  EXPECT_EQ(dtype(PointRole::kWeight, WeightKind::kHead), DType::kU4);
  EXPECT_EQ(dtype(PointRole::kWeight, WeightKind::kLinear), DType::kU8);
  EXPECT_EQ(dtype(PointRole::kActivation, WeightKind::kHead), DType::kI16) << "beside the weight, not the weight";
}

TEST(TargetsTest, NamesTellTheLayer) {
  EXPECT_FALSE(LayerPointOf("model.language_model.norm.weight"));
  EXPECT_FALSE(LayerPointOf("layers.x.act_in"));
  EXPECT_EQ(LayerPointOf("layers.12.act_in")->layer, 12);
}

}  // namespace
}  // namespace circlet
