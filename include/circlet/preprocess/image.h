#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "circlet/base/tensor.h"

namespace circlet {

// How a checkpoint wants its images (model.md 6.1).
struct ImageRules {
  int64_t patch_size = 16;          // pixels on a side
  int64_t pooling = 3;              // patches on a side of a soft token
  int64_t max_soft_tokens = 280;    // the budget that every image is scaled to
  std::string source = "built in";  // the file that they come from
  std::string missing;              // no file says: pictures are an Error with this text

  int64_t MaxPatches() const { return max_soft_tokens * pooling * pooling; }
};

// From processor_config.json (its image_processor) or preprocessor_config.json of a checkpoint directory. When there is
// neither, `missing` says so: text needs none, and for pictures the reference fails too. Throws Error naming file, key
// and value for anything that circlet does not do: another resampling, normalization, a rescale factor other than 1/255, a budget other than 70, 140, 280, 560 or 1120.
ImageRules LoadImageRules(const std::filesystem::path& directory);

struct ImageSize {
  int64_t width = 0, height = 0;
  bool operator==(const ImageSize&) const = default;
};

struct Image {
  ImageSize size;
  std::vector<uint8_t> rgb;  // [height, width, 3]
};

// Largest image that is decoded: 2^28 pixels, 65535 on a side.
inline constexpr int64_t kImageLimitPixels = int64_t{1} << 28;
inline constexpr int64_t kImageLimitSide = 65535;

// A picture as upright RGB, as transformers' image processor has it: PNG, JPEG, BMP, WebP, GIF (the first frame) and TIFF
// (the first page), turned by its EXIF or XMP orientation, transparency over white (docs/data.md has the rules). A file of
// another format, or one that is damaged, cut off, empty or past the limits, is an Error naming it; sizes are judged
// before memory is taken. WebP, GIF and TIFF need their libraries at build time.
Image LoadImage(const std::filesystem::path& path);
Image DecodeImage(std::span<const std::byte> bytes, std::string_view file);

// The size an image is scaled to: multiples of patch * pooling that fill the budget (model.md 6.1). Throws Error when
// the sides are so unequal that no size fits.
ImageSize TargetSize(ImageSize size, const ImageRules& rules);

// Antialiased bicubic interpolation as Pillow does it: a horizontal, then a vertical pass, each in 22-bit fixed point
// and rounded to 8 bits, so the result is the same on every machine. Unchanged when the size is.
Image ResizeBicubic(const Image& image, ImageSize target);

// What the vision tower reads, padded to the budget.
struct ImagePatches {
  Tensor pixel_values;  // uint8 [1, max_patches, 3 * patch^2]: rows, columns, RGB of a patch; padding 0
  Tensor position_ids;  // int64 [1, max_patches, 2]: (x, y) of a patch; padding (-1, -1)
  int64_t patches = 0;  // without padding
  int64_t soft_tokens = 0;
};

// Cuts an image whose sides are multiples of patch * pooling and that fits the budget; anything else is an Error.
ImagePatches Patchify(const Image& image, const ImageRules& rules);
// TargetSize, ResizeBicubic and Patchify. Throws Error with rules.missing when that is set.
ImagePatches PrepareImage(const Image& image, const ImageRules& rules);
// What the patch embedder multiplies: v * (1/255) of uint8 pixels, a quarter of the size to keep; float32 as they are.
Tensor PixelValues(const Tensor& pixels);

}  // namespace circlet
