#pragma once

// The decoders behind DecodeImage. Most libraries report failures by calling back; where such a callback must not
// return it notes the text and jumps (longjmp) to a function that owns nothing, so no destructor is skipped, and an
// Error is thrown from there.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "circlet/preprocess/image.h"

namespace circlet {

// Pixels as stored, and the EXIF orientation that they still need.
struct StoredImage {
  Image image;
  int orientation = 1;  // 2 .. 8 turn; anything else is upright
};

using ImageBytes = std::span<const std::byte>;

StoredImage DecodePng(ImageBytes bytes, std::string_view file);
StoredImage DecodeJpeg(ImageBytes bytes, std::string_view file);
StoredImage DecodeBmp(ImageBytes bytes, std::string_view file);
// These are there when their libraries were at build time (CIRCLET_WEBP, CIRCLET_GIF, CIRCLET_TIFF).
StoredImage DecodeWebp(ImageBytes bytes, std::string_view file);
StoredImage DecodeGif(ImageBytes bytes, std::string_view file);
StoredImage DecodeTiff(ImageBytes bytes, std::string_view file);

// Refuses empty images and those past the limits of image.h, and those that `bytes` cannot hold even at the format's
// best compression: a header may claim any size. Images of up to `free_pixels` are taken whatever the file's length,
// for formats that store an even picture in next to nothing.
void CheckSize(ImageSize size, size_t bytes, int64_t max_pixels_per_byte, std::string_view file,
               int64_t free_pixels = 0);
inline constexpr int64_t kFreePixels = int64_t{1} << 24;

// The rule for transparency, the same for all formats: colours lie over white, in 8 bits, rounded.
inline uint8_t OverWhite(int value, int alpha) {
  return static_cast<uint8_t>((value * alpha + 255 * (255 - alpha) + 127) / 255);
}
// Ink of 0 (none) to 255 as RGB, as Pillow converts it.
void InkToRgb(const uint8_t* cmyk, uint8_t* rgb);

// Where a picture says how it is to be turned. Empty parts are absent.
struct Orientations {
  std::span<const uint8_t> exif;  // a TIFF block, with or without "Exif\0\0" in front
  std::string_view xmp;           // asked when EXIF has no orientation
};
int OrientationOf(const Orientations& said);
Image Upright(Image image, int orientation);

}  // namespace circlet
