#pragma once

// The decoders behind DecodeImage. Both libraries report failures by calling back; the callbacks note the text and jump
// (longjmp) to a function that owns nothing, so no destructor is skipped, and an Error is thrown from there.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "circlet/preprocess/image.h"

namespace circlet {

// Pixels as stored, and the EXIF orientation that they still need.
struct StoredImage {
  Image image;
  int orientation = 1;  // 1 .. 8, 1 = upright
};

bool IsPng(std::span<const std::byte> bytes);
bool IsJpeg(std::span<const std::byte> bytes);
StoredImage DecodePng(std::span<const std::byte> bytes, std::string_view file);
StoredImage DecodeJpeg(std::span<const std::byte> bytes, std::string_view file);

// Refuses empty images and those past the limits of image.h, and those that `bytes` cannot hold even at the format's
// best compression: a header may claim any size.
void CheckSize(ImageSize size, size_t bytes, int64_t max_pixels_per_byte, std::string_view file);

// The orientation that a TIFF block (the payload of EXIF) states; 1 when it states none or is damaged.
int ExifOrientation(std::span<const uint8_t> tiff);
Image Upright(Image image, int orientation);

}  // namespace circlet
