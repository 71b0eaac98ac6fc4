#include "circlet/preprocess/samples.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/base/hash.h"
#include "circlet/io/json.h"
#include "preprocess/check_sample.h"
#include "preprocess/data_lines.h"
#include "preprocess/picture_source.h"

namespace circlet {
namespace {

using nlohmann::json;

Placeholders Resolve(const Tokenizer& tokenizer, const Placeholders& configured) {
  Placeholders found = FindPlaceholders(tokenizer);
  const auto agree = [](std::string_view piece, std::string_view key, int64_t expected, int64_t& id) {
    if (expected >= 0 && id >= 0 && expected != id) {
      Fail(
          "config.json: {} is {}, but the tokenizer calls {} \"{}\"; are config.json and tokenizer.json of one "
          "checkpoint?",
          key, expected, id, piece);
    }
    if (id < 0) id = expected;
  };
  agree("<|image|>", "image_token_id", configured.image, found.image);
  agree("<|video|>", "video_token_id", configured.video, found.video);
  agree("<|audio|>", "audio_token_id", configured.audio, found.audio);
  return found;
}

// Images of one budget, one after another.
Tensor Concatenate(const std::vector<Tensor>& parts) {
  if (parts.empty()) return {};
  if (parts.size() == 1) return parts[0];
  Shape shape = parts[0].GetShape();
  shape[0] = static_cast<int64_t>(parts.size());
  Tensor whole(TensorType{parts[0].GetDType(), shape});
  std::byte* out = whole.Raw();
  for (const Tensor& part : parts) {
    std::memcpy(out, part.Raw(), static_cast<size_t>(part.Bytes()));
    out += part.Bytes();
  }
  return whole;
}

// The model has positions for so many patches on a side and no more, which a narrow picture can pass.
ImagePatches FittingPatches(const Image& picture, const ImageRules& rules, const SampleOptions& options) {
  const ImageSize target = TargetSize(picture.size, rules);
  const int64_t longest = std::max(target.width, target.height) / rules.patch_size;
  if (options.patch_positions > 0 && longest > options.patch_positions) {
    Fail("{}x{} pixels become {} patches on the longer side, and the model has positions for {}; crop the picture",
         picture.size.width, picture.size.height, longest, options.patch_positions);
  }
  return PrepareImage(picture, rules);
}

Sample TextSample(std::string_view text, const Tokenizer& tokenizer, const SampleOptions& options, std::string source) {
  Sample sample;
  sample.source = std::move(source);
  if (text.empty()) Fail("the text is empty, which would calibrate on <bos> alone; fill it in or take the line out");
  sample.input_ids = tokenizer.Encode(text, true);
  sample.token_types = TokenTypes(sample.input_ids, options.placeholders);
  if (std::ranges::any_of(sample.token_types, [](int64_t type) { return type != 0; }))
    Fail("the text holds the placeholder of an image, a video or a sound, but no such thing; use a chat line");
  CheckSample(sample, options);
  return sample;
}

}  // namespace

Processor LoadProcessor(const std::filesystem::path& directory) {
  return {Tokenizer::Load(directory), ChatTemplate::Load(directory), LoadImageRules(directory)};
}

std::vector<std::string> ProcessorFiles(const std::filesystem::path& directory) {
  std::vector<std::string> files;
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                           "chat_template.jinja", "chat_template.json", "processor_config.json",
                           "preprocessor_config.json", "generation_config.json"}) {
    std::error_code error;
    if (std::filesystem::is_regular_file(directory / name, error)) files.emplace_back(name);
  }
  return files;
}

Sample ChatSample(std::string_view conversation, const Processor& processor, const std::filesystem::path& directory,
                  const SampleOptions& options, std::string source) {
  const ChatPrompt prompt = RenderChat(processor.chat, conversation);
  if (prompt.has_audio || prompt.has_video)
    Fail("the conversation has {}; circlet prepares text and images only", prompt.has_audio ? "a sound" : "a video");
  Sample sample;
  sample.source = std::move(source);
  sample.date_place = prompt.date_place;
  std::vector<Tensor> pixels, positions;
  std::vector<int64_t> soft_tokens;
  for (const std::string& name : prompt.images) {
    const Image picture = LoadPicture(name, directory);
    const ImagePatches patches =
        Within(PictureName(name), [&] { return FittingPatches(picture, processor.images, options); });
    pixels.push_back(patches.pixel_values);
    positions.push_back(patches.position_ids);
    soft_tokens.push_back(patches.soft_tokens);
  }
  sample.pixel_values = Concatenate(pixels);
  if (options.hold_pixels && !pixels.empty()) sample.pixel_values = options.hold_pixels(std::move(sample.pixel_values));
  sample.image_position_ids = Concatenate(positions);
  sample.input_ids = processor.tokenizer.Encode(ExpandImages(prompt.text, soft_tokens), prompt.add_special_tokens);
  sample.token_types = TokenTypes(sample.input_ids, Resolve(processor.tokenizer, options.placeholders));
  CheckSample(sample, options);
  return sample;
}

