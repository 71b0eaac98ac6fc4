// The program from the outside: exit codes, messages, files.

#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

#include "circlet/circle/model.h"
#include "circlet/io/json.h"
#include "circlet/io/safetensors.h"
#include "golden.h"
#include "golden_model_test.h"
#include "paths.h"
#include "program.h"

namespace circlet {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::ContainsRegex;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Matcher;
using ::testing::Not;
using ::testing::StartsWith;

std::vector<std::string> With(std::vector<std::string> arguments, const std::string& from, const std::string& to) {
  std::ranges::replace(arguments, from, to);
  return arguments;
}

class CliTest : public GoldenModelTest {
 protected:
  // With other data than the samples.
  std::vector<std::string> QuantizeText(const std::vector<std::string>& more) const {
    std::vector<std::string> arguments{"quantize", kTiny, "--output", out_, "--quiet"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  }

  std::string Lines(const std::string& text) const {
    const fs::path file = directory_.Path() / "data.jsonl";
    WriteFile(file, text);
    return file;
  }

  // A question about one of the example's pictures.
  static std::string PictureLine(const std::string& picture) {
    return R"({"messages": [{"role": "user", "content": [{"type": "image", "path": ")" + kTiny + "/eval/images/" +
           picture + R"("}, {"type": "text", "text": "What is in the picture?"}]}]})" + "\n";
  }

  void EditConfig(const std::function<void(nlohmann::json&)>& change) const {
    nlohmann::json config = ReadJson(fs::path(model_) / "config.json");
    change(config);
    WriteJson(fs::path(model_) / "config.json", config);
  }

  void EditTensor(const std::string& name, const std::function<void(Tensor&)>& change) const {
    const fs::path file = fs::path(model_) / "model.safetensors";
    std::map<std::string, Tensor> tensors = SafetensorsFile::Open(file).Tensors();
    Tensor& tensor = tensors.at(name);
    tensor = tensor.Clone();
    change(tensor);
    WriteSafetensors(file, tensors);
  }

  // The user can mend it: exit code 2, the message, and nothing left behind.
  void ExpectRefused(const std::vector<std::string>& arguments, const Matcher<std::string>& message,
                     const std::string& shell = "") const {
    const ProgramResult result = RunProgram(arguments, shell);
    EXPECT_EQ(result.exit_code, 2) << result.err;
    EXPECT_THAT(result.err, AllOf(StartsWith("circlet: "), message));
    EXPECT_EQ(std::ranges::count(result.err, '\n'), 1) << result.err;
    EXPECT_THAT(result.out, IsEmpty());
    ExpectNothingLeft();
  }
  static void ExpectError(const std::vector<std::string>& arguments, const Matcher<std::string>& message) {
    const ProgramResult result = RunProgram(arguments);
    EXPECT_EQ(result.exit_code, 2) << result.err;
    EXPECT_THAT(result.err, AllOf(StartsWith("circlet: "), message));
  }
  void ExpectNothingLeft() const {
    EXPECT_FALSE(fs::exists(out_));
    for (const auto& entry : fs::directory_iterator(directory_.Path()))
      EXPECT_THAT(entry.path().filename().string(), Not(StartsWith("out"))) << "left behind";
  }

  static inline const std::string kTiny = SourcePath("examples/tiny-gemma4");
};

// ---- From directory to files ----------------------------------------------------------------------------------------

// Held-out lines, one of which was calibrated on.
TEST_F(CliTest, ErrorsAreThoseOfEvaluationData) {
  const std::string calibration = Lines(
      "{\"type\": \"text\", \"text\": \"Emma saw a small brown dog near the old house by the river.\"}\n"
      "{\"type\": \"text\", \"text\": \"The children played in the garden until it was dark.\"}\n");
  const fs::path held = directory_.Path() / "held.jsonl", json = directory_.Path() / "report.json";
  WriteFile(held,
            "{\"type\": \"text\", \"text\": \"A boat came down the river, and the boy waved at it.\"}\n"
            "{\"type\": \"text\", \"text\": \"The children played in the garden until it was dark.\"}\n");
  std::vector<std::string> arguments{"evaluate", kTiny,    "--data", calibration, "--eval-data",
                                     held,       "--json", json,     "--quiet"};
  const ProgramResult result = RunProgram(arguments);
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("figures of logits on samples not calibrated on"),
                                HasSubstr("held.jsonl: 1 of 2 samples are calibration samples too, the first: ")));
  const nlohmann::json report = ReadJson(json);
  EXPECT_EQ(report.at("calibration_samples"), 2);
  EXPECT_EQ(report.at("evaluation_samples"), 2);
  EXPECT_EQ(report.at("output").at("on_calibration_data"), false);
  arguments.emplace_back("--strict");
  ExpectRefused(arguments, AllOf(HasSubstr("1 of 2 samples are calibration samples too"), HasSubstr("--strict")));
  ExpectRefused(Quantize({"--eval-data", held}), HasSubstr("has evaluation samples (eval.N.*) already"));
  ExpectRefused({"evaluate", kTiny, "--data", "-", "--eval-data", "-"}, HasSubstr("standard input is read by --data"),
                "echo | ");
  ExpectRefused({"evaluate", kTiny, "--data", calibration, "--eval-data", kTiny + "/eval/calib.jsonl"},
                HasSubstr("calib.jsonl:17 has a picture, and no calibration sample has one; calibrate on pictures too"));
  ExpectRefused({"evaluate", kTiny, "--data", calibration, "--eval-data", "x.safetensors"},
                HasSubstr("eval.N.* are evaluation samples of --samples"));
  ExpectRefused({"evaluate", kTiny, "--data", calibration, "--eval-captions", kTiny + "/eval/captions.jsonl"},
                HasSubstr("captions.jsonl:1 has a picture, and no calibration sample has one"));
  const std::string pictures = directory_.Path() / "pictures.jsonl";
  WriteFile(pictures, PictureLine("calib_00.png"));
  ExpectRefused({"evaluate", kTiny, "--data", calibration, "--eval-data", pictures, "--text-only"},
                HasSubstr("pictures.jsonl: all 1 samples have images and were left out"));
  const ProgramResult cut = RunProgram(
      {"evaluate", kTiny, "--data", calibration, "--eval-data", held, "--max-seq-len", "8", "--truncate", "--quiet"},
      "export COLUMNS=60; ");
  EXPECT_THAT(cut.out, HasSubstr("2 of 2 samples cut to 8 tokens; 2 of 2 samples cut to 8 tokens")) << cut.err;
  EXPECT_THAT(cut.out, HasSubstr("(no room for: "));
}

// Two samples with one text differ by their pictures, which no name tells.
TEST_F(CliTest, EvaluationDataAreKnownAgainByTheirPictures) {
  const std::string calibration = Lines(PictureLine("calib_00.png")), held = directory_.Path() / "held.jsonl";
  const auto evaluated = [&](const char* picture) {
    WriteFile(held, PictureLine(picture));
    const ProgramResult result = RunProgram({"evaluate", kTiny, "--data", calibration, "--eval-data", held, "--quiet"});
    EXPECT_EQ(result.exit_code, 0) << result.err;
    return result.out;
  };
  EXPECT_THAT(evaluated("eval_000.png"), Not(HasSubstr("calibration samples too")));
  EXPECT_THAT(evaluated("../images/calib_00.png"), HasSubstr("1 of 1 samples are calibration samples too"));
  const std::string captions = directory_.Path() / "captions.jsonl";
  WriteFile(captions,
            R"({"question": "What?", "caption": "a circle", "image": ")" + kTiny + "/eval/images/calib_00.png\"}\n");
  EXPECT_THAT(RunProgram({"evaluate", kTiny, "--data", calibration, "--eval-captions", captions, "--quiet"}).out,
              HasSubstr("captions.jsonl: 1 of 1 pictures also stand in the calibration data"));
}

