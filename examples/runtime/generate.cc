// Greedy generation from what `circlet quantize` wrote, unit by unit: how a host runs the files (docs/runtime.md). A
// program that only wants the model's words takes circlet/runtime/session.h, which does all this.
//
//     example_runtime OUT COUNT ID...      # ids of the prompt, from `circlet tokenize OUT --text ...`
//
// Prints the id of each of COUNT new tokens and a hash of the logits' codes that it was chosen by.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "circlet/circle/export.h"
#include "circlet/io/json.h"
#include "circlet/io/safetensors.h"

namespace {

using circlet::Tensor;
using nlohmann::json;

// Values are float32 here, as RunModel takes and gives them: each lies on the grid of its end, so it stands for a code.
class Host {
 public:
  explicit Host(const std::filesystem::path& out)
      : pipeline_(circlet::ReadJson(out / "pipeline.json")),
        context_(pipeline_.at("context")),
        tables_(circlet::SafetensorsFile::Open(out / pipeline_.at("tables").get<std::string>())) {
    for (const json& unit : pipeline_.at("units"))
      units_[unit.at("name")] = {unit, circlet::circle::Read(out / unit.at("file").get<std::string>())};
  }
  int64_t Context() const { return context_; }
  int64_t Pad() const { return pipeline_.at("pad_token_id"); }

  // Positions first .. first + ids.size() - 1, of which `count` are no padding; the logits behind the last of those.
  Tensor Step(const std::string& phase, const std::vector<int64_t>& ids, int64_t first, int64_t count) {
    std::map<std::string, Tensor> values;  // by key
    const auto names = pipeline_.at("phases").at(phase).get<std::vector<std::string>>();
    for (const std::string& name : names) {
      Unit& unit = units_.at(name);
      if (unit.facts.at("inputs").back().at("name") == "visual") continue;  // the fusion: no picture here
      std::vector<Tensor> inputs;
      for (const json& end : unit.facts.at("inputs")) {
        Tensor value = InputOf(unit.facts, end, phase, ids, first, count, values);
        if (name == names.back()) value = value.Slice(count - 1, count, 1);  // the head reads one position
        inputs.push_back(value);
      }
      const std::vector<Tensor> outputs = Run(unit, inputs);
      for (size_t k = 0; k < outputs.size(); ++k) {
        const json& end = unit.facts.at("outputs")[k];
        values[end.at("key")] = outputs[k];
        if (end.at("name") == "new_key" || end.at("name") == "new_value") Keep(end.at("key"), outputs[k], phase, count);
      }
    }
    if (phase == "decode")
      for (auto& [key, cache] : caches_) CopySlots(cache, context_ - 1, 1, cache, first);
    return values.at(units_.at(names.back()).facts.at("outputs")[0].at("key"));
  }

  // What stands for a logit in the file.
  int64_t CodeOf(float logit) const {
    const json& end = units_.at("lm_head").facts.at("outputs")[0];
    return std::lround(logit / end.at("scale").get<float>()) + end.at("zero_point").get<int64_t>();
  }

 private:
  struct Unit {
    json facts;
    circlet::circle::Model model;
  };

  static std::vector<Tensor> Run(const Unit& unit, const std::vector<Tensor>& inputs) {
    std::map<std::string, Tensor> bound;
    for (size_t k = 0; k < inputs.size(); ++k) bound[unit.facts.at("inputs")[k].at("tensor")] = inputs[k];
    const std::map<std::string, Tensor> outputs = circlet::circle::RunModel(unit.model, bound);
    std::vector<Tensor> results;
    for (const json& end : unit.facts.at("outputs")) results.push_back(outputs.at(end.at("tensor")));
    return results;
  }

