#include "circlet/model/gemma4/widening.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <optional>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"

namespace circlet {
namespace {

bool Strip(std::string_view& text, std::string_view prefix) {
  if (!text.starts_with(prefix)) return false;
  text.remove_prefix(prefix.size());
  return true;
}

}  // namespace

void Widen(Gemma4Config& config, const Widening& widening) {
  CIRCLET_CHECK(widening.model_width == config.text.ModelWidth(), "a widening of {} channels for {}",
                widening.model_width, config.text.ModelWidth());
  config.text.hidden_size = static_cast<int>(widening.Width());
  config.text.added_channels = static_cast<int>(widening.Width() - widening.model_width);
}

bool LiesOnStream(std::string_view point) {
  if (!Strip(point, "model.language_model.")) return false;
  if (point == "inputs_embeds") return true;
  constexpr std::array kPoints = {"attn_residual_out",
                                  "mlp_residual_out",
                                  "per_layer_residual_out",
                                  "layer_scalar_out",
                                  "post_attention_layernorm.act_out",
                                  "post_feedforward_layernorm.act_out",
                                  "post_per_layer_input_norm.act_out"};
  const size_t layer = Strip(point, "layers.") ? point.find('.') : point.npos;
  return layer != point.npos && std::ranges::find(kPoints, point.substr(layer + 1)) != kPoints.end();
}

// ---- Parameters -----------------------------------------------------------------------------------------------------

// What becomes of the entries of channel c along the axis of the stream: the first of its K copies is multiplied by
// gain * K^first, the others by gain * K^further, or are zero.
struct WidenedParameters::Form {
  int axis = -1;  // -1: the parameter does not meet the stream
  double first = 0;
  std::optional<double> further;
  double gain = 1;

  bool OnlyZerosAreNew() const { return gain == 1 && first == 0 && !further; }
  double FactorOfFirst(int64_t copies) const { return gain * std::pow(static_cast<double>(copies), first); }
  double FactorOfFurther(int64_t copies) const {
    return further ? gain * std::pow(static_cast<double>(copies), *further) : 0;
  }
};

WidenedParameters::WidenedParameters(const Gemma4Config& config, Widening widening)
    : widening_(std::move(widening)),
      model_width_(widening_.model_width),
      width_(widening_.Width()),
      tied_head_(config.tie_word_embeddings),
      gain_(std::sqrt(static_cast<double>(model_width_) / static_cast<double>(width_))) {}

WidenedParameters::Form WidenedParameters::FormOf(std::string_view name) const {
  // Linears that write the stream share a channel's value among its copies. What reads it takes the first copy: linears
  // behind a norm as they are, since the norm has undone the division.
  const Form rows_written{.axis = 0, .first = -0.5, .further = -0.5};
  const Form columns_written{.axis = 1, .first = -0.5, .further = -0.5};
  const Form read_behind_norm{.axis = 1, .first = 0, .further = {}};
  const Form read_raw{.axis = 1, .first = 0.5, .further = {}};
  const Form norm_that_reads{.axis = 0, .first = 0.5, .further = {}, .gain = gain_};
  const Form norm_of_copies{.axis = 0, .first = 0, .further = 0, .gain = gain_};

  if (name == "lm_head.weight") return tied_head_ ? columns_written : read_behind_norm;
  if (name == "model.embed_vision.embedding_projection.weight") return rows_written;
  if (!Strip(name, "model.language_model.")) return {};
  if (name == "embed_tokens.weight") return columns_written;
  if (name == "per_layer_model_projection.weight") return read_raw;
  // A tied head multiplies each copy with a copy, and the products add up.
  if (name == "norm.weight") return tied_head_ ? norm_of_copies : norm_that_reads;
  if (!Strip(name, "layers.")) return {};
  name.remove_prefix(std::min(name.find('.'), name.size()));
  constexpr std::array kReadNorms = {".input_layernorm.weight", ".pre_feedforward_layernorm.weight"};
  constexpr std::array kWriteNorms = {".post_attention_layernorm.weight", ".post_feedforward_layernorm.weight",
                                      ".post_per_layer_input_norm.weight"};
  constexpr std::array kReaders = {".self_attn.q_proj.weight", ".self_attn.k_proj.weight", ".self_attn.v_proj.weight",
                                   ".mlp.gate_proj.weight", ".mlp.up_proj.weight"};
  constexpr std::array kWriters = {".self_attn.o_proj.weight", ".mlp.down_proj.weight", ".per_layer_projection.weight"};
  const auto is_one_of = [&](const auto& names) { return std::ranges::find(names, name) != names.end(); };
  if (is_one_of(kReadNorms)) return norm_that_reads;
  if (is_one_of(kWriteNorms)) return norm_of_copies;
  if (is_one_of(kReaders)) return read_behind_norm;
  if (is_one_of(kWriters)) return rows_written;
  if (name == ".per_layer_input_gate.weight") return read_raw;
  return {};
}

Tensor WidenedParameters::operator()(std::string_view name, const Tensor& stored) const {
  const Form form = FormOf(name);
  if (form.axis < 0) return stored;
  Shape shape = stored.GetShape();
  CIRCLET_CHECK(shape[form.axis] == model_width_, "{} is {}", name, stored.Type().ToString());
  shape[form.axis] = width_;
  const int64_t rows = form.axis == 1 ? shape[0] : 1, others = form.axis == 0 && shape.Rank() > 1 ? shape[1] : 1;
  if (form.OnlyZerosAreNew()) {
    Tensor wide(TensorType{stored.GetDType(), shape});
    const int64_t from = stored.Bytes() / rows, to = wide.Bytes() / rows;
    for (int64_t row = 0; row < rows; ++row) std::memcpy(wide.Raw() + row * to, stored.Raw() + row * from, from);
    return wide;
  }
  const Tensor narrow = ToF32(stored), wide = Tensor::Uninitialized({DType::kF32, shape});
  // Of each row in turn; a channel is `others` values that lie together.
  ParallelFor(rows, std::max<int64_t>(1, (1 << 16) / width_), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* from = narrow.F32().data() + row * model_width_ * others;
      float* const to = wide.F32().data() + row * width_ * others;
      const auto put = [&](int64_t at, int64_t channel, double factor) {
        for (int64_t i = 0; i < others; ++i)
          to[at * others + i] = static_cast<float>(from[channel * others + i] * factor);
      };
      for (int64_t channel = 0; channel < model_width_; ++channel) put(channel, channel, form.gain);
      int64_t next = model_width_;
      for (const auto& [channel, copies] : widening_.channels) {
        put(channel, channel, form.FactorOfFirst(copies));
        for (int64_t copy = 1; copy < copies; ++copy) put(next++, channel, form.FactorOfFurther(copies));
      }
    }
  });
  return wide;
}

}  // namespace circlet
