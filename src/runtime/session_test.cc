// Sessions of a small random model, text and pictures, from its files, its simulation and in float.

#include "circlet/runtime/session.h"

#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

#include "circlet/io/json.h"
#include "circlet/io/safetensors.h"
#include "circlet/runtime/generate.h"
#include "circlet/runtime/prompts.h"
#include "error_text.h"
#include "fnv_checkpoint.h"
#include "heap_bytes.h"
#include "paths.h"
#include "pipeline/gemma4/data.h"
#include "temp_directory.h"

namespace circlet::runtime {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr int64_t kContext = 24;

// Config A with its calibration samples, one of them with a picture whose layout has padding.
class SessionTest : public testing::Test {
 protected:
  SessionTest() {
    fs::create_directory(Model());
    WriteFnvCheckpoint(Model());
    const Sample picture = Picture();
    const std::vector<int64_t> text{2, 9, 17, 33, 5, 61, 40, 22, 8, 3, 12, 50, 31, 44, 27, 19, 58, 7};
    WriteSafetensors(Samples(),
                     {{"calib.0.input_ids", Tensor::Of<int64_t>({std::ssize(text)}, text)},
                      {"calib.1.input_ids", Tensor::Of<int64_t>({std::ssize(picture.input_ids)}, picture.input_ids)},
                      {"calib.1.pixel_values", picture.pixel_values},
                      {"calib.1.image_position_ids", picture.image_position_ids}});
  }

  fs::path Model() const { return own_.Path() / "model"; }
  fs::path Samples() const { return own_.Path() / "samples.safetensors"; }

  Sample Picture(int64_t at = 3) const {
    const VisionProfile profile{.name = "test",
                                .visual_start_idx = at,
                                .num_visual_tokens = 4,
                                .max_soft_tokens = 6,
                                .patch_grid_height = 4,
                                .patch_grid_width = 4,
                                .patch_size = 4,
                                .pooling_kernel_size = 2};
    return gemma4::PatternSample(profile, ReadConfig(Model()), {2, 9, 17, 3, 4, 5, 6, 33, 21, 14, 9, 47}, "picture");
  }
  static Sample Text() {
    Sample sample{.source = "text"};
    sample.input_ids = {2, 40, 9, 33, 17, 5, 61};
    return sample;
  }

  QuantizeOptions Run(const std::string& recipe, const std::string& dialect = "default") const {
    return {.model = Model(),
            .samples = Samples(),
            .recipe = recipe,
            .dialect = dialect,
            .max_seq_len = kContext,
            .units = QuantizeOptions::Units::kDeployment};
  }
  fs::path Exported(QuantizeOptions options) const {
    options.output = own_.Path() / fmt::format("{}-{}", options.recipe, options.dialect);
    Quantize(options);
    return options.output;
  }

