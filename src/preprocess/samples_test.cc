#include "circlet/preprocess/samples.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "circlet/io/safetensors.h"
#include "circlet/preprocess/overlap.h"
#include "error_text.h"
#include "golden.h"
#include "paths.h"
#include "temp_directory.h"

namespace circlet {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::SizeIs;

const std::filesystem::path kTiny = SourcePath("examples/tiny-gemma4");

const Processor& Tiny() {
  static const Processor processor = LoadProcessor(kTiny);
  return processor;
}

const json& Reference() {
  static const json reference = json::parse(ReadFile(kTiny / "eval/reference.json"));
  return reference;
}

const std::vector<CaptionTask>& Captions() {
  static const std::vector<CaptionTask> tasks = LoadCaptions(kTiny / "eval/captions.jsonl", Tiny(), {});
  return tasks;
}

std::string JsonlError(const std::string& text, const SampleOptions& options = {}) {
  const TempDirectory directory;
  WriteFile(directory.Path() / "data.jsonl", text);
  WriteFile(directory.Path() / "broken.png", "\x89PNG\r\n\x1a\n nothing");
  return ErrorText([&] { LoadJsonl(directory.Path() / "data.jsonl", Tiny(), options); });
}

TEST(JsonlTest, TheExampleCalibrationDataLoad) {
  const SampleSet set = LoadJsonl(kTiny / "eval/calib.jsonl", Tiny(), {.vocab_size = 2048, .max_length = 2048});
  ASSERT_THAT(set.samples, SizeIs(32));
  EXPECT_THAT(set.skipped, IsEmpty());
  int images = 0;
  for (size_t i = 0; i < 32; ++i) {
    const Sample& sample = set.samples[i];
    EXPECT_EQ(sample.source, fmt::format("calib.jsonl:{}", i + 1));
    EXPECT_EQ(sample.input_ids[0], 2);
    EXPECT_NE(sample.input_ids[1], 2);
    EXPECT_THAT(sample.token_types, SizeIs(sample.input_ids.size()));
    EXPECT_THAT(sample.attention_mask, IsEmpty());
    EXPECT_EQ(sample.pixel_values.Empty(), std::ranges::count(sample.token_types, 1) == 0);
    if (sample.pixel_values.Empty()) continue;
    ++images;
    EXPECT_EQ(sample.pixel_values.GetShape(), (Shape{1, 630, 768}));
    EXPECT_EQ(sample.image_position_ids.GetShape(), (Shape{1, 630, 2}));
    const auto positions = sample.image_position_ids.I64();
    const int64_t patches = (630 * 2 - std::ranges::count(positions, -1)) / 2;
    EXPECT_EQ(std::ranges::count(sample.token_types, 1) * 9, patches);
  }
  EXPECT_EQ(images, 16);
}

TEST(JsonlTest, ALineSaysByItsKeysWhatItIs) {
  const TempDirectory directory;
  const auto ids = [&](const char* lines) {
    WriteFile(directory.Path() / "data.jsonl", lines);
    std::vector<std::vector<int64_t>> all;
    for (const Sample& sample : LoadJsonl(directory.Path() / "data.jsonl", Tiny(), {}).samples)
      all.push_back(sample.input_ids);
    return all;
  };
  EXPECT_EQ(ids(R"({"text": "Emma saw"}
{"messages": [{"role": "user", "content": "Hello"}]})"),
            ids(R"({"type": "text", "text": "Emma saw"}
{"type": "chat", "messages": [{"role": "user", "content": "Hello"}]})"));
}

TEST(JsonlTest, TextOnlyNamesWhatItLeavesOut) {
  const SampleSet set = LoadJsonl(kTiny / "eval/calib.jsonl", Tiny(), {.text_only = true});
  EXPECT_THAT(set.samples, SizeIs(16));
  ASSERT_THAT(set.skipped, SizeIs(16));
  std::set<std::string> all(set.skipped.begin(), set.skipped.end());
  for (const Sample& sample : set.samples) all.insert(sample.source);
  EXPECT_THAT(all, SizeIs(32));
}

TEST(JsonlTest, PixelsStayWhereTheCallerHoldsThem) {
  const TempDirectory directory;
  int64_t held = 0;
  const SampleOptions options{.hold_pixels = [&](Tensor pixels) {
    held += pixels.Bytes();
    return pixels;
  }};
  const auto bytes_of = [](const SampleSet& set) {
    int64_t bytes = 0;
    for (const Sample& sample : set.samples)
      if (!sample.pixel_values.Empty()) bytes += sample.pixel_values.Bytes();
    return bytes;
  };
  const int64_t of_lines = bytes_of(LoadJsonl(kTiny / "eval/calib.jsonl", Tiny(), options));
  EXPECT_EQ(held, of_lines);
  EXPECT_GT(held, 16 * 630 * 700);
  WriteSafetensors(directory.Path() / "data.safetensors",
                   {{"0.input_ids", Tensor::Of<int64_t>({1, 3}, std::vector<int64_t>{2, 9, 3})},
                    {"0.pixel_values", Tensor({DType::kF32, {1, 1, 12}})},
                    {"0.image_position_ids", Tensor::Of<int64_t>({1, 1, 2}, std::vector<int64_t>{0, 0})}});
  SampleOptions of_tensors = options;
  of_tensors.placeholders.image = 9;
  EXPECT_EQ(bytes_of(SamplesFromSafetensors(directory.Path() / "data.safetensors", "", of_tensors)), 48);
  EXPECT_EQ(held, of_lines + 48);
}

TEST(JsonlTest, ErrorsNameFileAndLine) {
  const std::string good = R"({"type": "text", "text": "Emma"})"
                           "\n";
  EXPECT_THAT(JsonlError(good + "\r\n{oops"), HasSubstr("data.jsonl:3: "));
  EXPECT_THAT(JsonlError(good + "[1]"), HasSubstr("data.jsonl:2"));
  EXPECT_THAT(JsonlError(good + R"({"type": "text"})"), HasSubstr("data.jsonl:2: text"));
  EXPECT_THAT(
      JsonlError(good + R"({"question": "x"})"),
      HasSubstr("data.jsonl:2: type: is missing, and so are \"text\" and \"messages\"; write {\"type\": \"text\""));
  EXPECT_THAT(JsonlError(R"({"type": "poem", "text": "x"})"),
              HasSubstr("data.jsonl:1: type: expected \"text\" or \"chat\", found \"poem\""));
  EXPECT_THAT(JsonlError(R"({"type": "chat"})"), HasSubstr("data.jsonl:1: messages: expected a list of messages"));
  EXPECT_THAT(JsonlError(""), HasSubstr("data.jsonl: has no samples"));
  EXPECT_THAT(JsonlError("\n \n"), HasSubstr("data.jsonl: has no samples"));
  EXPECT_THAT(JsonlError(good + R"({"type": "text", "text": ""})"),
              HasSubstr("data.jsonl:2: the text is empty, which would calibrate on <bos> alone"));
  EXPECT_THAT(JsonlError(good, {.vocab_size = 100}), HasSubstr("but the vocabulary has 100 entries"));
  EXPECT_THAT(JsonlError(R"({"type": "text", "text": "a <|image|> b"})"),
              HasSubstr("data.jsonl:1: the text holds the"));
  EXPECT_THAT(JsonlError(good, {.placeholders = {.image = 77}}),
              HasSubstr("config.json: image_token_id is 77, but the tokenizer calls 2043"));
}

std::string TextLine(const std::string& text) { return json{{"type", "text"}, {"text", text}}.dump() + "\n"; }

TEST(JsonlTest, SamplesPastTheLimitAreCountedInOneError) {
  const std::string data = TextLine("Emma") + TextLine("Emma was glad of it") + TextLine("Emma was glad of it all day");
  EXPECT_THAT(JsonlError(data, {.max_length = 4}),
              ::testing::ContainsRegex("data.jsonl: 2 of 3 samples are longer than the limit of 4 tokens, the longest, "
                                       "data.jsonl:3, has ([0-9]+); --max-seq-len [0-9]+ takes all, --truncate or "
                                       "--chunk shortens them"));
}

TEST(JsonlTest, LongSamplesAreCutOrSplitWhenAsked) {
  const TempDirectory directory;
  const std::filesystem::path path = directory.Path() / "data.jsonl";
  WriteFile(path, TextLine("Emma") + TextLine("Emma was glad of it all day long"));
  const SampleSet whole = LoadJsonl(path, Tiny(), {});
  const std::vector<int64_t>& ids = whole.samples[1].input_ids;
  ASSERT_GE(ids.size(), 8u);
  const SampleSet cut = LoadJsonl(path, Tiny(), {.max_length = 5, .longer = LongSamples::kTruncate});
  ASSERT_THAT(cut.samples, SizeIs(2));
  EXPECT_EQ(cut.samples[0].input_ids, whole.samples[0].input_ids);
  EXPECT_EQ(cut.samples[1].input_ids, std::vector<int64_t>(ids.begin(), ids.begin() + 5));
  EXPECT_THAT(cut.samples[1].token_types, SizeIs(5));
  EXPECT_EQ(cut.shortened, "1 of 2 samples cut to 5 tokens");
  const SampleSet split = LoadJsonl(path, Tiny(), {.max_length = 5, .longer = LongSamples::kChunk, .bos = 2});
  std::vector<int64_t> joined{2};
  for (size_t i = 1; i < split.samples.size(); ++i) {
    const Sample& part = split.samples[i];
    EXPECT_EQ(part.input_ids[0], 2);
    EXPECT_LE(part.input_ids.size(), 5u);
    EXPECT_THAT(part.token_types, SizeIs(part.input_ids.size()));
    joined.insert(joined.end(), part.input_ids.begin() + 1, part.input_ids.end());
  }
  EXPECT_EQ(joined, ids);
  EXPECT_EQ(split.samples[2].source, "data.jsonl:2, part 2");
  EXPECT_EQ(split.shortened, "1 of 2 samples split into parts of 5 tokens");
}

TEST(JsonlTest, NoPictureIsCut) {
  const SampleOptions options{.max_length = 40, .longer = LongSamples::kTruncate};
  EXPECT_THAT(ErrorText([&] { LoadJsonl(kTiny / "eval/calib.jsonl", Tiny(), options); }),
              ::testing::ContainsRegex("calib.jsonl:[0-9]+: its pictures end at token [0-9]+, past the limit of 40"));
}

TEST(JsonlTest, ImageErrorsNameLineAndImage) {
  const auto chat = [](const char* content) {
    return fmt::format(R"({{"type": "chat", "messages": [{{"role": "user", "content": {}}}]}})", content);
  };
  EXPECT_THAT(JsonlError(chat(R"([{"type": "image", "image": "none.png"}])")), HasSubstr("data.jsonl:1: "));
  EXPECT_THAT(JsonlError(chat(R"([{"type": "image", "image": "none.png"}])")), HasSubstr("none.png"));
  EXPECT_THAT(JsonlError(chat(R"([{"type": "image", "image": "broken.png"}])")), HasSubstr("broken.png: damaged PNG"));
  const std::string large = (kTiny / "eval/images/calib_00.png").string();
  EXPECT_THAT(
      JsonlError(chat((R"([{"type": "image", "image": ")" + large + R"("}])").c_str()), {.patch_positions = 5}),
      ::testing::ContainsRegex("data.jsonl:1: .*calib_00.png: [0-9]+x[0-9]+ pixels become [0-9]+ patches on the "
                               "longer side, and the model has positions for 5; crop the picture"));
  EXPECT_THAT(JsonlError(chat(R"([{"type": "image", "path": "a.png", "url": "b.png"}])")),
              HasSubstr("names a picture, and so does \"path\"; leave one of them"));
  EXPECT_THAT(JsonlError(chat(R"([{"type": "image"}])")), HasSubstr("is missing, and so are image, url and base64"));
  EXPECT_THAT(JsonlError(chat(R"([{"type": "audio"}])")),
              HasSubstr("has a sound; circlet prepares text and images only"));
  EXPECT_THAT(JsonlError(chat(R"("<|image|>")")), HasSubstr("1 times \"<|image|>\" for 0 images"));
  EXPECT_THAT(JsonlError(chat(R"([{"type": "image", "image": "x.png"}])"), {.text_only = true}),
              HasSubstr("all 1 samples have images and were left out"));
}

TEST(JsonlTest, KeysOfALineReachTheTemplateAndUnknownOnesAreNamed) {
  const TempDirectory directory;
  WriteFile(directory.Path() / "data.jsonl",
            R"({"type": "chat", "tools": [{"b": 1, "a": 2}], "enable_thinking": true,
"messages": [{"role": "model", "content": "x"}], "chat_template_kwargs": {"k": "v"}})");
  std::string line = ReadFile(directory.Path() / "data.jsonl");
  std::erase(line, '\n');
  WriteFile(directory.Path() / "data.jsonl", line);
  Processor processor = Tiny();
  processor.chat =
      ChatTemplate::Parse("{{ tools | tojson }} {{ enable_thinking }} {{ k }} {{ messages[0].role }}", "t");
  const SampleSet set = LoadJsonl(directory.Path() / "data.jsonl", processor, {});
  ASSERT_THAT(set.samples, SizeIs(1));
  EXPECT_EQ(processor.tokenizer.Decode(set.samples[0].input_ids, false), R"([{"b": 1, "a": 2}] True v model)");
  EXPECT_THAT(JsonlError(R"({"type": "chat", "messages": [{"role": "user", "content": "x"}], "imagse": ["cat.png"]})"),
              HasSubstr("data.jsonl:1: unknown key \"imagse\""));
  EXPECT_THAT(JsonlError(R"({"type": "chat", "messages": [{"role": "user", "content": "x"}], "documnts": []})"),
              HasSubstr("data.jsonl:1: unknown key \"documnts\"; nearest: \"documents\""));
  EXPECT_THAT(JsonlError(R"({"type": "text", "text": "x", "txt": "y"})"), HasSubstr("data.jsonl:1: "));
  EXPECT_THAT(JsonlError(R"({"type": "text", "text": "x", "txt": "y"})"), HasSubstr("\"text\""));
}

TEST(JsonlTest, APictureBesideTheMessagesIsTheOneInItsPart) {
  const TempDirectory directory;
  std::filesystem::copy_file(kTiny / "eval/images/calib_00.png", directory.Path() / "a.png");
  const std::string beside =
      R"({"type": "chat", "images": ["a.png"], "messages": [{"role": "user", "content": [{"type": "image"}]}]})";
  const std::string inside =
      R"({"type": "chat", "messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}]})";
  WriteFile(directory.Path() / "data.jsonl", beside + "\n" + inside + "\n");
  const SampleSet set = LoadJsonl(directory.Path() / "data.jsonl", Tiny(), {});
  ASSERT_THAT(set.samples, SizeIs(2));
  EXPECT_EQ(set.samples[0].input_ids, set.samples[1].input_ids);
  const Tensor &beside_it = set.samples[0].pixel_values, &in_it = set.samples[1].pixel_values;
  ASSERT_EQ(beside_it.Type(), in_it.Type());
  EXPECT_EQ(std::memcmp(beside_it.Raw(), in_it.Raw(), static_cast<size_t>(in_it.Bytes())), 0);
  WriteFile(directory.Path() / "data.jsonl", beside + "\n" + R"({"type": "text", "text": "x"})");
  EXPECT_THAT(LoadJsonl(directory.Path() / "data.jsonl", Tiny(), {.text_only = true}).skipped,
              ElementsAre("data.jsonl:1"));
}

