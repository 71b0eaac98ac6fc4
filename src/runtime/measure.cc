#include "circlet/runtime/measure.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "circlet/report/terminal.h"
#include "circlet/runtime/prompts.h"
#include "pipeline/gemma4/agreement.h"
#include "pipeline/gemma4/captions.h"
#include "pipeline/gemma4/perplexity.h"
#include "pipeline/gemma4/tails.h"
#include "pipeline/report.h"
#include "pipeline/units.h"
#include "preprocess/data_lines.h"
#include "runtime/units.h"

namespace circlet::runtime {
namespace {

using gemma4::ItemAgreement;
using gemma4::TailPair;
using gemma4::Tails;
using gemma4::WindowLoss;
using nlohmann::json;

// What both say behind each position from `first` on, one prefill each. Without a reference the session stands for it
// too.
Tails Followed(Session& session, Session* reference, const Sample& sample, int64_t first) {
  session.Prefill(sample);
  if (reference != nullptr) reference->Prefill(sample);
  const auto count = static_cast<int64_t>(sample.input_ids.size());
  Tails tails(count);
  for (int64_t position = first; position < count; ++position) {
    const Tensor own = Widened(session.Logits(position));
    const Tensor other = reference == nullptr ? own : Widened(reference->Logits(position));
    if (other.GetShape() != own.GetShape())
      Fail("one model has a vocabulary of {}, the other one of {}; compare models of one kind", own.GetShape()[-1],
           other.GetShape()[-1]);
    gemma4::Follow(other, own, position, 0, sample.input_ids, tails);
  }
  return tails;
}

// From `first` on, so that a prompt does not count.
WindowLoss LossFrom(const Tails& tails, int64_t first) {
  return gemma4::LossOf(Tails(tails.begin() + first, tails.end()));
}

struct Sums {
  std::vector<WindowLoss> losses;
  std::vector<ItemAgreement> agreements;
  void Add(const Tails& tails, int64_t first) {
    losses.push_back(LossFrom(tails, first));
    agreements.push_back(gemma4::AgreementOf(tails, first));
  }
};

// The conversation up to its last turn, which must be the model's, and the whole; the tokens between are the answer.
struct Answered {
  Sample whole;
  int64_t answer = 0;
};
std::vector<Answered> LoadAnswers(const std::filesystem::path& path, const Processor& processor,
                                  const ModelFacts& facts) {
  constexpr LineForm kChatLine{
      R"({"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]})", ""};
  std::vector<Answered> answers;
  const DataFile data = ReadDataFile(path);
  ForEachLine(
      data,
      [&](const JsonObject& object, const DataLine& line) {
        Within(line.place, [&] {
          if (!object.Has("messages")) Fail("has no \"messages\"; --eval-chat takes conversations");
          auto whole = nlohmann::ordered_json::parse(line.text);
          nlohmann::ordered_json& messages = whole["messages"];
          if (!messages.is_array() || messages.size() < 2 || !messages.back().is_object() ||
              messages.back().value("role", "") != std::string("assistant"))
            Fail("the last turn is not the model's (role \"assistant\"), so there is no answer to be measured");
          nlohmann::ordered_json asked = whole;
          asked["messages"].erase(messages.size() - 1);
          asked["add_generation_prompt"] = true;
          whole["add_generation_prompt"] = false;
          const auto sample = [&](const nlohmann::ordered_json& conversation) {
            return ChatPromptSample(conversation.dump(), processor, facts, data.directory, line.source);
          };
          Answered answered{sample(whole), 0};
          const std::vector<int64_t> prompt = sample(asked).input_ids;
          const std::vector<int64_t>& ids = answered.whole.input_ids;
          if (prompt.size() >= ids.size() || !std::equal(prompt.begin(), prompt.end(), ids.begin()))
            Fail(
                "the chat template writes another prompt once the answer stands there; its tokens cannot be told "
                "apart");
          answered.answer = static_cast<int64_t>(prompt.size());
          answers.push_back(std::move(answered));
        });
      },
      kChatLine);
  return answers;
}

// Before anything is run on it.
void Note(const std::filesystem::path& file, const std::string& overlap, const MeasureOptions& options,
          Measured& measured) {
  if (overlap.empty()) return;
  measured.overlaps.push_back(fmt::format("{}: {}", file.string(), overlap));
  if (options.strict)
    Fail("{}; figures of such data flatter: take it out, or leave out --strict", measured.overlaps.back());
}

