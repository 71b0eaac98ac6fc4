#include "circlet/runtime/session.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <set>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"
#include "circlet/io/json.h"
#include "circlet/model/gemma4/tables.h"
#include "ops/codes.h"
#include "ops/simd.h"
#include "pipeline/output_directory.h"
#include "runtime/units.h"

namespace circlet::runtime {
namespace {

// [1,KV,T,h] with the value 0 everywhere, of the type of [1,KV,.,h].
Tensor EmptyCache(const Tensor& fresh, int64_t slots) {
  Shape shape = fresh.GetShape();
  shape[2] = slots;
  const Tensor cache(TensorType{fresh.GetDType(), shape});
  if (fresh.Grid() == nullptr) return cache;
  const int64_t zero = fresh.Grid()->zero_point[0];
  const auto bytes = static_cast<size_t>(BitWidth(fresh.GetDType()) / 8);
  for (int64_t i = 0; i < cache.Elements(); ++i)
    std::memcpy(cache.Raw() + static_cast<size_t>(i) * bytes, &zero, bytes);  // little-endian
  return Gridded(cache, fresh);
}

// [1,KV,slots,h] whose elements are whole bytes; a file may say anything.
void RequireCache(const Tensor& tensor, const std::string& key, int64_t slots) {
  const Shape& shape = tensor.GetShape();
  if (shape.Rank() != 4 || shape[0] != 1 || shape[1] < 1 || shape[2] < slots || BitWidth(tensor.GetDType()) % 8 != 0)
    Fail("{}: is {}, expected [1,heads,{} or more,size]; quantize again", key, tensor.Type().ToString(), slots);
}

// `count` slots of each head, from slot `from` of one to slot `to` of another [1,KV,.,h].
void CopySlots(const Tensor& source, int64_t from, int64_t count, const Tensor& target, int64_t to) {
  const int64_t heads = source.GetShape()[1];
  const int64_t row = source.Bytes() / (heads * source.GetShape()[2]);
  for (int64_t h = 0; h < heads; ++h)
    std::memmove(target.Raw() + (h * target.GetShape()[2] + to) * row,
                 source.Raw() + (h * source.GetShape()[2] + from) * row, static_cast<size_t>(count * row));
}

class UnitSession final : public Session {
 public:
  explicit UnitSession(std::unique_ptr<UnitSource> source) : source_(std::move(source)) {}

  const ModelFacts& Facts() const override { return source_->Facts(); }
  int64_t Length() const override { return length_; }

  void Prefill(const Sample& prompt) override {
    const auto count = static_cast<int64_t>(prompt.input_ids.size());
    CheckPrompt(prompt);
    length_ = 0;
    caches_.clear();
    const int64_t padded = source_->PaddedLength(count);
    Step step{.first = 0, .count = padded, .real = count};
    step.ids.assign(padded, Facts().pad);
    std::vector<int64_t>& places = step.places;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t id = prompt.input_ids[i];
      const bool image = id == Facts().placeholders.image && id >= 0;
      if (image) places.push_back(i);
      step.ids[i] = image ? Facts().pad : id;
    }
    const std::vector<Tensor> features = FeaturesOf(prompt, places);
    const std::vector<RunnableUnit*> units = source_->Prefill(padded);
    for (size_t i = 0; i < units.size(); ++i) {
      if (HasInput(*units[i], "visual"))
        Fuse(*units[i], features, step);
      else
        Run(*units[i], step);
      DropUnread(std::span(units).subspan(i + 1), step);
    }
    Settle(step);
    length_ = count;
  }

  std::string PictureFault(const Sample& prompt) const override {
    if (prompt.pixel_values.Empty()) return "";
    if (!Facts().pictures)
      return "the prompt has a picture, but there are no vision units; quantize with samples that have pictures";
    for (int64_t i = 0; i < prompt.pixel_values.GetShape()[0]; ++i)
      if (std::string fault = source_->PictureFault(prompt.image_position_ids.Slice(i, i + 1, 0).I64()); !fault.empty())
        return fault;
    return "";
  }

  void Decode(int64_t id) override {
    CheckId(id);
    if (length_ == 0) Fail("nothing stands in front of the token; begin with a prompt");
    if (length_ >= Facts().context)
      Fail("the context of {} positions is full; {} {} or more", Facts().context, source_->LongerBy(),
           Facts().context + 1);
    Step step{.first = length_, .count = 1, .real = 1, .ids = {id}};
    for (RunnableUnit* unit : source_->Decode()) Run(*unit, step);
    // The newest slot is the next token's.
    const int64_t newest = Facts().context - 1;
    if (length_ != newest)
      for (const auto& [key, cache] : caches_) CopySlots(cache, newest, 1, cache, length_);
    Settle(step);
    ++length_;
  }

  Tensor Logits(int64_t position) override {
    const int64_t at = position - hidden_first_;
    if (hidden_.Empty() || position < 0 || position >= length_ || at < 0 || at >= hidden_.GetShape()[1])
      Fail("logits of position {}: only those of the last prompt or token are at hand", position);
    RunnableUnit& head = source_->Head();
    const Tensor row = Gridded(hidden_.Slice(at, at + 1, 1), hidden_);
    return head.Run({{head.inputs.at(0).name, row}}).at(head.outputs.at(0).name);
  }

