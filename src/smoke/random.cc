#include "smoke/random.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numbers>

#include "circlet/base/error.h"
#include "circlet/base/hash.h"
#include "circlet/base/threads.h"
#include "circlet/model/gemma4/weights.h"

namespace circlet {
namespace {

constexpr int64_t kGrain = 1 << 14;

// One number of the sequence that begins at `x`.
uint64_t Bits(uint64_t x) { return Mix(x + kSplitMixStep); }

uint64_t KeyOf(uint64_t seed, std::string_view name) { return Bits(Fnv1a64(name) ^ Bits(seed)); }

// In (0, 1).
float Unit(uint64_t bits) { return (static_cast<float>(bits >> 41) + 0.5f) * 0x1p-23f; }

template <typename Draw>
Tensor Drawn(const Shape& shape, uint64_t key, const Draw& draw) {
  Tensor tensor = Tensor::Uninitialized({DType::kF32, shape});
  const std::span<float> values = tensor.F32();
  ParallelFor(static_cast<int64_t>(values.size()), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) values[i] = draw(Bits(key + static_cast<uint64_t>(i)));
  });
  return tensor;
}

Tensor Filled(const Shape& shape, float value) {
  Tensor tensor = Tensor::Uninitialized({DType::kF32, shape});
  std::ranges::fill(tensor.F32(), value);
  return tensor;
}

Tensor DrawWeight(const Parameter& parameter, WeightLaw law, uint64_t seed) {
  const std::string& name = parameter.name;
  const Shape& shape = parameter.shape;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  switch (parameter.kind) {
    case WeightKind::kUpperBound:
      return Filled(shape, kInfinity);
    case WeightKind::kLowerBound:
      return Filled(shape, -kInfinity);
    case WeightKind::kBias:
      return Filled(shape, 0.0f);
    case WeightKind::kNorm:
    case WeightKind::kScale:
    case WeightKind::kLayerScalar:
    case WeightKind::kPositionTable:
      return Filled(shape, 1.0f);
    default:
      break;
  }
  if (law == WeightLaw::kModel) return RandomNormal(shape, seed, name, 0.02f);
  if (parameter.kind == WeightKind::kEmbedding) return RandomNormal(shape, seed, name);
  const float bound = 1.0f / std::sqrt(static_cast<float>(shape[-1]));
  return RandomUniform(shape, seed, name, -bound, bound);
}

}  // namespace

Tensor RandomNormal(const Shape& shape, uint64_t seed, std::string_view name, float deviation) {
  // Box-Muller; both uniforms from one word would leave too few bits, so the second is mixed again.
  return Drawn(shape, KeyOf(seed, name), [deviation](uint64_t bits) {
    const float radius = std::sqrt(-2.0f * std::log(Unit(bits)));
    return deviation * radius * std::cos(2.0f * std::numbers::pi_v<float> * Unit(Bits(bits)));
  });
}

Tensor RandomUniform(const Shape& shape, uint64_t seed, std::string_view name, float low, float high) {
  return Drawn(shape, KeyOf(seed, name), [low, high](uint64_t bits) { return low + (high - low) * Unit(bits); });
}

Tensor RandomIds(const Gemma4Config& config, int64_t limit, int64_t count, uint64_t seed, std::string_view name) {
  Tensor ids(TensorType{DType::kI64, {1, count}});
  const uint64_t key = KeyOf(seed, name);
  if (limit <= 0) limit = config.text.vocab_size;
  const auto forbidden = [&](int64_t id) {
    return id == config.image_token_id || id == config.video_token_id || id == config.audio_token_id;
  };
  for (int64_t i = 0; i < count; ++i) {
    uint64_t bits = Bits(key + static_cast<uint64_t>(i));
    while (forbidden(static_cast<int64_t>(bits % limit))) bits = Bits(bits);
    ids.I64()[i] = static_cast<int64_t>(bits % limit);
  }
  return ids;
}

WeightSource RandomWeights(const Gemma4Config& config, WeightLaw law, uint64_t seed) {
  auto shapes = std::make_shared<std::map<std::string, Parameter>>();
  for (Parameter& parameter : Parameters(config)) (*shapes)[parameter.name] = parameter;
  auto made = std::make_shared<std::map<std::string, Tensor>>();
  const bool tied = config.tie_word_embeddings;
  return [=](const std::string& asked) {
    const std::string name =
        tied && asked == "lm_head.weight" ? "model.language_model.embed_tokens.weight" : asked;
    Tensor& tensor = (*made)[name];
    if (!tensor.Empty()) return tensor;
    const auto parameter = shapes->find(name);
    CIRCLET_CHECK(parameter != shapes->end(), "the model has no parameter {}", name);
    return tensor = DrawWeight(parameter->second, law, seed);
  };
}

}  // namespace circlet
