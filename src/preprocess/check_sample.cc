#include "preprocess/check_sample.h"

#include <algorithm>

#include "circlet/base/error.h"

namespace circlet {
namespace {

// Tokens [begin, end) of a sample; pictures stay with its beginning.
Sample Part(const Sample& whole, int64_t begin, int64_t end) {
  const auto cut = [&](const auto& values) {
    using Values = std::remove_cvref_t<decltype(values)>;
    return values.empty() ? Values() : Values(values.begin() + begin, values.begin() + end);
  };
  Sample part{.input_ids = cut(whole.input_ids),
              .token_types = cut(whole.token_types),
              .attention_mask = cut(whole.attention_mask),
              .source = whole.source,
              .date_place = whole.date_place};
  if (begin > 0) return part;
  part.pixel_values = whole.pixel_values;
  part.image_position_ids = whole.image_position_ids;
  return part;
}

void PutInFront(int64_t id, Sample& part) {
  part.input_ids.insert(part.input_ids.begin(), id);
  part.token_types.insert(part.token_types.begin(), 0);
  if (!part.attention_mask.empty()) part.attention_mask.insert(part.attention_mask.begin(), 1);
}

}  // namespace

void CheckSample(const Sample& sample, const SampleOptions& options) {
  const int64_t length = static_cast<int64_t>(sample.input_ids.size());
  if (length == 0) Fail("the sample has no tokens; take it out");
  for (int64_t i = 0; i < length; ++i) {
    const int64_t id = sample.input_ids[i];
    const bool past_table = options.vocab_size > 0 && id >= options.vocab_size && sample.token_types[i] == 0;
    if (id < 0 || past_table) {
      Fail(
          "token {} has id {}, but the vocabulary has {} entries (vocab_size of config.json); do the data belong to "
          "this model?",
          i, id, options.vocab_size);
    }
  }
}

void LengthLimit::Add(Sample sample, std::vector<Sample>& samples) {
  const int64_t length = static_cast<int64_t>(sample.input_ids.size()), limit = options_.max_length;
  ++all_;
  if (limit == 0 || length <= limit) {
    samples.push_back(std::move(sample));
    return;
  }
  ++longer_;
  if (length > longest_) {
    longest_ = length;
    longest_source_ = sample.source;
  }
  if (options_.longer == LongSamples::kRefuse) return;
  const auto last = std::find_if(sample.token_types.rbegin(), sample.token_types.rend(), [](auto t) { return t != 0; });
  const int64_t pictures_end = sample.token_types.rend() - last;
  if (pictures_end > limit) {
    Fail(
        "its pictures end at token {}, past the limit of {}, and no picture is cut; raise --max-seq-len to that, or "
        "take the sample out",
        pictures_end, limit);
  }
  samples.push_back(Part(sample, 0, limit));
  if (options_.longer == LongSamples::kTruncate) return;
  const bool repeats_bos = options_.bos >= 0 && sample.input_ids[0] == options_.bos;
  const int64_t step = limit - (repeats_bos ? 1 : 0);
  if (step < 1) Fail("a limit of {} leaves no room after <bos>; raise --max-seq-len", limit);
  int64_t number = 1;
  for (int64_t begin = limit; begin < length; begin += step) {
    Sample& part = samples.emplace_back(Part(sample, begin, std::min(length, begin + step)));
    if (repeats_bos) PutInFront(options_.bos, part);
    part.source = fmt::format("{}, part {}", sample.source, ++number);
  }
}

void LengthLimit::Check(std::string_view place) const {
  if (longer_ == 0 || options_.longer != LongSamples::kRefuse) return;
  Fail(
      "{}: {} of {} samples {} longer than the limit of {} tokens, the longest, {}, has {}; --max-seq-len {} takes "
      "all, --truncate or --chunk shortens them",
      place, longer_, all_, longer_ == 1 ? "is" : "are", options_.max_length, longest_source_, longest_, longest_);
}

std::string LengthLimit::Summary() const {
  if (longer_ == 0 || options_.longer == LongSamples::kRefuse) return "";
  return fmt::format("{} of {} samples {} {} tokens", longer_, all_,
                     options_.longer == LongSamples::kTruncate ? "cut to" : "split into parts of", options_.max_length);
}

}  // namespace circlet