TEST_F(CliTest, QuantizeShowRunAndVerifyFollowEachOther) {
  const ProgramResult quantize = RunProgram(Quantize({"--save-stages"}));
  ASSERT_EQ(quantize.exit_code, 0) << quantize.err;
  EXPECT_THAT(quantize.err, IsEmpty());
  EXPECT_THAT(quantize.out, AllOf(HasSubstr("Quantization Error Summary"), HasSubstr("PEIR"), HasSubstr("logits"),
                                  HasSubstr("weights bf16  quantized"), HasSubstr("Circle files"),
                                  EndsWith("next: circlet verify " + out_ + "\n")));
  EXPECT_THAT(quantize.out, Not(HasSubstr("RANDOM")));

  const ProgramResult verify = RunProgram({"verify", out_});
  EXPECT_EQ(verify.exit_code, 0) << verify.err;
  EXPECT_THAT(RunProgram({"verify", out_}, "export COLUMNS=50; ").out, HasSubstr("(no room for: "));
  EXPECT_THAT(verify.out, Not(HasSubstr("no room")));
  EXPECT_THAT(verify.out, AllOf(HasSubstr("decoder_layer_decode_0"), HasSubstr("to the last code")));

  const std::string head = out_ + "/lm_head.q.circle";
  const ProgramResult show = RunProgram({"show", head});
  EXPECT_EQ(show.exit_code, 0) << show.err;
  EXPECT_THAT(show.out, AllOf(HasSubstr("FULLY_CONNECTED"), HasSubstr("RMS_NORM"),
                              HasSubstr("uint8[256,64] constant, 16.0 KiB")));

  const ProgramResult all = RunProgram({"show", out_});
  EXPECT_THAT(all.out, AllOf(HasSubstr("lm_head.q.circle"), HasSubstr("-> int16[1,1,256]\n"), HasSubstr(" files, ")));
  const nlohmann::json listed = nlohmann::json::parse(RunProgram({"show", out_, "--json"}).out);
  EXPECT_EQ(listed.size(), ReadJson(fs::path(out_) / "pipeline.json").at("units").size());
  ExpectError({"show", model_}, HasSubstr("holds no .circle file"));
  // A runtime that goes by name finds what pipeline.json names.
  for (const auto& unit : ReadJson(fs::path(out_) / "pipeline.json").at("units")) {
    const auto entry =
        std::ranges::find_if(listed, [&](const auto& file) { return file.at("file") == unit.at("file"); });
    for (const char* side : {"inputs", "outputs"})
      for (size_t i = 0; i < unit.at(side).size(); ++i)
        EXPECT_EQ(unit.at(side).at(i).at("tensor"), entry->at(side).at(i)) << unit.at("name");
  }

  const SafetensorsFile codes = SafetensorsFile::Open(out_ + "/verify.safetensors");
  const std::string in = directory_.Path() / "in.safetensors", result = directory_.Path() / "result.safetensors";
  const std::string stored = out_ + "/verify.safetensors";
  const ProgramResult raw =
      RunProgram({"run", head, "--unit", "lm_head", "--inputs", stored, "--outputs", result, "--codes"});
  EXPECT_EQ(raw.exit_code, 0) << raw.err;
  EXPECT_THAT(raw.out, HasSubstr("out.0: int16[1,1,256]"));
  const Tensor raw_codes = SafetensorsFile::Open(result).Get("out.0").Clone();
  EXPECT_EQ(0, std::memcmp(raw_codes.Raw(), codes.Get("lm_head.out.0").Raw(), raw_codes.Bytes()));
  ExpectError({"run", head, "--inputs", stored, "--outputs", result},
              AllOf(HasSubstr("input 0 \"hidden\""), HasSubstr("take those of the unit with --unit lm_head")));

  // Codes that equal others are stored once; the metadata says where.
  const auto same = codes.Metadata().find("lm_head.in.0");
  const Tensor hidden = codes.Get(same == codes.Metadata().end() ? "lm_head.in.0" : same->second);
  WriteSafetensors(in, {{"in.0", hidden}, {"hiden", hidden}});
  ExpectError({"run", head, "--inputs", in, "--outputs", result},
              AllOf(HasSubstr("\"hiden\" is no input of"), HasSubstr("nearest: \"hidden\"")));
  WriteSafetensors(in, {{"in.0", hidden}});
  const ProgramResult run = RunProgram({"run", head, "--inputs", in, "--outputs", result});
  EXPECT_EQ(run.exit_code, 0) << run.err;
  EXPECT_THAT(run.out, AllOf(HasSubstr("out.0: float32[1,1,256]"), HasSubstr(result)));
  const circle::Model model = circle::Read(head);
  const QParams& grid = model.tensors[model.outputs[0]].qparams.value();
  const SafetensorsFile results = SafetensorsFile::Open(result);
  const Tensor& found = results.Get("out.0");
  const Tensor& expected = codes.Get("lm_head.out.0");
  for (int64_t i = 0; i < found.Elements(); ++i)
    ASSERT_EQ(found.F32()[i], static_cast<float>(expected.As<int16_t>()[i]) * grid.scale[0]) << i;
}

TEST_F(CliTest, TheWrittenFilesHaveTheDocumentedKeys) {
  const ProgramResult quantize = RunProgram(Quantize());
  ASSERT_EQ(quantize.exit_code, 0) << quantize.err;
  const auto keys = [&](const char* file) {
    std::vector<std::string> names;
    const nlohmann::json json = ReadJson(fs::path(out_) / file);
    for (const auto& [name, value] : json.items()) names.push_back(name);
    return names;
  };
  EXPECT_THAT(keys("report.json"),
              testing::IsSupersetOf({"schema_version", "model", "recipe", "dialect", "calibration_samples",
                                     "evaluation_samples", "random_data", "skipped", "points", "max_seq_len",
                                     "unused_tensors", "unknown_config_keys", "output", "stages", "units"}));
  EXPECT_THAT(keys("manifest.json"), testing::IsSupersetOf({"schema_version", "circlet_version", "instruction_set",
                                                            "model", "recipe", "dialect", "seed", "max_seq_len",
                                                            "random_data", "inputs", "outputs", "samples_sha256"}));
  EXPECT_THAT(ReadJson(fs::path(out_) / "manifest.json").at("samples_sha256").get<std::string>(), testing::SizeIs(64));
  EXPECT_THAT(keys("pipeline.json"), testing::IsSupersetOf({"schema_version", "units", "boundaries"}));
  EXPECT_THAT(keys("qparams.json"), testing::IsSupersetOf({"model", "recipe", "dialect", "points", "quant_points"}));
  EXPECT_THAT(keys("timings.json"), testing::Contains("seconds"));

  const nlohmann::json report = ReadJson(fs::path(out_) / "report.json");
  EXPECT_EQ(report.at("recipe"), "w8a16");
  EXPECT_EQ(report.at("random_data"), false);
  EXPECT_EQ(report.at("output").at("name"), "logits");
  EXPECT_GT(report.at("output").at("error").at("peir"), 0);
  EXPECT_LT(report.at("output").at("error").at("peir"), 0.1);
  EXPECT_GE(report.at("stages").size(), 4);

  // The manifest lists every file but itself and the timings, which differ from run to run.
  std::map<std::string, std::string> listed, there;
  const nlohmann::json manifest = ReadJson(fs::path(out_) / "manifest.json");
  for (const auto& entry : manifest.at("outputs")) listed[entry.at("file")] = entry.at("sha256");
  for (const auto& entry : fs::directory_iterator(out_)) there[entry.path().filename()] = Sha256File(entry.path());
  there.erase("manifest.json");
  there.erase("timings.json");
  EXPECT_EQ(listed, there);
  for (const auto& unit : report.at("units")) {
    EXPECT_TRUE(there.contains(unit.at("file")));
    EXPECT_EQ(unit.at("bytes"), fs::file_size(fs::path(out_) / unit.at("file").get<std::string>()));
    // The head: a table of 256 rows of 64 as uint8, and a norm weight of 64 as int16.
    if (unit.at("name") == "lm_head") {
      EXPECT_EQ(unit.at("parameters"), 256 * 64 + 64);
      EXPECT_EQ(unit.at("parameter_bytes"), 256 * 64 + 2 * 64);
    }
  }
}

TEST_F(CliTest, TheCommandInTheManifestMakesTheSameFilesAgain) {
  ASSERT_EQ(RunProgram(Quantize({"--set", "pipeline.0.activation={dtype: int16}", "--threads", "1"})).exit_code, 0);
  const std::string command = ReadJson(fs::path(out_) / "manifest.json").at("command");
  EXPECT_THAT(command,
              AllOf(StartsWith("circlet quantize " + model_), HasSubstr("'pipeline.0.activation={dtype: int16}'"),
                    Not(HasSubstr("--output")), Not(HasSubstr("--threads"))));
  const std::string again = out_ + ".again";
  const std::string line = kCircletBinary + command.substr(std::string("circlet").size()) + " --output " + again;
  ASSERT_EQ(std::system((line + " > /dev/null 2>&1").c_str()), 0) << line;
  for (const char* file : {"manifest.json", "report.json", "qparams.json", "effective_config.yaml"})
    EXPECT_EQ(ReadFile(out_ + "/" + file), ReadFile(again + "/" + file)) << file;
}

TEST_F(CliTest, RandomSamplesAreSaidToBeRandom) {
  const ProgramResult result =
      RunProgram({"quantize", model_, "--random-samples", "2x9", "--units", "deployment", "--output", out_, "--quiet"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("RANDOM token ids"));
  EXPECT_EQ(ReadJson(fs::path(out_) / "report.json").at("random_data"), true);
  EXPECT_EQ(ReadJson(fs::path(out_) / "report.json").at("max_seq_len"), 16);
  EXPECT_FALSE(fs::exists(out_ + "/gemma4_model.q.circle"));
}

TEST_F(CliTest, FrozenGridsAreUsedAsGiven) {
  ASSERT_EQ(RunProgram(Quantize()).exit_code, 0);
  const std::string again = directory_.Path() / "again";
  std::vector<std::string> arguments = Quantize({"--qparams", out_ + "/qparams.json"});
  std::ranges::replace(arguments, out_, again);
  const ProgramResult result = RunProgram(arguments);
  ASSERT_EQ(result.exit_code, 0) << result.err;
  for (const char* unit : {"lm_head.q.circle", "decoder_layer_decode_0.q.circle", "verify.safetensors"})
    EXPECT_EQ(Sha256File(fs::path(again) / unit), Sha256File(fs::path(out_) / unit)) << unit;
}

TEST_F(CliTest, ProgressGoesToStandardErrorAsLinesWhenThatIsNoTerminal) {
  std::vector<std::string> arguments = Quantize();
  std::erase(arguments, "--quiet");
  const ProgramResult result = RunProgram(arguments);
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.err, AllOf(HasSubstr("] layers.0  "), HasSubstr("] logits  100 %  0:0"), Not(HasSubstr("\r")),
                                EndsWith("\n")));
}

TEST_F(CliTest, DifferingCodesGiveExitCode1) {
  ASSERT_EQ(RunProgram(Quantize()).exit_code, 0);
  const SafetensorsFile stored = SafetensorsFile::Open(out_ + "/verify.safetensors");
  std::map<std::string, Tensor> codes = stored.Tensors();
  Tensor& changed = codes.at("lm_head.out.0");
  changed = changed.Clone();
  changed.As<int16_t>()[7] ^= 1;
  const std::string file = directory_.Path() / "changed.safetensors";
  WriteSafetensors(file, codes, stored.Metadata());
  const ProgramResult result = RunProgram({"verify", out_, "--samples", file});
  EXPECT_EQ(result.exit_code, 1) << result.err;
  EXPECT_THAT(result.out,
              AllOf(HasSubstr("lm_head: out.0[0,0,7]: code"), HasSubstr("do not compute what was simulated")));
}

