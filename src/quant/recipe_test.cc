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
    EXPECT_TRUE(recipe.export_options.circle_per_layer) << name;
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
                        "smoke-u8, or give the path of a YAML file"));
  EXPECT_THAT(ErrorText([] { Recipe::BuiltinText("w8a61"); }), HasSubstr("nearest: \"w8a16\""));
  EXPECT_THAT(ErrorText([] { Recipe::Load("/no/such/quant.yaml"); }), HasSubstr("/no/such/quant.yaml"));
}

TEST(RecipeTest, AssignmentsChangeTheTree) {
  const std::vector<std::string> assignments{"pipeline.ptq.linear_weight=uint8", "export.max_seq_len=64",
                                             "runtime.seed=7"};
  const Recipe recipe = Recipe::Load("w4a16", assignments);
  EXPECT_THAT(Having(recipe, DType::kU4), IsEmpty());
  EXPECT_EQ(recipe.export_options.max_seq_len, 64);
  EXPECT_EQ(recipe.runtime.seed, 7u);
  EXPECT_THAT(recipe.EffectiveYaml(), HasSubstr("linear_weight: uint8"));
  const std::vector<std::string> misspelled{"pipeline.ptq.linear_wieght=uint8"};
  EXPECT_THAT(ErrorText([&] { Recipe::Load("w4a16", misspelled); }),
              HasSubstr("linear_wieght: is no known key; nearest: \"linear_weight\""));
}

TEST(RecipeTest, EverySectionIsRead) {
  const Recipe recipe = Recipe::Parse(R"(
model: {family: gemma4, name_or_path: ./e2b, trust_remote_code: true, hf_token: null}
runtime: {device: cpu, dtype: fp32, seed: 9, show_progress: false, verbose: true}
calibration:
  datasets:
    - dataset: chats.jsonl
      split: train
      n_samples: 12
    - name: photos
  seq_len: 256
model_args:
  vision: {visual_start_idx: 4, num_visual_tokens: 6, max_soft_tokens: 70, patch_grid_height: 6, patch_grid_width: 9}
  text: {max_seq: 128, ple_embedding_scale_fusion: false}
  attention: {profile: npu_export, layout: unrolled, rope: pre_negated_sin}
pipeline:
  - {name: gptq, enabled: false, weight_bits: 4}
  - {name: ptq, activation: uint8, print_overrides: true}
evaluation:
  enabled: true
  n_samples: 5
  ppl: {enabled: true, dataset: wiki.txt, stride: 64}
  coco: true
  llava_bench: {enabled: false, mode: judge}
export:
  enabled: true
  output_dir: out
  artifacts: [circle_per_layer, ptq_checkpoint]
  max_seq_len: 128
  prefill_decode: false
  vision: {granularity: layer}
debug:
  wrapper_smoke:
    calibration_iters: 2
    export: {enabled: true, artifact: circle}
    plot: {enabled: false}
    llama: {size_profile: tiny}
    gemma4: {size_profile: e2b_static_runtime, static_runtime: {max_seq: 64, profile: e2b_66x36_264}}
)",
                                      "quant.yaml");
  EXPECT_EQ(recipe.model.name_or_path, "./e2b");
  EXPECT_EQ(recipe.runtime.seed, 9u);
  EXPECT_EQ(recipe.smoke.seed, 9u);
  EXPECT_EQ(Recipe::Parse("{}", "empty.yaml").smoke.seed, 123u);
  EXPECT_FALSE(recipe.runtime.show_progress);
  EXPECT_EQ(
      recipe.calibration.datasets,
      (std::vector<DataSource>{{.dataset = "chats.jsonl", .split = "train", .n_samples = 12}, {.dataset = "photos"}}));
  EXPECT_EQ(recipe.calibration.seq_len, 256);
  EXPECT_EQ(recipe.model_args.patch_grid_width, 9);
  EXPECT_EQ(recipe.model_args.max_seq, 128);
  EXPECT_FALSE(recipe.model_args.ple_embedding_scale_fusion);
  EXPECT_EQ(recipe.specs.activation, QuantSpec::Affine(DType::kU8));
  EXPECT_TRUE(recipe.print_overrides);
  EXPECT_TRUE(recipe.evaluation.captions);
  EXPECT_EQ(recipe.evaluation.perplexity.stride, 64);
  EXPECT_TRUE(recipe.export_options.checkpoint);
  EXPECT_EQ(recipe.export_options.vision, ExportOptions::Granularity::kLayer);
  EXPECT_FALSE(recipe.export_options.prefill_decode);
  EXPECT_EQ(recipe.smoke.calibration_iters, 2);
  EXPECT_TRUE(recipe.smoke.export_circle);
  EXPECT_FALSE(recipe.smoke.plot);
  EXPECT_EQ(recipe.smoke.static_runtime.max_seq, 64);
}

