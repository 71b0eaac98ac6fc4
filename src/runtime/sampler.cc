#include "circlet/runtime/sampler.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>

#include "circlet/base/error.h"
#include "circlet/base/hash.h"
#include "circlet/io/json.h"

namespace circlet::runtime {
namespace {

void Check(const Sampling& options) {
  const auto require = [](bool holds, const char* name, double value, const char* range) {
    if (!holds) Fail("{}: {}, expected {}", name, value, range);
  };
  require(options.temperature >= 0 && options.temperature <= 1e6, "temperature", options.temperature, "0 to 1e6");
  require(options.top_k >= 0, "top_k", static_cast<double>(options.top_k), "0 (all) or more");
  require(options.top_p > 0 && options.top_p <= 1, "top_p", options.top_p, "more than 0, at most 1");
  require(options.repetition_penalty > 0 && options.repetition_penalty <= 1e6, "repetition_penalty",
          options.repetition_penalty, "more than 0");
}

}  // namespace

Sampling LoadSampling(const std::filesystem::path& directory, std::vector<std::string>& notes) {
  const std::filesystem::path path = directory / "generation_config.json";
  Sampling sampling{.temperature = 0};
  std::error_code error;
  if (!std::filesystem::exists(path, error)) return sampling;
  const nlohmann::json tree = ReadJson(path);
  const JsonObject config(tree, path.string());
  sampling.repetition_penalty = config.Optional<double>("repetition_penalty", 1);
  if (config.Optional<bool>("do_sample", false)) {
    sampling.temperature = config.Optional<double>("temperature", 1);
    sampling.top_k = config.Optional<int64_t>("top_k", 50);  // transformers' default
    sampling.top_p = config.Optional<double>("top_p", 1);
  }
  Within(path.string(), [&] { Check(sampling); });
  const std::pair<const char*, nlohmann::json> others[] = {
      {"num_beams", 1},        {"min_p", nullptr},        {"typical_p", 1.0},         {"no_repeat_ngram_size", 0},
      {"min_length", 0},       {"min_new_tokens", 0},     {"bad_words_ids", nullptr}, {"suppress_tokens", nullptr},
      {"epsilon_cutoff", 0.0}, {"penalty_alpha", nullptr}};
  for (const auto& [name, usual] : others)
    if (config.Has(name) && config.Raw(name) != usual)
      notes.push_back(fmt::format("{}: {} is {}, which circlet does not do; it is left out", path.string(), name,
                                  Shown(config.Raw(name))));
  return sampling;
}

Sampler::Sampler(const Sampling& options) : options_(options), state_(options.seed) { Check(options); }

// SplitMix64; 53 bits.
double Sampler::Uniform() {
  return static_cast<double>(Mix(state_ += kSplitMixStep) >> 11) * 0x1p-53;
}

int64_t Sampler::Next(std::span<const float> logits, std::span<const int64_t> sequence) {
  scores_.assign(logits.begin(), logits.end());
  const auto nan = std::ranges::find_if(scores_, [](float score) { return std::isnan(score); });
  if (nan != scores_.end())
    Fail("the logit of token {} is NaN; the model's weights or grids are damaged", nan - scores_.begin());
  if (options_.repetition_penalty != 1) {
    std::vector<int64_t> used(sequence.begin(), sequence.end());
    std::ranges::sort(used);
    used.erase(std::unique(used.begin(), used.end()), used.end());
    const auto penalty = static_cast<float>(options_.repetition_penalty);
    for (const int64_t id : used)
      if (id >= 0 && id < static_cast<int64_t>(scores_.size()))
        scores_[id] = scores_[id] < 0 ? scores_[id] * penalty : scores_[id] / penalty;
  }
  if (options_.temperature == 0) return std::ranges::max_element(scores_) - scores_.begin();

  // The likeliest first; of equals the smaller id.
  std::vector<int64_t> order(scores_.size());
  std::iota(order.begin(), order.end(), 0);
  const auto before = [&](int64_t a, int64_t b) { return scores_[a] != scores_[b] ? scores_[a] > scores_[b] : a < b; };
  const size_t kept =
      options_.top_k == 0 ? order.size() : std::min<size_t>(order.size(), static_cast<size_t>(options_.top_k));
  std::partial_sort(order.begin(), order.begin() + static_cast<int64_t>(kept), order.end(), before);
  order.resize(kept);
  std::vector<double> weights;
  for (const int64_t id : order)
    weights.push_back(std::exp((static_cast<double>(scores_[id]) - scores_[order[0]]) / options_.temperature));
  double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
  double within = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    within += weights[i];
    if (within < options_.top_p * sum) continue;
    weights.resize(i + 1);
    sum = within;
    break;
  }
  const double drawn = Uniform() * sum;
  double passed = 0;
  for (size_t i = 0; i < weights.size(); ++i)
    if (passed += weights[i]; drawn < passed) return order[i];
  return order[weights.size() - 1];
}

}  // namespace circlet::runtime
