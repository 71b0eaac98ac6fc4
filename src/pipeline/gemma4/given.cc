#include "pipeline/gemma4/given.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

#include "circlet/model/gemma4/text.h"
#include "circlet/model/gemma4/vision.h"

namespace circlet::gemma4 {
namespace {

class Giver {
 public:
  Giver(const ModelWeights& weights, const GivenOptions& options, const Dialect& dialect)
      : weights_(weights), config_(weights.GetConfig()), options_(options), dialect_(dialect) {}

  GivenGrids Run() {
    for (int i = 0; i < config_.text.NumLayers(); ++i) TextLayer(i);
    const std::string text(kTextRoot);
    Own(text + ".per_layer_model_projection");
    Shared({"lm_head"}, text + ".norm.act_out");
    if (config_.vision) {
      for (int i = 0; i < config_.vision->num_layers; ++i) VisionLayer(i);
      PatchProjection();
      const std::string projector(kProjectorRoot);
      Shared({projector + ".embedding_projection"}, projector + ".embedding_pre_projection_norm.act_out");
    }
    for (const auto& [name, step] : weights_.GetInventory().cache_steps) Cache(name, step);
    for (const auto& [parameter, packed] : weights_.GetInventory().packed) {
      if (parameter.ends_with("embed_tokens.weight") || parameter == kPleTable) continue;
      std::vector<const char*> sides;
      if (!packed.input_step) sides.push_back("input");
      if (!packed.output_step) sides.push_back("output");
      if (!sides.empty())
        given_.without.push_back(
            fmt::format("{}: {}", parameter.substr(0, parameter.rfind('.')), fmt::join(sides, ", ")));
    }
    return std::move(given_);
  }

 private:
  const PackedParameter* Find(const std::string& module) const { return weights_.Packed(module + ".weight"); }

  QParams GridOf(float step, int32_t zero_point = 0) const {
    constexpr int32_t kFiner = 256;
    if (options_.int16_twin) return {DType::kI16, -1, {step / kFiner}, {zero_point * kFiner}};
    return {DType::kI8, -1, {step}, {zero_point}};
  }

  // `early`: rounded ahead of what the graph else does first: clip, or leave the bias to a later sum.
  void Output(const std::string& module, bool early = false) {
    const PackedParameter* const packed = Find(module);
    if (packed == nullptr || !packed->output_step) return;
    given_.points[module + ".act_out"] = GridOf(*packed->output_step);
    if (early) given_.added.outputs.insert(module + ".act_out");
  }

  // Linears that read one tensor. `producer`: its point. Clipped ones have a point behind the bounds in any case.
  void Shared(const std::vector<std::string>& modules, const std::string& producer, bool clipped = false) {
    std::vector<std::optional<float>> steps;
    for (const std::string& module : modules) {
      const PackedParameter* const packed = Find(module);
      steps.push_back(packed == nullptr ? std::nullopt : packed->input_step);
      Output(module, clipped);
    }
    const bool one = std::ranges::all_of(steps, [&](const auto& step) { return step && step == steps[0]; });
    if (one) given_.points[producer] = GridOf(*steps[0]);
    for (size_t i = 0; i < modules.size(); ++i) {
      if (!steps[i] || (one && !clipped)) continue;
      given_.points[modules[i] + ".act_in"] = GridOf(*steps[i]);
      if (!clipped) given_.added.inputs.insert(modules[i] + ".act_in");
    }
  }

  // A linear that reads what others read as well.
  void Own(const std::string& module) {
    Output(module);
    const PackedParameter* const packed = Find(module);
    if (packed == nullptr || !packed->input_step) return;
    given_.points[module + ".act_in"] = GridOf(*packed->input_step);
    given_.added.inputs.insert(module + ".act_in");
  }

  void TextLayer(int index) {
    const LayerConfig& layer = config_.text.layers[index];
    const std::string name = fmt::format("{}.layers.{}", kTextRoot, index), attention = name + ".self_attn";
    std::vector<std::string> readers{attention + ".q_proj"};
    if (!layer.kv_shared) readers.push_back(attention + ".k_proj");
    if (!layer.kv_shared && !layer.k_eq_v) readers.push_back(attention + ".v_proj");
    Shared(readers, name + ".input_layernorm.act_out");
    Shared({attention + ".o_proj"}, attention + ".attn_out");
    Shared({name + ".mlp.gate_proj", name + ".mlp.up_proj"}, name + ".pre_feedforward_layernorm.act_out");
    Shared({name + ".mlp.down_proj"}, name + ".mlp.mul");
    if (!config_.text.HasPle()) return;
    Own(name + ".per_layer_input_gate");
    Shared({name + ".per_layer_projection"}, name + ".per_layer_mul");
  }

  void VisionLayer(int index) {
    const bool clipped = config_.vision->use_clipped_linears;
    const std::string name = fmt::format("{}.encoder.layers.{}", kVisionRoot, index), attention = name + ".self_attn";
    const auto linear = [](const std::string& module) { return module + ".linear"; };
    Shared({linear(attention + ".q_proj"), linear(attention + ".k_proj"), linear(attention + ".v_proj")},
           name + ".input_layernorm.act_out", clipped);
    Shared({linear(attention + ".o_proj")}, attention + ".attn_out", clipped);
    Shared({linear(name + ".mlp.gate_proj"), linear(name + ".mlp.up_proj")},
           name + ".pre_feedforward_layernorm.act_out", clipped);
    Shared({linear(name + ".mlp.down_proj")}, name + ".mlp.mul", clipped);
  }

  // The reference rounds 2 (x - 0.5) of a pixel x; x itself stays in [0,1] here, on half the step and around another
  // code.
  void PatchProjection() {
    const std::string embedder = fmt::format("{}.patch_embedder", kVisionRoot), module = embedder + ".input_proj";
    const PackedParameter* const packed = Find(module);
    if (packed == nullptr) return;
    Output(module, /*early=*/true);
    if (!packed->input_step) return;
    constexpr float kTolerance = 1e-3f;
    constexpr int32_t kMost = 127;
    const float steps = 1.0f / *packed->input_step;
    const auto whole = static_cast<int32_t>(std::lround(std::min(steps, 1e6f)));
    if (whole < 1 || whole > kMost || std::abs(steps - static_cast<float>(whole)) > kTolerance) {
      given_.unused.push_back(module + ".input_activation_scale: pixels of [0,1] do not lie on its grid");
      return;
    }
    given_.points[embedder + ".act_in"] = GridOf(*packed->input_step / 2, -whole);
  }

  void Cache(const std::string& name, float step) {
    if (!options_.kv_scales) {
      given_.unused.push_back(name + ": the reference does not read it; --kv-scales takes it");
      return;
    }
    for (int i = 0; i < config_.text.NumLayers(); ++i) {
      const std::string layer = fmt::format("{}.layers.{}.self_attn.", kTextRoot, i);
      if (!name.starts_with(layer)) continue;
      const bool key = name.ends_with("k_cache_scale");
      given_.points[key ? KeyPoint(i, dialect_) : ValuePoint(i, dialect_)] = GridOf(step);
    }
  }

  const ModelWeights& weights_;
  const Gemma4Config& config_;
  const GivenOptions& options_;
  const Dialect& dialect_;
  GivenGrids given_;
};

}  // namespace

GivenGrids GivenBy(const ModelWeights& weights, const GivenOptions& options, const Dialect& dialect) {
  return Giver(weights, options, dialect).Run();
}

}  // namespace circlet::gemma4
