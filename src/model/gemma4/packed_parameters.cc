#include "model/gemma4/packed_parameters.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "circlet/base/error.h"
#include "circlet/io/names.h"

namespace circlet {
namespace {

using Method = QuantizationConfig::Method;

constexpr std::string_view kWeight = ".weight";
constexpr std::string_view kTextPrefix = "model.language_model.";
constexpr std::string_view kDamaged = "; was the checkpoint damaged, or its scales left out when it was saved?";

// What a step of an activation says: 0 is none.
std::optional<float> StepOf(const Tensor& scale, std::string_view stored) {
  const float step = ToF32(scale).F32()[0];
  if (step != 0 && !(std::isnormal(step) && step > 0))
    Fail("tensor \"{}\" is {}; the step of an int8 grid is positive, or 0 where values are not rounded{}", stored, step,
         kDamaged);
  return step == 0 ? std::nullopt : std::optional(step);
}

void CheckScales(const Tensor& scales, std::string_view stored, bool may_be_negative) {
  const Tensor values = ToF32(scales);
  const int64_t width = scales.GetShape()[1];
  for (int64_t i = 0; i < values.Elements(); ++i) {
    const float scale = values.F32()[static_cast<size_t>(i)];
    if (std::isnormal(scale) && (scale > 0 || may_be_negative)) continue;
    Fail("tensor \"{}\": the scale at [{},{}] is {}; scales of weights are {}{}", stored, i / width, i % width, scale,
         may_be_negative ? "finite and not 0" : "positive", kDamaged);
  }
}

}  // namespace

// Patterns of a text-only checkpoint are written for its own names.
std::string PackedFinder::WrittenName(const std::string& canonical) const {
  const bool text_only = config_.architecture == "Gemma4ForCausalLM" || config_.architecture == "Gemma4TextModel";
  if (!text_only || !canonical.starts_with(kTextPrefix)) return canonical;
  return fmt::format("{}{}", config_.architecture == "Gemma4TextModel" ? "" : "model.",
                     canonical.substr(kTextPrefix.size()));
}

PackedForm PackedFinder::FormOf(const Parameter& parameter) const {
  const bool table = parameter.kind == WeightKind::kEmbedding;
  if (!config_.quantization || (!table && !IsLinear(parameter.kind)) || !parameter.name.ends_with(kWeight)) return {};
  const std::string module = parameter.name.substr(0, parameter.name.size() - kWeight.size());
  return config_.quantization->FormOf(WrittenName(module),
                                      table ? QuantizationConfig::Module::kTable : QuantizationConfig::Module::kLinear,
                                      config_.tie_word_embeddings);
}

const Tensor& PackedFinder::Part(const std::string& canonical, std::initializer_list<DType> types, const Shape& shape,
                                 std::string* stored) {
  std::vector<std::string_view> expected;
  for (const DType type : types) expected.push_back(Name(type));
  const std::string form = fmt::format("{}{}", fmt::join(expected, " or "), shape.ToString());
  const auto entry = names_.find(canonical);
  if (entry == names_.end()) {
    misses_tensors_ = true;
    Fail("tensor \"{}\" {} is missing; quantization_config of config.json says that this module is packed{}",
         canonical, form, kDamaged);
  }
  const Tensor* const tensor = checkpoint_.Find(entry->second);
  if (tensor == nullptr)
    Fail("tensor \"{}\" is of a type that circlet does not read, expected {}", Shortened(entry->second), form);
  if (std::ranges::find(types, tensor->GetDType()) == types.end() || tensor->GetShape() != shape)
    Fail("{}: tensor \"{}\" is {}, expected {}, as quantization_config of config.json says{}",
         checkpoint_.FileOf(entry->second), Shortened(entry->second), tensor->Type().ToString(), form, kDamaged);
  if (stored != nullptr) *stored = entry->second;
  names_.erase(entry);
  return *tensor;
}

void PackedFinder::TakeGemma(const Parameter& parameter, const std::string& module, PackedParameter& packed) {
  const bool table = parameter.kind == WeightKind::kEmbedding;
  const int64_t rows = parameter.shape[0], width = parameter.shape[1];
  Part(module + (table ? ".embedding_quantized" : ".weight"), {packed.form.bits == 8 ? DType::kI8 : DType::kU8},
       {rows, PackedRowBytes(packed.form.bits, width)}, &packed.codes);
  int64_t groups = 1;
  if (table) {
    const auto scales = names_.find(module + ".embedding_scale");
    const Tensor* const found = scales == names_.end() ? nullptr : checkpoint_.Find(scales->second);
    if (found != nullptr && found->GetShape().Rank() == 2) groups = found->GetShape()[1];
    // A group of a row is a row of the table that is looked up.
    const bool per_layer = parameter.name.ends_with("embed_tokens_per_layer.weight");
    if (groups < 1 || width % groups != 0 || (!per_layer && groups != 1))
      Fail("{}: tensor \"{}\" has {} scales a row of {} columns; expected {}", checkpoint_.FileOf(scales->second),
           Shortened(scales->second), groups, width, per_layer ? "a number that divides the columns" : "one");
  }
  const Tensor& scales = Part(module + (table ? ".embedding_scale" : ".weight_scale"),
                              {DType::kF32, DType::kBF16, DType::kF16}, {rows, groups}, &packed.scales);
  CheckScales(scales, packed.scales, /*may_be_negative=*/false);
  packed.shape = {rows * groups, width / groups};
  if (groups > 1 && packed.form.bits != 8 && width / groups * packed.form.bits % 8 != 0)
    Fail("tensor \"{}\": {} scales a row cut its bytes; circlet reads groups of whole bytes", packed.scales, groups);
  if (table) return;
  std::string stored;
  const auto step = [&](const char* name) {
    const Tensor& scale = Part(module + name, {DType::kF32, DType::kBF16, DType::kF16}, Shape{}, &stored);
    return StepOf(scale, stored);
  };
  packed.input_step = step(".input_activation_scale");
  packed.output_step = step(".output_activation_scale");
}

void PackedFinder::TakeGroups(const Parameter& parameter, const std::string& module, PackedParameter& packed) {
  const int64_t rows = parameter.shape[0], width = parameter.shape[1], group = packed.form.group;
  for (const char* part : {".weight_g_idx", ".weight_zero_point"})
    if (const auto found = names_.find(module + part); found != names_.end())
      Fail(
          "{}: tensor \"{}\": columns in another order and asymmetric codes are not read; give the checkpoint with "
          "float "
          "weights that it was made from",
          checkpoint_.Find(found->second) != nullptr ? checkpoint_.FileOf(found->second) : "checkpoint",
          Shortened(found->second));
  if (width % group != 0)
    Fail("{}: group_size {} of config.json does not divide its {} inputs", parameter.name, group, width);
  constexpr int64_t kCodesPerWord = 8;
  Part(module + ".weight_packed", {DType::kI32}, {rows, (width + kCodesPerWord - 1) / kCodesPerWord}, &packed.codes);
  const Tensor& scales =
      Part(module + ".weight_scale", {DType::kBF16, DType::kF16, DType::kF32}, {rows, width / group}, &packed.scales);
  CheckScales(scales, packed.scales, /*may_be_negative=*/true);
  std::string stored;
  const Tensor& shape = Part(module + ".weight_shape", {DType::kI64}, {2}, &stored);
  const int64_t* const sizes = shape.I64().data();
  if (sizes[0] != rows || sizes[1] != width)
    Fail("tensor \"{}\" says [{},{}], config.json [{},{}]; both must agree", stored, sizes[0], sizes[1], rows, width);
  packed.shape = {rows, width};
}

bool PackedFinder::Take(const Parameter& parameter, Inventory& inventory, std::vector<std::string>& problems) {
  PackedParameter packed{.form = FormOf(parameter)};
  if (!packed.form.Packed()) return false;
  const std::string module = parameter.name.substr(0, parameter.name.size() - kWeight.size());
  try {
    if (config_.tie_word_embeddings && module.ends_with(".embed_tokens"))
      Fail(
          "{}: is packed, but tie_word_embeddings of config.json is true; the reference reads tied tables in float "
          "only: "
          "set it to false and store the head, or name {} in modules_to_not_convert",
          module, module);
    if (config_.quantization->GetMethod() == Method::kGemma) {
      TakeGemma(parameter, module, packed);
    } else {
      TakeGroups(parameter, module, packed);
    }
    inventory.name_in_checkpoint.emplace(parameter.name, packed.codes);
    inventory.packed.emplace(parameter.name, std::move(packed));
  } catch (const Error& error) {
    problems.push_back(error.what());
  }
  return true;
}

void PackedFinder::TakeCacheSteps(Inventory& inventory) {
  for (int i = 0; i < config_.text.NumLayers(); ++i) {
    if (config_.text.layers[i].kv_shared) continue;
    for (const char* side : {"k", "v"}) {
      const std::string name = fmt::format("{}layers.{}.self_attn.{}_cache_scale", kTextPrefix, i, side);
      if (!names_.contains(name)) continue;
      std::string stored;
      const Tensor& scale = Part(name, {DType::kF32, DType::kBF16, DType::kF16}, Shape{}, &stored);
      if (const std::optional<float> step = StepOf(scale, stored)) inventory.cache_steps.emplace(name, *step);
    }
  }
}

BlockWeight BlocksOf(const Checkpoint& checkpoint, const PackedParameter& packed) {
  constexpr int64_t kCodesPerWord = 8;
  const Tensor& words = *checkpoint.Find(packed.codes);
  const int64_t rows = packed.shape[0], width = packed.shape[1];
  Tensor bytes({DType::kU8, {rows, words.Bytes() / rows}}, words.Raw(), std::make_shared<Tensor>(words));
  if (width % kCodesPerWord != 0) {  // words end behind the row's last code
    const int64_t row_bytes = PackedRowBytes(4, width);
    Tensor cut({DType::kU8, {rows, row_bytes}});
    for (int64_t i = 0; i < rows; ++i)
      std::memcpy(cut.Raw() + i * row_bytes, bytes.Raw() + i * bytes.GetShape()[1], static_cast<size_t>(row_bytes));
    bytes = cut;
  }
  return {.codes = UnpackedRows(bytes, 4, width),
          .scales = ToF32(*checkpoint.Find(packed.scales)),
          .block = packed.form.group};
}

Tensor Unpacked(const Checkpoint& checkpoint, const PackedParameter& packed) {
  if (packed.form.group != 0) return BlocksOf(checkpoint, packed).Values();
  const int bits = packed.form.bits;
  const Tensor scales = ToF32(*checkpoint.Find(packed.scales));
  const Tensor& stored = *checkpoint.Find(packed.codes);
  const int64_t rows = packed.shape[0], width = packed.shape[1];
  const Tensor bytes(TensorType{stored.GetDType(), {rows, PackedRowBytes(bits, width)}}, stored.Raw(),
                     std::make_shared<Tensor>(stored));
  auto grid = std::make_shared<QParams>();
  grid->dtype = StorageOf(bits);
  grid->axis = 0;
  grid->scale.assign(scales.F32().begin(), scales.F32().end());
  grid->zero_point.assign(grid->scale.size(), ZeroPointOf(bits));
  return UnpackedRows(bytes, bits, width).WithGrid(std::shared_ptr<const QParams>(std::move(grid)));
}

}  // namespace circlet