TEST_F(CliTest, ForceReplacesOurFilesAndLeavesOthers) {
  ASSERT_EQ(RunProgram(Quantize()).exit_code, 0);
  WriteFile(out_ + "/notes.txt", "mine");
  const ProgramResult refused = RunProgram(Quantize());
  EXPECT_EQ(refused.exit_code, 2);
  EXPECT_THAT(refused.err, AllOf(StartsWith("circlet: " + out_), HasSubstr("is not empty"), HasSubstr("--force")));
  const ProgramResult replaced = RunProgram(Quantize({"--force", "--units", "deployment"}));
  ASSERT_EQ(replaced.exit_code, 0) << replaced.err;
  EXPECT_EQ(ReadFile(out_ + "/notes.txt"), "mine");
  EXPECT_FALSE(fs::exists(out_ + "/gemma4_model.q.circle")) << "a file of the run before";
  EXPECT_EQ(RunProgram({"verify", out_}).exit_code, 0);
}

TEST_F(CliTest, AFailedRunLeavesTheEarlierResultAlone) {
  ASSERT_EQ(RunProgram(Quantize()).exit_code, 0);
  const std::string before = Sha256File(out_ + "/manifest.json");
  EditTensor("model.language_model.layers.0.mlp.up_proj.weight", [](Tensor& tensor) { tensor.F32()[3] = NAN; });
  EXPECT_EQ(RunProgram(Quantize({"--force"})).exit_code, 2);
  EXPECT_TRUE(fs::exists(out_ + "/manifest.json")) << "the earlier result is gone";
  EXPECT_EQ(Sha256File(out_ + "/manifest.json"), before);
  EXPECT_EQ(RunProgram({"verify", out_}).exit_code, 0);
}

TEST_F(CliTest, HelpNamesAWorkingCommandForEachVerb) {
  for (const char* verb : {"quantize", "evaluate", "verify", "show", "run", "generate", "chat", "tokenize",
                           "preprocess", "smoke", "trace", "example", "make-checkpoint", "inspect"}) {
    const ProgramResult result = RunProgram({verb, "--help"});
    EXPECT_EQ(result.exit_code, 0);
    EXPECT_THAT(result.out, HasSubstr(fmt::format("Example:\n  circlet {}", verb)));
  }
  EXPECT_EQ(RunProgram({"--version"}).exit_code, 0);
}

// ---- The checkpoint -------------------------------------------------------------------------------------------------

TEST_F(CliTest, AModelThatIsNoDirectoryIsRefused) {
  fs::remove_all(model_);
  ExpectRefused(Quantize(), AllOf(HasSubstr(model_), HasSubstr("does not exist")));
  WriteFile(model_, "x");
  ExpectRefused(Quantize(), AllOf(HasSubstr(model_), HasSubstr("is no directory")));
}

TEST_F(CliTest, WhatTheUserGaveIsNamedAsItWasGiven) {
  ExpectRefused(
      {"quantize", "/no/such", "--data", samples_, "--output", out_},
      AllOf(HasSubstr("/no/such: does not exist; give a checkpoint directory"), Not(HasSubstr("hf download"))));
  ExpectRefused({"evaluate", "google/gemma-4-E2B-it", "--random-samples", "1x8"},
                HasSubstr("circlet downloads nothing: `hf download google/gemma-4-E2B-it --local-dir DIR`"));
  ExpectRefused({"evaluate", kTiny, "--data", "https://example.org/calib.jsonl"},
                HasSubstr("circlet downloads nothing; fetch the file, and give its path"));
  ExpectRefused(Quantize({"--memory-limit", "1MB"}), HasSubstr("--memory-limit 1 MB: the largest stage alone"));
  ExpectRefused(QuantizeText({"--data", kTiny + "/eval/calib.jsonl", "--eval-text", "nosuch.txt"}),
                StartsWith("circlet: nosuch.txt: cannot be opened"));
  ExpectRefused(With(Quantize(), out_, "/proc/x"), StartsWith("circlet: /proc/x: /proc: cannot be written: "));
  ExpectRefused({"show", model_ + "/config.json"}, HasSubstr("not CIR0; is it a .circle file?"));
}

TEST_F(CliTest, ADirectoryWithoutConfigIsRefused) {
  fs::remove(model_ + "/config.json");
  ExpectRefused(Quantize(), AllOf(HasSubstr(model_ + "/config.json"), HasSubstr("No such file")));
}

TEST_F(CliTest, AnotherModelTypeIsNamed) {
  EditConfig([](nlohmann::json& config) {
    config["model_type"] = "llama";
    config["architectures"] = {"LlamaForCausalLM"};
  });
  ExpectRefused(Quantize(),
                AllOf(HasSubstr("config.json"), HasSubstr("model_type: \"llama\""), HasSubstr("gemma4_text")));
}

TEST_F(CliTest, MixtureOfExpertsIsRefusedByName) {
  EditConfig([](nlohmann::json& config) { config["text_config"]["enable_moe_block"] = true; });
  ExpectRefused(Quantize(), AllOf(HasSubstr("config.json: text_config.enable_moe_block"), HasSubstr("experts")));
}

// Names of files are bytes; those of a run are hashed and written down.
TEST_F(CliTest, ACheckpointOfAnyNameIsQuantizedAndGoesOn) {
  const std::string model = model_ + "\xff";
  fs::rename(model_, model);
  const ProgramResult result = RunProgram(With(Quantize(), model_, model));
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_EQ(RunProgram(With(Quantize({"--resume"}), model_, model)).exit_code, 0);
}

TEST_F(CliTest, DamagedConfigIsNamedWithItsLine) {
  WriteFile(model_ + "/config.json", "{\n  \"model_type\": \"gemma4\",\n  \"text_config\": {\n");
  ExpectRefused(Quantize(), AllOf(HasSubstr(model_ + "/config.json"), HasSubstr("line 4")));
}

TEST_F(CliTest, ACutCheckpointIsNamed) {
  fs::resize_file(model_ + "/model.safetensors", 300'000);
  ExpectRefused(Quantize(),
                AllOf(HasSubstr("model.safetensors"), HasSubstr("the file is cut"), HasSubstr("download it again")));
}

TEST_F(CliTest, ACheckpointWithAnOverlongHeaderIsNamed) {
  std::string bytes = ReadFile(model_ + "/model.safetensors");
  bytes.replace(0, 8, std::string(8, '\xff'));
  WriteFile(model_ + "/model.safetensors", bytes);
  ExpectRefused(Quantize(), AllOf(HasSubstr("model.safetensors"), HasSubstr("the header's length is"),
                                  HasSubstr("is it a safetensors file?")));
}

TEST_F(CliTest, AMissingTensorIsNamedWithWhatWasExpected) {
  const fs::path file = fs::path(model_) / "model.safetensors";
  std::map<std::string, Tensor> tensors = SafetensorsFile::Open(file).Tensors();
  tensors.erase("model.language_model.layers.0.mlp.up_proj.weight");
  WriteSafetensors(file, tensors);
  ExpectRefused(Quantize(), AllOf(HasSubstr("\"model.language_model.layers.0.mlp.up_proj.weight\""),
                                  HasSubstr("is missing"), HasSubstr("was a shard left out")));
}

TEST_F(CliTest, NanInALinearWeightIsNamedWithItsPlace) {
  EditTensor("model.language_model.layers.0.mlp.up_proj.weight", [](Tensor& tensor) { tensor.F32()[64 + 3] = NAN; });
  ExpectRefused(Quantize(),
                AllOf(HasSubstr("layers.0.mlp.up_proj.weight"), HasSubstr("row 1, column 3"), HasSubstr("nan")));
}

TEST_F(CliTest, InfinityInANormIsNamed) {
  EditTensor("model.language_model.norm.weight", [](Tensor& tensor) { tensor.F32()[5] = INFINITY; });
  ExpectRefused(Quantize(),
                AllOf(HasSubstr("model.language_model.norm.weight"), HasSubstr("column 5"), HasSubstr("inf")));
}

TEST_F(CliTest, InfiniteActivationsNameTheFirstPoint) {
  EditTensor("model.language_model.layers.0.self_attn.q_norm.weight", [](Tensor& tensor) { tensor.F32()[0] = 3e38f; });
  EditTensor("model.language_model.layers.0.self_attn.k_norm.weight", [](Tensor& tensor) { tensor.F32()[0] = 3e38f; });
  ExpectRefused(Quantize(), AllOf(HasSubstr("layers.0.self_attn"), HasSubstr("a NaN or an infinity reached this point"),
                                  HasSubstr("check the weights and the calibration data")));
}

// ---- The data -------------------------------------------------------------------------------------------------------

TEST_F(CliTest, DataMustBeGivenOnce) {
  ExpectRefused(QuantizeText({}), AllOf(HasSubstr("--data, --samples and --random-samples"), HasSubstr("found 0")));
  ExpectRefused(Quantize({"--random-samples", "1x8"}), HasSubstr("found 2"));
}

TEST_F(CliTest, TokenIdsPastTheVocabularyAreNamed) {
  const std::vector<int64_t> ids{2, 7, 256, 9};
  WriteSafetensors(samples_, {{"calib.0.input_ids", Tensor::Of<int64_t>({1, 4}, ids)}});
  ExpectRefused(Quantize(), AllOf(HasSubstr(samples_), HasSubstr("calib.0"), HasSubstr("256"), HasSubstr("vocab")));
}

TEST_F(CliTest, SamplesWithoutTheExpectedNamesAreRefused) {
  WriteSafetensors(samples_, {{"x", Tensor::Of<int64_t>({1, 1}, std::vector<int64_t>{2})}});
  ExpectRefused(Quantize(), AllOf(HasSubstr(samples_), HasSubstr("tensor \"x\" is no sample's"),
                                  HasSubstr("calib.N.KEY and eval.N.KEY")));
}

TEST_F(CliTest, PlainTextIsAnsweredWithTheFormOfTheLineThatIsWanted) {
  const std::string text = Lines("It is a truth\n");
  ExpectRefused({"generate", kTiny, "--prompt-file", text},
                AllOf(HasSubstr("as {\"prompt\": \"...\"}, found It is a truth"), HasSubstr("`jq -Rc '{prompt: .}' ")));
  ExpectRefused({"tokenize", kTiny, "--file", text},
                AllOf(HasSubstr("as {\"text\": \"...\"}, found It is a truth"), HasSubstr("`jq -Rc '{text: .}' ")));
  ExpectRefused({"evaluate", kTiny, "--data", text},
                AllOf(HasSubstr("as {\"type\": \"text\", "), HasSubstr("`jq -Rc '{text: .}' ")));
  ExpectRefused({"evaluate", kTiny, "--data", kTiny + "/eval/calib.jsonl", "--eval-captions", text},
                AllOf(HasSubstr("\"caption\": \"...\"}, found It is a truth"), Not(HasSubstr("jq"))));
}

// Where words go is shown by an example, what a flag is called by the nearest.
TEST_F(CliTest, AWordTooManyIsAnsweredWithAnExample) {
  ExpectRefused({"tokenize", kTiny, "truth"},
                HasSubstr("truth: not expected here; for example `circlet tokenize out/ --text 'It is a truth'`; "
                          "`circlet tokenize --help` lists what is"));
  ExpectRefused({"generate", kTiny, "truth"}, HasSubstr("`circlet generate out/ --prompt 'It is a truth' "));
  ExpectRefused({"tokenize", kTiny, "--txt", "truth"},
                AllOf(HasSubstr("--txt: not expected here; nearest: \"--text\""), Not(HasSubstr("example"))));
}

TEST_F(CliTest, AnEmptyDataFileIsRefused) {
  const std::string data = Lines("");
  ExpectRefused(QuantizeText({"--data", data}), AllOf(HasSubstr(data), HasSubstr("a JSON object on each line")));
}

TEST_F(CliTest, ALineThatIsNotJsonIsNamedByItsNumber) {
  const std::string data = Lines("{\"type\": \"text\", \"text\": \"Emma\"}\n\n{\"type\": \"text\", \n");
  ExpectRefused(QuantizeText({"--data", data}), HasSubstr(data + ":3"));
}

TEST_F(CliTest, AMissingDataFileIsNamed) {
  ExpectRefused(QuantizeText({"--data", "/nonexistent/calib.jsonl"}),
                AllOf(HasSubstr("/nonexistent/calib.jsonl"), HasSubstr("No such file")));
}

TEST_F(CliTest, DataOfPicturesOnlyIsRefusedInATextOnlyRun) {
  const std::string image = kTiny + "/eval/images/calib_00.png";
  const std::string data =
      Lines(R"({"type": "chat", "messages": [{"role": "user", "content": [{"type": "image", "path": ")" + image +
            R"("}, {"type": "text", "text": "What?"}]}]})" + "\n");
  ExpectRefused(QuantizeText({"--data", data, "--text-only"}),
                AllOf(HasSubstr(data), HasSubstr("images"), HasSubstr("add text samples")));
}