// The template of the directory is run, whatever it is, and no <bos> is added.
TEST(JsonlTest, TheCheckpointsOwnTemplateIsRun) {
  const TempDirectory directory;
  for (const char* file : {"tokenizer.json", "tokenizer_config.json", "processor_config.json"})
    std::filesystem::copy_file(kTiny / file, directory.Path() / file);
  const std::string line =
      R"({"type": "chat", "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]})";
  WriteFile(directory.Path() / "data.jsonl", line + "\n");
  const auto load = [&] { return LoadJsonl(directory.Path() / "data.jsonl", LoadProcessor(directory.Path()), {}); };
  EXPECT_THAT(ErrorText([&] { load(); }), HasSubstr("data.jsonl:1: the checkpoint has no chat template"));
  WriteFile(directory.Path() / "chat_template.jinja", ReadFile(TestData("chat_templates/plain.jinja")));
  const std::string text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n";
  EXPECT_EQ(load().samples[0].input_ids, Tiny().tokenizer.Encode(text, false));
  EXPECT_EQ(load().samples[0].date_place, "");
  WriteFile(directory.Path() / "chat_template.jinja", "{{ strftime_now('%Y') }}");
  EXPECT_EQ(load().samples[0].date_place, "chat_template.jinja:1");
  // Texts need no template.
  std::filesystem::remove(directory.Path() / "chat_template.jinja");
  WriteFile(directory.Path() / "data.jsonl", R"({"type": "text", "text": "Emma"})");
  EXPECT_THAT(load().samples, SizeIs(1));
}