  WeightRead ReadWeights() override {
    std::vector<Tensor> weights = source_->Head().LinearWeights();
    for (RunnableUnit* unit : source_->Decode())
      for (Tensor& weight : unit->LinearWeights()) weights.push_back(std::move(weight));
    WeightRead read;
    std::atomic<int64_t> sum = 0;  // so that the bytes are looked at
    const auto begin = std::chrono::steady_clock::now();
    for (const Tensor& weight : weights) {
      read.bytes += weight.Bytes();
      ParallelFor(weight.Bytes(), int64_t{1} << 18, [&](int64_t first, int64_t last) {
        sum += simd::SumOfCodes(reinterpret_cast<const int8_t*>(weight.Raw()) + first, last - first);
      });
    }
    read.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    return read;
  }

 private:
  // One pass through the units.
  struct Step {
    int64_t first, count, real;  // positions; those that are no padding
    std::vector<int64_t> ids;
    std::vector<int64_t> places = {};      // of soft tokens
    std::map<std::string, Tensor> values;  // by key
    std::map<std::string, Tensor> masks;   // by attention
  };

  static bool HasInput(const RunnableUnit& unit, const char* name) {
    return std::ranges::any_of(unit.inputs, [&](const End& end) { return end.name == name; });
  }

  void CheckId(int64_t id) const {
    if (id < 0 || id >= Facts().vocabulary)
      Fail("token id {} is outside the vocabulary of {}; is the tokenizer this model's?", id, Facts().vocabulary);
  }

  void CheckPrompt(const Sample& prompt) const {
    const auto count = static_cast<int64_t>(prompt.input_ids.size());
    if (count == 0) Fail("the prompt is empty; it needs a token at least");
    if (count > Facts().context)
      Fail("the prompt has {} tokens, the context {} positions; shorten it, or {} {}", count, Facts().context,
           source_->LongerBy(), count + 1);
    const Placeholders& known = Facts().placeholders;
    for (const int64_t id : prompt.input_ids) {
      if (id >= 0 && (id == known.video || id == known.audio))
        Fail("the prompt has the placeholder {} of {}, which circlet does not run", id,
             id == known.video ? "a video" : "a sound");
      if (id < 0 || id != known.image) CheckId(id);
    }
    for (const uint8_t kept : prompt.attention_mask)
      if (kept == 0) Fail("the prompt has padding (attention_mask 0); leave it out");
    if (const std::string fault = PictureFault(prompt); !fault.empty()) throw Error(fault);
  }

  // Soft tokens of each picture; there are as many placeholders.
  std::vector<Tensor> FeaturesOf(const Sample& prompt, const std::vector<int64_t>& places) {
    std::vector<Tensor> features;
    int64_t tokens = 0;
    const int64_t pictures = prompt.pixel_values.Empty() ? 0 : prompt.pixel_values.GetShape()[0];
    for (int64_t i = 0; i < pictures; ++i) {
      const Tensor positions = prompt.image_position_ids.Slice(i, i + 1, 0);
      features.push_back(source_->Features(prompt.pixel_values.Slice(i, i + 1, 0), positions.I64()));
      tokens += features.back().GetShape()[0];
    }
    if (tokens != static_cast<int64_t>(places.size()))
      Fail("the prompt has {} image placeholders, its {} pictures have {} soft tokens", places.size(), pictures,
           tokens);
    return features;
  }

  void Fuse(const RunnableUnit& unit, const std::vector<Tensor>& features, Step& step) {
    const auto text = std::ranges::find(unit.inputs, "text", &End::name);
    text_key_ = text->key;
    fused_key_ = unit.outputs.at(0).key;
    const Tensor& embeddings = step.values.at(text->key);
    const Tensor fused = features.empty() ? embeddings : source_->Fused(embeddings, features, step.places);
    step.values[fused_key_] = fused;
  }

  static const LayerPlace& LayerOf(const RunnableUnit& unit, const End& end) {
    if (!unit.layer) Fail("{}: has an input \"{}\" and no layer; quantize again", unit.name, end.name);
    return *unit.layer;
  }

  const Tensor& CacheOf(const RunnableUnit& unit, const End& end) const {
    const auto cache = caches_.find(end.key);
    if (cache == caches_.end()) Fail("{}: no unit fills the cache \"{}\" that it reads", unit.name, end.key);
    return cache->second;
  }