TEST_F(CliTest, SamplesLongerThanTheSequenceLengthAreCountedWithTheFlagsThatHelp) {
  ExpectRefused(Quantize({"--max-seq-len", "8"}),
                AllOf(HasSubstr("samples are longer than the limit of 8 tokens"),
                      HasSubstr("--max-seq-len 16 takes all"), HasSubstr("--truncate or --chunk shortens them")));
  ExpectRefused(Quantize({"--truncate"}), HasSubstr("give that too"));
}

TEST_F(CliTest, DataFromAPipeGiveTheResultOfTheFile) {
  const std::string data = Lines(R"({"type": "text", "text": "Emma was glad."})"
                                 "\n");
  const auto inputs = [&](const std::string& source, const std::string& shell) {
    const ProgramResult result =
        RunProgram(QuantizeText({"--data", source, "--recipe", "w8a16", "--units", "deployment"}), shell);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    nlohmann::json manifest = ReadJson(fs::path(out_) / "manifest.json");
    fs::remove_all(out_);
    for (nlohmann::json& input : manifest["inputs"])
      if (input["file"] == "data.jsonl" || input["file"] == "stdin") input["file"] = "DATA";
    std::sort(manifest["inputs"].begin(), manifest["inputs"].end());
    return std::pair(manifest["inputs"], manifest["outputs"]);
  };
  EXPECT_EQ(inputs("-", "cat '" + data + "' | "), inputs(data, ""));
  ExpectRefused(QuantizeText({"--data", "-", "--recipe", "w8a16"}), HasSubstr("standard input: has no samples"),
                "exec < /dev/null; ");
}

TEST_F(CliTest, SequenceLengthsWithoutMeaningAreRefused) {
  ExpectRefused({"quantize", model_, "--random-samples", "1x1", "--max-seq-len", "1", "--output", out_, "--quiet"},
                HasSubstr("--max-seq-len: \"1\" is no whole number from 2 to 1048576"));
  ExpectRefused(Quantize({"--max-seq-len", "-4"}), AllOf(HasSubstr("-4")));
}

TEST_F(CliTest, RandomSamplesNeedCountAndLength) {
  for (const char* text : {"8", "x", "0x4", "4x0", "4x-1", "4x4x4", "99999999999999999999x4"})
    ExpectRefused({"quantize", model_, "--random-samples", text, "--output", out_, "--quiet"},
                  AllOf(HasSubstr(fmt::format("--random-samples {}", text)), HasSubstr("NxLENGTH")));
}

TEST_F(CliTest, AnEvaluationTextWithoutTextIsRefused) {
  WriteFile(directory_.Path() / "empty.txt", "");
  ExpectRefused(QuantizeText({"--random-samples", "1x8", "--eval-text", directory_.Path() / "empty.txt"}),
                AllOf(HasSubstr("empty.txt"), HasSubstr("text is empty")));
}

// ---- The recipe -----------------------------------------------------------------------------------------------------

TEST_F(CliTest, AnUnknownRecipeNamesTheNearest) {
  ExpectRefused(With(Quantize(), "w8a16", "w8a61"),
                AllOf(HasSubstr("unknown recipe \"w8a61\""), HasSubstr("nearest: \"w8a16\""), HasSubstr("known are")));
}

TEST_F(CliTest, AnUnknownDialectNamesTheKnownOnes) {
  ExpectRefused(Quantize({"--dialect", "ticco"}),
                AllOf(HasSubstr("\"ticco\""), HasSubstr("tico"), HasSubstr("default")));
}

TEST_F(CliTest, AnUnknownRecipeKeyNamesTheNearest) {
  ExpectRefused(Quantize({"--set", "pipeline.0.activations=uint8"}),
                AllOf(HasSubstr("activations"), HasSubstr("nearest: \"activation\"")));
}

TEST_F(CliTest, AnUnknownSectionListsTheKnownOnes) {
  ExpectRefused(Quantize({"--set", "a.b=3"}),
                AllOf(HasSubstr("a: is no known key; known: "), HasSubstr("calibration"), HasSubstr("pipeline")));
}

TEST_F(CliTest, AnEmptyRecipeIsRefusedAndOneWithoutAStageSaysWhatItDoes) {
  const fs::path recipe = directory_.Path() / "recipe.yaml";
  WriteFile(recipe, "# nothing\n");
  ExpectRefused(With(Quantize(), "w8a16", recipe), HasSubstr("recipe.yaml: is empty; a recipe has at least"));
  WriteFile(recipe, "pipeline: []\n");
  const ProgramResult result = RunProgram(With(Quantize(), "w8a16", recipe));
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("recipe.yaml: its pipeline has no ptq stage; every point is int16\n"));
}

TEST_F(CliTest, AGptqStageThatHasNothingToRoundIsNoted) {
  const fs::path recipe = directory_.Path() / "recipe.yaml";
  WriteFile(recipe, "pipeline:\n  - {name: gptq}\n  - {name: ptq, linear_weight: int16}\n");
  const ProgramResult result = RunProgram(With(Quantize(), "w8a16", recipe));
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("recipe.yaml: its gptq stage has rounded nothing: no linear's weight has up to 8"));
}

TEST_F(CliTest, AnAssignmentWithoutAValueIsRefused) {
  ExpectRefused(Quantize({"--set", "pipeline.0.activation"}),
                AllOf(HasSubstr("pipeline.0.activation"), HasSubstr("=")));
}

TEST_F(CliTest, AnOverrideThatMatchesNothingNamesTheNearestPoint) {
  ExpectRefused(Quantize({"--set", "pipeline.0.raw_overrides.model.language_model.layers.0.mlp.mull=uint8"}),
                AllOf(HasSubstr("no point \"model.language_model.layers.0.mlp.mull\""),
                      HasSubstr("nearest: \"model.language_model.layers.0.mlp.mul\"")));
}

TEST_F(CliTest, MxFormatsCannotBeExported) {
  ExpectRefused(Quantize({"--set", "pipeline.0.activation={kind: mx, elem_format: int8, axis: -1}"}),
                AllOf(HasSubstr("model.language_model."), HasSubstr("simulated only"), HasSubstr("integer type")));
}

TEST_F(CliTest, FrozenGridsOfAnotherModelNameAPointThatDoesNotFit) {
  const std::string grids = directory_.Path() / "qparams.json";
  UnpackGolden("golden/tiny_wide/default.qparams.json.xz", grids);
  ExpectRefused(Quantize({"--qparams", grids, "--dialect", "tico"}),
                AllOf(HasSubstr("points have another type than in recipe w8a16"),
                      HasSubstr("model.language_model.embed_tokens.weight is int16 asymmetric by axis 0 there")));
  ExpectRefused(With(Quantize({"--qparams", grids, "--dialect", "tico"}), "w8a16", "default"),
                AllOf(HasSubstr("model.language_model.embed_tokens.weight"), HasSubstr("320 grids for 256 rows"),
                      HasSubstr("belongs to another model")));
}

// ---- The output -----------------------------------------------------------------------------------------------------

TEST_F(CliTest, AnUnwritablePlaceIsRefusedBeforeAnythingIsComputed) {
  ExpectRefused(With(Quantize(), out_, "/proc/circlet/out"),
                AllOf(HasSubstr("/proc/circlet/out"), HasSubstr("No such file")));
  ExpectRefused(With(Quantize(), out_, samples_ + "/out"), AllOf(HasSubstr(samples_), HasSubstr("Not a directory")));
}