// reference.json: prompts of the reference's processor.
TEST(ChatSampleTest, ImagePromptsHaveTheIdsOfTheReference) {
  for (const json& row : Reference()["image_samples"]) {
    const std::vector<CaptionTask>& tasks = Captions();
    const auto task = std::ranges::find(tasks, row["image"].get<std::string>(), &CaptionTask::image);
    ASSERT_NE(task, tasks.end());
    EXPECT_EQ(task->prompt.input_ids, row["input_ids"].get<std::vector<int64_t>>());
  }
}

TEST(ChatSampleTest, PixelsAreThoseOfTheReference) {
  const std::vector<CaptionTask>& tasks = Captions();
  ASSERT_THAT(tasks, SizeIs(100));
  EXPECT_EQ(tasks[0].caption, "a blue circle");
  EXPECT_EQ(tasks[0].question, "What is in the picture?");
  EXPECT_EQ(tasks[7].prompt.source, "captions.jsonl:8");
  int compared = 0;
  for (size_t i = 0; i < 100; ++i) {
    const json& row = Reference()["captions"]["outputs"][i];
    if (!row.contains("pixel_sum")) continue;
    ++compared;
    double sum = 0;
    const Tensor pixel_values = PixelValues(tasks[i].prompt.pixel_values);
    const auto values = pixel_values.F32();
    for (const float value : values) sum += value;
    // Two codes on a hundredth of the values at most.
    EXPECT_NEAR(sum, row["pixel_sum"].get<double>(), 1e-4 * sum) << i;
    for (const auto& [patch, first8] : row["pixel_patch_first8"].items())
      for (size_t k = 0; k < 8; ++k)
        EXPECT_NEAR(values[768 * std::stoll(patch) + k], first8[k].get<float>(), 2.1 / 255) << i << " " << patch;
  }
  EXPECT_GE(compared, 3);
}

