#include <algorithm>
#include <new>
#include <utility>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"
#include "circlet/io/file.h"
#include "preprocess/image_formats.h"

namespace circlet {

Image LoadImage(const std::filesystem::path& path) {
  const std::string bytes = ReadFile(path);
  return DecodeImage(std::as_bytes(std::span(bytes)), path.string());
}

Image DecodeImage(std::span<const std::byte> bytes, std::string_view file) {
  if (bytes.empty()) Fail("{}: the file is empty; was the image written completely?", file);
  if (!IsPng(bytes) && !IsJpeg(bytes)) Fail("{}: neither PNG nor JPEG; convert the image to one of them", file);
  try {
    StoredImage stored = IsPng(bytes) ? DecodePng(bytes, file) : DecodeJpeg(bytes, file);
    return Upright(std::move(stored.image), stored.orientation);
  } catch (const std::bad_alloc&) {
    Fail("{}: no memory for its pixels; scale the image down", file);
  }
}

void CheckSize(ImageSize size, size_t bytes, int64_t max_pixels_per_byte, std::string_view file) {
  const auto [width, height] = size;
  if (width < 1 || height < 1) Fail("{}: {}x{} pixels; the image is empty", file, width, height);
  if (width > kImageLimitSide || height > kImageLimitSide || width * height > kImageLimitPixels) {
    Fail("{}: {}x{} pixels are more than circlet decodes ({} on a side, {} in all); scale the image down", file, width,
         height, kImageLimitSide, kImageLimitPixels);
  }
  if (width * height / max_pixels_per_byte > static_cast<int64_t>(bytes)) {
    Fail("{}: {}x{} pixels cannot come out of {} bytes; the file is cut off or damaged", file, width, height, bytes);
  }
}

int ExifOrientation(std::span<const uint8_t> tiff) {
  constexpr uint32_t kOrientationTag = 0x112, kShort = 3;
  if (tiff.size() < 8) return 1;
  const bool little = tiff[0] == 'I' && tiff[1] == 'I';
  if (!little && !(tiff[0] == 'M' && tiff[1] == 'M')) return 1;
  const auto number = [&](size_t at, size_t length) {
    uint32_t value = 0;
    for (size_t i = 0; i < length; ++i) value = value << 8 | tiff[little ? at + length - 1 - i : at + i];
    return value;
  };
  const size_t directory = number(4, 4);
  if (directory > tiff.size() - 2) return 1;
  const size_t entries = number(directory, 2);
  for (size_t i = 0; i < entries; ++i) {
    const size_t entry = directory + 2 + 12 * i;
    if (entry + 12 > tiff.size()) return 1;
    if (number(entry, 2) != kOrientationTag || number(entry + 2, 2) != kShort) continue;
    const uint32_t orientation = number(entry + 8, 2);
    return orientation >= 1 && orientation <= 8 ? static_cast<int>(orientation) : 1;
  }
  return 1;
}

Image Upright(Image image, int orientation) {
  if (orientation == 1) return image;
  const int64_t w = image.size.width, h = image.size.height;
  // Output (x, y) is input start + x * step_x + y * step_y, in pixels.
  const bool swaps = orientation >= 5;
  const bool from_right = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
  const bool from_bottom = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  const int64_t start = (from_right ? w - 1 : 0) + (from_bottom ? (h - 1) * w : 0);
  const int64_t along = from_right ? -1 : 1, down = from_bottom ? -w : w;
  const int64_t step_x = swaps ? down : along, step_y = swaps ? along : down;
  Image upright{swaps ? ImageSize{h, w} : ImageSize{w, h}, std::vector<uint8_t>(image.rgb.size())};
  const auto [out_w, out_h] = upright.size;
  constexpr int64_t kTile = 32;  // so that a turned column is read from cache lines that are still there
  ParallelFor(out_h, kTile, [&, out_w = out_w](int64_t y_begin, int64_t y_end) {
    for (int64_t tile_y = y_begin; tile_y < y_end; tile_y += kTile) {
      for (int64_t tile_x = 0; tile_x < out_w; tile_x += kTile) {
        for (int64_t y = tile_y; y < std::min(y_end, tile_y + kTile); ++y) {
          uint8_t* out = &upright.rgb[3 * (y * out_w + tile_x)];
          const uint8_t* in = &image.rgb[3 * (start + y * step_y + tile_x * step_x)];
          for (int64_t x = tile_x; x < std::min(out_w, tile_x + kTile); ++x, out += 3, in += 3 * step_x)
            std::copy_n(in, 3, out);
        }
      }
    }
  });
  return upright;
}

}  // namespace circlet