// A file that takes a name by renaming would take that of a device or a link, too.
TEST_F(CliTest, AReportTakesThePlaceOfNothingButAFileAndThatIsToldAtOnce) {
  const fs::path link = directory_.Path() / "link";
  fs::create_symlink("/dev/null", link);
  const auto evaluate = [&](const std::string& report) {
    return std::vector<std::string>{"evaluate", model_, "--samples", samples_, "--json", report};
  };
  ExpectRefused(evaluate(link), HasSubstr("--json: " + link.string() + ": is a link to /dev/null; name the file"));
  ExpectRefused(evaluate("/dev/null"), HasSubstr("--json: /dev/null: is a device; name a file"));
  ExpectRefused(evaluate(directory_.Path()), HasSubstr(": is a directory; name a file"));
  ExpectRefused(evaluate("/proc/circlet/x.json"), HasSubstr("/proc/circlet/x.json: cannot be written: No such file"));
  EXPECT_TRUE(fs::is_symlink(link));
  EXPECT_TRUE(fs::is_character_file("/dev/null"));
}

TEST_F(CliTest, AnOutputThatIsAFileIsRefused) {
  const std::string file = directory_.Path() / "result";
  WriteFile(file, "mine");
  ExpectRefused(With(Quantize(), out_, file),
                AllOf(HasSubstr(file), HasSubstr("is a file"), HasSubstr("choose another name")));
  EXPECT_EQ(ReadFile(file), "mine");
}

// A limit on the size of files stands for a full disk.
TEST_F(CliTest, AFullDiskLeavesNothingAndIsToldWithTheFile) {
  ExpectRefused(Quantize(), AllOf(HasSubstr(out_), HasSubstr(".q.circle"), HasSubstr("File too large")),
                "trap \"\" XFSZ; ulimit -f 8; ");
}

// ---- Circle files ---------------------------------------------------------------------------------------------------

TEST_F(CliTest, DamagedCircleFilesAreRefusedByShowAndRun) {
  const std::string golden = TestData("golden/seed_example/circle/w4a16/lm_head.circle");
  const std::string file = directory_.Path() / "damaged.circle", in = directory_.Path() / "in.safetensors";
  WriteSafetensors(in, {{"in.0", Tensor::Scalar(1)}});
  std::string bytes = ReadFile(golden);
  WriteFile(file, std::string_view(bytes).substr(0, bytes.size() / 2));
  for (const std::vector<std::string>& arguments :
       {std::vector<std::string>{"show", file}, {"run", file, "--inputs", in, "--outputs", out_}})
    ExpectRefused(arguments, HasSubstr(file));
  WriteFile(file, "no circle");
  ExpectRefused({"show", file}, HasSubstr(file));
  fs::remove(file);
  ExpectRefused({"show", file}, AllOf(HasSubstr(file), HasSubstr("No such file")));
}

TEST_F(CliTest, RunNamesAMissingInputAndOneOfAnotherShape) {
  const std::string golden = TestData("golden/seed_example/circle/w4a16/lm_head.circle");
  const std::string in = directory_.Path() / "in.safetensors";
  WriteSafetensors(in, {{"hiden", Tensor(TensorType{DType::kF32, {1, 1, 64}})}});
  ExpectRefused(
      {"run", golden, "--inputs", in, "--outputs", out_},
      AllOf(HasSubstr("lm_head.circle"), HasSubstr("input 0"), HasSubstr("int16[1,1,64]"), HasSubstr("\"in.0\"")));
  WriteSafetensors(in, {{"in.0", Tensor(TensorType{DType::kF32, {1, 1, 63}})}});
  ExpectRefused({"run", golden, "--inputs", in, "--outputs", out_},
                AllOf(HasSubstr("lm_head.circle"), HasSubstr("[1,1,63]"), HasSubstr("[1,1,64]")));
}

TEST_F(CliTest, VerifyRefusesADirectoryThatIsNoResult) {
  ExpectRefused({"verify", model_},
                AllOf(HasSubstr(model_), HasSubstr("is a checkpoint; give the directory that quantize wrote")));
}

TEST_F(CliTest, VerifyNamesACutFileByItsHashAndLooksAtTheOthers) {
  ASSERT_EQ(RunProgram(Quantize()).exit_code, 0);
  fs::resize_file(out_ + "/lm_head.q.circle", 1000);
  const std::string json = directory_.Path() / "verdict.json";
  const ProgramResult result = RunProgram({"verify", out_, "--quiet", "--json", json});
  EXPECT_EQ(result.exit_code, 2);
  EXPECT_THAT(result.err, IsEmpty());
  EXPECT_THAT(result.out,
              AllOf(HasSubstr("lm_head.q.circle: differs from the file that manifest.json lists"),
                    HasSubstr("quantize again"), HasSubstr("files are missing or damaged"), HasSubstr("gemma4_model")));
  EXPECT_EQ(ReadJson(json).at("verdict"), "damaged");
}

// Anyone may hand us a directory with his own manifest and pipeline.
TEST_F(CliTest, VerifyRefusesHostilePipelines) {
  ASSERT_EQ(RunProgram(Quantize()).exit_code, 0);
  const nlohmann::json pipeline = ReadJson(fs::path(out_) / "pipeline.json");
  const auto expect = [&](const std::function<void(nlohmann::json&)>& change, const Matcher<std::string>& message) {
    nlohmann::json changed = pipeline;
    change(changed);
    WriteJson(fs::path(out_) / "pipeline.json", changed);
    const ProgramResult result = RunProgram({"verify", out_});
    EXPECT_EQ(result.exit_code, 2) << result.err;
    EXPECT_THAT(result.err, AllOf(StartsWith("circlet: "), HasSubstr("pipeline.json"), message));
  };
  nlohmann::json manifest = ReadJson(fs::path(out_) / "manifest.json");
  manifest.erase("outputs");
  WriteJson(fs::path(out_) / "manifest.json", manifest);
  expect([](nlohmann::json& json) { json.erase("units"); }, HasSubstr("units"));
  expect([](nlohmann::json& json) { json["units"] = 3; }, HasSubstr("units"));
  expect([](nlohmann::json& json) { json["schema_version"] = 3; },
         HasSubstr("schema_version: 3; this circlet reads 1 to 2"));
  expect([](nlohmann::json& json) { json["units"][0].erase("file"); }, HasSubstr("file"));
  expect([](nlohmann::json& json) { json["units"][0]["inputs"][0]["dtype"] = 7; }, HasSubstr("dtype"));
  expect([](nlohmann::json& json) { json["units"][0]["file"] = "../../etc/passwd"; }, HasSubstr("../../etc/passwd"));
  expect([](nlohmann::json& json) { json["boundaries"][0].erase("producer"); }, HasSubstr("producer"));
}

// ---- Inspecting -----------------------------------------------------------------------------------------------------

// Runs in an empty directory.
class InspectTest : public CliTest {
 protected:
  ProgramResult Inspect(std::vector<std::string> arguments, const std::string& shell = "") const {
    arguments.insert(arguments.begin(), "inspect");
    return RunProgram(arguments, "cd '" + work_ + "'; " + shell);
  }
  // The user can mend it, and nothing was written.
  void ExpectInspectRefused(const std::vector<std::string>& arguments, const Matcher<std::string>& message) const {
    const ProgramResult result = Inspect(arguments);
    EXPECT_EQ(result.exit_code, 2) << testing::PrintToString(arguments) << result.out;
    EXPECT_THAT(result.err, message);
    EXPECT_THAT(result.out, IsEmpty());
    EXPECT_TRUE(fs::is_empty(work_)) << testing::PrintToString(arguments);
  }
  fs::path Work(const std::string& name) const { return fs::path(work_) / name; }
  std::string Settings(const std::string& yaml) const {
    const fs::path file = directory_.Path() / "settings.yaml";
    WriteFile(file, yaml);
    return file;
  }

  static constexpr char kMlp[] = "gemma4_text_mlp";
  const std::string work_ = [this] {
    const fs::path work = directory_.Path() / "work";
    fs::create_directory(work);
    return work.string();
  }();
};

TEST_F(InspectTest, CasesAreListedWithRecipesAndProfiles) {
  for (const std::vector<std::string>& mode : {std::vector<std::string>{}, {"--mode", "wrapper-smoke"}}) {
    std::vector<std::string> arguments{"--list-cases"};
    arguments.insert(arguments.end(), mode.begin(), mode.end());
    const ProgramResult result = Inspect(arguments);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    EXPECT_EQ(std::ranges::count(result.out, '\n'), 24);
    EXPECT_THAT(result.out,
                HasSubstr("gemma4_text_mlp                              smoke-u8   tiny, e2b_dims, e2b_stat"));
  }
}

TEST_F(InspectTest, ACaseIsSummedUpAndItsFileWritten) {
  const ProgramResult result = Inspect({"--case", kMlp, "--export", "circle", "--report-json", "new/dir/report.json"});
  ASSERT_EQ(result.exit_code, 0) << result.out << result.err;
  EXPECT_THAT(result.err, IsEmpty());
  EXPECT_THAT(result.out, AllOf(HasSubstr("Wrapper Smoke Summary"), HasSubstr("Status           : PASS"),
                                HasSubstr("  - circle: out/wrapper_smoke/gemma4_text_mlp.q.circle\n"), HasSubstr("•"),
                                EndsWith("report: new/dir/report.json\n")));
  EXPECT_EQ(RunProgram({"show", Work("out/wrapper_smoke/gemma4_text_mlp.q.circle")}).exit_code, 0);
  const nlohmann::json report = ReadJson(Work("new/dir/report.json"));
  EXPECT_EQ(report.at("schema_version"), 1);
  EXPECT_EQ(report.at("case"), kMlp);
  EXPECT_EQ(report.at("passed"), true);
  EXPECT_EQ(report.at("artifacts").at("circle"), "out/wrapper_smoke/gemma4_text_mlp.q.circle");
  EXPECT_GT(report.at("verified_values"), 0);
  EXPECT_GT(report.at("bounds").at("min_mean_abs_diff"), 0);
}

