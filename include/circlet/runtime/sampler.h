#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

namespace circlet::runtime {

// How the next token is drawn, as transformers' generate does it, in this order: the repetition penalty, the
// temperature, the top_k likeliest, of these the fewest whose probabilities add up to top_p.
struct Sampling {
  double temperature = 1;  // 0: the likeliest token, always
  int64_t top_k = 0;       // 0: all
  double top_p = 1;        // 0 < top_p <= 1
  double repetition_penalty =
      1;  // logits of tokens that stand in the sequence are divided by it, negative ones multiplied
  uint64_t seed = 0;
};

// What a model asks for: generation_config.json of `directory`, greedy when there is none. What it asks besides and
// circlet does not do ("num_beams: 4") is told in `notes`. Throws Error naming file, key and value.
Sampling LoadSampling(const std::filesystem::path& directory, std::vector<std::string>& notes);

// The same options and logits give the same tokens on every machine with the same exp().
class Sampler {
 public:
  // Throws Error for options out of range.
  explicit Sampler(const Sampling& options);

  // `sequence`: ids so far, prompt included. Throws Error when a logit is NaN.
  int64_t Next(std::span<const float> logits, std::span<const int64_t> sequence);

 private:
  double Uniform();  // in [0, 1)
  Sampling options_;
  uint64_t state_;
  std::vector<float> scores_;
};

}  // namespace circlet::runtime
