#include <algorithm>
#include <charconv>
#include <cstring>
#include <map>
#include <optional>

#include "circlet/base/error.h"
#include "circlet/io/names.h"
#include "circlet/io/safetensors.h"
#include "circlet/preprocess/samples.h"
#include "preprocess/check_sample.h"

namespace circlet {
namespace {

// Bytes of a mapped file need not be aligned to their element.
template <typename T>
std::vector<int64_t> Widen(const Tensor& tensor) {
  std::vector<int64_t> values(static_cast<size_t>(tensor.Elements()));
  for (size_t i = 0; i < values.size(); ++i) {
    T value;
    std::memcpy(&value, tensor.Raw() + i * sizeof(T), sizeof(T));
    values[i] = value;
  }
  return values;
}

std::vector<int64_t> Integers(const Tensor& tensor) {
  switch (tensor.GetDType()) {
    case DType::kI64:
      return Widen<int64_t>(tensor);
    case DType::kI32:
      return Widen<int32_t>(tensor);
    case DType::kU8:
    case DType::kBool:
      return Widen<uint8_t>(tensor);
    default:
      Fail("expected int64, int32, uint8 or bool, found {}", tensor.Type().ToString());
  }
}

// The tensors `GROUP.N.KEY` of one N.
class Batch {
 public:
  Batch(const SafetensorsFile& file, std::string prefix) : file_(file), prefix_(std::move(prefix)) {}

  std::string Place(std::string_view key) const { return fmt::format("{}: {}{}", file_.Path().string(), prefix_, key); }
  const Tensor* Find(std::string_view key) const { return file_.Find(prefix_ + std::string(key)); }
  std::string Source() const {
    return fmt::format("{}:{}", file_.Path().filename().string(), prefix_.substr(0, prefix_.size() - 1));
  }

