#include <algorithm>
#include <array>
#include <cmath>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"
#include "circlet/io/json.h"
#include "circlet/preprocess/image.h"

namespace circlet {
namespace {

using nlohmann::json;

void Require(const JsonObject& object, std::string_view key, bool ok, std::string_view expected) {
  if (!ok) object.FailAt(key, fmt::format("{} is not implemented; circlet needs {}", Shown(object.Raw(key)), expected));
}

bool AllEqual(const JsonObject& object, std::string_view key, double value) {
  const std::vector<double> found = object.Optional<std::vector<double>>(key, {});
  return std::ranges::all_of(found, [&](double x) { return x == value; });
}

ImageRules ReadRules(const JsonObject& object, std::string source) {
  constexpr std::array<int64_t, 5> kBudgets{70, 140, 280, 560, 1120};
  const std::string type = object.Optional<std::string>("image_processor_type", "Gemma4ImageProcessor");
  Require(object, "image_processor_type", type.starts_with("Gemma4ImageProcessor"), "Gemma4ImageProcessor");
  for (const std::string_view key : {"do_resize", "do_rescale", "do_convert_rgb"})
    Require(object, key, object.Optional<bool>(key, true), "true");
  // Mean 0 and deviation 1 change nothing.
  const bool normalizes = object.Optional<bool>("do_normalize", false) &&
                          !(object.Has("image_mean") && object.Has("image_std") && AllEqual(object, "image_mean", 0) &&
                            AllEqual(object, "image_std", 1));
  Require(object, "do_normalize", !normalizes, "false");
  Require(object, "resample", object.Optional<int64_t>("resample", 3) == 3, "3 (bicubic)");
  const double factor = object.Optional<double>("rescale_factor", 1.0 / 255);
  Require(object, "rescale_factor", std::abs(factor * 255 - 1) < 1e-6, "1/255");
  ImageRules rules;
  rules.patch_size = object.Optional<int64_t>("patch_size", rules.patch_size);
  rules.pooling = object.Optional<int64_t>("pooling_kernel_size", rules.pooling);
  rules.max_soft_tokens = object.Optional<int64_t>("max_soft_tokens", rules.max_soft_tokens);
  rules.source = std::move(source);
  const auto in_range = [](int64_t value, int64_t limit) { return value >= 1 && value <= limit; };
  Require(object, "patch_size", in_range(rules.patch_size, 256), "1 to 256");
  Require(object, "pooling_kernel_size", in_range(rules.pooling, 16), "1 to 16");
  Require(object, "max_soft_tokens", std::ranges::find(kBudgets, rules.max_soft_tokens) != kBudgets.end(),
          "70, 140, 280, 560 or 1120");
  return rules;
}

}  // namespace

ImageRules LoadImageRules(const std::filesystem::path& directory) {
  for (const char* name : {"processor_config.json", "preprocessor_config.json"}) {
    const std::filesystem::path path = directory / name;
    std::error_code ignored;
    if (!std::filesystem::exists(path, ignored)) continue;
    const json tree = ReadJson(path);
    const JsonObject root(tree, path.string());
    if (root.Has("image_processor")) return ReadRules(root.Object("image_processor"), name);
    // The older layout has the fields at the top; a processor_config.json of that age has nothing about images.
    if (path.filename() == "preprocessor_config.json") return ReadRules(root, name);
  }
  return {.missing = fmt::format("{}: has neither processor_config.json with an image_processor nor "
                                 "preprocessor_config.json, which say how pictures are cut into patches; copy one from "
                                 "the original checkpoint",
                                 directory.string())};
}

ImageSize TargetSize(ImageSize size, const ImageRules& rules) {
  const double w = static_cast<double>(size.width), h = static_cast<double>(size.height);
  const int64_t side = rules.patch_size * rules.pooling;
  const int64_t budget = rules.MaxPatches() * rules.patch_size * rules.patch_size;  // pixels
  const auto no_size = [&] {
    Fail("{}x{} pixels do not fit a budget of {} soft tokens of {}x{} pixels; crop the image", size.width, size.height,
         rules.max_soft_tokens, side, side);
  };
  if (size.width < 1 || size.height < 1) no_size();
  const double factor = std::sqrt(static_cast<double>(budget) / (h * w));
  const auto fit = [&](double length) {
    return static_cast<int64_t>(std::floor(factor * length / static_cast<double>(side))) * side;
  };
  ImageSize target{fit(w), fit(h)};
  if (target.width == 0 && target.height == 0) no_size();
  const int64_t longest = rules.max_soft_tokens * side;
  if (target.height == 0) target = {std::min(size.width / size.height * side, longest), side};
  if (target.width == 0) target = {side, std::min(size.height / size.width * side, longest)};
  if (target.width == 0 || target.height == 0 || target.width * target.height > budget) no_size();
  return target;
}

ImagePatches Patchify(const Image& image, const ImageRules& rules) {
  const auto [width, height] = image.size;
  const int64_t patch = rules.patch_size, side = patch * rules.pooling;
  const int64_t columns = width / patch, grid_rows = height / patch, capacity = rules.MaxPatches();
  if (width % side != 0 || height % side != 0 || columns * grid_rows > capacity || columns * grid_rows == 0) {
    Fail(
        "{}x{} pixels do not cut into soft tokens of {}x{} within a budget of {}; scale the image to its target size "
        "first",
        width, height, side, side, rules.max_soft_tokens);
  }
  ImagePatches result;
  result.patches = columns * grid_rows;
  result.soft_tokens = result.patches / (rules.pooling * rules.pooling);
  const int64_t values = 3 * patch * patch;
  result.pixel_values = Tensor(TensorType{DType::kU8, {1, capacity, values}});
  result.position_ids = Tensor(TensorType{DType::kI64, {1, capacity, 2}});
  const std::span<int64_t> positions = result.position_ids.I64();
  std::ranges::fill(positions, -1);
  for (int64_t i = 0; i < result.patches; ++i) {
    positions[2 * i] = i % columns;
    positions[2 * i + 1] = i / columns;
  }
  uint8_t* const out = result.pixel_values.As<uint8_t>().data();
  const uint8_t* const in = image.rgb.data();
  ParallelFor(grid_rows, 1, [&, row_bytes = 3 * width](int64_t begin, int64_t end) {
    for (int64_t y = begin * patch; y < end * patch; ++y) {
      uint8_t* to = out + (y / patch * columns) * values + y % patch * 3 * patch;
      const uint8_t* from = in + y * row_bytes;
      for (int64_t x = 0; x < columns; ++x, to += values, from += 3 * patch) std::copy_n(from, 3 * patch, to);
    }
  });
  return result;
}

Tensor PixelValues(const Tensor& pixels) {
  if (pixels.GetDType() == DType::kF32) return pixels;
  Tensor values = Tensor::Uninitialized({DType::kF32, pixels.GetShape()});
  const uint8_t* __restrict from = pixels.As<uint8_t>().data();
  float* __restrict to = values.F32().data();
  for (int64_t i = 0, count = pixels.Elements(); i < count; ++i) to[i] = static_cast<float>(from[i]) * (1.0f / 255.0f);
  return values;
}

ImagePatches PrepareImage(const Image& image, const ImageRules& rules) {
  if (!rules.missing.empty()) throw Error(rules.missing);
  return Patchify(ResizeBicubic(image, TargetSize(image.size, rules)), rules);
}

}  // namespace circlet