  TempDirectory own_;
};

// Logits behind the prompt, and behind each of the tokens that follow it.
std::vector<std::vector<float>> Followed(Session& session, const Sample& prompt) {
  std::vector<std::vector<float>> logits;
  session.Prefill(prompt);
  logits.push_back(ValuesOf(session.Logits()));
  for (const int64_t id : {11, 30, 52, 7}) {
    session.Decode(id);
    logits.push_back(ValuesOf(session.Logits()));
  }
  return logits;
}

TEST_F(SessionTest, TheSimulationIsTheFilesToTheLastCode) {
  // The second one's codes are made by a rounding method, in a wider stream.
  for (const char* recipe : {"default", "w4a16-gptq"}) {
    const QuantizeOptions run = Run(recipe);
    const auto files = OpenSession(Exported(run));
    std::string notes;
    const auto simulation = OpenSession(Model(), {.simulation = run, .notes = &notes});
    const auto reference = OpenSession(Model(), {.context = kContext});
    EXPECT_EQ(simulation->Facts().context, kContext);
    for (const Sample& prompt : {Text(), Picture(), Picture(5)}) {
      const auto wanted = Followed(*files, prompt);
      EXPECT_EQ(Followed(*simulation, prompt), wanted) << recipe << " " << prompt.source;
      EXPECT_NE(Followed(*reference, prompt), wanted);
    }
  }
}

// Units of the reference's dialect meet on unequal grids, and its sums are float32: codes lie some steps apart
// (measured: 0.4 % of the range of a position's logits).
TEST_F(SessionTest, TheSimulationOfTheReferencesDialectIsNearItsFiles) {
  const QuantizeOptions run = Run("w8a16", "tico");
  const auto files = OpenSession(Exported(run));
  const auto simulation = OpenSession(Model(), {.simulation = run});
  for (const Sample& prompt : {Text(), Picture()}) {
    const auto wanted = Followed(*files, prompt), found = Followed(*simulation, prompt);
    for (size_t i = 0; i < wanted.size(); ++i) {
      const float largest = std::ranges::max(wanted[i]) - std::ranges::min(wanted[i]);
      for (size_t k = 0; k < wanted[i].size(); ++k) EXPECT_NEAR(found[i][k], wanted[i][k], 0.01f * largest) << i;
    }
  }
}

TEST_F(SessionTest, GridsOfAFileMakeTheSameSimulation) {
  const fs::path out = Exported(Run("w4a16"));
  QuantizeOptions frozen = Run("w4a16");
  frozen.samples.clear();
  frozen.max_seq_len.reset();
  frozen.qparams = out / "qparams.json";
  const auto files = OpenSession(out);
  const auto simulation = OpenSession(Model(), {.context = kContext, .simulation = frozen});
  for (const Sample& prompt : {Text(), Picture()}) EXPECT_EQ(Followed(*simulation, prompt), Followed(*files, prompt));
  frozen.recipe = "w8a8";
  EXPECT_THAT(ErrorText([&] { OpenSession(Model(), {.simulation = frozen}); }),
              AllOf(HasSubstr("qparams.json"), HasSubstr("have another type than in recipe w8a8")));
  QuantizeOptions text = Run("w4a16");
  text.text_only = true;
  const auto without = OpenSession(Model(), {.simulation = text});
  EXPECT_THAT(without->PictureFault(Picture()), HasSubstr("there are no vision units"));
}

// Layers 4 and 5 of Config A take keys and values of layers 2 and 3.
TEST_F(SessionTest, AnExportWithoutDecodeUnitsRunsPromptsAndSaysWhatItLacks) {
  const auto both = OpenSession(Exported(Run("w8a8")));
  QuantizeOptions run = Run("w8a8");
  run.set = {"export.prefill_decode=false"};
  run.output = own_.Path() / "whole";
  Quantize(run);
  const auto whole = OpenSession(run.output);
  for (const Sample& prompt : {Text(), Picture()}) {
    both->Prefill(prompt);
    whole->Prefill(prompt);
    EXPECT_EQ(ValuesOf(whole->Logits()), ValuesOf(both->Logits()));
  }
  EXPECT_THAT(ErrorText([&] { whole->Decode(3); }), HasSubstr("export.prefill_decode: false"));
  EXPECT_FALSE(whole->Facts().decodes);
}

#ifndef __SANITIZE_ADDRESS__
// Weights of 25 million elements, 100 MB as float32, 25 MB of them in a wide layer: a session that widened a layer as a
// whole would hold more than it may here, caches, values of a unit and scratch memory included.
TEST_F(SessionTest, ItsOwnMemoryDoesNotGrowWithTheWeights) {
  std::string config(kConfigA);
  const auto set = [&](const std::string& from, const std::string& to) {
    ASSERT_NE(config.find(from), std::string::npos) << from;
    config.replace(config.find(from), from.size(), to);
  };
  set("\"hidden_size\": 32, \"intermediate_size\": 48", "\"hidden_size\": 256, \"intermediate_size\": 4096");
  const fs::path model = own_.Path() / "wide";
  fs::create_directory(model);
  WriteFnvCheckpoint(model, config);
  for (const char* recipe : {"w4a16", "default"}) {
    QuantizeOptions run = Run(recipe);
    run.model = model;
    run.samples.clear();
    run.random_samples = "1x20";
    run.text_only = true;
    const fs::path out = Exported(run);
    const int64_t most = MostHeldBy([&] {
      const auto session = OpenSession(out);
      Followed(*session, Text());
      EXPECT_GT(session->ReadWeights().bytes, 12 << 20);
    });
    EXPECT_LT(most, 16 << 20) << recipe;
    EXPECT_GT(most, 1 << 16) << recipe;
  }
}
#endif

TEST_F(SessionTest, BrokenNumbersAreTold) {
  std::map<std::string, Tensor> tensors;
  const SafetensorsFile file = SafetensorsFile::Open(Model() / "model.safetensors");
  for (const auto& [name, info] : file.Tensors()) tensors.emplace(name, file.Get(name).Clone());
  const std::string broken = "model.language_model.layers.2.mlp.down_proj.weight";
  tensors.at(broken).F32()[5] = std::numeric_limits<float>::quiet_NaN();
  WriteSafetensors(Model() / "model.safetensors", tensors);
  const auto reference = OpenSession(Model());
  reference->Prefill(Text());
  Sampler sampler({.temperature = 0});
  EXPECT_THAT(ErrorText([&] { sampler.Next(ValuesOf(reference->Logits()), {}); }),
              HasSubstr("the logit of token 0 is NaN; the model's weights or grids are damaged"));
  EXPECT_THAT(ErrorText([&] { OpenSession(Model(), {.simulation = Run("w8a8")}); }), HasSubstr(broken));
}

// ---- Tool calls -----------------------------------------------------------------------------------------------------

// A model that says, behind each token of a chain, the next one: its layers add nothing, embeddings are unit vectors,
// and the head knows each one's successor.
class ToolCallTest : public testing::Test {
 protected:
  static constexpr int64_t kWidth = 32;