TEST(CaptionsTest, AFileOfAnotherKindIsToldWhatCaptionsAreLike) {
  const TempDirectory directory;
  const auto error = [&](const std::string& text) {
    WriteFile(directory.Path() / "captions.jsonl", text);
    return ErrorText([&] { LoadCaptions(directory.Path() / "captions.jsonl", Tiny(), {}); });
  };
  const std::string form = R"({"image": "PATH", "question": "...", "caption": "..."})";
  EXPECT_THAT(error(R"({"image": "a.png", "caption": "x"})"),
              HasSubstr("captions.jsonl:1: has no \"question\"; captions are lines as " + form));
  EXPECT_THAT(error(R"({"type": "text", "text": "calibration"})"), HasSubstr("captions.jsonl:1: has no \"image\""));
  EXPECT_THAT(error("Emma was glad.\n"), AllOf(HasSubstr("captions.jsonl:1: expected a JSON object on each line, as " + form),
                                               Not(HasSubstr("one sample a line"))));
  EXPECT_THAT(error(""), HasSubstr("has no samples; it needs a JSON object on each line, as " + form));
}

TEST(PerplexityTest, WindowsFollowTheProtocolOfTheExample) {
  const std::string text = ReadFile(kTiny / "eval/heldout.txt");
  const auto windows = PerplexityWindows(text, Tiny().tokenizer, 255, 2);
  ASSERT_EQ(windows.size(), Reference()["perplexity"]["windows"].get<size_t>());
  size_t tokens = 0;
  for (size_t i = 0; i < windows.size(); ++i) {
    EXPECT_EQ(windows[i][0], 2);
    EXPECT_THAT(windows[i], SizeIs(i + 1 < windows.size() ? 256 : 29244 % 255 + 1));
    tokens += windows[i].size() - 1;
  }
  EXPECT_EQ(tokens, 29244u);
  const std::vector<int64_t> first = Reference()["perplexity"]["first_token_ids"];
  EXPECT_TRUE(std::equal(first.begin(), first.end(), windows[0].begin() + 1));
  EXPECT_THAT(ErrorText([] { PerplexityWindows("", Tiny().tokenizer, 255, 2); }), HasSubstr("the text is empty"));
}

