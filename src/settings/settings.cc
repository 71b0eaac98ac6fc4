#include "circlet/settings/settings.h"

#include <fmt/ranges.h>

#include <charconv>
#include <functional>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/io/json.h"
#include "circlet/io/yaml.h"
#include "quant/accepted_keys.h"

namespace circlet {
namespace {

using nlohmann::json;

// ---- model, runtime, calibration, model_args ------------------------------------------------------------------------

void ReadModel(const JsonObject& object, ModelOptions& model) {
  Choice(object, "family", "gemma4", {"gemma4"},
         {"llama", "qwen3_vl", "qwen3-vl", "gemma4_assistant", "gemma4-assistant"});
  model.name_or_path = object.Optional<std::string>("name_or_path", "");
  object.Optional<bool>("trust_remote_code");  // either way no code of a checkpoint is run
  for (const std::string_view key : {"adapter", "hf_token", "cache_dir"}) Refuse(object, key);
  object.RejectUnknownKeys();
}

void ReadRuntime(const JsonObject& object, RuntimeOptions& runtime) {
  Choice(object, "device", "cpu", {"cpu"}, {"cuda", "cuda:0", "auto"});
  Refuse(object, "device_map");
  Choice(object, "dtype", "float32", {"float32", "fp32", "float"},
         {"float64", "fp64", "double", "float16", "fp16", "bfloat16", "bf16"});
  const auto seed = object.Optional<int64_t>("seed");
  RequireAtLeast(object, "seed", seed, int64_t{0});
  if (seed) runtime.seed = static_cast<uint64_t>(*seed);
  for (const std::string_view key : {"show_progress", "verbose"}) object.Optional<bool>(key);
  object.RejectUnknownKeys();
}

// "name", "name:64" or "name:split:64".
DataSource ParseSource(std::string_view text, const JsonObject& calibration) {
  DataSource source;
  const size_t last = text.rfind(':');
  const std::string_view count = last == text.npos ? std::string_view() : text.substr(last + 1);
  const std::string_view rest = last == text.npos ? text : text.substr(0, last);
  if (!count.empty()) {
    const auto [end, error] = std::from_chars(count.data(), count.data() + count.size(), source.n_samples);
    if (error != std::errc() || end != count.data() + count.size())
      calibration.FailAt(
          "datasets",
          fmt::format("\"{}\": \"{}\" is no number of samples; write name:64 or name:split:64", text, count));
  }
  source.dataset = rest.substr(0, rest.find(':'));
  return source;
}

DataSource ReadSource(const JsonObject& object, std::string name) {
  DataSource source;
  for (const std::string_view key : {"dataset", "name"})
    if (name.empty()) name = object.Optional<std::string>(key, "");
  source.dataset = std::move(name);
  if (source.dataset.empty()) object.FailAt("dataset", "is missing; give the name or path of the data");
  for (const std::string_view key : {"split", "config"}) object.Optional<std::string>(key);
  source.n_samples = object.Optional<int64_t>("n_samples", source.n_samples);
  for (const std::string_view key : {"include_targets", "filter"}) Refuse(object, key);
  object.RejectUnknownKeys();
  return source;
}

// A mapping in the order of the file, which JSON does not keep.
std::vector<DataSource> ReadSourceMap(const JsonObject& calibration, const YamlNode& tree) {
  std::vector<DataSource> sources;
  const JsonObject map = calibration.Object("datasets");
  for (const YamlMember& member : tree.members) {
    if (member.value.kind == YamlNode::Kind::kMap) {
      sources.push_back(ReadSource(map.Object(member.key), member.key));
    } else {
      sources.push_back({.dataset = member.key, .n_samples = map.Required<int64_t>(member.key)});
    }
  }
  return sources;
}

std::vector<DataSource> ReadSources(const JsonObject& calibration, const YamlNode* tree) {
  std::vector<DataSource> sources;
  const json& value = calibration.Raw("datasets");
  if (value.is_object()) return ReadSourceMap(calibration, *tree->Find("datasets"));
  const auto add = [&](std::string_view list) {
    while (!list.empty()) {
      const size_t comma = std::min(list.find(','), list.size());
      sources.push_back(ParseSource(list.substr(0, comma), calibration));
      list.remove_prefix(std::min(comma + 1, list.size()));
    }
  };
  if (value.is_array() && !value.empty() && value[0].is_object()) {
    for (const JsonObject& object : calibration.Objects("datasets")) sources.push_back(ReadSource(object, ""));
  } else if (value.is_array()) {
    for (const std::string& text : calibration.Required<std::vector<std::string>>("datasets")) add(text);
  } else if (calibration.Has("datasets")) {
    add(calibration.Required<std::string>("datasets"));
  }
  return sources;
}

void ReadCalibration(const JsonObject& object, const YamlNode* tree, CalibrationOptions& calibration) {
  calibration.datasets = ReadSources(object, tree);
  DataSource single{.dataset = object.Optional<std::string>("dataset", "")};
  for (const std::string_view key : {"split", "dataset_config"}) object.Optional<std::string>(key);
  single.n_samples = object.Optional<int64_t>("n_samples", single.n_samples);
  if (!single.dataset.empty()) {
    if (!calibration.datasets.empty()) object.FailAt("dataset", "stands beside datasets; keep one of the two");
    calibration.datasets = {single};
  }
  for (const DataSource& source : calibration.datasets)
    if (source.n_samples < 1)
      object.FailAt("datasets", fmt::format("{} samples of \"{}\"; use 1 or more", source.n_samples, source.dataset));
  calibration.seq_len = OptionalCount(object, "seq_len");
  if (object.Has("seed")) object.FailAt("seed", "has no effect; set runtime.seed");
  for (const std::string_view key : {"filter", "allow_benchmark_overlap", "allow_unregistered_dataset"})
    Refuse(object, key);
  object.RejectUnknownKeys();
}

void RequireBoth(const JsonObject& object, std::string_view a, std::string_view b) {
  if (object.Has(a) != object.Has(b))
    object.FailAt(object.Has(a) ? a : b, fmt::format("stands alone; {} and {} belong together", a, b));
}

void ReadModelArgs(const JsonObject& object, ModelArgs& args) {
  Choice(object, "profile", "npu_export", {"npu_export"}, {"reference_eval"});
  if (object.Raw("attention").is_object()) {
    const JsonObject attention = object.Object("attention");
    Choice(attention, "profile", "npu_export", {"npu_export"}, {"reference_eval"});
    Choice(attention, "layout", "unrolled", {"unrolled"}, {"batched"});
    Choice(attention, "rope", "pre_negated_sin", {"pre_negated_sin"}, {"hf"});
    attention.RejectUnknownKeys();
  } else {
    Choice(object, "attention", "npu_export", {"npu_export"}, {"reference_eval"});
  }
  if (const auto vision = object.OptionalObject("vision")) {
    args.visual_start_idx = OptionalCount(*vision, "visual_start_idx", 0);
    args.num_visual_tokens = OptionalCount(*vision, "num_visual_tokens");
    args.max_soft_tokens = OptionalCount(*vision, "max_soft_tokens");
    args.patch_grid_height = OptionalCount(*vision, "patch_grid_height");
    args.patch_grid_width = OptionalCount(*vision, "patch_grid_width");
    args.image_height = OptionalCount(*vision, "image_height");
    args.image_width = OptionalCount(*vision, "image_width");
    RequireBoth(*vision, "patch_grid_height", "patch_grid_width");
    RequireBoth(*vision, "image_height", "image_width");
    args.validate_static_layout = vision->Optional<bool>("validate_static_layout", false);
    Refuse(*vision, "profile");
    vision->RejectUnknownKeys();
  }
  args.max_seq = OptionalCount(object, "max_seq", 2);
  if (const auto text = object.OptionalObject("text")) {
    if (const auto max_seq = OptionalCount(*text, "max_seq", 2)) args.max_seq = max_seq;
    text->Optional<bool>("ple_embedding_scale_fusion");
    text->RejectUnknownKeys();
  }
  Refuse(object, "assistant");
  object.RejectUnknownKeys();
}

// ---- evaluation, export, debug --------------------------------------------------------------------------------------

void ReadEvaluation(const JsonObject& object, EvaluationOptions& evaluation) {
  evaluation.enabled = object.Optional<bool>("enabled", false);
  object.Optional<int64_t>("n_samples");
  OptionalCount(object, "max_seq_len");
  object.Optional<bool>("verbose");
  evaluation.captions = object.Optional<bool>("coco", false);
  if (const auto ppl = object.OptionalObject("ppl")) {
    EvaluationOptions::Perplexity& perplexity = evaluation.perplexity;
    perplexity.enabled = ppl->Optional<bool>("enabled", false);
    perplexity.dataset = ppl->Optional<std::string>("dataset", perplexity.dataset);
    ppl->Optional<std::string>("split");
    OptionalCount(*ppl, "stride");
    Choice(*ppl, "mode", "raw", {"raw"}, {"chat-prefix"});
    ppl->RejectUnknownKeys();
  }
  for (const std::string_view key :
       {"selected_tasks", "vlm_tasks", "llava_bench", "videomme", "mmlu", "hellaswag", "mmmu"}) {
    // Nothing of a disabled section runs.
    if (evaluation.enabled) {
      RefuseTask(object, key);
    } else {
      object.Has(key);
    }
  }
  object.RejectUnknownKeys();
}

void ReadExport(const JsonObject& object, ExportOptions& options) {
  options.enabled = object.Optional<bool>("enabled", false);
  options.output_dir = object.Optional<std::string>("output_dir", "");
  // An output has all of them.
  for (const std::string& name : object.Optional<std::vector<std::string>>("artifacts", {}))
    if (name != "ptq_checkpoint" && name != "checkpoint" && name != "circle_per_layer")
      object.FailAt("artifacts",
                    fmt::format("unknown artifact \"{}\"; known are circle_per_layer, ptq_checkpoint", name));
  options.max_seq_len = OptionalCount(object, "max_seq_len", 2);
  options.prefill_decode = object.Optional<bool>("prefill_decode", true);
  Refuse(object, "strict");
  if (const auto vision = object.OptionalObject("vision")) {
    const std::string granularity = Choice(*vision, "granularity", "monolithic", {"monolithic", "layer", "both"}, {});
    if (granularity == "layer") options.vision = ExportOptions::Granularity::kLayer;
    if (granularity == "both") options.vision = ExportOptions::Granularity::kBoth;
    vision->RejectUnknownKeys();
  }
  Choice(object, "ple_embedding_format", "auto", {"auto", "circle"}, {"pt"});
  object.RejectUnknownKeys();
}

void ReadSmoke(const JsonObject& object, SmokeOptions& smoke) {
  smoke.calibration_iters = object.Optional<int>("calibration_iters", smoke.calibration_iters);
  smoke.output_dir = object.Optional<std::string>("output_dir", "");
  if (const auto exported = object.OptionalObject("export")) {
    smoke.export_circle = exported->Optional<bool>("enabled", false);
    Choice(*exported, "artifact", "circle", {"circle"}, {});
    exported->RejectUnknownKeys();
  }
  if (const auto plot = object.OptionalObject("plot")) {
    smoke.plot = plot->Optional<bool>("enabled", true);
    plot->RejectUnknownKeys();
  }
  if (const auto gemma4 = object.OptionalObject("gemma4")) {
    smoke.size_profile = Choice(*gemma4, "size_profile", "tiny", {"tiny", "e2b_dims", "e2b_static_runtime"}, {});
    if (const auto runtime = gemma4->OptionalObject("static_runtime")) {
      SmokeOptions::StaticRuntime& figures = smoke.static_runtime;
      figures.profile = runtime->Optional<std::string>("profile", "");
      figures.max_seq = OptionalCount(*runtime, "max_seq", 2);
      figures.num_visual_tokens = OptionalCount(*runtime, "num_visual_tokens");
      figures.max_soft_tokens = OptionalCount(*runtime, "max_soft_tokens");
      figures.patch_grid_height = OptionalCount(*runtime, "patch_grid_height");
      figures.patch_grid_width = OptionalCount(*runtime, "patch_grid_width");
      figures.pooling_kernel_size = OptionalCount(*runtime, "pooling_kernel_size");
      runtime->RejectUnknownKeys();
    }
    gemma4->RejectUnknownKeys();
  }
  // Sections of other families concern cases that circlet does not have.
  for (const std::string_view key : {"llama", "qwen3_vl", "gemma4_assistant"}) object.Has(key);
  object.RejectUnknownKeys();
}

// Pictures of any size may stand anywhere, so that no layout has to be said.
void ReadGeneration(const JsonObject& object, GenerationOptions& generation) {
  generation.model = object.Optional<std::string>("model", "");
  generation.prompt = object.Optional<std::string>("prompt", "");
  generation.max_seq = OptionalCount(object, "max_seq", 2);
  generation.gen_steps = OptionalCount(object, "gen_steps");
  generation.verify_steps = OptionalCount(object, "verify_steps");
  Choice(object, "padding_side", "right", {"right"}, {"left"});
  Choice(object, "device", "cpu", {"cpu"}, {"cuda", "cuda:0", "auto"});
  Choice(object, "rope", "pre_negated_sin", {"pre_negated_sin"}, {"hf"});
  for (const char* key : {"vision_profile", "image_height", "image_width", "visual_start_idx", "num_visual_tokens"})
    if (object.Has(key) && !object.Raw(key).is_null())
      generation.unused.push_back(fmt::format("debug.static_gemma4_runtime.{}", key));
  object.RejectUnknownKeys();
}

}  // namespace

Settings Settings::Load(const std::string& name_or_path, std::span<const std::string> assignments) {
  return Parse(Recipe::TextOf(name_or_path), name_or_path, assignments);
}

Settings Settings::Parse(std::string_view text, const std::string& file, std::span<const std::string> assignments) {
  YamlNode tree = ParseYaml(text, file);
  if (tree.kind == YamlNode::Kind::kNull) Fail("{}: is empty; a recipe has at least `pipeline: [{{name: ptq}}]`", file);
  for (const std::string& assignment : assignments) ApplyOverride(tree, assignment);
  const json value = ToJson(tree);
  std::vector<std::string> complaints;
  const JsonObject root(value, file, &tree, &complaints);
  Settings settings;
  const auto part = [&](std::string_view key, const std::function<void(const JsonObject&)>& read) {
    root.Try([&] {
      if (const auto object = root.OptionalObject(key)) read(*object);
    });
  };
  part("model", [&](const JsonObject& object) { ReadModel(object, settings.model); });
  part("runtime", [&](const JsonObject& object) {
    ReadRuntime(object, settings.runtime);
    if (object.Has("seed")) settings.smoke.seed = settings.runtime.seed;
  });
  part("calibration",
       [&](const JsonObject& object) { ReadCalibration(object, tree.Find("calibration"), settings.calibration); });
  part("model_args", [&](const JsonObject& object) { ReadModelArgs(object, settings.model_args); });
  root.Try([&] { settings.recipe = Recipe::FromTree(tree, root, file); });
  part("evaluation", [&](const JsonObject& object) { ReadEvaluation(object, settings.evaluation); });
  part("export", [&](const JsonObject& object) { ReadExport(object, settings.export_options); });
  part("debug", [&](const JsonObject& object) {
    if (const auto smoke = object.OptionalObject("wrapper_smoke")) ReadSmoke(*smoke, settings.smoke);
    if (const auto runtime = object.OptionalObject("static_gemma4_runtime"))
      ReadGeneration(*runtime, settings.generation);
    Refuse(object, "tied_embedding");
    object.RejectUnknownKeys();
  });
  for (const std::string_view key : {"extensions", "target_model"}) Refuse(root, key);
  root.RejectUnknownKeys();
  if (complaints.size() == 1) throw Error(complaints.front());
  if (!complaints.empty()) Fail("{}: {} faults:\n  {}", file, complaints.size(), fmt::join(complaints, "\n  "));
  return settings;
}

}  // namespace circlet
