#pragma once

// The small model with computable weights whose results model.md 11 lists: Config A.

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>

#include "circlet/io/file.h"
#include "circlet/io/safetensors.h"
#include "circlet/model/gemma4/config.h"
#include "circlet/model/gemma4/weights.h"

namespace circlet {

// Text with PLE, KV sharing and double-wide MLPs; vision with clipped linears and standardization.
inline constexpr std::string_view kConfigA = R"({
  "architectures": ["Gemma4ForConditionalGeneration"],
  "model_type": "gemma4",
  "image_token_id": 70, "video_token_id": 71, "audio_token_id": 72,
  "text_config": {
    "model_type": "gemma4_text", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention",
                    "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 2, "use_double_wide_mlp": true, "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": 64, "sliding_window": 4, "final_logit_softcapping": 30.0
  },
  "vision_config": {
    "model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 2,
    "position_embedding_size": 32, "use_clipped_linears": true, "standardize": true,
    "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0}
  }
})";

inline uint32_t Fnv1a(std::string_view text) {
  uint32_t hash = 2166136261u;
  for (const char c : text) hash = (hash ^ static_cast<uint8_t>(c)) * 16777619u;
  return hash;
}

// Element `index` of the tensor `name` (the full name on disk).
inline float FnvWeight(std::string_view name, uint32_t hash, uint32_t index) {
  const size_t dot = name.rfind('.');
  const std::string_view last = name.substr(dot + 1);
  if (last == "input_min") return -1.5f;
  if (last == "input_max") return 1.5f;
  if (last == "output_min") return -1.0f;
  if (last == "output_max") return 1.0f;
  uint32_t x = index * 2654435761u + hash;
  x = (x ^ (x >> 15)) * 2246822519u;
  x = (x ^ (x >> 13)) * 3266489917u;
  x ^= x >> 16;
  const double u = static_cast<double>(x) / 2147483648.0 - 1.0;
  const std::string_view parents = name.substr(0, dot == std::string_view::npos ? 0 : dot);
  const bool norm = parents.substr(parents.rfind('.') + 1).find("norm") != std::string_view::npos;
  const bool scale = last == "layer_scalar" || last == "std_scale" || last == "scale" || last == "per_expert_scale";
  return static_cast<float>(norm || scale ? 1.0 + 0.25 * u : 0.25 * u);
}

inline Tensor FnvTensor(const Parameter& parameter) {
  Tensor tensor(TensorType{DType::kF32, parameter.shape});
  const uint32_t hash = Fnv1a(parameter.name);
  const std::span<float> values = tensor.F32();
  for (size_t i = 0; i < values.size(); ++i) values[i] = FnvWeight(parameter.name, hash, static_cast<uint32_t>(i));
  return tensor;
}

// Writes config.json and model.safetensors (float32) of Config A, or another, into `directory`, which must exist.
inline void WriteFnvCheckpoint(const std::filesystem::path& directory, std::string_view config = kConfigA) {
  WriteFile(directory / "config.json", config);
  std::map<std::string, Tensor> tensors;
  for (const Parameter& parameter : Parameters(ReadConfig(directory)))
    tensors.emplace(parameter.name, FnvTensor(parameter));
  WriteSafetensors(directory / "model.safetensors", tensors);
}

}  // namespace circlet
