#include "quant/recipe_reader.h"

#include <algorithm>
#include <charconv>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "circlet/base/error.h"
#include "circlet/io/json.h"
#include "circlet/io/names.h"

namespace circlet {
namespace {

using nlohmann::json;

constexpr std::string_view kUnsupported = "is not supported yet; remove it";

// Accepts a key of the reference only where it asks for nothing: absent, null, false, empty, or `harmless`.
void Refuse(const JsonObject& object, std::string_view key, const json& harmless = nullptr) {
  const json& value = object.Raw(key);
  if (value.is_null() || value == false || value.empty() || value == harmless) return;
  object.FailAt(key, kUnsupported);
}

// The same for a key that has an `enabled` of its own.
void RefuseTask(const JsonObject& object, std::string_view key) {
  const json& value = object.Raw(key);
  if (value.is_object() && !object.Object(key).Optional<bool>("enabled", false)) return;
  Refuse(object, key);
}

std::string LowerString(const JsonObject& object, std::string_view key, std::string_view otherwise) {
  std::string text = object.Optional<std::string>(key, std::string(otherwise));
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}

// One of `known`; others that the reference has are in `unsupported`.
std::string Choice(const JsonObject& object, std::string_view key, std::string_view otherwise,
                   std::initializer_list<std::string_view> known, std::initializer_list<std::string_view> unsupported) {
  std::string text = LowerString(object, key, otherwise);
  if (std::ranges::find(known, text) != known.end()) return text;
  const std::string_view because =
      std::ranges::find(unsupported, text) != unsupported.end() ? "is not supported yet" : "is no known value";
  std::string names;
  for (const std::string_view name : known) names += (names.empty() ? "" : ", ") + std::string(name);
  object.FailAt(key, fmt::format("\"{}\" {}; use {}", text, because, names));
}

template <typename T>
void RequireAtLeast(const JsonObject& object, std::string_view key, const std::optional<T>& value, T least) {
  if (value && *value < least) object.FailAt(key, fmt::format("{} is too small; use {} or more", *value, least));
}

std::optional<int> OptionalCount(const JsonObject& object, std::string_view key, int least = 1) {
  const std::optional<int> value = object.Optional<int>(key);
  RequireAtLeast(object, key, value, least);
  return value;
}

// ---- model, runtime, calibration, model_args ------------------------------------------------------------------------

void ReadModel(const JsonObject& object, ModelOptions& model) {
  model.family = Choice(object, "family", "gemma4", {"gemma4"},
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
  runtime.show_progress = object.Optional<bool>("show_progress", true);
  runtime.verbose = object.Optional<bool>("verbose", false);
  object.RejectUnknownKeys();
}

// "name", "name:64" or "name:split:64".
DataSource ParseSource(std::string_view text, const JsonObject& calibration) {
  DataSource source;
  const size_t last = text.rfind(':');
  const std::string_view count = last == text.npos ? std::string_view() : text.substr(last + 1);
  std::string_view rest = last == text.npos ? text : text.substr(0, last);
  if (!count.empty()) {
    const auto [end, error] = std::from_chars(count.data(), count.data() + count.size(), source.n_samples);
    if (error != std::errc() || end != count.data() + count.size())
      calibration.FailAt(
          "datasets",
          fmt::format("\"{}\": \"{}\" is no number of samples; write name:64 or name:split:64", text, count));
  }
  if (const size_t colon = rest.find(':'); colon != rest.npos) {
    source.split = rest.substr(colon + 1);
    rest = rest.substr(0, colon);
  }
  source.dataset = rest;
  return source;
}

DataSource ReadSource(const JsonObject& object, std::string name) {
  DataSource source;
  for (const std::string_view key : {"dataset", "name"})
    if (name.empty()) name = object.Optional<std::string>(key, "");
  source.dataset = std::move(name);
  if (source.dataset.empty()) object.FailAt("dataset", "is missing; give the name or path of the data");
  source.split = object.Optional<std::string>("split", "");
  source.config = object.Optional<std::string>("config", "");
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
  DataSource single{.dataset = object.Optional<std::string>("dataset", ""),
                    .split = object.Optional<std::string>("split", ""),
                    .config = object.Optional<std::string>("dataset_config", "")};
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
    args.ple_embedding_scale_fusion = text->Optional<bool>("ple_embedding_scale_fusion", true);
    text->RejectUnknownKeys();
  }
  Refuse(object, "assistant");
  object.RejectUnknownKeys();
}

// ---- pipeline -------------------------------------------------------------------------------------------------------

using NamedSpecs = std::map<std::string, QuantSpec>;

// Reads the ptq stage; lines come from the tree, whose order of keys also counts.
class StageReader {
 public:
  StageReader(const JsonObject& stage, const YamlNode& tree, const std::string& file, Recipe& recipe)
      : stage_(stage), tree_(tree), file_(file), recipe_(recipe) {}