// Pictures that no unit is made for are left out and told.
Captions MeasureCaptions(Session& session, Session* reference, const Processor& processor,
                         const MeasureOptions& options, Measured& measured, Progress& progress) {
  const ModelFacts& facts = session.Facts();
  const std::vector<CaptionTask> tasks =
      LoadCaptions(options.captions, processor, {.vocab_size = facts.vocabulary, .placeholders = facts.placeholders});
  Note(options.captions, OverlapOf(tasks, options.calibrated_on), options, measured);
  const int64_t turn_end = processor.tokenizer.RequireId("<turn|>");
  const std::vector<int> stops(facts.stops.begin(), facts.stops.end());
  Captions captions;
  std::vector<ItemAgreement> agreements;
  progress.Begin("captions", static_cast<int64_t>(tasks.size()));
  for (const CaptionTask& task : tasks) {
    Sample sample = task.prompt;
    gemma4::Sequence sequence{.answer = static_cast<int64_t>(sample.input_ids.size())};
    const std::vector<int64_t> answer = processor.tokenizer.Encode(task.caption, /*add_special=*/false);
    sample.input_ids.insert(sample.input_ids.end(), answer.begin(), answer.end());
    sample.input_ids.push_back(turn_end);
    sequence.ids = sample.input_ids;
    progress.Advance();
    if (const std::string fault = session.PictureFault(sample); !fault.empty()) {
      measured.left_out.push_back(fmt::format("{}: {}", sample.source, fault));
      continue;
    }
    const Tails tails =
        Within(sample.source, [&] { return Followed(session, reference, sample, sequence.FirstRead()); });
    ++captions.pictures;
    captions.quantized_exact += gemma4::Answers(sequence, stops, tails, &TailPair::quantized);
    captions.float_exact += gemma4::Answers(sequence, stops, tails, &TailPair::reference);
    agreements.push_back(gemma4::AgreementOf(tails, sequence.FirstRead()));
  }
  if (captions.pictures == 0)
    Fail("{}: none of the {} pictures fits; the first: {}", options.captions.string(), tasks.size(),
         measured.left_out.front());
  captions.agreement = gemma4::AgreementOf(agreements);
  return captions;
}

std::string PerplexityLine(const char* what, const Perplexity& perplexity, const std::optional<Agreement>& agreement,
                           const std::string& name) {
  const auto figure = [](double value, double error) { return WithError(fmt::format("{:.4f}", value), error); };
  std::string text = fmt::format("{}: ", what);
  if (agreement) text += fmt::format("reference {}, ", figure(perplexity.float_value, perplexity.float_error));
  text += fmt::format("{} {} ({} sequences, {} tokens)\n", name,
                      figure(perplexity.quantized_value, perplexity.quantized_error), perplexity.windows,
                      perplexity.tokens);
  if (agreement) text += fmt::format("  {}\n", AgreementText(*agreement, "reference", name));
  return text;
}

json PerplexityJson(const Perplexity& perplexity, const std::optional<Agreement>& agreement) {
  json made{{"sequences", perplexity.windows},
            {"tokens", perplexity.tokens},
            {"value", Number(perplexity.quantized_value)},
            {"standard_error", Number(perplexity.quantized_error)}};
  if (!agreement) return made;
  made["reference"] = Number(perplexity.float_value);
  made["log_loss_difference"] = Number(perplexity.log_loss_difference.value);
  made["log_loss_difference_standard_error"] = Number(perplexity.log_loss_difference.standard_error);
  made["agreement"] = ToJson(*agreement);
  return made;
}

}  // namespace

DataHashes CalibratedOn(const std::filesystem::path& directory) {
  const nlohmann::json tree = ReadJson(directory / kPipelineFile);
  const auto hashes = JsonObject(tree, (directory / kPipelineFile).string()).OptionalObject("calibrated_on");
  if (!hashes) return {};
  const auto lines = hashes->Required<std::vector<std::string>>("lines"),
             pictures = hashes->Required<std::vector<std::string>>("pictures");
  return {{lines.begin(), lines.end()}, {pictures.begin(), pictures.end()}};
}