TEST_F(InspectTest, WithoutExportNothingIsWritten) {
  const ProgramResult result = Inspect({"--case", kMlp, "--no-plot"});
  EXPECT_EQ(result.exit_code, 0) << result.out;
  EXPECT_THAT(result.out, AllOf(Not(HasSubstr("•")), Not(HasSubstr("Artifacts"))));
  EXPECT_TRUE(fs::is_empty(work_));
}

TEST_F(InspectTest, TheSuiteRunsAllCasesAndSumsUp) {
  const ProgramResult result = Inspect(
      {"--case", "all", "--export", "circle", "--output-dir", "files", "--report-json", "report.json", "--strict"});
  ASSERT_EQ(result.exit_code, 0) << result.out << result.err;
  EXPECT_THAT(result.out, HasSubstr("24 of 24 cases passed\n"));
  const nlohmann::json report = ReadJson(Work("report.json"));
  EXPECT_EQ(report.at("schema_version"), 1);
  ASSERT_EQ(report.at("cases").size(), 24u);
  for (const auto& test_case : report.at("cases")) {
    EXPECT_EQ(test_case.at("passed"), true) << test_case;
    EXPECT_EQ(test_case.at("warnings"), 0) << test_case;
    EXPECT_EQ(fs::file_size(Work(test_case.at("artifacts").at("circle"))), test_case.at("bytes"));
  }
}

// A limit on the size of files stands for a full disk: small files still fit.
TEST_F(InspectTest, ASuiteRunsToItsEndOnAFullDisk) {
  const ProgramResult result = Inspect({"--case", "all", "--export", "circle"}, "trap \"\" XFSZ; ulimit -f 64; ");
  EXPECT_EQ(result.exit_code, 1) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("gemma4_text_model: EXPORT: out/wrapper_smoke/gemma4_text_model.q.circle"),
                                HasSubstr("File too large"), testing::ContainsRegex("gemma4_vision_pooler +PASS"),
                                testing::ContainsRegex("gemma4_for_causal_lm +FAIL \\(EXPORT\\)"),
                                HasSubstr(" of 24 cases passed\n")));
  EXPECT_TRUE(fs::exists(Work("out/wrapper_smoke/gemma4_vision_pooler.q.circle")));
  EXPECT_FALSE(fs::exists(Work("out/wrapper_smoke/gemma4_text_model.q.circle")));
}

TEST_F(InspectTest, AReportThatCannotBeWrittenDoesNotHideTheResults) {
  WriteFile(Work("file"), "mine");
  const ProgramResult result = Inspect({"--case", kMlp, "--report-json", "file/report.json"});
  EXPECT_EQ(result.exit_code, 2);
  EXPECT_THAT(result.out, HasSubstr("Status           : PASS"));
  EXPECT_THAT(result.err, AllOf(StartsWith("circlet: file: cannot be created: "), HasSubstr("directory")));
  EXPECT_EQ(ReadFile(Work("file")), "mine");
}

TEST_F(InspectTest, AFailedCaseGivesExitCode1AndItsKind) {
  const std::string counts = "debug.wrapper_smoke.gemma4.static_runtime.";
  const ProgramResult config = Inspect(
      {"--case", "gemma4_vision_pooler", "--profile", "e2b_static_runtime", "--set", counts + "max_soft_tokens=300"});
  EXPECT_EQ(config.exit_code, 1) << config.err;
  EXPECT_THAT(config.out, AllOf(HasSubstr("Status           : FAIL (CONFIG)"), HasSubstr("Mean |diff|      : n/a"),
                                HasSubstr("max_soft_tokens is 300; choose 70, 140, 280, 560 or 1120")));
  const ProgramResult unavailable =
      Inspect({"--case", "gemma4_text_attention_k_eq_v_prefill", "--profile", "e2b_static_runtime"});
  EXPECT_EQ(unavailable.exit_code, 1);
  EXPECT_THAT(unavailable.out, AllOf(HasSubstr("FAIL (UNAVAILABLE)"), HasSubstr("choose tiny or e2b_dims")));
}

TEST_F(InspectTest, WarningsFailOnlyWhenStrict) {
  const std::string recipe = Settings("pipeline: [{name: ptq, activation: uint8, raw_overrides: {no.such: int16}}]\n");
  const ProgramResult lax = Inspect({"--case", kMlp, "--recipe", recipe});
  EXPECT_EQ(lax.exit_code, 0) << lax.out << lax.err;
  EXPECT_THAT(lax.out, AllOf(HasSubstr("PASS"), HasSubstr("warning: "), HasSubstr("no.such")));
  const ProgramResult strict = Inspect({"--case", kMlp, "--recipe", recipe, "--strict"});
  EXPECT_EQ(strict.exit_code, 1) << strict.out;
  EXPECT_THAT(strict.out, HasSubstr("FAIL (STRICT)"));
}

TEST_F(InspectTest, SettingsComeFromAFileAndFlagsReplaceThem) {
  const std::string settings = Settings(
      "runtime: {seed: 7}\n"
      "debug: {wrapper_smoke: {calibration_iters: 2, output_dir: there, export: {enabled: true}, plot: {enabled: "
      "false},"
      " gemma4: {size_profile: e2b_dims}}}\n");
  const std::string pooler = "gemma4_vision_pooler";
  const ProgramResult result = Inspect({"--config", settings, "--case", pooler, "--report-json", "report.json"});
  ASSERT_EQ(result.exit_code, 0) << result.out << result.err;
  EXPECT_THAT(result.out, Not(HasSubstr("•")));
  EXPECT_TRUE(fs::exists(Work("there/gemma4_vision_pooler.q.circle")));
  const nlohmann::json report = ReadJson(Work("report.json"));
  EXPECT_EQ(report.at("profile"), "e2b_dims");
  EXPECT_TRUE(report.at("bounds").is_null()) << "other samples than the bounds were measured with";

  fs::remove_all(Work("there"));
  const ProgramResult replaced = Inspect({"--config", settings, "--case", pooler, "--profile", "tiny", "--export",
                                          "none", "--calibration-iters", "3", "--set", "runtime.seed=123", "--set",
                                          "debug.wrapper_smoke.plot.enabled=true", "--report-json", "report.json"});
  ASSERT_EQ(replaced.exit_code, 0) << replaced.out << replaced.err;
  EXPECT_THAT(replaced.out, HasSubstr("•"));
  EXPECT_FALSE(fs::exists(Work("there")));
  EXPECT_EQ(ReadJson(Work("report.json")).at("profile"), "tiny");
  EXPECT_FALSE(ReadJson(Work("report.json")).at("bounds").is_null());
}

TEST_F(InspectTest, TheSettingsThatComeWithTheProgramAreItsDefaults) {
  const std::string settings = SourcePath("recipes/wrapper_smoke.yaml");
  const ProgramResult with = Inspect({"--config", settings, "--mode", "wrapper-smoke", "--case", kMlp, "--strict"});
  EXPECT_EQ(with.exit_code, 0) << with.out << with.err;
  EXPECT_EQ(with.out, Inspect({"--case", kMlp}).out);
}

// LC_ALL=C shows no frames.
TEST_F(InspectTest, WhatATerminalCannotShowIsLeftOut) {
  const std::vector<std::string> arguments{"smoke", "--case", kMlp};
  const auto is_ascii = [](const std::string& text) {
    return std::ranges::all_of(text, [](char c) { return static_cast<unsigned char>(c) < 0x80; });
  };
  const std::string plain = RunProgram(arguments, "unset LC_ALL LC_CTYPE LANG; ").out;
  EXPECT_FALSE(is_ascii(plain));
  EXPECT_EQ(RunProgram(arguments, "export LC_ALL=en_US.UTF-8; ").out, plain);
  const std::string ascii = RunProgram(arguments, "export LC_ALL=C; ").out;
  EXPECT_TRUE(is_ascii(ascii));
  EXPECT_THAT(ascii, AllOf(HasSubstr("+------------- Wrapper Smoke Summary -------------"),
                           HasSubstr("| Case             : gemma4_text_mlp"), HasSubstr("*")));
  EXPECT_TRUE(is_ascii(RunProgram(arguments, "unset LC_ALL LC_CTYPE; export LANG=POSIX; ").out));
  // An empty variable says nothing, the first that says something decides, and what no report is drawn with passes.
  EXPECT_EQ(RunProgram(arguments, "unset LC_CTYPE; export LC_ALL= LANG=en_US.UTF-8; ").out, plain);
  EXPECT_TRUE(is_ascii(RunProgram(arguments, "export LC_ALL=C LANG=de_DE.utf8; ").out));
  EXPECT_EQ(RunProgram(arguments, "unset LC_ALL LC_CTYPE; export LANG=de_DE.utf8; ").out, plain);
  EXPECT_THAT(RunProgram({"smoke", "--case", kMlp, "--export", "circle", "--output-dir", Work("m\u00e4rz")},
                         "export LC_ALL=C; ")
                  .out,
              HasSubstr("m\u00e4rz/gemma4_text_mlp.q.circle"));

  const std::string narrow = RunProgram({"smoke", "--case", "all"}, "export COLUMNS=60; ").out;
  EXPECT_THAT(narrow, HasSubstr("(no room for: "));
  EXPECT_THAT(RunProgram({"smoke", "--case", "all"}, "unset COLUMNS; ").out, Not(HasSubstr("no room")));
}

TEST_F(InspectTest, CalibrationItersChangeWhatIsSeen) {
  const auto mean = [&](const char* iters) {
    EXPECT_EQ(Inspect({"--case", kMlp, "--calibration-iters", iters, "--report-json", "report.json"}).exit_code, 0);
    return ReadJson(Work("report.json")).at("metrics").at("mean_abs_diff").get<double>();
  };
  EXPECT_NE(mean("1"), mean("3"));
  EXPECT_EQ(mean("0"), mean("3")) << "0: all that are built";
}

