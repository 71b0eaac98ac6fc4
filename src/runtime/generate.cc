#include "circlet/runtime/generate.h"

#include <algorithm>
#include <chrono>

#include "circlet/base/error.h"
#include "runtime/units.h"

namespace circlet::runtime {
namespace {

constexpr std::string_view kReplacement = "\xef\xbf\xbd";  // what a character whose bytes are not all there is shown as

// The text so far, handed out as far as no later token can change it.
class Saying {
 public:
  Saying(const Tokenizer& tokenizer, const GenerateOptions& options) : tokenizer_(tokenizer), options_(options) {}

  // Whether a stop string came; `ids` are all so far.
  bool Take(std::span<const int64_t> ids) {
    text_ = tokenizer_.Decode(ids, /*skip_special=*/true);
    size_t first = std::string::npos;
    for (const std::string& stop : options_.stop_strings)
      if (!stop.empty()) first = std::min(first, text_.find(stop));
    if (first == std::string::npos) return false;
    text_.resize(first);
    return true;
  }

  // False: the listener has had enough. At the end all is certain.
  bool Say(bool end) {
    const size_t certain = end ? text_.size() : Certain();
    if (certain <= said_) return true;
    const std::string_view piece = std::string_view(text_).substr(said_, certain - said_);
    said_ = certain;
    return !options_.said || options_.said(piece);
  }
  const std::string& Text() const { return text_; }

 private:
  // Ahead of half a character, and of what a stop string may begin with.
  size_t Certain() const {
    size_t certain = text_.size();
    while (std::string_view(text_).substr(0, certain).ends_with(kReplacement)) certain -= kReplacement.size();
    for (const std::string& stop : options_.stop_strings)
      for (size_t begun = std::min(stop.size(), text_.size()); begun > 0; --begun)
        if (text_.ends_with(std::string_view(stop).substr(0, begun))) {
          certain = std::min(certain, text_.size() - begun);
          break;
        }
    return certain;
  }

  const Tokenizer& tokenizer_;
  const GenerateOptions& options_;
  std::string text_;
  size_t said_ = 0;
};

double SecondsSince(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

Generation Generate(Session& session, const Tokenizer& tokenizer, const Sample& prompt,
                    const GenerateOptions& options) {
  if (!session.Facts().decodes && options.max_new_tokens > 1) Fail("the model {}", kNoDecoding);
  Sampler sampler(options.sampling);
  Saying saying(tokenizer, options);
  Generation made;
  std::vector<int64_t> sequence = prompt.input_ids;
  auto begin = std::chrono::steady_clock::now(), step = begin;
  session.Prefill(prompt);
  while (static_cast<int64_t>(made.ids.size()) < options.max_new_tokens) {
    const int64_t id = sampler.Next(ValuesOf(session.Logits()), sequence);
    made.ids.push_back(id);
    sequence.push_back(id);
    if (made.ids.size() == 1) {
      made.prefill_seconds = SecondsSince(begin);
      begin = std::chrono::steady_clock::now();
    } else {
      const double seconds = SecondsSince(step);
      made.fastest_step = made.ids.size() == 2 ? seconds : std::min(made.fastest_step, seconds);
    }
    if (std::ranges::find(options.stop_ids, id) != options.stop_ids.end()) {
      made.reason = StopReason::kStopId;
      break;
    }
    if (saying.Take(made.ids)) {
      made.reason = StopReason::kStopString;
      break;
    }
    if (!saying.Say(/*end=*/false)) {
      made.reason = StopReason::kInterrupted;
      break;
    }
    if (static_cast<int64_t>(made.ids.size()) == options.max_new_tokens) break;
    if (session.Length() == session.Facts().context) {
      made.reason = StopReason::kContextFull;
      break;
    }
    step = std::chrono::steady_clock::now();
    session.Decode(id);
  }
  if (!made.ids.empty()) made.decode_seconds = SecondsSince(begin);
  saying.Say(/*end=*/true);
  made.text = saying.Text();
  return made;
}

std::string Describe(const Generation& generation, const ModelFacts& facts) {
  switch (generation.reason) {
    case StopReason::kStopId:
      return fmt::format("stop id {}", generation.ids.back());
    case StopReason::kStopString:
      return "stop string";
    case StopReason::kMaxNewTokens:
      return fmt::format("{} new tokens", generation.ids.size());
    case StopReason::kContextFull:
      return fmt::format("the context of {} positions is full", facts.context);
    case StopReason::kInterrupted:
      return "interrupted";
  }
  return "";
}

}  // namespace circlet::runtime
