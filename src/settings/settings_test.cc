#include "circlet/settings/settings.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "error_text.h"

namespace circlet {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

std::string LoadError(const std::string& text) {
  return ErrorText([&] { Settings::Parse(text, "quant.yaml"); });
}

TEST(SettingsTest, EveryBuiltInRecipeIsRead) {
  for (const std::string& name : Recipe::BuiltinNames())
    EXPECT_TRUE(Settings::Load(name).export_options.prefill_decode) << name;
}

TEST(SettingsTest, AssignmentsChangeTheTree) {
  const std::vector<std::string> assignments{"pipeline.ptq.linear_weight=uint8", "export.max_seq_len=64",
                                             "runtime.seed=7"};
  const Settings settings = Settings::Load("w4a16", assignments);
  EXPECT_EQ(settings.recipe.specs.linear_weight, QuantSpec::Affine(DType::kU8));
  EXPECT_EQ(settings.export_options.max_seq_len, 64);
  EXPECT_EQ(settings.runtime.seed, 7u);
  EXPECT_THAT(settings.recipe.EffectiveYaml(), HasSubstr("linear_weight: uint8"));
  const std::vector<std::string> misspelled{"pipeline.ptq.linear_wieght=uint8"};
  EXPECT_THAT(ErrorText([&] { Settings::Load("w4a16", misspelled); }),
              HasSubstr("linear_wieght: is no known key; nearest: \"linear_weight\""));
}

TEST(SettingsTest, EverySectionIsRead) {
  const Settings settings = Settings::Parse(R"(
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
  EXPECT_EQ(settings.model.name_or_path, "./e2b");
  EXPECT_EQ(settings.runtime.seed, 9u);
  EXPECT_EQ(settings.smoke.seed, 9u);
  EXPECT_EQ(Settings::Parse("{}", "empty.yaml").smoke.seed, 123u);
  EXPECT_EQ(settings.calibration.datasets,
            (std::vector<DataSource>{{.dataset = "chats.jsonl", .n_samples = 12}, {.dataset = "photos"}}));
  EXPECT_EQ(settings.calibration.seq_len, 256);
  EXPECT_EQ(settings.model_args.patch_grid_width, 9);
  EXPECT_EQ(settings.model_args.max_seq, 128);
  EXPECT_EQ(settings.recipe.specs.activation, QuantSpec::Affine(DType::kU8));
  EXPECT_TRUE(settings.evaluation.captions);
  EXPECT_EQ(settings.evaluation.perplexity.dataset, "wiki.txt");
  EXPECT_EQ(settings.export_options.vision, ExportOptions::Granularity::kLayer);
  EXPECT_FALSE(settings.export_options.prefill_decode);
  EXPECT_EQ(settings.smoke.calibration_iters, 2);
  EXPECT_TRUE(settings.smoke.export_circle);
  EXPECT_FALSE(settings.smoke.plot);
  EXPECT_EQ(settings.smoke.static_runtime.max_seq, 64);
}

TEST(SettingsTest, DataSourcesMayBeAListInOneStringOrAMapping) {
  const auto sources = [](const std::string& text) {
    return Settings::Parse("calibration:\n" + text, "quant.yaml").calibration.datasets;
  };
  const std::vector<DataSource> expected{
      {.dataset = "b"}, {.dataset = "a", .n_samples = 64}, {.dataset = "c", .n_samples = 32}};
  EXPECT_EQ(sources("  datasets: \"b,a:64,c:train:32\""), expected);
  EXPECT_EQ(sources("  datasets: [b, \"a:64\", \"c:train:32\"]"), expected);
  EXPECT_EQ(sources("  datasets: {b: 128, a: 64, c: {split: train, n_samples: 32}}"), expected);
  EXPECT_EQ(sources("  dataset: c\n  split: train\n  n_samples: 32"), std::vector{expected[2]});
  EXPECT_THAT(LoadError("calibration: {datasets: \"a:b\"}"), HasSubstr("\"b\" is no number of samples; write name:64"));
  EXPECT_THAT(LoadError("calibration: {datasets: {a: 0}}"), HasSubstr("0 samples of \"a\"; use 1 or more"));
  EXPECT_THAT(LoadError("calibration: {datasets: a, dataset: b}"), HasSubstr("keep one of the two"));
  EXPECT_THAT(LoadError("calibration: {datasets: [{split: train}]}"), HasSubstr("give the name or path of the data"));
}

TEST(SettingsTest, KeysWithoutEffectAreStillOfTheirType) {
  for (const char* text : {"runtime: {show_progress: 1}", "runtime: {verbose: loud}",
                           "calibration: {dataset: a, split: 3}", "calibration: {datasets: [{dataset: a, config: 3}]}",
                           "model_args: {text: {ple_embedding_scale_fusion: 2}}", "evaluation: {n_samples: many}",
                           "evaluation: {max_seq_len: 0}", "evaluation: {verbose: 2}", "evaluation: {ppl: {split: 2}}",
                           "evaluation: {ppl: {stride: 0}}", "pipeline: [{name: ptq, print_overrides: 3}]"})
    EXPECT_NE(LoadError(text), "") << text;
  EXPECT_THAT(LoadError("export: {artifacts: [onnx]}"),
              HasSubstr("export.artifacts: unknown artifact \"onnx\"; known are circle_per_layer, ptq_checkpoint"));
}

TEST(SettingsTest, UnknownKeysAreErrorsWithLineAndNearestKey) {
  EXPECT_THAT(LoadError("runtime:\n  sed: 3\n"),
              StartsWith("quant.yaml:2: runtime.sed: is no known key; nearest: \"seed\""));
  EXPECT_THAT(LoadError("runtime: {sed: 3, vrbose: true}\n"),
              AllOf(HasSubstr("2 faults"), HasSubstr("runtime.sed: is no"), HasSubstr("runtime.vrbose: is no")));
  EXPECT_THAT(LoadError("pipelin: []\n"), HasSubstr("quant.yaml:1: pipelin: is no known key; nearest: \"pipeline\""));
  EXPECT_THAT(LoadError("pipeline:\n  - name: ptq\n    activaton: int16\n"),
              HasSubstr("quant.yaml:3: pipeline.0.activaton: is no known key; nearest: \"activation\""));
  EXPECT_THAT(LoadError("export:\n  vision: {granularty: layer}\n"),
              HasSubstr("export.vision.granularty: is no known key; nearest: \"granularity\""));
  EXPECT_THAT(LoadError("export: {max_seq_len: long}"), HasSubstr("export.max_seq_len: expected an integer"));
  EXPECT_THAT(LoadError("[1, 2]"), HasSubstr("quant.yaml:1: expected an object"));
}

TEST(SettingsTest, TheRuntimesSectionIsWhatGenerateTakes) {
  const GenerationOptions said = Settings::Parse(R"(
pipeline: [{name: ptq}]
debug:
  static_gemma4_runtime: {model: dir, max_seq: 512, prompt: Describe it., verify_steps: 4, gen_steps: 16,
    padding_side: right, device: cpu, rope: pre_negated_sin, vision_profile: e2b_66x36_264, image_width: 30}
)",
                                                 "quant.yaml")
                                     .generation;
  EXPECT_EQ(said.model, "dir");
  EXPECT_EQ(said.prompt, "Describe it.");
  EXPECT_EQ(said.max_seq, 512);
  EXPECT_EQ(said.verify_steps, 4);
  EXPECT_EQ(said.gen_steps, 16);
  EXPECT_THAT(said.unused, testing::ElementsAre("debug.static_gemma4_runtime.vision_profile",
                                                "debug.static_gemma4_runtime.image_width"));
  EXPECT_THAT(LoadError("debug: {static_gemma4_runtime: {padding_side: left}}"),
              HasSubstr("debug.static_gemma4_runtime.padding_side: \"left\" is not supported yet; use right"));
  EXPECT_THAT(LoadError("debug: {static_gemma4_runtime: {gen_stps: 3}}"), HasSubstr("nearest: \"gen_steps\""));
}

TEST(SettingsTest, KnownKeysThatAskForMoreThanThereIsAreRefusedByName) {
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
      LoadError("pipeline:\n  - name: cle\n"),
      testing::AllOf(
          HasSubstr("quant.yaml:2: pipeline.0.name: stage \"cle\": rows in front of a norm cannot be equalized"),
          HasSubstr("take the recipe w4a16-gptq; set enabled: false, or remove it")));
  EXPECT_THAT(LoadError("pipeline: [{name: smoothquant}]"), HasSubstr("gain little after a gptq stage"));
  EXPECT_THAT(LoadError("pipeline: [{name: spinquant}]"), HasSubstr("widen: auto of the ptq stage"));
  EXPECT_THAT(LoadError("pipeline: [{name: pqt}]"), HasSubstr("unknown stage \"pqt\"; nearest: \"ptq\""));
  EXPECT_THAT(LoadError("pipeline: [{name: ptq}, {name: ptq}]"), HasSubstr("a second ptq stage; keep one"));
}

