#include "quant/recipe_reader.h"

#include <algorithm>
#include <charconv>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "circlet/base/error.h"
#include "circlet/io/names.h"
#include "quant/accepted_keys.h"

namespace circlet {
namespace {

using nlohmann::json;

using NamedSpecs = std::map<std::string, QuantSpec>;

// Reads the ptq stage; lines come from the tree, whose order of keys also counts.
class StageReader {
 public:
  StageReader(const JsonObject& stage, const YamlNode& tree, const std::string& file, Recipe& recipe)
      : stage_(stage), tree_(tree), file_(file), recipe_(recipe) {}

  void Read() {
    BuilderSpecs& specs = recipe_.specs;
    for (const auto& [key, spec] : {std::pair("activation", &specs.activation), std::pair("weight", &specs.weight)}) {
      if (const auto read = SpecAt(key)) *spec = *read;
      if (spec->kind == QuantKind::kAffine && !spec->dtype)
        stage_.Complain(key, "names no dtype; add one, such as int16");
    }
    specs.linear_weight = SpecAt("linear_weight");
    specs.embedding_weight = SpecAt("embedding_weight");
    specs.lm_head_weight = SpecAt("lm_head_weight");
    specs.vision_patch_embed_weight = SpecAt("vision_patch_embed_weight");
    specs.norm_weight = SpecAt("norm_weight");
    stage_.Try([&] {
      if (const auto named = stage_.OptionalObject("specs"))
        for (const std::string& name : named->Keys())
          specs_.emplace(name, QuantSpecFromJson(named->Raw(name), named->Where(name)));
    });
    stage_.Try([&] { ReadPolicies(); });
    stage_.Try([&] {
      if (!stage_.Has("raw_overrides")) return;
      stage_.Object("raw_overrides");
      ReadOverrides(*tree_.Find("raw_overrides"), "");
    });
    stage_.Try([&] { ReadWidening(); });
    stage_.Try([&] { ReadFold(); });
    if (stage_.Has("packed_weights"))
      recipe_.packed_weights =
          Choice(stage_, "packed_weights", "uint4", {"uint4", "int4"}, {}) == "int4" ? DType::kI4 : DType::kU4;
    for (const std::string_view key : {"print_overrides", "verbose"}) stage_.Optional<bool>(key);  // says nothing more
    stage_.Optional<bool>("reuse_gptq_qparams");  // there is no gptq stage to reuse from
    for (const std::string_view key : {"strict_wrap", "inplace"})
      if (!stage_.Optional<bool>(key, true)) stage_.Complain(key, kUnsupported);
    for (const std::string_view key :
         {"print_model", "norm", "spin_rotation_weight", "profile", "text_linear_weight", "vision_linear_weight"})
      Refuse(stage_, key);
    stage_.RejectUnknownKeys();
  }

 private:
  std::optional<QuantSpec> SpecAt(std::string_view key) const {
    std::optional<QuantSpec> spec;
    stage_.Try([&] {
      if (stage_.Has(key)) spec = QuantSpecFromJson(stage_.Raw(key), stage_.Where(key));
    });
    return spec;
  }

