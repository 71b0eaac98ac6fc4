#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "circlet/base/tensor.h"
#include "circlet/preprocess/chat.h"
#include "circlet/preprocess/data_file.h"
#include "circlet/preprocess/image.h"
#include "circlet/preprocess/tokenizer.h"

namespace circlet {

// One sequence for the model.
struct Sample {
  std::vector<int64_t> input_ids;       // [seq], one placeholder id for each soft token
  std::vector<int64_t> token_types;     // [seq], TokenTypes of the ids
  std::vector<uint8_t> attention_mask;  // [seq], 1 = kept; empty = all are
  Tensor pixel_values;                  // [images, patches, 3 * patch^2], uint8 or float32; Empty() without images
  Tensor image_position_ids;            // int64 [images, patches, 2], (x, y), padding (-1, -1)
  std::string source;                   // "calib.jsonl:7"
  std::string date_place;               // where the chat template wrote the date into it, else empty
};

// What turns text and pictures into samples, read from a checkpoint directory.
struct Processor {
  Tokenizer tokenizer;
  ChatTemplate chat;
  ImageRules images;
};
Processor LoadProcessor(const std::filesystem::path& directory);
// The files in `directory` that LoadProcessor reads, and generation_config.json, by name; without chat_templates/.
std::vector<std::string> ProcessorFiles(const std::filesystem::path& directory);

// What becomes of a sample that is longer than SampleOptions.max_length: an error that counts them, its beginning
// alone, or parts of that length, each with <bos> in front when the sample has it. Pictures must lie in the first part.
enum class LongSamples { kRefuse, kTruncate, kChunk };

struct SampleOptions {
  int64_t vocab_size = 0;  // ids but placeholders must be below it; 0 = any
  int64_t max_length = 0;  // tokens of a sample; 0 = any
  LongSamples longer = LongSamples::kRefuse;
  int64_t bos = -1;           // id of <bos>, for kChunk; -1 = none
  int64_t patch_positions = 0;  // on a side of a picture that the model knows; 0 = any
  bool text_only = false;       // leave out samples with images
  Placeholders placeholders;  // of config.json; those that are -1 are taken from the tokenizer
  std::function<Tensor(Tensor)> hold_pixels;  // gives the same pixels from where they may stay; empty: from memory
};

struct SampleSet {
  std::vector<Sample> samples;
  std::vector<std::string> skipped;  // sources left out by text_only
  std::string shortened;             // "3 of 32 samples cut to 64 tokens"; empty when none was
};

// One JSON object a line, or an array of them: {"type": "text", "text": ...} (<bos> in front) or {"type": "chat",
// "messages": [...], ...} (RenderChat; image paths are relative to the file). Empty lines are passed over. Throws Error
// "FILE:LINE: ..." for a line that is not JSON, lacks a key or has an unknown one, an empty text, an id past the
// vocabulary, an image that cannot be read, "FILE: ..." for samples longer than max_length (how many, which flag) and when no line is left.
SampleSet LoadJsonl(const DataFile& data, const Processor& processor, const SampleOptions& options);
SampleSet LoadJsonl(const std::filesystem::path& path, const Processor& processor, const SampleOptions& options);

// Tensors `GROUP.N.input_ids` ([batch, seq] or [seq], int64 or int32) with optional `attention_mask`, `pixel_values`,
// `image_position_ids`, in the order of N; an empty group means `N.input_ids`. Each row of a batch is a sample; it
// takes as many images as it has runs of image placeholders. Throws Error naming the tensor.
SampleSet SamplesFromSafetensors(const std::filesystem::path& path, std::string_view group,
                                 const SampleOptions& options);

// Text that reads as nothing: ids drawn evenly from [0, vocab_size) without the forbidden ones, the same for a seed on
// every machine. For runs that only try the machinery: ranges of real text differ.
std::vector<Sample> RandomSamples(int64_t count, int64_t length, uint64_t seed, int64_t vocab_size,
                                  std::span<const int64_t> forbidden);

// One conversation (RenderChat) as a sample. Image paths are relative to `directory`. Throws Error for audio and video.
Sample ChatSample(std::string_view conversation, const Processor& processor, const std::filesystem::path& directory,
                  const SampleOptions& options, std::string source);

// The text cut into windows of `window` tokens (the last may be shorter), each with `bos` in front and on its own:
// every token but <bos> is predicted once. Tokenized as a whole, without special tokens.
std::vector<std::vector<int64_t>> PerplexityWindows(std::string_view text, const Tokenizer& tokenizer, int64_t window,
                                                    int64_t bos);

// A line of captions.jsonl, {"image", "question", "caption"}: a prompt that asks about one picture, and the answer
// wanted.
struct CaptionTask {
  Sample prompt;  // with the generation prompt
  std::string image, question, caption;
};
std::vector<CaptionTask> LoadCaptions(const DataFile& data, const Processor& processor, const SampleOptions& options);
std::vector<CaptionTask> LoadCaptions(const std::filesystem::path& path, const Processor& processor,
                                      const SampleOptions& options);

}  // namespace circlet