  void Read() {
    BuilderSpecs& specs = recipe_.specs;
    if (const auto spec = SpecAt("activation")) specs.activation = *spec;
    if (const auto spec = SpecAt("weight")) specs.weight = *spec;
    specs.linear_weight = SpecAt("linear_weight");
    specs.embedding_weight = SpecAt("embedding_weight");
    specs.lm_head_weight = SpecAt("lm_head_weight");
    specs.vision_patch_embed_weight = SpecAt("vision_patch_embed_weight");
    specs.norm_weight = SpecAt("norm_weight");
    for (const auto& [key, spec] : {std::pair("activation", &specs.activation), std::pair("weight", &specs.weight)})
      if (spec->kind == QuantKind::kAffine && !spec->dtype)
        stage_.FailAt(key, "names no dtype; add one, such as int16");

    if (const auto named = stage_.OptionalObject("specs"))
      for (const std::string& name : named->Keys())
        specs_.emplace(name, QuantSpecFromJson(named->Raw(name), named->Where(name)));
    ReadPolicies();
    if (stage_.Has("raw_overrides")) {
      stage_.Object("raw_overrides");
      ReadOverrides(*tree_.Find("raw_overrides"), "");
    }
    ReadWidening();
    recipe_.print_overrides = stage_.Optional<bool>("print_overrides", false);
    if (stage_.Optional<bool>("verbose", false)) recipe_.runtime.verbose = true;
    stage_.Optional<bool>("reuse_gptq_qparams");  // there is no gptq stage to reuse from
    for (const std::string_view key : {"strict_wrap", "inplace"})
      if (!stage_.Optional<bool>(key, true)) stage_.FailAt(key, kUnsupported);
    for (const std::string_view key :
         {"print_model", "norm", "spin_rotation_weight", "profile", "text_linear_weight", "vision_linear_weight"})
      Refuse(stage_, key);
    stage_.RejectUnknownKeys();
  }

 private:
  std::optional<QuantSpec> SpecAt(std::string_view key) const {
    if (!stage_.Has(key)) return std::nullopt;
    return QuantSpecFromJson(stage_.Raw(key), stage_.Where(key));
  }

  void ReadWidening() {
    const json& value = stage_.Raw("widen");
    if (value.is_null()) return;
    const std::string text = value == false ? "off" : value.is_string() ? value.get<std::string>() : value.dump();
    recipe_.widen = WideningOption::Parse(text, stage_.Where("widen"));
  }

  std::string WhereLine(const YamlNode& node) const {
    return node.line > 0 ? fmt::format("{}:{}", file_, node.line) : fmt::format("{} (--set)", file_);
  }

  // The name of an entry of `specs`, or a specification of its own.
  QuantSpec SpecOf(const json& value, const std::string& where) const {
    if (value.is_string()) {
      const auto named = specs_.find(value.get<std::string>());
      if (named != specs_.end()) return named->second;
    }
    if (value.is_null()) Fail("{}: is empty; give a type such as int16, or the name of an entry of specs", where);
    return QuantSpecFromJson(value, where);
  }

  // A mapping is a specification when it has one of its keys, else a level of a path.
  static bool IsSpec(const YamlNode& node) {
    if (node.kind != YamlNode::Kind::kMap) return true;
    return std::ranges::any_of(node.members, [](const YamlMember& member) {
      return member.value.kind != YamlNode::Kind::kMap &&
             (member.key == "kind" || member.key == "dtype" || member.key == "qscheme" || member.key == "elem_format" ||
              member.key == "observer");
    });
  }

  void ReadOverrides(const YamlNode& node, const std::string& prefix) {
    for (const YamlMember& member : node.members) {
      const std::string path = prefix.empty() ? member.key : fmt::format("{}.{}", prefix, member.key);
      const std::string where = WhereLine(member.value);
      if (path.empty() || path.front() == '.' || path.back() == '.' || path.find("..") != path.npos)
        Fail("{}: raw_overrides: \"{}\" has an empty part; write names with single dots between", where, path);
      if (!IsSpec(member.value)) {
        ReadOverrides(member.value, path);
        continue;
      }
      const bool twice = std::ranges::any_of(recipe_.overrides, [&](const Override& o) { return o.path == path; });
      if (twice) Fail("{}: raw_overrides: \"{}\" stands twice; remove one", where, path);
      const std::string place = fmt::format("{}: raw_overrides.{}", where, path);
      recipe_.overrides.push_back({path, SpecOf(ToJson(member.value), place), where});
    }
  }