  Tensor InputOf(const json& unit, const json& end, const std::string& phase, const std::vector<int64_t>& ids,
                 int64_t first, int64_t count, const std::map<std::string, Tensor>& values) const {
    const std::string role = end.at("name"), key = end.at("key");
    const auto length = static_cast<int64_t>(ids.size());
    if (role == "ids") return Tensor::Of<int64_t>({1, length}, ids);
    if (role == "mask") return Mask(unit.at("layer").at("window"), phase == "decode", first, length, count);
    if (role == "cos" || role == "sin")
      return tables_.Get(role + "." + unit.at("layer").at("attention").get<std::string>())
          .Slice(first, first + length, 1);
    if (role.starts_with("past_")) return caches_.at(key).Slice(0, context_ - 1, 2);
    if (role.starts_with("shared_") && phase == "decode") return caches_.at(key);
    if (role != "per_layer_input") return values.at(key);
    const Tensor& all = values.at(key);  // [1,S,L,p]
    const int64_t layer = unit.at("layer").at("index");
    return all.Slice(layer, layer + 1, 2).Reshaped({1, length, all.GetShape()[3]});
  }

  Tensor Mask(int64_t window, bool decode, int64_t first, int64_t length, int64_t count) const {
    const Tensor mask(
        {circlet::DType::kF32, decode ? circlet::Shape{1, 1, context_} : circlet::Shape{1, 1, length, context_}});
    const float unseen = pipeline_.at("mask").at("unseen");
    for (int64_t q = 0; q < length; ++q)
      for (int64_t slot = 0; slot < context_; ++slot) {
        // In decoding the newest key lies in the last slot, and nothing between it and the past.
        const bool newest = decode && slot == context_ - 1;
        const int64_t key = newest ? first : slot, query = first + q;
        bool seen = key <= query && key < first + count && (window == 0 || key > query - window);
        if (decode && !newest) seen &= slot < first;
        mask.F32()[q * context_ + slot] = seen ? 0 : unseen;
      }
    return mask;
  }

  void Keep(const std::string& key, const Tensor& fresh, const std::string& phase, int64_t count) {
    Tensor& cache = caches_[key];
    if (cache.Empty()) cache = Tensor({circlet::DType::kF32, {1, fresh.GetShape()[1], context_, fresh.GetShape()[3]}});
    CopySlots(fresh, 0, count, cache, phase == "decode" ? context_ - 1 : 0);
  }

  static void CopySlots(const Tensor& source, int64_t from, int64_t count, const Tensor& target, int64_t to) {
    const int64_t heads = source.GetShape()[1], width = source.GetShape()[3];
    for (int64_t h = 0; h < heads; ++h)
      std::memcpy(target.F32().data() + (h * target.GetShape()[2] + to) * width,
                  source.F32().data() + (h * source.GetShape()[2] + from) * width, count * width * sizeof(float));
  }

  json pipeline_;
  int64_t context_;
  circlet::SafetensorsFile tables_;
  std::map<std::string, Unit> units_;
  std::map<std::string, Tensor> caches_;  // [1,KV,context,h] by key
};

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 4) return std::fputs("usage: example_runtime OUT COUNT ID...\n", stderr), 2;
  Host host(argv[1]);
  std::vector<int64_t> ids;
  for (int i = 3; i < argc; ++i) ids.push_back(std::atoll(argv[i]));
  std::vector<int64_t> padded = ids;
  padded.resize(host.Context(), host.Pad());
  Tensor logits = host.Step("prefill", padded, 0, static_cast<int64_t>(ids.size()));
  for (int made = 0; made < std::atoi(argv[2]); ++made) {
    if (made > 0) logits = host.Step("decode", {ids.back()}, static_cast<int64_t>(ids.size()) - 1, 1);
    const auto values = logits.F32();
    ids.push_back(std::ranges::max_element(values) - values.begin());
    uint32_t hash = 0;
    for (const float value : values) hash = hash * 31 + static_cast<uint32_t>(host.CodeOf(value));
    std::printf("%lld %u\n", static_cast<long long>(ids.back()), hash);
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "example_runtime: %s\n", error.what());
  return 2;
}
