#include "circlet/runtime/generate.h"

#include <fmt/core.h>

#include <memory>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/io/json.h"
#include "circlet/runtime/prompts.h"
#include "cli/commands.h"
#include "cli/flags.h"
#include "cli/stop.h"

namespace circlet {
namespace {

using nlohmann::json;

struct GenerateFlags {
  std::string directory;
  std::optional<std::string> prompt;
  std::string prompt_file, system, tools;
  std::vector<std::string> images, stops;
  bool chat = false, as_json = false, timings = false;
  std::optional<double> temperature, top_p, repetition_penalty;
  std::optional<int64_t> top_k;
  uint64_t seed = 0;
  int64_t max_new_tokens = 256, context = 0;
};

void Warn(const std::string& text) { fmt::print(stderr, "circlet: {}\n", text); }

// What the model asks for, and the flags instead.
runtime::Sampling SamplingOf(const GenerateFlags& flags) {
  std::vector<std::string> notes;
  runtime::Sampling sampling = runtime::LoadSampling(flags.directory, notes);
  for (const std::string& note : notes) Warn(note);
  sampling.temperature = flags.temperature.value_or(sampling.temperature);
  sampling.top_k = flags.top_k.value_or(sampling.top_k);
  sampling.top_p = flags.top_p.value_or(sampling.top_p);
  sampling.repetition_penalty = flags.repetition_penalty.value_or(sampling.repetition_penalty);
  sampling.seed = flags.seed;
  return sampling;
}

std::string Conversation(const GenerateFlags& flags) {
  json messages = json::array();
  if (!flags.system.empty()) messages.push_back({{"role", "system"}, {"content", flags.system}});
  for (const json& message : UserTurn(*flags.prompt, flags.images)) messages.push_back(message);
  json conversation{{"messages", messages}};
  if (!flags.tools.empty()) conversation["tools"] = ReadJson(flags.tools);
  return conversation.dump();
}

std::vector<Sample> PromptsOf(const GenerateFlags& flags, const Processor& processor,
                              const runtime::ModelFacts& facts) {
  if (flags.prompt.has_value() == !flags.prompt_file.empty()) Fail("give a --prompt or a --prompt-file");
  if (!flags.prompt_file.empty()) {
    if (flags.chat || !flags.system.empty() || !flags.tools.empty() || !flags.images.empty())
      Fail(
          "--prompt-file: its lines say whether they are chats, and hold system turns, tools and pictures; leave out "
          "--chat, --system, --tools and --image");
    return runtime::LoadPrompts(flags.prompt_file, processor, facts);
  }
  if (flags.chat)
    return {
        runtime::ChatPromptSample(Conversation(flags), processor, facts, std::filesystem::current_path(), "--prompt")};
  if (!flags.system.empty() || !flags.tools.empty() || !flags.images.empty())
    Fail("--system, --tools and --image are parts of a conversation; give --chat too");
  return {runtime::TextPrompt(*flags.prompt, processor, facts, "--prompt")};
}

std::string TimingsText(const runtime::Generation& made, int64_t prompt) {
  const auto others = static_cast<double>(made.ids.size()) - 1;
  return fmt::format("{} tokens in {:.3f} s ({:.1f} a second), then {} in {:.3f} s ({:.1f} a second)", prompt,
                     made.prefill_seconds, static_cast<double>(prompt) / made.prefill_seconds, others,
                     made.decode_seconds, made.decode_seconds > 0 ? others / made.decode_seconds : 0);
}

int RunGenerate(const GenerateFlags& flags) {
  const std::unique_ptr<runtime::Session> session = runtime::OpenSession(flags.directory, {.context = flags.context});
  const runtime::ModelFacts& facts = session->Facts();
  const Processor processor = LoadProcessor(flags.directory);
  const std::vector<Sample> prompts = PromptsOf(flags, processor, facts);
  runtime::GenerateOptions options{.sampling = SamplingOf(flags),
                                   .max_new_tokens = flags.max_new_tokens,
                                   .stop_ids = facts.stops,
                                   .stop_strings = flags.stops};
  options.said = [&](std::string_view piece) {
    if (!flags.as_json) {
      std::fwrite(piece.data(), 1, piece.size(), stdout);
      std::fflush(stdout);
    }
    return !StopAsked();
  };
  json results = json::array();
  for (const Sample& prompt : prompts) {
    if (StopAsked()) break;
    if (!flags.as_json && prompts.size() > 1) fmt::print("== {}\n", prompt.source);
    const auto count = static_cast<int64_t>(prompt.input_ids.size());
    const runtime::Generation made =
        Within(prompt.source, [&] { return runtime::Generate(*session, processor.tokenizer, prompt, options); });
    if (!flags.as_json) fmt::print("\n");
    if (flags.timings) Warn(TimingsText(made, count));
    const std::string why = runtime::Describe(made, facts);
    if (!flags.as_json && (made.reason == runtime::StopReason::kContextFull || prompts.size() == 1))
      Warn(fmt::format("{} + {} tokens; {}", count, made.ids.size(), why));
    results.push_back({{"source", prompt.source},
                       {"prompt_tokens", count},
                       {"ids", made.ids},
                       {"text", made.text},
                       {"raw_text", processor.tokenizer.Decode(made.ids, /*skip_special=*/false)},
                       {"stopped_by", why}});
  }
  if (flags.as_json) fmt::print("{}", DumpJson({{"schema_version", 1}, {"results", results}}));
  return StopAsked() ? 130 : 0;
}

}  // namespace

void AddGenerate(CLI::App& app, std::function<int()>& command) {
  auto flags = std::make_shared<GenerateFlags>();
  CLI::App* generate =
      app.add_subcommand("generate", "Let the exported files, or a float checkpoint, go on with a prompt");
  generate->footer(
      "Example:\n  circlet generate out/ --prompt 'It is a truth' --max-new-tokens 40 --temperature 0\n"
      "  circlet generate out/ --chat --prompt 'What is in the picture?' --image cat.png");
  generate->add_option("DIR", flags->directory, "Output directory of quantize, or a checkpoint")->required();
  generate->option_defaults()->group("Prompt");
  generate->add_option("--prompt", flags->prompt, "Text to go on with; with --chat what the user says");
  generate
      ->add_option("--prompt-file", flags->prompt_file,
                   "Many of them, JSON lines: {\"prompt\": ...}, or lines of calibration data")
      ->type_name("FILE");
  generate->add_flag("--chat", flags->chat, "Put the prompt into the model's chat template");
  generate->add_option("--system", flags->system, "System turn in front of it");
  generate->add_option("--tools", flags->tools, "Functions that the model may call, a JSON list")->type_name("FILE");
  generate->add_option("--image", flags->images, "Picture in front of the text (repeatable)")->type_name("FILE");
  generate->option_defaults()->group("Answer");
  generate->add_option("--max-new-tokens", flags->max_new_tokens, "Longest answer")
      ->check(WholeNumber(1, int64_t{1} << 30))
      ->capture_default_str();
  generate->add_option("--temperature", flags->temperature, "0: always the likeliest token (default: the model's)")
      ->check(Number(0, 1e6));
  generate->add_option("--top-k", flags->top_k, "Draw among so many; 0: all (default: the model's)")
      ->check(WholeNumber(0, int64_t{1} << 30));
  generate->add_option("--top-p", flags->top_p, "Draw among the likeliest of this sum (default: the model's)")
      ->check(Number(0, 1));
  generate
      ->add_option("--repetition-penalty", flags->repetition_penalty,
                   "Makes tokens less likely that stand there already (default: the model's)")
      ->check(Number(0, 1e6));
  generate->add_option("--seed", flags->seed, "Of the drawing")
      ->check(WholeNumber(0, INT64_MAX))
      ->capture_default_str();
  generate->add_option("--stop", flags->stops, "Text that ends the answer (repeatable)")->type_name("TEXT");
  generate
      ->add_option("--context", flags->context,
                   "Positions of a checkpoint's caches (default 2048); files have those of their export")
      ->check(WholeNumber(2, int64_t{1} << 20));
  generate->add_flag("--json", flags->as_json, "Ids and texts as JSON");
  generate->add_flag("--timings", flags->timings, "Tokens a second");
  generate->callback([flags, &command] { command = [flags] { return RunGenerate(*flags); }; });
}

}  // namespace circlet