TEST(RandomSamplesTest, TheyRepeatAndAvoidForbiddenIds) {
  const std::vector<int64_t> forbidden{0, 2, 5};
  const auto a = RandomSamples(4, 500, 123, 8, forbidden);
  const auto b = RandomSamples(4, 500, 123, 8, forbidden);
  ASSERT_THAT(a, SizeIs(4));
  std::set<int64_t> seen;
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_THAT(a[i].input_ids, SizeIs(500));
    EXPECT_EQ(a[i].input_ids, b[i].input_ids);
    seen.insert(a[i].input_ids.begin(), a[i].input_ids.end());
  }
  EXPECT_THAT(seen, ElementsAre(1, 3, 4, 6, 7));
  EXPECT_NE(a[0].input_ids, a[1].input_ids);
  EXPECT_NE(a[0].input_ids, RandomSamples(1, 500, 124, 8, forbidden)[0].input_ids);
  // The same on every machine.
  EXPECT_THAT(RandomSamples(1, 4, 123, 256, {})[0].input_ids, ElementsAre(180, 250, 220, 175));
  EXPECT_THAT(ErrorText([&] { RandomSamples(1, 1, 1, 1, forbidden); }), HasSubstr("an id must be left"));
}

TEST(OverlapTest, LinesAreKnownAgainWhateverTheirBlanksAndCapitals) {
  DataHashes calibrated;
  AddLines("Emma saw a small brown dog near the river.\nShort.\n", calibrated);
  EXPECT_THAT(
      OverlapOf("Short.\n emma saw a  small BROWN dog near the river.\t\nA line that is long enough to count.\n",
                calibrated),
      testing::StartsWith("1 of 2 lines also stand in the calibration data, the first: \" emma saw"));
  EXPECT_EQ(OverlapOf("Emma saw a small brown cat near the river.\nShort.\n", calibrated), "");
}