// A file of the reference asks for several such things; one run names them all.
TEST(SettingsTest, AllFaultsOfAFileAreNamedTogether) {
  const std::string text = LoadError(
      "runtime:\n  device: cuda\n  dtype: bfloat16\n"
      "calibration: {filter: {n_per_class: 3}}\n"
      "pipeline:\n  - name: spinquant\n  - name: ptq\n    activaton: int16\n    weight: {dtype: int17}\n"
      "    print_model: true\n"
      "model_args: {attention: {layout: batched}}\n"
      "export: {max_seq_len: long}\nunknown: 1\n");
  EXPECT_THAT(text, testing::StartsWith("quant.yaml: 10 faults:\n  quant.yaml:2: runtime.device: \"cuda\""));
  for (const char* part :
       {"quant.yaml:3: runtime.dtype: \"bfloat16\"", "calibration.filter: is not supported", "stage \"spinquant\"",
        "pipeline.1.activaton: is no known key", "int17", "pipeline.1.print_model: is not supported",
        "model_args.attention.layout: \"batched\"", "export.max_seq_len: expected an integer", "unknown: is no known key"})
    EXPECT_THAT(text, HasSubstr(part));
}

TEST(SettingsTest, FiguresOutsideTheirRangeAreErrors) {
  EXPECT_THAT(LoadError("export: {max_seq_len: 1}"), HasSubstr("1 is too small; use 2 or more"));
  EXPECT_THAT(LoadError("runtime: {seed: -1}"), HasSubstr("runtime.seed: -1 is too small; use 0 or more"));
  EXPECT_THAT(LoadError("export: {artifacts: [onnx]}"),
              HasSubstr("unknown artifact \"onnx\"; known are circle_per_layer"));
  EXPECT_THAT(LoadError("model_args: {vision: {image_height: 8}}"),
              HasSubstr("image_height and image_width belong together"));
  EXPECT_THAT(LoadError("pipeline: [{name: ptq, activation: {observer: ema}}]"),
              HasSubstr("activation: names no dtype"));
}

}  // namespace
}  // namespace circlet
