// What runs count, and what they refuse to take.

#include <gmock/gmock.h>

#include "circlet/io/file.h"
#include "error_text.h"
#include "golden_run.h"

namespace circlet {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

// ---- Padding --------------------------------------------------------------------------------------------------------

// Ten tokens among padding. Its positions compute something too, which nobody reads.
QuantizeResult RunMasked(const std::vector<int64_t>& mask) {
  const TempDirectory directory;
  const fs::path samples = directory.Path() / "samples.safetensors";
  std::vector<int64_t> ids;
  int64_t next = 30;
  for (const int64_t kept : mask) ids.push_back(kept != 0 ? next++ : 0);
  const auto length = static_cast<int64_t>(ids.size());
  WriteSafetensors(samples, {{"calib.0.input_ids", Tensor::Of<int64_t>({1, length}, ids)},
                             {"calib.0.attention_mask", Tensor::Of<int64_t>({1, length}, mask)}});
  return Quantize({.model = TestData("golden/seed_example/model"), .samples = samples, .recipe = "w8a16"});
}

TEST(Padding, OnlyKeptPositionsCountInErrorsWhereverTheyStand) {
  const QuantizeResult whole = RunMasked({1, 1, 1, 1, 1, 1, 1, 1, 1, 1});
  ASSERT_EQ(whole.output.count, 10 * 256);
  for (const std::vector<int64_t>& mask : std::vector<std::vector<int64_t>>{
           {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0},
           {0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1},
           {0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0},
       }) {
    const QuantizeResult padded = RunMasked(mask);
    EXPECT_EQ(padded.output.count, whole.output.count) << "logits";
    ASSERT_EQ(padded.stages.size(), whole.stages.size());
    for (size_t i = 0; i < padded.stages.size(); ++i) {
      EXPECT_EQ(padded.stages[i].accumulated.count, whole.stages[i].accumulated.count) << padded.stages[i].stage;
      EXPECT_EQ(padded.stages[i].alone.count, whole.stages[i].alone.count) << padded.stages[i].stage;
    }
    EXPECT_LE(padded.scatter.size(), 4096u);
  }
}

// ---- Frozen grids ---------------------------------------------------------------------------------------------------

TEST(FrozenGridsTest, GridsOfAnotherRecipeAreRefusedWithTheFirstPointsAndTheRecipe) {
  const GoldenRun source({"seed_example", "w4a16"}, "default");
  const fs::path file = source.Output() / "qparams.json";
  const auto run = [&](const char* recipe) {
    return GoldenRun({"seed_example", recipe}, "default", [&](QuantizeOptions& options) { options.qparams = file; });
  };
  EXPECT_THAT(ErrorText([&] { run("w8a16"); }),
              AllOf(StartsWith(file.string() + ": "), HasSubstr("have another type than in recipe w8a16: "),
                    HasSubstr("weight is uint4 asymmetric by axis 0 there and uint8 asymmetric by axis 0 here"),
                    HasSubstr("give the recipe that made the file (it says w4a16)")));
  // The grids' recipe stays with them, also where another one asks for the same types.
  const GoldenRun again = run("w4a16");
  for (const char* name : {"report.json", "manifest.json", "qparams.json"}) {
    const nlohmann::json json = ReadJson(again.Output() / name);
    EXPECT_EQ(json.at("grids"), (nlohmann::json{{"file", "qparams.json"}, {"recipe", "w4a16"}})) << name;
    EXPECT_FALSE(ReadJson(source.Output() / name).contains("grids")) << name;
  }
  EXPECT_THAT(ReportText(again.Result()), HasSubstr("grids of qparams.json, made with w4a16"));
}

TEST(FrozenGridsTest, AreRefusedBesideWeightsThatAreFittedToTheData) {
  const GoldenRun source({"seed_example", "w4a16"}, "default");
  const fs::path file = source.Output() / "qparams.json";
  EXPECT_THAT(ErrorText([&] {
                GoldenRun({"seed_example", "w4a16-gptq"}, "default",
                          [&](QuantizeOptions& options) { options.qparams = file; });
              }),
              AllOf(StartsWith("--qparams: "), HasSubstr("w4a16-gptq")));
}

TEST(FrozenGridsTest, TakeEvaluationSamplesAlone) {
  const GoldenRun source({"seed_example", "w8a16"}, "default");
  const TempDirectory directory;
  std::map<std::string, Tensor> samples;
  const SafetensorsFile all = [&] {
    UnpackGolden("golden/seed_example/inputs.safetensors.xz", directory.Path() / "all.safetensors");
    return SafetensorsFile::Open(directory.Path() / "all.safetensors");
  }();
  for (const auto& [name, tensor] : all.Tensors())
    if (name.starts_with("eval.")) samples[name] = tensor;
  const fs::path file = directory.Path() / "eval.safetensors";
  WriteSafetensors(file, samples);
  QuantizeOptions options{
      .model = TestData("golden/seed_example/model"), .samples = file, .recipe = "w8a16", .text_only = true};
  EXPECT_THAT(ErrorText([&] { Quantize(options); }), HasSubstr("no tensor is called \"calib.N.input_ids\""));
  options.qparams = source.Output() / "qparams.json";
  const QuantizeResult result = Quantize(options);
  EXPECT_EQ(result.calibration_samples, 0);
  EXPECT_EQ(result.evaluation_samples, 1);
  EXPECT_FALSE(result.output_on_calibration_data);
  EXPECT_EQ(result.output, source.Result().output) << "the same grids on the same samples";
}

TEST(SampleFiles, NamesThatNoSampleReadsAreRefused) {
  const TempDirectory directory;
  const fs::path file = directory.Path() / "samples.safetensors";
  const Tensor ids = Tensor::Of<int64_t>({3}, std::vector<int64_t>{30, 31, 32});
  const auto refused = [&](const std::map<std::string, Tensor>& more) {
    std::map<std::string, Tensor> tensors{{"calib.0.input_ids", ids}};
    tensors.insert(more.begin(), more.end());
    WriteSafetensors(file, tensors);
    return ErrorText(
        [&] { Quantize({.model = TestData("golden/seed_example/model"), .samples = file, .recipe = "w8a16"}); });
  };
  EXPECT_THAT(refused({{"calib.0.atention_mask", ids}}),
              AllOf(HasSubstr("tensor \"calib.0.atention_mask\""), HasSubstr("nearest: \"attention_mask\"")));
  EXPECT_THAT(refused({{"evaluation.0.input_ids", ids}}), HasSubstr("names are calib.N.KEY and eval.N.KEY"));
  EXPECT_THAT(refused({{"calib.1.attention_mask", ids}}), HasSubstr("has no \"calib.1.input_ids\" beside it"));
  const Tensor none = Tensor::Of<int64_t>({3}, std::vector<int64_t>{0, 0, 0});
  EXPECT_THAT(refused({{"calib.0.attention_mask", none}}), HasSubstr("keeps no position"));
}

// ---- Layouts and switches -------------------------------------------------------------------------------------------

QuantizeOptions Pictures(const TempDirectory& directory) {
  const fs::path samples = directory.Path() / "samples.safetensors";
  UnpackGolden("golden/seed_example/inputs.safetensors.xz", samples);
  return {.model = TestData("golden/seed_example/model"), .samples = samples, .recipe = "w8a16"};
}

TEST(StaticLayout, IsComparedWithEverySample) {
  const TempDirectory directory;
  QuantizeOptions options = Pictures(directory);
  options.output = directory.Path() / "out";
  const std::string profile = ReadFile(Quantize(options).output_directory + "/vision_profile.json");
  const fs::path file = directory.Path() / "profile.json";
  WriteFile(file, profile);
  options.output.clear();
  options.vision_profile = file;
  options.set = {"model_args.vision.validate_static_layout=true"};
  EXPECT_GT(Quantize(options).pictures, 0);  // all samples have it
  nlohmann::json json = nlohmann::json::parse(profile);
  json["visual_start_idx"] = json["visual_start_idx"].get<int>() + 1;
  WriteJson(file, json);
  EXPECT_THAT(ErrorText([&] { Quantize(options); }),
              AllOf(StartsWith("samples.safetensors:calib.4: vision profile custom: position "),
                    HasSubstr("image placeholder; the static layout has them at [")));
  options.vision_profile.clear();
  options.text_only = true;
  EXPECT_THAT(ErrorText([&] { Quantize(options); }),
              AllOf(StartsWith("model_args.vision.validate_static_layout: no sample has a picture"),
                    HasSubstr("set it to false")));
}

TEST(Switches, ThatCannotHaveAnEffectAreRefused) {
  const TempDirectory directory;
  const auto refused = [&](const std::function<void(QuantizeOptions&)>& change) {
    QuantizeOptions options = Pictures(directory);
    change(options);
    return ErrorText([&] { Quantize(options); });
  };
  EXPECT_THAT(refused([](auto& o) { o.eval_windows = 3; }), "--eval-windows: has no effect without --eval-text");
  EXPECT_THAT(refused([](auto& o) {
                o.text_only = true;
                o.eval_captions = "captions.jsonl";
              }),
              HasSubstr("--eval-captions needs them"));
  EXPECT_THAT(refused([](auto& o) {
                o.text_only = true;
                o.vision_profile = "e2b_66x36_264";
              }),
              HasSubstr("has no effect with --text-only"));
  const fs::path file = directory.Path() / "calib.safetensors";
  WriteSafetensors(file, {{"calib.0.input_ids", Tensor::Of<int64_t>({3}, std::vector<int64_t>{30, 31, 32})}});
  EXPECT_THAT(refused([&](auto& o) {
                o.samples = file;
                o.save_stages = true;
                o.output = directory.Path() / "out";
              }),
              StartsWith("--save-stages: has no effect without evaluation samples"));
}

}  // namespace
}  // namespace circlet