TEST_F(InspectTest, RecipesStandSideBySide) {
  const ProgramResult result = Inspect({"--case", kMlp, "--compare", "w8a16,w4a16", "--export", "circle"});
  ASSERT_EQ(result.exit_code, 0) << result.out << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("w8a16 mean"), HasSubstr("w4a16 PEIR %"),
                                ContainsRegex("gemma4_text_mlp +w8a16 +PASS"), HasSubstr("2 of 2 cases passed")));
  const auto size = [&](const std::string& recipe) {
    return fs::file_size(Work("out/wrapper_smoke/" + recipe + "/gemma4_text_mlp.q.circle"));
  };
  EXPECT_GT(size("w8a16"), size("w4a16"));
}

TEST_F(InspectTest, MistakesOnTheCommandLineAreToldBeforeAnythingRuns) {
  ExpectInspectRefused({}, HasSubstr("which case? --case NAME, --case all, or --list-cases"));
  ExpectInspectRefused({"--case", "gemma4_text_mpl"}, HasSubstr("nearest: \"gemma4_text_mlp\""));
  ExpectInspectRefused({"--case", kMlp, "--recipe", "w8a61"},
                       HasSubstr("unknown recipe \"w8a61\"; nearest: \"w8a16\""));
  ExpectInspectRefused({"--case", kMlp, "--recipe", "no/such.yaml"},
                       AllOf(HasSubstr("no/such.yaml"), HasSubstr("No such file")));
  ExpectInspectRefused({"--case", kMlp, "--recipe", Settings("pipeline: [")}, HasSubstr("settings.yaml"));
  ExpectInspectRefused({"--case", kMlp, "--compare", "w8a16,w4a61"}, HasSubstr("nearest: \"w4a16\""));
  ExpectInspectRefused({"--case", kMlp, "--compare", "w8a16"}, HasSubstr("puts two recipes or more side by side"));
  ExpectInspectRefused({"--case", kMlp, "--compare", "w8a16,,w4a16"}, HasSubstr("a name is empty"));
  ExpectInspectRefused({"--case", kMlp, "--compare", "w8a16", "--recipe", "w4a16"}, HasSubstr("leave --recipe out"));
  ExpectInspectRefused({"--case", kMlp, "--config", "no/such.yaml"},
                       AllOf(HasSubstr("no/such.yaml"), HasSubstr("No such file")));
  ExpectInspectRefused({"--case", kMlp, "--config", Settings("debug: {wrapper_smok: {}}\n")},
                       AllOf(HasSubstr("settings.yaml:1"), HasSubstr("nearest: \"wrapper_smoke\"")));
  ExpectInspectRefused({"--case", kMlp, "--config", Settings("{")}, HasSubstr("settings.yaml"));
  ExpectInspectRefused({"--case", kMlp, "--set", "debug.wrapper_smoke.gemma4.size_profil=tiny"},
                       HasSubstr("nearest: \"size_profile\""));
  ExpectInspectRefused({"--case", kMlp, "--set", "pipeline"}, HasSubstr("expected KEY=VALUE"));
  ExpectInspectRefused({"--case", kMlp, "--set", "debug.wrapper_smoke.gemma4.static_runtime.max_seq=64"},
                       AllOf(HasSubstr("has no effect on the profile tiny"), HasSubstr("e2b_static_runtime")));
  ExpectInspectRefused({"--case", kMlp, "--profile", "e2b"}, AllOf(HasSubstr("--profile"), HasSubstr("e2b_dims")));
  ExpectInspectRefused({"--case", kMlp, "--export", "onnx"}, AllOf(HasSubstr("--export"), HasSubstr("circle")));
  ExpectInspectRefused({"--case", kMlp, "--calibration-iters", "many"}, HasSubstr("--calibration-iters"));
  ExpectInspectRefused({"--case", kMlp, "--mode", "trac"}, HasSubstr("trace"));
  ExpectInspectRefused({"--case", kMlp, "--rows", "3"}, HasSubstr("--rows has no effect in --mode wrapper-smoke"));
  ExpectInspectRefused({"--case", kMlp, "--explain", "x"}, HasSubstr("it belongs to --mode trace"));
}

// ---- Tracing --------------------------------------------------------------------------------------------------------

TEST_F(InspectTest, ATraceListsThePointsOfACase) {
  const ProgramResult result = Inspect({"--mode", "trace", "--case", kMlp, "--rows", "4"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("error out %"), HasSubstr("mlp.up_proj.act_out"),
                                EndsWith("4 of 6 points; --rows 6 lists all\n")));

  const ProgramResult written =
      RunProgram({"trace", "--case", kMlp, "--json", Work("trace.json"), "--csv", Work("trace.csv")});
  ASSERT_EQ(written.exit_code, 0) << written.err;
  const nlohmann::json json = ReadJson(Work("trace.json"));
  EXPECT_EQ(json.at("schema_version"), 1);
  ASSERT_EQ(json.at("points").size(), 6u);
  for (const nlohmann::json& point : json.at("points")) {
    EXPECT_GT(point.at("rows"), 0);
    EXPECT_GE(point.at("error_out_p99"), point.at("error_out"));
    EXPECT_THAT(written.out, HasSubstr(point.at("point").get<std::string>()));
  }
  const std::string csv = ReadFile(Work("trace.csv"));
  EXPECT_THAT(csv, StartsWith("index,point,own_error,error_in,error_out,error_out_p99,rows,dtype,"));
  EXPECT_EQ(std::ranges::count(csv, '\n'), 7);
  EXPECT_THAT(RunProgram({"trace", "--case", kMlp}, "export COLUMNS=90; ").out, HasSubstr("(no room for: "));
}

TEST_F(InspectTest, ATraceWarnsOfAnOverrideWithoutEffect) {
  const ProgramResult result =
      Inspect({"--mode", "trace", "--case", kMlp, "--set", "pipeline.0.raw_overrides.layers.0.mlp.mull=uint8"});
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_THAT(result.err, AllOf(StartsWith("circlet: warning: "), HasSubstr("layers.0.mlp.mull")));
}

TEST_F(InspectTest, APointIsExplainedByItsHistogram) {
  const std::string point = "model.language_model.layers.0.mlp.down_proj.act_out";
  const ProgramResult result = Inspect({"--mode", "trace", "--case", kMlp, "--explain", point, "--recipe", "w8a16"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(StartsWith(point + ": 512 values in ["), HasSubstr("grid int16 ["),
                                HasSubstr("grid low"), HasSubstr("grid high"), HasSubstr("█")));
  EXPECT_EQ(
      RunProgram({"trace", "--case", kMlp, "--explain", "layers.0.mlp.down_proj.act_out", "--recipe", "w8a16"}).out,
      result.out);
}

TEST_F(InspectTest, AParameterIsExplainedByItsRows) {
  const ProgramResult result =
      RunProgram({"trace", "--case", kMlp, "--explain", "layers.0.mlp.up_proj.weight", "--recipe", "w4a16"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(StartsWith("model.language_model.layers.0.mlp.up_proj.weight: "),
                                HasSubstr("rows, uint4 with a scale a row"), HasSubstr("error %")));
  // Ten rows, the largest error first; at 4 bits it is some percent.
  std::istringstream text(result.out.substr(result.out.find("row  ")));
  std::string line;
  std::getline(text, line);
  std::getline(text, line);
  double before = 100;
  int rows = 0;
  for (double row = 0, error = 0; std::getline(text, line) && std::sscanf(line.c_str(), "%lf %lf", &row, &error) == 2;
       ++rows) {
    EXPECT_LE(error, before);
    EXPECT_GT(error, 1);
    EXPECT_LT(error, 20);
    before = error;
  }
  EXPECT_EQ(rows, 10) << result.out;
  ExpectInspectRefused({"--mode", "trace", "--case", kMlp, "--explain", "layers.0.mlp.up_proj.wieght"},
                       HasSubstr("nearest: \"layers.0.mlp.up_proj.weight\""));
}

TEST_F(InspectTest, ACheckpointIsTracedOnItsSamples) {
  std::string lines;
  for (const char* text : {"The first text.", "Another one.", "And the last, which is measured."})
    lines += nlohmann::json{{"type", "text"}, {"text", text}}.dump() + "\n";
  const std::string samples = Lines(lines);
  const auto traced = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {"--mode", "trace", "--model", kTiny, "--samples", samples, "--recipe", "w4a16"});
    const ProgramResult result = Inspect(more);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    return result.out;
  };
  const std::string trace = traced({"--rows", "5"});
  EXPECT_THAT(trace, AllOf(HasSubstr("model.language_model."), HasSubstr("5 of ")));
  EXPECT_NE(traced({"--rows", "5", "--calibration-iters", "1"}), trace);
  // The head is met in slices of the vocabulary.
  EXPECT_THAT(traced({"--explain", "lm_head.weight", "--memory-limit", "40MiB"}),
              StartsWith("lm_head.weight: 2048 rows, uint8 with a scale a row"));
  EXPECT_THAT(Inspect({"--mode", "trace", "--model", kTiny, "--samples", samples, "--explain", "embed_tokens.weight"}),
              testing::AllOf(testing::Field(&ProgramResult::exit_code, 2),
                             testing::Field(&ProgramResult::err, HasSubstr("embed_tokens.weight: is a table, of which "
                                                                           "the sample looks up some rows"))));
  // Of a long sample in slices of the positions, too, each with the same rows.
  WriteFile(samples, nlohmann::json{{"text", "Emma."}}.dump() + "\n" +
                         nlohmann::json{{"text", ReadFile(kTiny + "/eval/heldout.txt").substr(0, 3000)}}.dump() + "\n");
  EXPECT_THAT(traced({"--explain", "lm_head.weight"}), StartsWith("lm_head.weight: 2048 rows"));
  // Padding is not measured.
  const auto of_ids = [&](std::vector<int64_t> ids, std::vector<int64_t> mask) {
    const Shape shape{1, std::ssize(ids)};
    const Tensor calibration = Tensor::Of<int64_t>({1, 6}, std::vector<int64_t>{2, 3, 5, 7, 9, 4});
    WriteSafetensors(Work("padded.safetensors"), {{"calib.0.input_ids", calibration},
                                                  {"eval.0.input_ids", Tensor::Of<int64_t>(shape, ids)},
                                                  {"eval.0.attention_mask", Tensor::Of<int64_t>(shape, mask)}});
    return Inspect({"--mode", "trace", "--model", model_, "--samples", Work("padded.safetensors")}).out;
  };
  const std::string bare = of_ids({2, 5, 7, 9}, {1, 1, 1, 1});
  EXPECT_THAT(bare, HasSubstr("model.language_model."));
  EXPECT_EQ(of_ids({0, 2, 5, 7, 9, 0}, {0, 1, 1, 1, 1, 0}), bare);
  const ProgramResult tensors = Inspect(
      {"--mode", "trace", "--model", model_, "--samples", samples_, "--explain", "model.language_model.norm.act_out"});
  EXPECT_EQ(tensors.exit_code, 0) << tensors.err;
  EXPECT_THAT(tensors.out, HasSubstr("model.language_model.norm.act_out: "));
}