Measured Measure(Session& session, Session* reference, const Processor& processor, const MeasureOptions& options) {
  Measured measured;
  Progress progress(options.progress);
  const auto settle = [&](const Sums& sums, std::optional<Perplexity>& perplexity,
                          std::optional<Agreement>& agreement) {
    perplexity = gemma4::PerplexityOf(sums.losses);
    if (reference != nullptr) agreement = gemma4::AgreementOf(sums.agreements);
  };
  if (!options.text.empty()) {
    const std::string text = ReadFile(options.text);
    Note(options.text, OverlapOf(text, options.calibrated_on), options, measured);
    std::vector<std::vector<int64_t>> windows = Within(options.text.string(), [&] {
      return PerplexityWindows(text, processor.tokenizer, gemma4::kWindow, session.Facts().bos);
    });
    if (options.windows && *options.windows < std::ssize(windows)) windows.resize(*options.windows);
    progress.Begin("text", std::ssize(windows));
    Sums sums;
    for (std::vector<int64_t>& window : windows) {
      Sample sample{.source = options.text.string()};
      sample.input_ids = std::move(window);
      Within(sample.source, [&] { sums.Add(Followed(session, reference, sample, 0), 0); });
      progress.Advance();
    }
    settle(sums, measured.perplexity, measured.agreement);
  }
  if (!options.chats.empty()) {
    const std::vector<Answered> chats = LoadAnswers(options.chats, processor, session.Facts());
    std::string turns;
    for (const Answered& chat : chats) turns += processor.tokenizer.Decode(chat.whole.input_ids, true) + "\n";
    Note(options.chats, OverlapOf(turns, options.calibrated_on), options, measured);
    progress.Begin("chats", std::ssize(chats));
    Sums sums;
    for (const Answered& chat : chats) {
      progress.Advance();
      if (const std::string fault = session.PictureFault(chat.whole); !fault.empty()) {
        measured.left_out.push_back(fmt::format("{}: {}", chat.whole.source, fault));
        continue;
      }
      const int64_t first = chat.answer - 1;
      Within(chat.whole.source, [&] { sums.Add(Followed(session, reference, chat.whole, first), first); });
    }
    if (sums.losses.empty())
      Fail("{}: none of the pictures fits; the first: {}", options.chats.string(), measured.left_out.front());
    settle(sums, measured.chat_perplexity, measured.chat_agreement);
  }
  if (!options.captions.empty())
    measured.captions = MeasureCaptions(session, reference, processor, options, measured, progress);
  return measured;
}

std::string MeasuredText(const Measured& measured, const std::string& name) {
  std::string text;
  if (measured.perplexity) text += PerplexityLine("perplexity", *measured.perplexity, measured.agreement, name);
  if (measured.chat_perplexity)
    text += PerplexityLine("perplexity of answers", *measured.chat_perplexity, measured.chat_agreement, name);
  if (measured.captions)
    text +=
        fmt::format("captions: {} {} of {}\n", name, measured.captions->quantized_exact, measured.captions->pictures);
  for (const std::string& overlap : measured.overlaps) text += overlap + "\n";
  if (!measured.left_out.empty())
    text += fmt::format("left out: {}, the first: {}\n", measured.left_out.size(), measured.left_out.front());
  return text;
}

std::string MeasuredJson(const Measured& measured, const std::string& name) {
  json made{{"schema_version", 1}, {"model", name}};
  if (measured.perplexity) made["perplexity"] = PerplexityJson(*measured.perplexity, measured.agreement);
  if (measured.chat_perplexity)
    made["chat_perplexity"] = PerplexityJson(*measured.chat_perplexity, measured.chat_agreement);
  if (measured.captions)
    made["captions"] = {{"pictures", measured.captions->pictures}, {"exact", measured.captions->quantized_exact}};
  made["overlaps"] = measured.overlaps;
  made["left_out"] = measured.left_out;
  return DumpJson(made);
}

Compared Compare(Session& first, Session& second, const Tokenizer& tokenizer, const Sample& prompt,
                 const GenerateOptions& options, int64_t compared_tokens) {
  Compared compared{.source = prompt.source,
                    .prompt = tokenizer.Decode(prompt.input_ids, /*skip_special=*/true),
                    .pictures = prompt.pixel_values.Empty() ? 0 : prompt.pixel_values.GetShape()[0],
                    .first = Generate(first, tokenizer, prompt, options),
                    .second = Generate(second, tokenizer, prompt, options)};
  const std::vector<int64_t>&a = compared.first.ids, &b = compared.second.ids;
  const auto [at, other] = std::ranges::mismatch(a, b);
  compared.same_tokens = at - a.begin();
  compared.diverges = at != a.end() || other != b.end();
  Sample forced = prompt;
  forced.input_ids.insert(forced.input_ids.end(), b.begin(), b.begin() + std::min(std::ssize(b), compared_tokens));
  // The last token of a full context has no place behind it.
  const int64_t most = std::min(first.Facts().context, second.Facts().context);
  if (std::ssize(forced.input_ids) > most) forced.input_ids.resize(most);
  const int64_t from = std::ssize(prompt.input_ids) - 1;
  const ItemAgreement agreement = gemma4::AgreementOf(Followed(first, &second, forced, from), from);
  compared.tokens = agreement.tokens;
  compared.same_top = agreement.same_top;
  compared.divergence = agreement.divergence;
  return compared;
}

Agreement AgreementOf(std::span<const Compared> all) {
  std::vector<ItemAgreement> items;
  for (const Compared& one : all) items.push_back({one.tokens, one.same_top, one.divergence});
  return gemma4::AgreementOf(items);
}

}  // namespace circlet::runtime
