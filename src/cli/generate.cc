#include "circlet/runtime/generate.h"

#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "circlet/runtime/measure.h"
#include "circlet/runtime/prompts.h"
#include "circlet/settings/settings.h"
#include "cli/commands.h"
#include "cli/flags.h"
#include "cli/stop.h"
#include "preprocess/utf8.h"

namespace circlet {
namespace {

using nlohmann::json;

struct GenerateFlags {
  std::string directory;
  std::optional<std::string> prompt;
  std::string prompt_file, system, tools, beside, report;
  std::vector<std::string> images, stops;
  bool chat = false, as_json = false, timings = false;
  std::optional<double> temperature, top_p, repetition_penalty;
  std::optional<int64_t> top_k;
  uint64_t seed = 0;
  std::optional<int64_t> max_new_tokens, compared_tokens;
  int64_t context = 0;
  QuantizeOptions simulation;
  std::optional<std::string> dialect;
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

// A part of a conversation, which is UTF-8.
const std::string& Utf8(const std::string& text, std::string_view part) {
  if (const size_t at = FirstNonUtf8(text); at != std::string::npos)
    Fail("{}: byte {} (0x{:02X}) is not UTF-8; convert the text", part, at, static_cast<uint8_t>(text[at]));
  return text;
}

// Functions that the model may call, of a file.
json ToolsOf(const std::string& path) {
  json tools = ReadJson(path);
  if (!tools.is_array() || !std::ranges::all_of(tools, [](const json& tool) { return tool.is_object(); }))
    Fail("{}: expected a list of objects, such as [{{\"type\": \"function\", \"function\": {{...}}}}]", path);
  return tools;
}

std::string Conversation(const GenerateFlags& flags) {
  json messages = json::array();
  if (!flags.system.empty()) messages.push_back({{"role", "system"}, {"content", Utf8(flags.system, "--system")}});
  for (const std::string& image : flags.images) Utf8(image, "--image");
  for (const json& message : UserTurn(Utf8(*flags.prompt, "--prompt"), flags.images)) messages.push_back(message);
  json conversation{{"messages", messages}};
  if (!flags.tools.empty()) conversation["tools"] = ToolsOf(flags.tools);
  return conversation.dump();
}

// The conversation of the flags. A part that the model's template passes over is told.
Sample ChatOf(const GenerateFlags& flags, const Processor& processor, const runtime::ModelFacts& facts) {
  const auto sample_of = [&](const GenerateFlags& of) {
    return runtime::ChatPromptSample(Conversation(of), processor, facts, std::filesystem::current_path(), "--prompt");
  };
  Sample sample = sample_of(flags);
  for (const auto& [part, name] : {std::pair{&GenerateFlags::tools, "--tools"}, {&GenerateFlags::system, "--system"}}) {
    if ((flags.*part).empty()) continue;
    GenerateFlags without = flags;
    (without.*part).clear();
    if (sample_of(without).input_ids == sample.input_ids)
      Warn(fmt::format("{}: changes nothing; the model's chat template passes it over", name));
  }
  return sample;
}

std::vector<Sample> PromptsOf(const GenerateFlags& flags, const Processor& processor,
                              const runtime::ModelFacts& facts) {
  if (flags.prompt && !flags.prompt_file.empty()) Fail("--prompt and --prompt-file: give one of them");
  if (!flags.prompt && flags.prompt_file.empty()) Fail("give a --prompt or a --prompt-file");
  if (!flags.prompt_file.empty()) {
    if (flags.chat || !flags.system.empty() || !flags.tools.empty() || !flags.images.empty())
      Fail(
          "--prompt-file: its lines say whether they are chats, and hold system turns, tools and pictures; leave out "
          "--chat, --system, --tools and --image");
    return runtime::LoadPrompts(flags.prompt_file, processor, facts);
  }
  if (flags.chat) return {ChatOf(flags, processor, facts)};
  if (!flags.system.empty() || !flags.tools.empty() || !flags.images.empty())
    Fail("--system, --tools and --image are parts of a conversation; give --chat too");
  return Within("--prompt",
                [&] { return std::vector{runtime::TextPrompt(*flags.prompt, processor, facts, "--prompt")}; });
}

// The fastest step beside the fastest plain read of its weights: what both cost when nothing else runs.
std::string BandwidthText(const runtime::Generation& made, runtime::Session& session) {
  if (made.fastest_step == 0) return "";
  runtime::Session::WeightRead read = session.ReadWeights();
  if (read.bytes == 0) return "";
  for (int tries = 0; tries < 8; ++tries) read.seconds = std::min(read.seconds, session.ReadWeights().seconds);
  return fmt::format(
             "; the fastest in {:.2f} ms, {:.2f} times the {:.2f} ms that its {:.1f} MB of weights take to read",
             1e3 * made.fastest_step, made.fastest_step / read.seconds, 1e3 * read.seconds,
             1e-6 * static_cast<double>(read.bytes)) +
         fmt::format(": {:.0f} % of the bandwidth", 100 * read.seconds / made.fastest_step);
}

std::string TimingsText(const runtime::Generation& made, int64_t prompt, runtime::Session& session) {
  const auto others = static_cast<double>(made.ids.size()) - 1;
  return fmt::format("{} tokens in {:.3f} s ({:.1f} a second), then {} in {:.3f} s ({:.1f} a second)", prompt,
                     made.prefill_seconds, static_cast<double>(prompt) / made.prefill_seconds, others,
                     made.decode_seconds, made.decode_seconds > 0 ? others / made.decode_seconds : 0) +
         BandwidthText(made, session);
}

// Whether flags ask for the simulation of a checkpoint.
bool Simulates(const GenerateFlags& flags) {
  const QuantizeOptions& run = flags.simulation;
  return !run.recipe.empty() || !run.data.empty() || !run.qparams.empty() || !run.set.empty() || flags.dialect;
}

// "out (files)"
std::string NameOf(const std::string& directory, bool simulates) {
  return fmt::format("{} ({})", directory,
                     runtime::IsOutputDirectory(directory) ? "files"
                     : simulates                           ? "simulation"
                                                           : "float");
}

std::unique_ptr<runtime::Session> Open(const GenerateFlags& flags) {
  runtime::SessionOptions options{.context = flags.context};
  if (!Simulates(flags)) return runtime::OpenSession(flags.directory, options);
  options.simulation = flags.simulation;
  if (flags.dialect) options.simulation->dialect = *flags.dialect;
  options.simulation->progress = isatty(STDERR_FILENO) != 0 ? stderr : nullptr;
  std::string notes;
  options.notes = &notes;
  auto session = runtime::OpenSession(flags.directory, options);
  fmt::print(stderr, "{}", notes);
  return session;
}

// What flags leave open and the recipe says.
void TakeFromRecipe(GenerateFlags& flags) {
  GenerationOptions said;
  if (!flags.simulation.recipe.empty()) {
    const Settings recipe = Settings::Load(flags.simulation.recipe, flags.simulation.set);
    said = recipe.generation;
    if (said.model.empty()) said.model = recipe.model.name_or_path;
  }
  if (flags.directory.empty()) flags.directory = said.model;
  if (flags.directory.empty()) Fail("no model: give DIR, an output directory of quantize or a checkpoint");
  if (!flags.simulation.data.empty() && !flags.simulation.qparams.empty())
    Fail("--data and --qparams: either calibrates, or has the grids; give one of them");
  if (Simulates(flags) && runtime::IsOutputDirectory(flags.directory))
    Fail(
        "{}: --recipe, --set, --dialect, --data and --qparams make a simulation of a checkpoint, and these files are "
        "made already; give the checkpoint, or leave them out",
        flags.directory);
  if (!flags.prompt && flags.prompt_file.empty() && !said.prompt.empty()) flags.prompt = said.prompt;
  if (flags.context == 0) flags.context = said.max_seq.value_or(0);
  if (!flags.max_new_tokens) flags.max_new_tokens = said.gen_steps;
  flags.compared_tokens = said.verify_steps;
  for (const std::string& key : said.unused)
    Warn(fmt::format("{}: changes nothing; pictures of any size may stand anywhere in a prompt", key));
}

// Both get the ids of one tokenizer, that of `directory`.
void TellOfAnotherTokenizer(const std::filesystem::path& directory, const std::filesystem::path& beside) {
  constexpr char kFile[] = "tokenizer.json";
  if (Sha256File(directory / kFile) != Sha256File(beside / kFile))
    Warn(fmt::format("{} is another than {}; the ids of the latter are given to both, and make both texts",
                     (beside / kFile).string(), (directory / kFile).string()));
}

int RunBeside(const GenerateFlags& flags, runtime::Session& session, runtime::Session& beside,
              const Processor& processor, const std::vector<Sample>& prompts, runtime::GenerateOptions options) {
  options.said = [](std::string_view) { return !StopAsked(); };
  std::vector<runtime::Compared> all;
  for (const Sample& prompt : prompts) {
    if (StopAsked()) break;
    all.push_back(Within(prompt.source, [&] {
      return runtime::Compare(session, beside, processor.tokenizer, prompt, options,
                              flags.compared_tokens.value_or(INT64_MAX));
    }));
  }
  if (!all.empty()) {
    const runtime::Comparison comparison = runtime::ComparisonOf(
        NameOf(flags.directory, Simulates(flags)), NameOf(flags.beside, /*simulates=*/false), std::move(all));
    fmt::print("{}", flags.as_json            ? runtime::ComparisonJson(comparison)
                     : flags.report == "html" ? runtime::ComparisonHtml(comparison)
                                              : runtime::ComparisonText(comparison));
  }
  return StopAsked() ? 130 : 0;
}

int RunGenerate(GenerateFlags flags) {
  TakeFromRecipe(flags);
  if (flags.beside.empty() && !flags.report.empty()) Fail("--report: is of a comparison; give --beside too");
  if (flags.as_json && flags.report == "html") Fail("--json and --report html: give one of them");
  // Both have as many positions: those of files, if there are any.
  std::unique_ptr<runtime::Session> session, beside;
  if (!flags.beside.empty() && runtime::IsOutputDirectory(flags.beside)) {
    beside = runtime::OpenSession(flags.beside);
    if (flags.context == 0 && !runtime::IsOutputDirectory(flags.directory)) flags.context = beside->Facts().context;
  }
  // A calibration takes its time, so all else is looked at before.
  if (!Simulates(flags)) session = Open(flags);
  const runtime::ModelFacts facts = session != nullptr
                                        ? session->Facts()
                                        : runtime::OpenSession(flags.directory, {.context = flags.context})->Facts();
  const Processor processor = LoadProcessor(flags.directory);
  const std::vector<Sample> prompts = PromptsOf(flags, processor, facts);
  runtime::GenerateOptions options{.sampling = SamplingOf(flags), .stop_ids = facts.stops, .stop_strings = flags.stops};
  options.max_new_tokens = flags.max_new_tokens.value_or(options.max_new_tokens);
  runtime::Sampler{options.sampling};
  if (session == nullptr) session = Open(flags);
  if (!flags.beside.empty()) TellOfAnotherTokenizer(flags.directory, flags.beside);
  if (!flags.beside.empty() && beside == nullptr)
    beside = runtime::OpenSession(flags.beside, {.context = session->Facts().context});
  if (beside != nullptr) return RunBeside(flags, *session, *beside, processor, prompts, options);
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
    std::fflush(stdout);  // ahead of what goes to stderr
    if (flags.timings) Warn(TimingsText(made, count, *session));
    const std::string why = runtime::Describe(made, session->Facts());
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

namespace {

// Reads what the user says until the input ends; the whole conversation is a prompt anew each time, as its template
// wants it.
int RunChat(GenerateFlags flags) {
  TakeFromRecipe(flags);
  const std::unique_ptr<runtime::Session> session = Open(flags);
  const runtime::ModelFacts& facts = session->Facts();
  const Processor processor = LoadProcessor(flags.directory);
  runtime::GenerateOptions options{.sampling = SamplingOf(flags), .stop_ids = facts.stops};
  options.max_new_tokens = flags.max_new_tokens.value_or(options.max_new_tokens);
  options.said = [](std::string_view piece) {
    std::fwrite(piece.data(), 1, piece.size(), stdout);
    std::fflush(stdout);
    return !StopAsked();
  };
  const bool person = isatty(STDIN_FILENO) != 0;
  if (person) Warn("/image FILE puts a picture in front of what you say next, /new begins again, Ctrl-D ends");
  const auto begin = [&] {
    json messages = json::array();
    if (!flags.system.empty()) messages.push_back({{"role", "system"}, {"content", Utf8(flags.system, "--system")}});
    return messages;
  };
  json messages = begin();
  std::vector<std::string> images;
  std::string line;
  while (!StopAsked()) {
    if (person) fmt::print(stderr, "> ");
    if (!std::getline(std::cin, line)) break;
    if (line.empty()) continue;
    if (line == "/new") {
      messages = begin();
      images.clear();
      continue;
    }
    if (line.starts_with("/image ")) {
      images.push_back(line.substr(7));
      continue;
    }
    const std::vector<std::string> pictures = std::exchange(images, {});
    try {
      Utf8(line, "what was said");
      for (const std::string& picture : pictures) Utf8(picture, "/image");
      json asked = messages;
      for (const json& message : UserTurn(line, pictures)) asked.push_back(message);
      const Sample prompt = runtime::ChatPromptSample(json{{"messages", asked}}.dump(), processor, facts,
                                                      std::filesystem::current_path(), "the conversation");
      const runtime::Generation made = runtime::Generate(*session, processor.tokenizer, prompt, options);
      fmt::print("\n");
      std::fflush(stdout);
      if (made.reason == runtime::StopReason::kContextFull || made.reason == runtime::StopReason::kMaxNewTokens)
        Warn(runtime::Describe(made, facts));
      asked.push_back({{"role", "assistant"}, {"content", made.text}});
      messages = std::move(asked);
    } catch (const Error& error) {
      if (!person) throw;
      Warn(error.what());  // the turn did not happen
    }
  }
  return StopAsked() ? 130 : 0;
}

void AddSampling(CLI::App& verb, GenerateFlags& flags) {
  verb.option_defaults()->group("Answer");
  verb.add_option("--max-new-tokens", flags.max_new_tokens, "Longest answer (default 256)")
      ->check(WholeNumber(1, int64_t{1} << 30));
  verb.add_option("--temperature", flags.temperature, "0: always the likeliest token (default: the model's)")
      ->check(Number(0, 1e6));
  verb.add_option("--top-k", flags.top_k, "Draw among so many; 0: all (default: the model's)")
      ->check(WholeNumber(0, int64_t{1} << 30));
  verb.add_option("--top-p", flags.top_p, "Draw among the likeliest of this sum (default: the model's)")
      ->check(Number(0, 1));
  verb.add_option("--repetition-penalty", flags.repetition_penalty,
                  "Makes tokens less likely that stand there already (default: the model's)")
      ->check(Number(0, 1e6));
  verb.add_option("--seed", flags.seed, "Of the drawing")->check(WholeNumber(0, INT64_MAX))->capture_default_str();
  verb.add_option("--context", flags.context,
                  "Positions of a checkpoint's caches (default 2048); files have those of their export")
      ->check(WholeNumber(2, int64_t{1} << 20));
  verb.option_defaults()->group("Simulation of a checkpoint");
  QuantizeOptions& run = flags.simulation;
  verb.add_option("--recipe", run.recipe, "Fake-quantize as this recipe says instead of running in float")
      ->type_name("NAME|FILE");
  verb.add_option("--data", run.data, "Calibration samples for it, JSON lines")->type_name("FILE");
  verb.add_option("--qparams", run.qparams, "Or the grids of an earlier calibration with that recipe")
      ->type_name("FILE");
  verb.add_option("--set", run.set, "KEY=VALUE in the recipe (repeatable)")->type_name("KEY=VALUE");
  verb.add_option("--dialect", flags.dialect, "default, or tico")
      ->check(OneOf({"default", "tico"}))
      ->type_name("{default,tico}");
  verb.option_defaults()->group("Answer");
}

}  // namespace

void AddChat(CLI::App& app, std::function<int()>& command) {
  auto flags = std::make_shared<GenerateFlags>();
  CLI::App* chat =
      app.add_subcommand("chat", "Talk with the exported files, with a float checkpoint or its simulation");
  chat->footer("Example:\n  circlet chat out/ --system 'Be brief.'");
  chat->add_option("DIR", flags->directory, "Output directory of quantize, or a checkpoint");
  chat->option_defaults()->group("Prompt");
  chat->add_option("--system", flags->system, "System turn in front of the conversation");
  AddSampling(*chat, *flags);
  chat->callback([flags, &command] { command = [flags] { return RunChat(*flags); }; });
}

void AddGenerate(CLI::App& app, std::function<int()>& command) {
  auto flags = std::make_shared<GenerateFlags>();
  CLI::App* generate = app.add_subcommand(
      "generate", "Let the exported files, a float checkpoint or its simulation go on with a prompt");
  generate->footer(
      "Example:\n  circlet generate out/ --prompt 'It is a truth' --max-new-tokens 40 --temperature 0\n"
      "  circlet generate out/ --chat --prompt 'What is in the picture?' --image cat.png");
  generate->add_option("DIR", flags->directory, "Output directory of quantize, or a checkpoint");
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
  AddSampling(*generate, *flags);
  generate->add_option("--stop", flags->stops, "Text that ends the answer (repeatable)")
      ->check(NotEmpty())
      ->type_name("TEXT");
  generate
      ->add_option("--beside", flags->beside,
                   "Another output directory, or a checkpoint: both texts, and how far the predictions differ")
      ->type_name("DIR");
  generate->add_option("--report", flags->report, "What --beside prints: text, or html, a page of its own")
      ->check(OneOf({"text", "html"}))
      ->type_name("{text,html}");
  generate->add_flag("--json", flags->as_json, "Ids and texts as JSON");
  generate->add_flag("--timings", flags->timings,
                     "Tokens a second of prompt and answer, and how near reading the weights a step comes");
  generate->callback([flags, &command] { command = [flags] { return RunGenerate(*flags); }; });
}

}  // namespace circlet
