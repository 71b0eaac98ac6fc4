#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "circlet/io/json.h"

namespace circlet {

// How a checkpoint stores the weight of one module.
struct PackedForm {
  int bits = 0;       // 2, 4 or 8; 0: an ordinary float weight
  int64_t group = 0;  // inputs that share a scale; 0: all of a row (of a table: as many groups as it has scales)
  bool Packed() const { return bits != 0; }
  bool operator==(const PackedForm&) const = default;
};

// The section quantization_config of a checkpoint whose weights are codes (docs/packed.md). Two methods are read:
//   gemma               Google's mobile checkpoints: codes of 2, 4 and 8 bits, a scale a row, int8 grids of activations
//   compressed-tensors  format pack-quantized: codes of 4 bits in groups
class QuantizationConfig {
 public:
  enum class Method : uint8_t { kGemma, kCompressedTensors };
  enum class Module : uint8_t { kLinear, kTable };

  // Of the text of a config.json; nothing when it has no such section. Throws Error naming `file`, line and key:
  // another method, by its name and with what to give instead, and everything in these two that would change what codes
  // mean.
  static std::optional<QuantizationConfig> Parse(std::string_view text, const std::string& file);

  Method GetMethod() const;
  // The form of a module's weight, by its full name ("model.language_model.layers.0.mlp.up_proj", "lm_head"). Without
  // modules_to_not_convert the head, and the table that it is `tied` to, stay float.
  PackedForm FormOf(std::string_view module, Module kind, bool tied) const;

 private:
  struct Rules;
  explicit QuantizationConfig(std::shared_ptr<const Rules> rules) : rules_(std::move(rules)) {}
  std::shared_ptr<const Rules> rules_;
};

// Throws Error unless the quant_method of `object`, a quantization_config, is one of those two.
void RequireReadableMethod(const JsonObject& object);

// Whether a tensor's name is that of a part of a packed weight or of an activation's scale ("...weight_scale",
// "...embedding_quantized", "...weight_packed").
bool IsPackedPart(std::string_view tensor);

}  // namespace circlet