  void ReadPolicies() {
    const YamlNode* list = tree_.Find("override_policies");
    const std::vector<JsonObject> objects = stage_.Objects("override_policies");
    std::set<std::string> names;
    for (size_t i = 0; i < objects.size(); ++i) {
      const JsonObject& object = objects[i];
      const bool enabled = object.Optional<bool>("enabled", true);
      OverridePolicy policy;
      policy.name = object.Required<std::string>("name");
      policy.where = WhereLine(list->items[i]);
      if (!names.insert(policy.name).second)
        object.FailAt("name", fmt::format("two policies are called \"{}\"; rename one", policy.name));
      policy.allow_empty = object.Optional<bool>("allow_empty", false);
      ReadTarget(object.Object("target"), policy);
      if (!object.Has("spec"))
        object.FailAt("spec", "is missing; give a type such as int16, or the name of an entry of specs");
      policy.spec = SpecOf(object.Raw("spec"), object.Where("spec"));
      object.RejectUnknownKeys();
      if (enabled) recipe_.policies.push_back(std::move(policy));
    }
    std::ranges::stable_sort(recipe_.policies, {}, &OverridePolicy::Specificity);
  }

  // Exactly one of the keys; its name.
  static std::string_view OneOf(const JsonObject& target, std::initializer_list<std::string_view> keys) {
    std::string_view found;
    std::string names;
    for (const std::string_view key : keys) {
      names += (names.empty() ? "" : ", ") + std::string(key);
      if (!target.Has(key)) continue;
      if (!found.empty()) target.FailAt(key, fmt::format("stands beside {}; give exactly one of {}", found, names));
      found = key;
    }
    if (found.empty()) target.FailAt("", fmt::format("gives none of {}; give exactly one", names));
    return found;
  }

  static void ReadTarget(const JsonObject& target, OverridePolicy& policy) {
    const std::string component = Choice(target, "component", "all", {"all", "text", "vision"}, {});
    if (component == "text") policy.component = OverridePolicy::Component::kText;
    if (component == "vision") policy.component = OverridePolicy::Component::kVision;
    ReadLayers(target, policy);
    const std::string_view module = OneOf(target, {"module", "modules", "op_type"});
    if (module == "module") {
      policy.modules = {target.Required<std::string>("module")};
    } else if (module == "modules") {
      policy.modules = target.Required<std::vector<std::string>>("modules");
      policy.several_modules = true;
      if (policy.modules.empty()) target.FailAt("modules", "is empty; name at least one module");
    } else {
      Choice(target, "op_type", "", {"linear"}, {});
    }
    if (OneOf(target, {"observers", "observer_role"}) == "observers") {
      policy.observers = target.Required<std::vector<std::string>>("observers");
      if (policy.observers.empty()) target.FailAt("observers", "is empty; name at least one point");
    } else {
      policy.by_observer_role = true;
      const std::string role =
          Choice(target, "observer_role", "", {"activation", "parameter", "input_activation", "output_activation"}, {});
      if (role == "parameter") policy.observers = {"weight"};
      if (role == "activation") policy.observers = {"act_in", "act_out"};
      if (role == "input_activation") policy.observers = {"act_in"};
      if (role == "output_activation") policy.observers = {"act_out"};
    }
    target.RejectUnknownKeys();
  }

  static void ReadLayers(const JsonObject& target, OverridePolicy& policy) {
    const json& value = target.Raw("layers");
    if (value.is_null() || value == "all") return;
    if (value.is_array()) {
      policy.layers = target.Required<std::vector<int64_t>>("layers");
      if (policy.layers->empty()) target.FailAt("layers", "is empty; name at least one layer");
    } else if (value.is_string()) {
      policy.slice = ParseSlice(target, value.get<std::string>());
    } else {
      policy.layers = std::vector<int64_t>{target.Required<int64_t>("layers")};
    }
    for (const int64_t layer : policy.layers.value_or(std::vector<int64_t>{}))
      if (layer < 0) target.FailAt("layers", fmt::format("{} is negative; layers count from 0", layer));
  }

  // "begin:end" or "begin:end:step"; empty parts are 0, the last layer, 1.
  static OverridePolicy::Slice ParseSlice(const JsonObject& target, std::string_view text) {
    OverridePolicy::Slice slice;
    int64_t* const parts[] = {&slice.begin, &slice.end, &slice.step};
    size_t count = 0;
    bool good = text.find(':') != text.npos;
    for (std::string_view rest = text; good; ++count) {
      const size_t colon = std::min(rest.find(':'), rest.size());
      const std::string_view part = rest.substr(0, colon);
      good = count < std::size(parts);
      if (good && !part.empty()) {
        const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), *parts[count]);
        good = error == std::errc() && end == part.data() + part.size();
      }
      if (colon == rest.size()) break;
      rest.remove_prefix(colon + 1);
    }
    if (!good || slice.begin < 0 || slice.end <= slice.begin || slice.step < 1)
      target.FailAt("layers",
                    fmt::format("\"{}\" selects no layers; write all, 3, [0, 3] or \"begin:end:step\"", text));
    return slice;
  }