TEST(RecipeTest, DataSourcesMayBeAListInOneStringOrAMapping) {
  const auto sources = [](const std::string& text) {
    return Recipe::Parse("calibration:\n" + text, "quant.yaml").calibration.datasets;
  };
  const std::vector<DataSource> expected{
      {.dataset = "b"}, {.dataset = "a", .n_samples = 64}, {.dataset = "c", .split = "train", .n_samples = 32}};
  EXPECT_EQ(sources("  datasets: \"b,a:64,c:train:32\""), expected);
  EXPECT_EQ(sources("  datasets: [b, \"a:64\", \"c:train:32\"]"), expected);
  EXPECT_EQ(sources("  datasets: {b: 128, a: 64, c: {split: train, n_samples: 32}}"), expected);
  EXPECT_EQ(sources("  dataset: c\n  split: train\n  n_samples: 32"), std::vector{expected[2]});
  EXPECT_THAT(LoadError("calibration: {datasets: \"a:b\"}"), HasSubstr("\"b\" is no number of samples; write name:64"));
  EXPECT_THAT(LoadError("calibration: {datasets: {a: 0}}"), HasSubstr("0 samples of \"a\"; use 1 or more"));
  EXPECT_THAT(LoadError("calibration: {datasets: a, dataset: b}"), HasSubstr("keep one of the two"));
  EXPECT_THAT(LoadError("calibration: {datasets: [{split: train}]}"), HasSubstr("give the name or path of the data"));
}

TEST(RecipeTest, UnknownKeysAreErrorsWithLineAndNearestKey) {
  EXPECT_THAT(LoadError("runtime:\n  sed: 3\n"),
              HasSubstr("quant.yaml:2: runtime.sed: is no known key; nearest: \"seed\""));
  EXPECT_THAT(LoadError("pipelin: []\n"), HasSubstr("quant.yaml:1: pipelin: is no known key; nearest: \"pipeline\""));
  EXPECT_THAT(LoadError("pipeline:\n  - name: ptq\n    activaton: int16\n"),
              HasSubstr("quant.yaml:3: pipeline.0.activaton: is no known key; nearest: \"activation\""));
  EXPECT_THAT(LoadError("export:\n  vision: {granularty: layer}\n"),
              HasSubstr("export.vision.granularty: is no known key; nearest: \"granularity\""));
  EXPECT_THAT(LoadError("export: {max_seq_len: long}"), HasSubstr("export.max_seq_len: expected an integer"));
  EXPECT_THAT(LoadError("[1, 2]"), HasSubstr("quant.yaml:1: expected an object"));
}

TEST(RecipeTest, KnownKeysThatAskForMoreThanThereIsAreRefusedByName) {
  for (const char* text :
       {"model: {hf_token: abc}", "runtime: {device_map: auto}", "calibration: {filter: {n_per_class: 3}}",
        "calibration: {allow_benchmark_overlap: true}", "model_args: {assistant: {full_kv_length: 3}}",
        "evaluation: {enabled: true, mmlu: {enabled: true}}", "evaluation: {enabled: true, vlm_tasks: [vqa]}",
        "export: {strict: true}", "debug: {tied_embedding: {vocab_size: 3}}", "extensions: [a]",
        "pipeline: [{name: ptq, norm: int16}]", "pipeline: [{name: ptq, strict_wrap: false}]",
        "pipeline: [{name: ptq, print_model: true}]"}) {
    EXPECT_THAT(LoadError(text), HasSubstr("is not supported yet; remove it")) << text;
  }
  EXPECT_THAT(LoadError("model: {family: llama}"),
              HasSubstr("model.family: \"llama\" is not supported yet; use gemma4"));
  EXPECT_THAT(LoadError("model: {family: gema4}"), HasSubstr("model.family: \"gema4\" is no known value; use gemma4"));
  EXPECT_THAT(LoadError("runtime: {device: cuda}"), HasSubstr("\"cuda\" is not supported yet; use cpu"));
  EXPECT_THAT(LoadError("runtime: {dtype: bfloat16}"), HasSubstr("\"bfloat16\" is not supported yet; use float32"));
  EXPECT_THAT(LoadError("model_args: {attention: reference_eval}"), HasSubstr("is not supported yet; use npu_export"));
  EXPECT_THAT(LoadError("model_args: {attention: {rope: hf}}"), HasSubstr("is not supported yet; use pre_negated_sin"));
  EXPECT_THAT(LoadError("export: {ple_embedding_format: pt}"),
              HasSubstr("\"pt\" is not supported yet; use auto, circle"));
  EXPECT_THAT(LoadError("evaluation: {ppl: {mode: chat-prefix}}"), HasSubstr("is not supported yet; use raw"));
  EXPECT_THAT(LoadError("calibration: {seed: 3}"), HasSubstr("has no effect; set runtime.seed"));
  EXPECT_THAT(
      LoadError("pipeline:\n  - name: gptq\n"),
      HasSubstr("quant.yaml:2: pipeline.0.name: stage \"gptq\" is not supported yet; remove it or set enabled: false"));
  EXPECT_THAT(LoadError("pipeline: [{name: pqt}]"), HasSubstr("unknown stage \"pqt\"; nearest: \"ptq\""));
  EXPECT_THAT(LoadError("pipeline: [{name: ptq}, {name: ptq}]"), HasSubstr("a second ptq stage; keep one"));
}

TEST(RecipeTest, FiguresOutsideTheirRangeAreErrors) {
  EXPECT_THAT(LoadError("export: {max_seq_len: 1}"), HasSubstr("1 is too small; use 2 or more"));
  EXPECT_THAT(LoadError("runtime: {seed: -1}"), HasSubstr("runtime.seed: -1 is too small; use 0 or more"));
  EXPECT_THAT(LoadError("export: {artifacts: [onnx]}"),
              HasSubstr("unknown artifact \"onnx\"; known are circle_per_layer"));
  EXPECT_THAT(LoadError("model_args: {vision: {image_height: 8}}"),
              HasSubstr("image_height and image_width belong together"));
  EXPECT_THAT(LoadError("pipeline: [{name: ptq, activation: {observer: ema}}]"),
              HasSubstr("activation: names no dtype"));
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