 private:
  const SafetensorsFile& file_;
  std::string prefix_;  // "calib.3."
};

int64_t CountImages(const std::vector<int64_t>& types) {
  int64_t runs = 0;
  for (size_t i = 0; i < types.size(); ++i) runs += types[i] == 1 && (i == 0 || types[i - 1] != 1);
  return runs;
}

// Rows [begin, begin + count) of the first axis, in memory of their own.
Tensor Rows(const Tensor& tensor, int64_t begin, int64_t count) {
  Shape shape = tensor.GetShape();
  const int64_t row_bytes = tensor.Bytes() / std::max<int64_t>(1, shape[0]);
  shape[0] = count;
  Tensor rows(TensorType{tensor.GetDType(), shape});
  if (rows.Bytes() > 0) std::memcpy(rows.Raw(), tensor.Raw() + begin * row_bytes, static_cast<size_t>(rows.Bytes()));
  return rows;
}

struct Images {
  Tensor pixels;     // float32 [images, patches, values]
  Tensor positions;  // int64 [images, patches, 2]
  int64_t count = 0;
};

Images ReadImages(const Batch& batch) {
  const Tensor* pixels = batch.Find("pixel_values");
  const Tensor* positions = batch.Find("image_position_ids");
  if (pixels == nullptr && positions == nullptr) return {};
  if (pixels == nullptr || positions == nullptr) {
    Fail("{} is missing, but {} is there; images need both",
         batch.Place(pixels ? "image_position_ids" : "pixel_values"), pixels ? "pixel_values" : "image_position_ids");
  }
  const Shape& p = pixels->GetShape();
  const Shape& q = positions->GetShape();
  if (p.Rank() != 3)
    Fail("{}: shape {}; expected [images, patches, 3 * patch^2]", batch.Place("pixel_values"), p.ToString());
  if (q != Shape{p[0], p[1], 2}) {
    Fail("{}: shape {}; pixel_values of shape {} need [{},{},2]", batch.Place("image_position_ids"), q.ToString(),
         p.ToString(), p[0], p[1]);
  }
  Images images;
  images.count = p[0];
  images.pixels = Within(batch.Place("pixel_values"), [&] { return ToF32(Rows(*pixels, 0, p[0])); });
  const std::vector<int64_t> ids = Within(batch.Place("image_position_ids"), [&] { return Integers(*positions); });
  images.positions = Tensor::Of<int64_t>(q, ids);
  return images;
}

void AppendRows(const Batch& batch, const SampleOptions& options, LengthLimit& limit, SampleSet& set) {
  const std::string place = batch.Place("input_ids");
  const Tensor& tensor = *batch.Find("input_ids");
  const Shape& shape = tensor.GetShape();
  if (shape.Rank() < 1 || shape.Rank() > 2)
    Fail("{}: shape {}; expected [batch, seq] or [seq]", place, shape.ToString());
  const int64_t rows = shape.Rank() == 2 ? shape[0] : 1;
  const int64_t length = shape[-1];
  const std::vector<int64_t> ids = Within(place, [&] { return Integers(tensor); });
  std::vector<int64_t> mask;
  if (const Tensor* given = batch.Find("attention_mask")) {
    if (given->GetShape() != shape) {
      Fail("{}: shape {}; input_ids have {}, and the mask needs the same", batch.Place("attention_mask"),
           given->GetShape().ToString(), shape.ToString());
    }
    mask = Within(batch.Place("attention_mask"), [&] { return Integers(*given); });
  }
  const Images images = ReadImages(batch);
  int64_t used = 0;
  for (int64_t row = 0; row < rows; ++row) {
    Sample sample;
    sample.source = rows == 1 ? batch.Source() : fmt::format("{}[{}]", batch.Source(), row);
    sample.input_ids.assign(ids.begin() + row * length, ids.begin() + (row + 1) * length);
    sample.token_types = TokenTypes(sample.input_ids, options.placeholders);
    Within(rows == 1 ? place : fmt::format("{}[{}]", place, row), [&] { CheckSample(sample, options); });
    for (int64_t i = 0; i < length && !mask.empty(); ++i) sample.attention_mask.push_back(mask[row * length + i] != 0);
    if (!mask.empty() && std::ranges::count(sample.attention_mask, 1) == 0)
      Fail("{}: row {} keeps no position; a sample needs one", batch.Place("attention_mask"), row);
    const int64_t count = rows == 1 ? images.count : std::min(CountImages(sample.token_types), images.count - used);
    if (count > 0) {
      sample.pixel_values = Rows(images.pixels, used, count);
      if (options.hold_pixels) sample.pixel_values = options.hold_pixels(std::move(sample.pixel_values));
      sample.image_position_ids = Rows(images.positions, used, count);
    }
    used += count;
    if (count > 0 && options.text_only)
      set.skipped.push_back(sample.source);
    else
      Within(rows == 1 ? place : fmt::format("{}[{}]", place, row),
             [&] { limit.Add(std::move(sample), set.samples); });
  }
  if (used != images.count) {
    Fail("{}: {} images, but the rows of input_ids hold {} runs of image placeholders (id {}); they must agree",
         batch.Place("pixel_values"), images.count, used, options.placeholders.image);
  }
}

}  // namespace

namespace {

// A tensor that no sample would read is a misspelt one.
void CheckKey(const SafetensorsFile& file, const std::string& name) {
  static const std::vector<std::string> kKeys{"input_ids", "attention_mask", "pixel_values", "image_position_ids"};
  const std::string key = name.substr(name.rfind('.') + 1);
  if (std::ranges::find(kKeys, key) == kKeys.end())
    Fail("{}: tensor \"{}\" is none of input_ids, attention_mask, pixel_values and image_position_ids{}",
         file.Path().string(), name, NearestHint(key, kKeys));
  const std::string ids = name.substr(0, name.size() - key.size()) + kKeys[0];
  if (file.Find(ids) == nullptr)
    Fail("{}: tensor \"{}\" has no \"{}\" beside it; give it, or take this one out", file.Path().string(), name, ids);
}

}  // namespace

SampleSet SamplesFromSafetensors(const std::filesystem::path& path, std::string_view group,
                                 const SampleOptions& options) {
  constexpr std::string_view kSuffix = ".input_ids";
  const SafetensorsFile file = SafetensorsFile::Open(path);
  const std::string prefix = group.empty() ? "" : std::string(group) + ".";
  std::map<int64_t, std::string> batches;  // by number: "calib.10." comes after "calib.2."
  for (const auto& [name, tensor] : file.Tensors()) {
    if (!name.starts_with(prefix)) continue;
    CheckKey(file, name);
    if (!name.ends_with(kSuffix) || name.size() <= prefix.size() + kSuffix.size()) continue;
    const std::string number = name.substr(prefix.size(), name.size() - prefix.size() - kSuffix.size());
    int64_t n = 0;
    const auto [end, failure] = std::from_chars(number.data(), number.data() + number.size(), n);
    if (failure == std::errc() && end == number.data() + number.size()) batches[n] = prefix + number + ".";
  }
  if (batches.empty()) {
    Fail("{}: no tensor is called \"{}N.input_ids\" with a number N; samples need one each", path.string(), prefix);
  }
  SampleSet set;
  LengthLimit limit(options);
  for (const auto& [number, name] : batches) AppendRows(Batch(file, name), options, limit, set);
  limit.Check(path.string());
  set.shortened = limit.Summary();
  if (set.samples.empty()) {
    Fail("{}: all {} samples have images and were left out, since only text was asked for; add text samples",
         path.string(), set.skipped.size());
  }
  return set;
}

}  // namespace circlet
