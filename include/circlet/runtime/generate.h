#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "circlet/preprocess/tokenizer.h"
#include "circlet/runtime/sampler.h"
#include "circlet/runtime/session.h"

namespace circlet::runtime {

struct GenerateOptions {
  Sampling sampling;
  int64_t max_new_tokens = 256;
  std::vector<int64_t> stop_ids;
  std::vector<std::string> stop_strings;  // the text ends in front of the first that it comes to hold
  // Called with each piece of text as soon as it is certain; false ends the generation. May be empty.
  std::function<bool(std::string_view piece)> said;
};

enum class StopReason { kStopId, kStopString, kMaxNewTokens, kContextFull, kInterrupted };

struct Generation {
  std::vector<int64_t> ids;  // with the stop id
  std::string text;          // without special tokens
  StopReason reason = StopReason::kMaxNewTokens;
  double prefill_seconds = 0, decode_seconds = 0;  // to the first token; of all others
  double fastest_step = 0;                         // seconds of the fastest of these; 0 without
};

// Prefill, then token by token.
Generation Generate(Session& session, const Tokenizer& tokenizer, const Sample& prompt, const GenerateOptions& options);

// "stop id 19", "the context of 288 positions is full; export with a larger --max-seq-len" ...
std::string Describe(const Generation& generation, const ModelFacts& facts);

}  // namespace circlet::runtime