SampleSet LoadJsonl(const DataFile& data, const Processor& processor, const SampleOptions& options) {
  SampleOptions resolved = options;
  resolved.placeholders = Resolve(processor.tokenizer, options.placeholders);
  LengthLimit limit(resolved);
  SampleSet set;
  ForEachLine(data, [&](const JsonObject& object, const DataLine& line) {
    const char* const usual = object.Has("messages") ? "chat" : object.Has("text") ? "text" : "";
    const std::string type = object.Optional<std::string>("type", usual);
    if (type.empty())
      object.FailAt("type",
                    fmt::format("is missing, and so are \"text\" and \"messages\"; write {}", kSampleLine.example));
    if (type == "text") {
      const std::string text = object.Required<std::string>("text");
      object.RejectUnknownKeys();
      Within(line.place, [&] { limit.Add(TextSample(text, processor.tokenizer, resolved, line.source), set.samples); });
    } else if (type == "chat") {
      Within(line.place, [&] {
        if (resolved.text_only && HasPictures(line.text)) {
          set.skipped.push_back(line.source);
          return;
        }
        limit.Add(ChatSample(line.text, processor, data.directory, resolved, line.source), set.samples);
      });
    } else {
      object.FailAt("type", fmt::format("expected \"text\" or \"chat\", found \"{}\"", type));
    }
  });
  limit.Check(data.place);
  if (set.samples.empty()) {
    Fail("{}: all {} samples have images and were left out, since only text was asked for; add text samples",
         data.place, set.skipped.size());
  }
  set.shortened = limit.Summary();
  return set;
}

SampleSet LoadJsonl(const std::filesystem::path& path, const Processor& processor, const SampleOptions& options) {
  return LoadJsonl(ReadDataFile(path), processor, options);
}

std::vector<CaptionTask> LoadCaptions(const DataFile& data, const Processor& processor, const SampleOptions& options) {
  SampleOptions whole = options;
  whole.longer = LongSamples::kRefuse;  // a cut question has another answer
  LengthLimit limit(whole);
  std::vector<CaptionTask> tasks;
  constexpr LineForm kCaptionLine{R"({"image": "PATH", "question": "...", "caption": "..."})", ""};
  const auto read = [&](const JsonObject& object, const DataLine& line) {
    for (const char* key : {"image", "question", "caption"})
      if (!object.Has(key)) Fail("{}: has no \"{}\"; captions are lines as {}", line.place, key, kCaptionLine.example);
    CaptionTask task;
    task.image = object.Required<std::string>("image");
    task.question = object.Required<std::string>("question");
    task.caption = object.Required<std::string>("caption");
    const std::string conversation =
        json{{"messages", UserTurn(task.question, std::span(&task.image, 1))}, {"add_generation_prompt", true}}.dump();
    std::vector<Sample> prompt;
    limit.Add(Within(line.place,
                     [&] {
                       return ChatSample(conversation, processor, data.directory, options, line.source);
                     }),
              prompt);
    if (prompt.empty()) return;
    task.prompt = std::move(prompt.front());
    tasks.push_back(std::move(task));
  };
  ForEachLine(data, read, kCaptionLine);
  limit.Check(data.place);
  return tasks;
}

std::vector<CaptionTask> LoadCaptions(const std::filesystem::path& path, const Processor& processor,
                                      const SampleOptions& options) {
  return LoadCaptions(ReadDataFile(path), processor, options);
}

std::vector<Sample> RandomSamples(int64_t count, int64_t length, uint64_t seed, int64_t vocab_size,
                                  std::span<const int64_t> forbidden) {
  std::vector<int64_t> allowed;
  for (int64_t id = 0; id < vocab_size; ++id)
    if (std::ranges::find(forbidden, id) == forbidden.end()) allowed.push_back(id);
  if (allowed.empty() || count < 1 || length < 1) {
    Fail(
        "random samples: {} samples of {} tokens from a vocabulary of {} with {} ids forbidden; each must be at least "
        "1, and "
        "an id must be left",
        count, length, vocab_size, forbidden.size());
  }
  uint64_t state = seed;
  const auto next = [&] { return Mix(state += kSplitMixStep); };
  std::vector<Sample> samples(count);
  for (int64_t i = 0; i < count; ++i) {
    Sample& sample = samples[i];
    sample.source = fmt::format("random:{}", i);
    sample.token_types.assign(length, 0);
    for (int64_t k = 0; k < length; ++k)  // the high half of the product: even up to one part in 2^40
      sample.input_ids.push_back(allowed[static_cast<size_t>((next() >> 32) * allowed.size() >> 32)]);
  }
  return samples;
}

std::vector<std::vector<int64_t>> PerplexityWindows(std::string_view text, const Tokenizer& tokenizer, int64_t window,
                                                    int64_t bos) {
  if (window < 1) Fail("perplexity: a window of {} tokens; it needs at least 1", window);
  const std::vector<int64_t> ids = tokenizer.Encode(text, false);
  if (ids.empty()) Fail("perplexity: the text is empty; there is nothing to predict");
  std::vector<std::vector<int64_t>> windows;
  const int64_t total = static_cast<int64_t>(ids.size());
  for (int64_t begin = 0; begin < total; begin += window) {
    std::vector<int64_t>& one = windows.emplace_back();
    one.push_back(bos);
    one.insert(one.end(), ids.begin() + begin, ids.begin() + std::min(total, begin + window));
  }
  return windows;
}

}  // namespace circlet