  Tensor InputOf(const RunnableUnit& unit, const End& end, Step& step) {
    if (end.name == "ids") return Tensor::Of<int64_t>({1, step.count}, step.ids);
    if (end.name == "mask") return Mask(LayerOf(unit, end), step);
    if (end.name == "cos" || end.name == "sin")
      return source_->Rope(LayerOf(unit, end).attention, end.name == "cos", step.first, step.count);
    if (end.name.starts_with("past_")) {
      const Tensor& cache = CacheOf(unit, end);
      return Gridded(cache.Slice(0, cache.GetShape()[2] - 1, 2), cache);
    }
    if (end.name.starts_with("shared_") && step.first > 0) return CacheOf(unit, end);
    auto value = step.values.find(end.key);
    // Without pictures the text itself is what the fusion makes, on a grid of its own where a dialect says so.
    if (value == step.values.end() && end.key == fused_key_) value = step.values.find(text_key_);
    if (value == step.values.end())
      Fail("{}: nothing computes its input \"{}\" ({}); quantize again", unit.name, end.name, end.key);
    if (end.name != "per_layer_input") return value->second;
    const Shape& all = value->second.GetShape();  // [1,S,L,p]
    const int index = LayerOf(unit, end).index;
    if (all.Rank() != 4 || index < 0 || index >= all[2])
      Fail("{}: layer {} has no part in {} of {}", unit.name, index, end.key, all.ToString());
    return Gridded(value->second.Slice(index, index + 1, 2).Reshaped({1, all[1], all[3]}), value->second);
  }

  void Run(RunnableUnit& unit, Step& step) {
    Values inputs;
    for (const End& end : unit.inputs) inputs[end.name] = InputOf(unit, end, step);
    Values outputs = unit.Run(inputs);
    for (const End& end : unit.outputs) {
      const Tensor& value = outputs.at(end.name);
      if (end.name == "new_key" || end.name == "new_value") Keep(end.key, value, step);
      step.values[end.key] = value;
    }
  }

  // Values that none of the units to come reads, nor the head.
  void DropUnread(std::span<RunnableUnit* const> to_come, Step& step) const {
    std::set<std::string> read{source_->Head().inputs.at(0).key};
    for (const RunnableUnit* unit : to_come)
      for (const End& end : unit->inputs) read.insert(end.key);
    std::erase_if(step.values, [&](const auto& value) { return !read.contains(value.first); });
  }

  // Keys or values of the step's positions, into their cache.
  void Keep(const std::string& key, const Tensor& fresh, const Step& step) {
    RequireCache(fresh, key, step.real);
    Tensor& cache = caches_[key];
    if (cache.Empty()) cache = EmptyCache(fresh, Facts().context);
    if (cache.GetDType() != fresh.GetDType() || cache.GetShape()[1] != fresh.GetShape()[1] ||
        cache.GetShape()[3] != fresh.GetShape()[3])
      Fail("{}: {} comes into a cache of {}; quantize again", key, fresh.Type().ToString(), cache.Type().ToString());
    const int64_t slot = step.first == 0 ? 0 : Facts().context - 1;
    CopySlots(fresh, 0, step.real, cache, slot);
  }

  Tensor Mask(const LayerPlace& layer, Step& step) const {
    Tensor& mask = step.masks[layer.attention];
    if (!mask.Empty()) return mask;
    const float fill = source_->MaskFill();
    const std::span<const int64_t> places = layer.bidirectional_pictures ? step.places : std::span<const int64_t>();
    mask = step.first == 0 ? PrefillMask(step.count, step.real, layer.window, fill, places)
                           : DecodeMask(Facts().context, step.first, layer.window, fill);
    return mask;
  }

  // What the head reads.
  void Settle(Step& step) {
    const End& read = source_->Head().inputs.at(0);
    const auto value = step.values.find(read.key);
    if (value == step.values.end() || value->second.GetShape().Rank() != 3)
      Fail("{}: nothing computes its input \"{}\" ({})", source_->Head().name, read.name, read.key);
    hidden_ = value->second;
    hidden_first_ = step.first;
  }

  std::unique_ptr<UnitSource> source_;
  std::map<std::string, Tensor> caches_;  // [1,KV,context,h] by key
  std::string text_key_, fused_key_;      // of the fusion
  int64_t length_ = 0;
  Tensor hidden_;
  int64_t hidden_first_ = 0;
};

}  // namespace

Tensor Widened(const Tensor& tensor) {
  if (tensor.Grid() == nullptr || tensor.GetDType() == DType::kF32) return tensor;
  const Tensor values = Tensor::Uninitialized({DType::kF32, tensor.GetShape()});
  Dequantize(tensor, *tensor.Grid(), 0, values.F32());
  return values;
}

std::vector<float> ValuesOf(const Tensor& logits) {
  const Tensor values = Widened(logits);
  return {values.F32().begin(), values.F32().end()};
}

bool IsOutputDirectory(const std::filesystem::path& directory) {
  std::error_code error;
  return std::filesystem::exists(directory / kManifestFile, error) ||
         !std::filesystem::exists(directory / "config.json", error);
}

std::unique_ptr<Session> OpenSession(const std::filesystem::path& directory, const SessionOptions& options) {
  if (!IsOutputDirectory(directory)) return std::make_unique<UnitSession>(OpenCheckpoint(directory, options));
  if (options.context != 0)
    Fail("{}: its units have a context of their own; leave the context out", directory.string());
  return std::make_unique<UnitSession>(OpenFiles(directory));
}

}  // namespace circlet::runtime