TEST(SafetensorsSamplesTest, GoldenInputsBecomeSamples) {
  const TempDirectory directory;
  const std::filesystem::path path = directory.Path() / "inputs.safetensors";
  const std::string command =
      fmt::format("xz -dc '{}' > '{}'", TestData("golden/tiny_e2b/inputs.safetensors.xz").string(), path.string());
  ASSERT_EQ(std::system(command.c_str()), 0);
  const SampleOptions options{.placeholders = {.image = 10, .video = 11, .audio = 12}};
  const SampleSet set = SamplesFromSafetensors(path, "calib", options);
  ASSERT_THAT(set.samples, SizeIs(8));
  EXPECT_EQ(set.samples[6].source, "inputs.safetensors:calib.6");
  EXPECT_THAT(set.samples[1].input_ids, SizeIs(17));
  EXPECT_THAT(set.samples[2].attention_mask, SizeIs(12));
  EXPECT_THAT(set.samples[0].attention_mask, IsEmpty());
  EXPECT_TRUE(set.samples[3].pixel_values.Empty());
  EXPECT_EQ(set.samples[6].pixel_values.GetShape(), (Shape{2, 72, 48}));
  EXPECT_EQ(set.samples[6].image_position_ids.GetShape(), (Shape{2, 72, 2}));
  EXPECT_THAT(SamplesFromSafetensors(path, "eval", options).samples, SizeIs(3));
  SampleOptions text_only = options;
  text_only.text_only = true;
  EXPECT_THAT(SamplesFromSafetensors(path, "calib", text_only).skipped,
              ElementsAre("inputs.safetensors:calib.4", "inputs.safetensors:calib.5", "inputs.safetensors:calib.6",
                          "inputs.safetensors:calib.7"));
  EXPECT_THAT(ErrorText([&] { SamplesFromSafetensors(path, "", options); }),
              HasSubstr("no tensor is called \"N.input_ids\""));
}

class BatchTest : public ::testing::Test {
 protected:
  SampleSet Load(const std::map<std::string, Tensor>& tensors, SampleOptions options = {.placeholders = {.image = 9}}) {
    const std::filesystem::path path = directory_.Path() / "data.safetensors";
    WriteSafetensors(path, tensors);
    return SamplesFromSafetensors(path, "", options);
  }
  static Tensor Ids(Shape shape, std::vector<int64_t> ids) { return Tensor::Of<int64_t>(std::move(shape), ids); }