  ToolCallTest() {
    const fs::path example = SourcePath("examples/tiny-gemma4");
    fs::create_directory(Model());
    nlohmann::json tokenizer = ReadJson(example / "tokenizer.json"), config = nlohmann::json::parse(kConfigA);
    // Pieces of the call, one token each, behind those of the tokenizer.
    int64_t next = 0;
    for (const nlohmann::json& token : tokenizer.at("added_tokens"))
      next = std::max(next, token.at("id").get<int64_t>());
    for (const auto& [piece, id] : tokenizer.at("model").at("vocab").items()) next = std::max(next, id.get<int64_t>());
    for (const char* piece : {"{\"name\": \"get_weather\"", ", \"arguments\": {\"city\": \"", "Köln", "\"}}"}) {
      chain_.push_back(++next);
      tokenizer["added_tokens"].push_back({{"id", next},
                                           {"content", piece},
                                           {"single_word", false},
                                           {"lstrip", false},
                                           {"rstrip", false},
                                           {"normalized", false},
                                           {"special", false}});
    }
    WriteJson(Model() / "tokenizer.json", tokenizer);
    fs::copy_file(example / "tokenizer_config.json", Model() / "tokenizer_config.json");
    WriteFile(Model() / "chat_template.jinja",
              "{{ bos_token }}{{ tools | map(attribute='name') | join }}: {{ messages[0]['content'] }}<turn|>");
    const Tokenizer read = Tokenizer::Load(Model());
    const int64_t turn_end = read.RequireId("<turn|>"), stop = read.RequireId("<eos>");
    chain_.insert(chain_.begin(), turn_end);
    chain_.push_back(stop);
    config.erase("vision_config");
    for (const char* id : {"image_token_id", "video_token_id", "audio_token_id"})
      config[id] = ReadJson(example / "config.json").at(id);
    nlohmann::json& text = config["text_config"];
    for (const char* key : {"vocab_size_per_layer_input", "final_logit_softcapping"}) text.erase(key);
    text["hidden_size_per_layer_input"] = 0;
    text.update({{"vocab_size", next + 1}, {"tie_word_embeddings", false}, {"hidden_size", kWidth}});
    config["tie_word_embeddings"] = false;
    config["eos_token_id"] = text["eos_token_id"] = stop;
    WriteJson(Model() / "config.json", config);
    std::map<std::string, Tensor> tensors;
    for (const Parameter& parameter : Parameters(ReadConfig(Model())))
      tensors.emplace(parameter.name, Weight(parameter));
    WriteSafetensors(Model() / "model.safetensors", tensors);
  }