  void ReadFold() {
    if (!stage_.Has("fold") || stage_.Raw("fold") == false) return;
    const auto fold = stage_.Required<double>("fold");
    if (!(fold >= 0 && fold <= 1)) stage_.FailAt("fold", fmt::format("is {}, must be 0 (off) to 1", fold));
    recipe_.fold = static_cast<float>(fold);
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

  void ReadPolicy(const JsonObject& object, std::string where, std::set<std::string>& names) {
    const bool enabled = object.Optional<bool>("enabled", true);
    OverridePolicy policy;
    policy.name = object.Required<std::string>("name");
    policy.where = std::move(where);
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

  void ReadPolicies() {
    const YamlNode* list = tree_.Find("override_policies");
    const std::vector<JsonObject> objects = stage_.Objects("override_policies");
    std::set<std::string> names;
    for (size_t i = 0; i < objects.size(); ++i)
      stage_.Try([&] { ReadPolicy(objects[i], WhereLine(list->items[i]), names); });
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
    // The layer's own points stand in no module.
    std::ranges::replace(policy.modules, std::string("layer"), std::string());
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
    if (value == "none") {
      policy.outside = true;
      if (policy.component != OverridePolicy::Component::kAll)
        target.FailAt("component", "parts are told apart by layers; with layers: none name the module's whole path");
      return;
    }
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
                    fmt::format("\"{}\" selects no layers; write all, none, 3, [0, 3] or \"begin:end:step\"", text));
    return slice;
  }

  const JsonObject& stage_;
  const YamlNode& tree_;
  const std::string& file_;
  Recipe& recipe_;
  NamedSpecs specs_;
};

// The ptq stage says of what type weights are, weight_bits of the gptq stage how many codes of a 4-bit one are used.
void FitWeightBits(Recipe& recipe, const std::string& file) {
  if (!recipe.rounding || recipe.rounding->bits == 0) return;
  const int bits = std::exchange(recipe.rounding->bits, 0);
  const QuantSpec& linear = recipe.specs.linear_weight ? *recipe.specs.linear_weight : recipe.specs.weight;
  const int held = linear.dtype ? static_cast<int>(BitWidth(*linear.dtype)) : 0;
  if (bits == held) return;
  if (held != 4 || bits < 2 || bits > 4)
    Fail(
        "{}: gptq: weight_bits is {}, but linear_weight of the ptq stage has {} bits; make them the same, or take 2 or "
        "3 "
        "bits of a 4-bit type",
        file, bits, held);
  recipe.rounding->bits = bits;
}

// Why a stage of the reference is not taken, and what does its job.
std::string_view WhyNot(std::string_view stage) {
  if (stage == "spinquant")
    return "the residual stream cannot be rotated where norms weigh each channel of a branch before it is added; "
           "widen: "
           "auto of the ptq stage keeps the stream's outliers from coarsening its grids";
  if (stage == "smoothquant")
    return "scales moved from inputs into weights gain little after a gptq stage, which weighs columns by their "
           "inputs "
           "already; take the recipe w4a16-gptq, for 8-bit activations w8a8-mixed";
  if (stage == "cle")
    return "rows in front of a norm cannot be equalized, and the others have scales of their own; take the recipe "
           "w4a16-gptq";
  return "weights are not pruned, an integer product gains nothing from zeros";
}

void ReadStage(const JsonObject& stage, const YamlNode& tree, const std::string& file, Recipe& recipe) {
  const auto name = stage.Required<std::string>("name");
  const std::vector<std::string> known{"ptq", "gptq", "spinquant", "cle", "smoothquant", "weight_sparsity"};
  if (std::ranges::find(known, name) == known.end())
    stage.FailAt("name", fmt::format("unknown stage \"{}\"{}", name, NearestHint(name, known)));
  if (!stage.Optional<bool>("enabled", true)) return;
  if (name == "gptq") {
    if (recipe.rounding || recipe.quantizes) stage.FailAt("name", "one gptq stage goes in front of the ptq stage");
    recipe.rounding = ReadGptqStage(stage);
    return;
  }
  if (name != "ptq")
    stage.FailAt("name", fmt::format("stage \"{}\": {}; set enabled: false, or remove it", name, WhyNot(name)));
  if (recipe.quantizes) stage.FailAt("name", "a second ptq stage; keep one");
  recipe.quantizes = true;
  StageReader(stage, tree, file, recipe).Read();
}

}  // namespace

void ReadPipeline(const JsonObject& root, const YamlNode& tree, const std::string& file, Recipe& recipe) {
  recipe.quantizes = false;
  const YamlNode* list = tree.Find("pipeline");
  const std::vector<JsonObject> stages = root.Objects("pipeline");
  for (size_t i = 0; i < stages.size(); ++i) root.Try([&] { ReadStage(stages[i], list->items[i], file, recipe); });
  root.Try([&] { FitWeightBits(recipe, file); });
}

}  // namespace circlet