  TempDirectory directory_;
};

TEST_F(BatchTest, RowsOfABatchTakeTheirImagesInOrder) {
  const Tensor ids = Ids({3, 4}, {9, 1, 9, 2, 3, 3, 3, 3, 1, 9, 9, 1});
  std::vector<float> pixels(3 * 2 * 5);
  for (size_t i = 0; i < pixels.size(); ++i) pixels[i] = static_cast<float>(i);
  const SampleSet set = Load({{"0.input_ids", ids},
                              {"0.attention_mask", Ids({3, 4}, {1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1})},
                              {"0.pixel_values", Tensor::Of<float>({3, 2, 5}, pixels)},
                              {"0.image_position_ids", Ids({3, 2, 2}, std::vector<int64_t>(12, 0))}});
  ASSERT_THAT(set.samples, SizeIs(3));
  EXPECT_EQ(set.samples[0].pixel_values.GetShape(), (Shape{2, 2, 5}));
  EXPECT_TRUE(set.samples[1].pixel_values.Empty());
  EXPECT_EQ(set.samples[2].pixel_values.F32()[0], 20);
  EXPECT_THAT(set.samples[0].attention_mask, ElementsAre(1, 1, 1, 0));
  EXPECT_EQ(set.samples[2].source, "data.safetensors:0[2]");
}

TEST_F(BatchTest, BatchesComeInTheOrderOfTheirNumbers) {
  std::map<std::string, Tensor> tensors;
  for (const int64_t n : {10, 2, 1}) tensors[fmt::format("{}.input_ids", n)] = Ids({2}, {n, n});
  const SampleSet set = Load(tensors);
  ASSERT_THAT(set.samples, SizeIs(3));
  EXPECT_EQ(set.samples[1].input_ids[0], 2);
  EXPECT_EQ(set.samples[2].input_ids[0], 10);
}

TEST_F(BatchTest, TensorsThatDoNotFitAreNamed) {
  const Tensor ids = Ids({1, 2}, {9, 1});
  const Tensor pixels(TensorType{DType::kF32, {1, 2, 3}});
  const Tensor positions(TensorType{DType::kI64, {1, 2, 2}});
  const auto error = [&](const std::map<std::string, Tensor>& tensors) { return ErrorText([&] { Load(tensors); }); };
  EXPECT_THAT(error({{"0.input_ids", ids}, {"0.pixel_values", pixels}}),
              HasSubstr("0.image_position_ids is missing, but pixel_values is there"));
  EXPECT_THAT(error({{"0.input_ids", ids}, {"0.pixel_values", pixels}, {"0.image_position_ids", ids}}),
              HasSubstr("0.image_position_ids: shape [1,2]; pixel_values of shape [1,2,3] need [1,2,2]"));
  EXPECT_THAT(error({{"0.input_ids", ids}, {"0.attention_mask", Ids({1, 1}, {1})}}),
              HasSubstr("0.attention_mask: shape [1,1]; input_ids have [1,2]"));
  EXPECT_THAT(error({{"0.input_ids", Tensor(TensorType{DType::kF32, {2}})}}),
              HasSubstr("0.input_ids: expected int64, int32, uint8 or bool, found float32[2]"));
  EXPECT_THAT(error({{"0.input_ids", Ids({1, 1, 1}, {1})}}), HasSubstr("0.input_ids: shape [1,1,1]"));
  EXPECT_THAT(error({{"0.input_ids", Ids({1, 2}, {1, -5})}}), HasSubstr("0.input_ids: token 1 has id -5"));
  const Tensor two = Ids({2, 2}, {1, 1, 9, 1});
  EXPECT_THAT(
      error({{"0.input_ids", two},
             {"0.pixel_values", Tensor(TensorType{DType::kF32, {2, 2, 3}})},
             {"0.image_position_ids", Tensor(TensorType{DType::kI64, {2, 2, 2}})}}),
      HasSubstr("0.pixel_values: 2 images, but the rows of input_ids hold 1 runs of image placeholders (id 9)"));
}

}  // namespace
}  // namespace circlet