  fs::path Model() const { return own_.Path() / "model"; }

  // What adds to the stream is zero.
  Tensor Weight(const Parameter& parameter) const {
    Tensor tensor = FnvTensor(parameter);
    const std::span<float> values = tensor.F32();
    const auto is = [&](const char* part) { return parameter.name.find(part) != std::string::npos; };
    if (is("embed_tokens")) {
      // Tokens outside of the chain share the last direction.
      std::ranges::fill(values, 0.0f);
      for (int64_t id = 0; id < tensor.GetShape()[0]; ++id) values[id * kWidth + Place(id)] = 1;
    } else if (is("lm_head")) {
      std::ranges::fill(values, 0.0f);
      for (size_t i = 0; i + 1 < chain_.size(); ++i) values[chain_[i + 1] * kWidth + static_cast<int64_t>(i)] = 1;
    } else if (is("o_proj") || is("down_proj")) {
      std::ranges::fill(values, 0.0f);
    }
    return tensor;
  }
  int64_t Place(int64_t id) const {
    const auto at = std::ranges::find(chain_, id);
    return at == chain_.end() ? kWidth - 1 : at - chain_.begin();
  }

  TempDirectory own_;
  std::vector<int64_t> chain_;  // the turn's end, pieces of the call, the stop id
};

TEST_F(ToolCallTest, AConversationWithToolsEndsInTheSameJsonFromFilesAndInFloat) {
  const std::string conversation = R"({"messages": [{"role": "user", "content": "How is it in Cologne?"}],
    "tools": [{"name": "get_weather", "parameters": {"city": {"type": "string"}}}]})";
  nlohmann::json line = nlohmann::json::parse(conversation);
  line["type"] = "chat";
  // The call itself is calibrated on, so that each token's embedding has its place.
  const Processor processor = LoadProcessor(Model());
  const std::string call = processor.tokenizer.Decode(std::span(chain_).subspan(1, 4), true);
  WriteFile(own_.Path() / "calib.jsonl",
            line.dump() + "\n" + nlohmann::json{{"type", "text"}, {"text", "<turn|>" + call + "<eos>"}}.dump() + "\n");
  const QuantizeOptions run{.model = Model(),
                            .output = own_.Path() / "out",
                            .data = own_.Path() / "calib.jsonl",
                            .recipe = "w8a16",
                            .max_seq_len = 64,
                            .units = QuantizeOptions::Units::kDeployment};
  Quantize(run);
  for (const fs::path& model : {Model(), run.output}) {
    const auto session = OpenSession(model);
    const Sample prompt = ChatPromptSample(conversation, LoadProcessor(model), session->Facts(), "", "tools");
    EXPECT_THAT(processor.tokenizer.Decode(prompt.input_ids, true), HasSubstr("get_weather")) << "tools are rendered";
    const Generation made =
        Generate(*session, processor.tokenizer, prompt,
                 {.sampling = {.temperature = 0}, .max_new_tokens = 20, .stop_ids = session->Facts().stops});
    EXPECT_EQ(made.reason, StopReason::kStopId) << model;
    ASSERT_TRUE(nlohmann::json::accept(made.text)) << model << ": " << made.text;
    EXPECT_EQ(nlohmann::json::parse(made.text).at("arguments").at("city"), "Köln");
    EXPECT_EQ(made.ids, std::vector<int64_t>(chain_.begin() + 1, chain_.end())) << model;
  }
}

}  // namespace
}  // namespace circlet::runtime
