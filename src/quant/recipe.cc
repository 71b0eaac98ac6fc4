#include "circlet/quant/recipe.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "circlet/io/names.h"
#include "circlet/io/yaml.h"
#include "quant/recipe_reader.h"
#include "quant/targets.h"

namespace circlet {
namespace {

constexpr int64_t kRecipeLimitBytes = int64_t{1} << 20;

// `top` over `below`: a complete specification replaces it, a partial one changes single fields.
std::optional<QuantSpec> Over(const std::optional<QuantSpec>& below, const QuantSpec& top) {
  if (!below || below->kind != QuantKind::kAffine || top.kind != QuantKind::kAffine || top.dtype) return top;
  QuantSpec merged = *below;
  if (top.scheme) merged.scheme = top.scheme;
  if (top.axis) merged.axis = top.axis;
  if (top.observer) merged.observer = top.observer;
  return merged;
}

// What the reference's builder writes as an override for a parameter (quantization.md 4.5).
std::optional<QuantSpec> BuilderOverride(const BuilderSpecs& specs, WeightKind kind) {
  const QuantSpec& linear = specs.linear_weight ? *specs.linear_weight : specs.weight;
  switch (kind) {
    case WeightKind::kLinear:
      return linear;
    case WeightKind::kPatchProjection:
      return specs.vision_patch_embed_weight.value_or(linear);
    case WeightKind::kHead:
      return specs.lm_head_weight.value_or(linear);
    case WeightKind::kEmbedding:
      return specs.embedding_weight;
    case WeightKind::kNorm:
      return specs.norm_weight;
    default:
      return std::nullopt;
  }
}

// The names by which a recipe may call the points, for the nearest one; those of full names only when asked so.
std::vector<std::string> SpellingsOf(std::span<const Point> points, std::string_view path) {
  std::vector<std::string> spellings;
  for (const Point& point : points) spellings.push_back(point.name);
  if (path.starts_with("model.")) return spellings;
  for (const Point& point : points)
    for (const std::string_view prefix : {"model.language_model.", "model."})
      if (point.name.starts_with(prefix)) spellings.push_back(point.name.substr(prefix.size()));
  return spellings;
}

// Names of points directly within the module `path`; empty when it is none.
std::set<std::string> LeavesOf(std::span<const Point> points, std::string_view path) {
  std::set<std::string> leaves;
  for (const Point& point : points)
    if (PathNames(path, point.name.substr(0, point.name.rfind('.')))) leaves.emplace(LeafOf(point.name));
  return leaves;
}

std::string UnusedText(const Override& override, std::span<const Point> points) {
  const std::set<std::string> leaves = LeavesOf(points, override.path);
  if (!leaves.empty())
    return fmt::format("{}: \"{}\" is a module, no point; name one of its points: {}", override.where, override.path,
                       fmt::join(leaves, ", "));
  return fmt::format(
      "{}: no point \"{}\"{}; qparams.json of a run has all, `circlet trace MODEL_DIR --samples FILE` "
      "lists those of activations",
      override.where, override.path, NearestHint(override.path, SpellingsOf(points, override.path)));
}

// The first thing that a policy asks for and that no layer has.
std::string UnusedText(const OverridePolicy& policy, std::span<const Point> points) {
  std::set<std::string> modules, leaves;
  for (const Point& point : points) {
    if (const auto at = LayerPointOf(point.name)) {
      modules.emplace(at->module);
      if (std::ranges::find(policy.modules, at->module) != policy.modules.end()) leaves.emplace(at->leaf);
    }
  }
  std::string hint;
  for (const std::string& module : policy.modules) {
    if (modules.contains(module)) continue;
    const std::vector<std::string> known(modules.begin(), modules.end());
    hint = fmt::format("; no layer has a module \"{}\"{}", module, NearestHint(module, known));
    break;
  }
  if (hint.empty() && !leaves.empty()) {
    for (const std::string& observer : policy.observers) {
      if (leaves.contains(observer)) continue;
      const std::vector<std::string> known(leaves.begin(), leaves.end());
      hint = fmt::format("; the module has no point \"{}\"{}", observer, NearestHint(observer, known));
      break;
    }
  }
  return fmt::format("{}: policy \"{}\" matches no point{}; mend its target, or set allow_empty", policy.where,
                     policy.name, hint);
}

// The overrides that name a point; the last one decides, since the fuller name says more.
std::vector<const Override*> OverridesOf(const Point& point, const std::vector<Override>& overrides) {
  std::vector<const Override*> named;
  for (const Override& candidate : overrides)
    if (PathNames(candidate.path, point.name)) named.push_back(&candidate);
  std::ranges::stable_sort(named, {}, [](const Override* candidate) { return candidate->path.size(); });
  return named;
}

}  // namespace

bool OverridePolicy::Matches(const Point& point) const {
  const auto at = LayerPointOf(point.name);
  if (outside) {
    const auto names = [&](const std::string& module) { return PathNames(module, ModuleOf(point.name)); };
    return !at && std::ranges::find(observers, LeafOf(point.name)) != observers.end() &&
           (modules.empty() ? IsLinear(point.kind) : std::ranges::any_of(modules, names));
  }
  if (!at) return false;
  if (component != Component::kAll && at->vision != (component == Component::kVision)) return false;
  if (layers && std::ranges::find(*layers, at->layer) == layers->end()) return false;
  if (slice && !(at->layer >= slice->begin && at->layer < slice->end && (at->layer - slice->begin) % slice->step == 0))
    return false;
  if (std::ranges::find(observers, at->leaf) == observers.end()) return false;
  if (!modules.empty()) return std::ranges::find(modules, at->module) != modules.end();
  return IsLinear(point.kind);
}

int OverridePolicy::Specificity() const {
  int score = 0;
  if (component != Component::kAll) score += 5;
  if (layers) score += layers->size() == 1 ? 20 : 10;
  if (slice) score += 10;
  if (!modules.empty()) score += several_modules ? 10 : 20;
  if (!by_observer_role) score += 20;
  return score;
}

Recipe Recipe::Load(const std::string& name_or_path, std::span<const std::string> assignments) {
  return Parse(TextOf(name_or_path), name_or_path, assignments);
}

std::string Recipe::TextOf(const std::string& name_or_path) {
  const std::vector<std::string> names = BuiltinNames();
  if (std::ranges::find(names, name_or_path) != names.end()) return BuiltinText(name_or_path);
  const std::filesystem::path path(name_or_path);
  if (!path.has_extension() && !std::filesystem::exists(path))
    Fail("unknown recipe \"{}\"{}; known are {}, or give the path of a YAML file", name_or_path,
         NearestHint(name_or_path, names), fmt::join(names, ", "));
  return ReadFile(path, kRecipeLimitBytes);
}

Recipe Recipe::Parse(std::string_view text, const std::string& file, std::span<const std::string> assignments) {
  YamlNode tree = ParseYaml(text, file);
  for (const std::string& assignment : assignments) ApplyOverride(tree, assignment);
  const nlohmann::json value = ToJson(tree);
  return FromTree(tree, JsonObject(value, file, &tree), file);
}

Recipe Recipe::FromTree(const YamlNode& tree, const JsonObject& root, const std::string& file) {
  Recipe recipe;
  ReadPipeline(root, tree, file, recipe);
  recipe.name_ = file;
  recipe.effective_yaml_ = DumpYaml(tree);
  return recipe;
}

PointSpec Recipe::SpecFor(const Point& point, const Dialect& dialect) const {
  const bool weight = point.role == PointRole::kWeight;
  const WeightKind kind = weight ? point.kind : WeightKind::kNone;
  std::optional<QuantSpec> override = BuilderOverride(specs, kind);
  for (const OverridePolicy& policy : policies)
    if (policy.Matches(point)) override = Over(override, policy.spec);
  for (const Override* named : OverridesOf(point, overrides)) override = Over(override, named->spec);
  return ResolveSpec(point, override ? &*override : nullptr, WrapperDefaultOf(kind),
                     weight ? specs.weight : specs.activation, dialect);
}

std::string Recipe::PlaceOf(const Point& point) const {
  std::string place;
  for (const OverridePolicy& policy : policies)
    if (policy.Matches(point)) place = policy.where;
  for (const Override* named : OverridesOf(point, overrides)) place = named->where;
  return place;
}

std::vector<std::string> Recipe::Cautions() const {
  std::vector<std::string> texts;
  const auto cuts = [](const QuantSpec& spec) {
    return spec.observer && spec.observer->kind == ObserverSpec::Kind::kPercentile;
  };
  std::string where;
  if (cuts(specs.activation)) where = "activation";
  for (const OverridePolicy& policy : policies)
    if (where.empty() && cuts(policy.spec)) where = policy.name;
  for (const Override& override : overrides)
    if (where.empty() && cuts(override.spec)) where = override.path;
  if (!where.empty())
    texts.push_back(
        fmt::format("{}: percentile observers cut the largest values off, which carry models with real weights; "
                    "compare with minmax",
                    where));
  if (rounding && rounding->range == WeightRounding::Range::kMse && !rounding->compensate)
    texts.emplace_back(
        "gptq: ranges of the least squared error, without compensate, lose more than min/max on real weights; "
        "take range: moments");
  return texts;
}

std::vector<std::string> Recipe::UnusedOverrides(std::span<const Point> points) const {
  std::vector<std::string> texts;
  for (const Override& override : overrides)
    if (std::ranges::none_of(points, [&](const Point& point) { return PathNames(override.path, point.name); }))
      texts.push_back(UnusedText(override, points));
  for (const OverridePolicy& policy : policies) {
    if (policy.allow_empty) continue;
    if (std::ranges::none_of(points, [&](const Point& point) { return policy.Matches(point); })) {
      texts.push_back(UnusedText(policy, points));
      continue;
    }
    for (const int64_t layer : policy.layers.value_or(std::vector<int64_t>{})) {
      OverridePolicy single = policy;
      single.layers = std::vector<int64_t>{layer};
      if (std::ranges::none_of(points, [&](const Point& point) { return single.Matches(point); }))
        texts.push_back(fmt::format("{}: policy \"{}\" matches no point in layer {}; take the layer out of its list",
                                    policy.where, policy.name, layer));
    }
  }
  return texts;
}

void Recipe::CheckAllUsed(std::span<const Point> points) const {
  const std::vector<std::string> texts = UnusedOverrides(points);
  if (!texts.empty()) throw Error(fmt::format("{}", fmt::join(texts, "\n")));
}

WrapperDefault WrapperDefaultOf(WeightKind kind) {
  if (kind == WeightKind::kPositionTable) return WrapperDefault::kFixedInt16;
  return ChannelAxis(kind) == 0 ? WrapperDefault::kPerRow : WrapperDefault::kNone;
}

}  // namespace circlet