  const JsonObject& stage_;
  const YamlNode& tree_;
  const std::string& file_;
  Recipe& recipe_;
  NamedSpecs specs_;
};

void ReadPipeline(const JsonObject& root, const YamlNode& tree, const std::string& file, Recipe& recipe) {
  recipe.quantizes = false;
  const YamlNode* list = tree.Find("pipeline");
  const std::vector<JsonObject> stages = root.Objects("pipeline");
  for (size_t i = 0; i < stages.size(); ++i) {
    const JsonObject& stage = stages[i];
    const auto name = stage.Required<std::string>("name");
    const std::vector<std::string> known{"ptq", "gptq", "spinquant", "cle", "smoothquant", "weight_sparsity"};
    if (std::ranges::find(known, name) == known.end())
      stage.FailAt("name", fmt::format("unknown stage \"{}\"{}", name, NearestHint(name, known)));
    if (!stage.Optional<bool>("enabled", true)) continue;
    if (name != "ptq")
      stage.FailAt("name", fmt::format("stage \"{}\" is not supported yet; remove it or set enabled: false", name));
    if (recipe.quantizes) stage.FailAt("name", "a second ptq stage; keep one");
    recipe.quantizes = true;
    StageReader(stage, list->items[i], file, recipe).Read();
  }
}

// ---- evaluation, export, debug --------------------------------------------------------------------------------------

void ReadEvaluation(const JsonObject& object, EvaluationOptions& evaluation) {
  evaluation.enabled = object.Optional<bool>("enabled", false);
  evaluation.n_samples = object.Optional<int64_t>("n_samples", evaluation.n_samples);
  evaluation.max_seq_len = OptionalCount(object, "max_seq_len");
  evaluation.verbose = object.Optional<bool>("verbose", false);
  evaluation.captions = object.Optional<bool>("coco", false);
  if (const auto ppl = object.OptionalObject("ppl")) {
    EvaluationOptions::Perplexity& perplexity = evaluation.perplexity;
    perplexity.enabled = ppl->Optional<bool>("enabled", false);
    perplexity.dataset = ppl->Optional<std::string>("dataset", perplexity.dataset);
    perplexity.split = ppl->Optional<std::string>("split", perplexity.split);
    perplexity.stride = OptionalCount(*ppl, "stride").value_or(perplexity.stride);
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
  if (object.Has("artifacts")) {
    options.checkpoint = options.circle_per_layer = false;
    for (const std::string& name : object.Required<std::vector<std::string>>("artifacts")) {
      if (name == "ptq_checkpoint" || name == "checkpoint") {
        options.checkpoint = true;
      } else if (name == "circle_per_layer") {
        options.circle_per_layer = true;
      } else {
        object.FailAt("artifacts",
                      fmt::format("unknown artifact \"{}\"; known are circle_per_layer, ptq_checkpoint", name));
      }
    }
  }
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

}  // namespace

void ReadRecipe(const YamlNode& tree, const std::string& file, Recipe& recipe) {
  const json value = ToJson(tree);
  const JsonObject root(value, file, &tree);
  if (const auto object = root.OptionalObject("model")) ReadModel(*object, recipe.model);
  if (const auto object = root.OptionalObject("runtime")) {
    ReadRuntime(*object, recipe.runtime);
    if (object->Has("seed")) recipe.smoke.seed = recipe.runtime.seed;
  }
  if (const auto object = root.OptionalObject("calibration"))
    ReadCalibration(*object, tree.Find("calibration"), recipe.calibration);
  if (const auto object = root.OptionalObject("model_args")) ReadModelArgs(*object, recipe.model_args);
  ReadPipeline(root, tree, file, recipe);
  if (const auto object = root.OptionalObject("evaluation")) ReadEvaluation(*object, recipe.evaluation);
  if (const auto object = root.OptionalObject("export")) ReadExport(*object, recipe.export_options);
  if (const auto debug = root.OptionalObject("debug")) {
    if (const auto smoke = debug->OptionalObject("wrapper_smoke")) ReadSmoke(*smoke, recipe.smoke);
    for (const std::string_view key : {"static_gemma4_runtime", "tied_embedding"}) Refuse(*debug, key);
    debug->RejectUnknownKeys();
  }
  for (const std::string_view key : {"extensions", "target_model"}) Refuse(root, key);
  root.RejectUnknownKeys();
}

}  // namespace circlet