TEST_F(InspectTest, MistakesInATraceAreTold) {
  const auto refused = [&](std::vector<std::string> arguments, const Matcher<std::string>& message) {
    arguments.insert(arguments.begin(), {"--mode", "trace"});
    ExpectInspectRefused(arguments, message);
  };
  refused({}, HasSubstr("trace what? MODEL_DIR --samples FILE, or --case NAME"));
  refused({"--case", "all"}, HasSubstr("takes one case"));
  refused({"--case", "gemma4_text_mpl"}, HasSubstr("nearest: \"gemma4_text_mlp\""));
  refused({"--case", "gemma4_text_attention_k_eq_v_prefill", "--profile", "e2b_static_runtime"},
          HasSubstr("has no profile e2b_static_runtime; choose tiny or e2b_dims"));
  refused({"--case", kMlp, "--explain", "model.language_model.layers.0.mlp.up_proj.act_oot"},
          AllOf(HasSubstr("nearest: \"model.language_model.layers.0.mlp.up_proj.act_out\""), HasSubstr("lists all")));
  refused({"--case", kMlp, "--rows", "0"}, HasSubstr("--rows"));
  refused({"--case", kMlp, "--recipe", "w8a61"}, HasSubstr("nearest: \"w8a16\""));
  for (const char* flag : {"--strict", "--no-plot"})
    refused({"--case", kMlp, flag}, HasSubstr(std::string(flag) + " has no effect in --mode trace"));
  refused({"--case", kMlp, "--report-json", "report.json"}, HasSubstr("--report-json has no effect"));
  refused({"--case", kMlp, "--export", "circle"}, HasSubstr("--export has no effect"));
  refused({"--case", kMlp, "--compare", "w8a16"}, HasSubstr("--compare has no effect"));

  refused({"--model", model_}, HasSubstr(model_ + ": needs --samples FILE"));
  refused({"--samples", samples_, "--case", kMlp}, HasSubstr("--samples needs MODEL_DIR"));
  refused({"--model", model_, "--samples", samples_, "--case", kMlp}, HasSubstr("has no place beside MODEL_DIR"));
  refused({"--model", "no/such", "--samples", samples_}, HasSubstr("no/such: does not exist"));
  refused({"--model", model_, "--samples", "no.safetensors"}, AllOf(HasSubstr("no.safetensors"), HasSubstr("No such")));
  refused({"--model", kTiny, "--samples", "no.jsonl"}, AllOf(HasSubstr("no.jsonl"), HasSubstr("No such file")));
  refused({"--model", kTiny, "--samples", Lines("{\"type\": \"text\", \"text\": \"one\"}\n")},
          HasSubstr("1 sample; a trace calibrates on all but the last and needs at least 2"));
  refused({"--model", kTiny, "--samples", kTiny + "/eval/calib.jsonl", "--calibration-iters", "2", "--quiet"},
          HasSubstr("calib.jsonl:32 has a picture, and no calibration sample has one"));
  refused({"--model", kTiny, "--samples", kTiny + "/eval/calib.jsonl", "--memory-limit", "1MB"},
          HasSubstr("--memory-limit 1 MB"));
  refused({"--model", model_, "--samples", samples_, "--set", "pipeline.0.raw_overrides.layers.0.mlp.mull=uint8"},
          HasSubstr("no point \"layers.0.mlp.mull\""));
  refused({"--case", kMlp, "--widen", "auto"}, HasSubstr("--widen: needs MODEL_DIR"));
  refused({"--case", kMlp, "--memory-limit", "1GB"}, HasSubstr("--memory-limit: needs MODEL_DIR"));
  refused({"--model", kTiny, "--samples", Lines("{\"type\": ")}, HasSubstr("data.jsonl:1"));
  fs::resize_file(samples_, 100);
  refused({"--model", model_, "--samples", samples_}, HasSubstr(samples_));
  fs::resize_file(model_ + "/model.safetensors", 300'000);
  refused({"--model", model_, "--samples", samples_}, HasSubstr("the file is cut"));
}

TEST_F(InspectTest, SmokeAndTraceAreTheModesOfInspect) {
  const auto same = [&](const std::vector<std::string>& verb, const std::vector<std::string>& mode) {
    const ProgramResult result = RunProgram(verb);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    EXPECT_EQ(result.out, Inspect(mode).out);
  };
  same({"smoke", "--case", kMlp}, {"--case", kMlp});
  same({"smoke", "--list-cases"}, {"--mode", "wrapper-smoke", "--list-cases"});
  same({"trace", "--case", kMlp}, {"--mode", "trace", "--case", kMlp});
  same({"trace", model_, "--data", samples_}, {"--mode", "trace", "--model", model_, "--samples", samples_});
  ExpectError({"trace", "--case", kMlp, "--strict"}, HasSubstr("--strict: not expected here"));
  ExpectError({"smoke", "--case", kMlp, "--rows", "3"}, HasSubstr("--rows: not expected here"));
}

// ---- Examples -------------------------------------------------------------------------------------------------------

using ExampleTest = InspectTest;

TEST_F(ExampleTest, EachNameLeavesItsFileInTheCurrentDirectory) {
  for (const char* name :
       {"model", "for_causal_lm", "for_conditional_generation", "vision_model", "vision_patch_embedder",
        "vision_pooler", "multimodal_embedder", "text_scaled_word_embedding"}) {
    const ProgramResult result = RunProgram({"example", name}, "cd '" + work_ + "'; ");
    ASSERT_EQ(result.exit_code, 0) << result.err;
    const std::string file = fmt::format("gemma4_{}.q.circle", name);
    EXPECT_THAT(result.out,
                AllOf(StartsWith("Preparing model for quantization...\n"), HasSubstr("Quantization Error"),
                      HasSubstr("on a sample that was not calibrated on"), HasSubstr("Export output shape: ("),
                      EndsWith(fmt::format("Circle model saved as '{}'\n", file))));
    EXPECT_EQ(RunProgram({"show", Work(file)}).exit_code, 0);
  }
}

TEST_F(ExampleTest, TheSeedDecidesTheFile) {
  const auto hash = [&](const std::string& seed) {
    const ProgramResult result =
        RunProgram({"example", "gemma4_vision_pooler", "--output-dir", work_ + "/new/dir", "--seed", seed});
    EXPECT_EQ(result.exit_code, 0) << result.err;
    return Sha256File(Work("new/dir/gemma4_vision_pooler.q.circle"));
  };
  const std::string first = hash("123");
  EXPECT_EQ(hash("123"), first);
  EXPECT_NE(hash("124"), first);
}

TEST_F(ExampleTest, MistakesAreTold) {
  ExpectRefused({"example", "gemma4_modl"}, AllOf(HasSubstr("nearest: \"model\""), HasSubstr("vision_pooler")));
  ExpectRefused({"example", "model", "--output-dir", "/proc/circlet/out"},
                HasSubstr("/proc/circlet/out: cannot be created: No such file"));
  ExpectRefused({"example", "model", "--output-dir", work_ + "/dir"}, HasSubstr("File too large"),
                "trap \"\" XFSZ; ulimit -f 8; ");
  for (const std::vector<std::string>& arguments :
       {std::vector<std::string>{"example"}, {"example", "model", "--seed", "x"}})
    EXPECT_EQ(RunProgram(arguments).exit_code, 2) << testing::PrintToString(arguments);
}

// ---- The command line -----------------------------------------------------------------------------------------------

TEST_F(CliTest, UnknownFlagsAndVerbsNameTheNearest) {
  const ProgramResult flag = RunProgram(Quantize({"--recipee", "x"}));
  EXPECT_EQ(flag.exit_code, 2);
  EXPECT_THAT(flag.err, AllOf(HasSubstr("--recipee"), HasSubstr("nearest: \"--recipe\"")));
  const ProgramResult verb = RunProgram({"quantise", model_});
  EXPECT_EQ(verb.exit_code, 2);
  EXPECT_THAT(verb.err, AllOf(HasSubstr("quantise"), HasSubstr("nearest: \"quantize\"")));
  EXPECT_EQ(RunProgram({}).exit_code, 2);
  ExpectNothingLeft();
}

TEST_F(CliTest, AFlagWithoutItsValueIsNamed) {
  ExpectRefused(Quantize({"--widen", ""}), HasSubstr("--widen: is empty; give a value, or leave it out"));
  const ProgramResult result = RunProgram({"quantize", model_, "--output"});
  EXPECT_EQ(result.exit_code, 2);
  EXPECT_THAT(result.err, HasSubstr("--output"));
  const ProgramResult number = RunProgram(Quantize({"--max-seq-len", "many"}));
  EXPECT_EQ(number.exit_code, 2);
  EXPECT_THAT(number.err, AllOf(HasSubstr("--max-seq-len"), HasSubstr("many")));
}

}  // namespace
}  // namespace circlet
