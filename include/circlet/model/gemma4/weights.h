#pragma once

// The parameters of a Gemma 4 model by canonical name, whatever prefix the checkpoint uses (model.md 1.1 - 1.3).
//
// Canonical names are those of Gemma4ForConditionalGeneration: "model.language_model.layers.0.mlp.up_proj.weight",
// "model.vision_tower.std_scale", "model.embed_vision.embedding_projection.weight", "lm_head.weight".

#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "circlet/io/packed/packed_weight.h"
#include "circlet/io/packed/quantization_config.h"
#include "circlet/io/safetensors.h"
#include "circlet/model/gemma4/config.h"
#include "circlet/model/gemma4/widening.h"
#include "circlet/ops/op.h"

namespace circlet {

// The table of per-layer embeddings.
inline constexpr std::string_view kPleTable = "model.language_model.embed_tokens_per_layer.weight";

// Where the result of a linear or norm goes; random values are chosen by it.
enum class Flow : uint8_t {
  kInner,
  kGate,      // into an activation function
  kResidual,  // into the residual stream
  kScores,    // into the scores of attention
  kHead,      // into the head
};

struct Parameter {
  std::string name;  // canonical
  Shape shape;
  WeightKind kind = WeightKind::kLinear;
  Flow flow = Flow::kInner;
  bool operator==(const Parameter&) const = default;
};

// Every parameter that a run of the model reads, in the order of computation: text, vision, projector, untied head. A
// tied "lm_head.weight" is not listed (it is embed_tokens.weight), nor are K/V weights of KV-shared layers.
std::vector<Parameter> Parameters(const Gemma4Config& config);

// "language_model.norm.weight", "model.norm.weight", "norm.weight" -> "model.language_model.norm.weight": one leading
// "model." and one leading "language_model." are stripped, then the canonical prefix is put in front (model.md 1.1).
// The doubled "model.language_model.model." and "language_model.model.model." of some saved files mean the same.
std::string CanonicalName(std::string_view checkpoint_name);

struct UnusedTensor {
  std::string name;    // as in the checkpoint
  std::string reason;  // "audio tower: circlet does not run audio"
  bool operator==(const UnusedTensor&) const = default;
};

// A parameter that is stored as codes.
struct PackedParameter {
  PackedForm form;
  std::string codes, scales;  // names of the stored tensors
  Shape shape;                // of the codes, a scale a row: a table with several scales a row has a row for each
  // The int8 steps that a linear's input and output were trained with; none: that side is not rounded.
  std::optional<float> input_step, output_step;
};

struct Inventory {
  std::map<std::string, std::string, std::less<>> name_in_checkpoint;  // canonical -> stored name, of used tensors
  std::map<std::string, PackedParameter, std::less<>> packed;          // by canonical name
  // int8 steps of caches that layers store ("...layers.3.self_attn.k_cache_scale").
  std::map<std::string, float, std::less<>> cache_steps;
  std::vector<UnusedTensor> unused;                                    // for the report
  std::vector<std::string> notes;  // where the tensors decided and not config.json, for the terminal
};

// Compares a checkpoint with its config, and corrects `config` where the stored tensors decide, as in the reference:
// * a stored lm_head.weight that differs from embed_tokens.weight is used, although tie_word_embeddings is true; of
//   equal ones the table serves both, and so does either one that stands alone;
// * a checkpoint without any vision tensor is one without a vision tower;
// * the per-layer table of a packed checkpoint has as many scales a token as are stored;
// * a packed checkpoint of quant_method "gemma" without bounds of clipped linears clips nothing.
// With `text_only` the vision tensors may be missing. Throws one Error that lists every parameter that is missing or
// has another shape or a type that is no float, with its file, the expected and the found shape, and what to check; and
// of packed parameters every missing, misshapen or impossible scale.
Inventory CheckInventory(Gemma4Config& config, const Checkpoint& checkpoint, bool text_only = false);

// Whether a tensor, by its name in the checkpoint, belongs to the vision tower with its projector; to the audio tower.
bool IsVisionTensor(std::string_view checkpoint_name);
bool IsAudioTensor(std::string_view checkpoint_name);

// A checked checkpoint as a source of parameters by canonical name. A tied lm_head.weight is embed_tokens.weight.
class ModelWeights {
 public:
  // Opens DIRECTORY's tensors; throws as Checkpoint::Open and CheckInventory do.
  static ModelWeights Open(Gemma4Config config, const std::filesystem::path& directory, bool text_only = false);

  // From here on the parameters, and the config, are those of the wider stream. Tables of the vocabulary are written to
  // files without a name in `directory`, gone with this object, and mapped; all others are made when they are asked
  // for. Throws Error when the disk is too small.
  void Widen(const Widening& widening, const std::filesystem::path& directory);

  // The config that was given, corrected by the stored tensors.
  const Gemma4Config& GetConfig() const { return config_; }

  // The tensor as stored (mapped; bf16, f16 or f32), or what the wider stream makes of it. Of a packed parameter the
  // codes with their grid, a scale a row (uint4 with zero point 8, or int8), and of one in blocks the float32 values:
  // made at the first call and kept until Release. Throws Error naming the nearest parameter.
  Tensor Stored(std::string_view name) const;
  // The same as float32; converted anew at each call unless stored so.
  Tensor Float(std::string_view name) const;
  // Bytes that it takes in the checkpoint.
  int64_t StoredBytes(std::string_view name) const;
  // Whether parameters are codes with grids of activations (quant_method "gemma").
  bool HoldsCodes() const {
    return config_.quantization && config_.quantization->GetMethod() == QuantizationConfig::Method::kGemma;
  }
  // How a parameter is packed; null: it is an ordinary tensor.
  const PackedParameter* Packed(std::string_view name) const;
  // The codes and scales of a parameter in blocks: one that is stored so, or one whose bfloat16 values lie on the grid of
  // Q4_0 (RecoverQ40).
  std::optional<BlockWeight> Blocks(std::string_view name) const;
  bool Has(std::string_view name) const;
  // A scalar or one-element parameter, e.g. a clip bound.
  float ScalarOf(std::string_view name) const;
  // Lets the kernel take the pages of a parameter back.
  void Release(std::string_view name) const;
  // Lets it read them ahead.
  void Prefetch(std::string_view name) const;

  // Null: the stream is as the checkpoint has it.
  const Widening* GetWidening() const { return widened_ ? &widened_->Plan() : nullptr; }

  const Inventory& GetInventory() const { return inventory_; }
  const Checkpoint& GetCheckpoint() const { return checkpoint_; }

 private:
  ModelWeights(Gemma4Config config, Checkpoint checkpoint, Inventory inventory);
  // Of the parameter that `name` is tied to, or itself.
  std::string_view Tied(std::string_view name) const;
  const std::string* StoredName(std::string_view name) const;
  Tensor InFile(std::string_view name, const std::filesystem::path& directory) const;

  // Packed parameters in the form of Stored, until they are released.
  struct Opened {
    std::mutex mutex;
    std::map<std::string, Tensor, std::less<>> tensors;
  };

  Gemma4Config config_;
  Checkpoint checkpoint_;
  Inventory inventory_;
  std::unique_ptr<Opened> opened_ = std::make_unique<Opened>();
  std::optional<WidenedParameters> widened_;
  std::map<std::string, Tensor, std::less<>> wide_tables_;
};

}  // namespace circlet
