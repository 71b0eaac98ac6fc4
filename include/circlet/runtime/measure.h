#pragma once

// How good a session's predictions are, alone or beside another's.

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "circlet/pipeline/quantize.h"
#include "circlet/preprocess/overlap.h"
#include "circlet/preprocess/samples.h"
#include "circlet/report/statistics.h"
#include "circlet/runtime/generate.h"
#include "circlet/runtime/session.h"

namespace circlet::runtime {

struct MeasureOptions {
  // Each may be empty. Texts are cut into windows as `quantize --eval-text` does; of chats, lines of calibration data
  // whose last turn is the model's, only the tokens of that turn count.
  std::filesystem::path text, captions, chats;
  std::optional<int64_t> windows;  // only the first of them
  // What the model was calibrated on; data that stands there too is told, with `strict` an Error.
  DataHashes calibrated_on;
  bool strict = false;
  std::FILE* progress = nullptr;
};

// Of an output directory.
DataHashes CalibratedOn(const std::filesystem::path& directory);

struct Measured {
  // Of each the float figures are the reference's, those called quantized the session's; NaN without a reference.
  std::optional<Perplexity> perplexity, chat_perplexity;
  std::optional<Agreement> agreement, chat_agreement;
  std::optional<Captions> captions;
  std::vector<std::string> overlaps;  // "heldout.txt: 3 of 812 lines also stand in the calibration data ..."
  std::vector<std::string> left_out;  // captions and chats whose picture the session has no units for, with the reason
};

// Runs each sequence once as a prompt. `reference` may be null. Throws Error for sequences longer than the context.
Measured Measure(Session& session, Session* reference, const Processor& processor, const MeasureOptions& options);

// A line each; `name` stands for the session.
std::string MeasuredText(const Measured& measured, const std::string& name);
std::string MeasuredJson(const Measured& measured, const std::string& name);

// One prompt through two models.
struct Compared {
  std::string source, prompt;  // the prompt's text
  int64_t pictures = 0;
  Generation first, second;
  int64_t same_tokens = 0;  // that both answers begin with
  bool diverges = false;    // they differ behind those
  // Along the second's answer: its own predictions against the first's.
  int64_t tokens = 0, same_top = 0;
  double divergence = 0;  // sum of KL(second || first), nats
};
// Predictions are compared along the first `compared_tokens` of the answer.
Compared Compare(Session& first, Session& second, const Tokenizer& tokenizer, const Sample& prompt,
                 const GenerateOptions& options, int64_t compared_tokens = INT64_MAX);
// Over all prompts; each is a cluster.
Agreement AgreementOf(std::span<const Compared> all);

// Prompts through two models, the one that differs most first.
struct Comparison {
  std::string first, second;  // what the models are called
  std::vector<Compared> prompts;
};
// Puts them in order.
Comparison ComparisonOf(std::string first, std::string second, std::vector<Compared> prompts);
// Of prompts of text and of those with pictures as well, where there are both.
std::string ComparisonText(const Comparison& comparison);
std::string ComparisonJson(const Comparison& comparison);
// A page that needs nothing but itself: both texts side by side, what follows their common beginning marked.
std::string ComparisonHtml(const Comparison& comparison);

}  // namespace circlet::runtime
