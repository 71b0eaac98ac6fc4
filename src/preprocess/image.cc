#include <algorithm>
#include <new>
#include <utility>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"
#include "circlet/io/file.h"
#include "preprocess/image_formats.h"

namespace circlet {

namespace {

using namespace std::string_view_literals;  // magics hold zeros

struct ReadFormat {
  std::string_view magic;
  size_t at;
  std::string_view name;
  StoredImage (*decode)(ImageBytes bytes, std::string_view file);  // null: built without it
  std::string_view package;                                        // that it needs
};

#ifdef CIRCLET_WEBP
constexpr auto kDecodeWebp = DecodeWebp;
#else
constexpr decltype(&DecodeWebp) kDecodeWebp = nullptr;
#endif
#ifdef CIRCLET_GIF
constexpr auto kDecodeGif = DecodeGif;
#else
constexpr decltype(&DecodeGif) kDecodeGif = nullptr;
#endif
#ifdef CIRCLET_TIFF
constexpr auto kDecodeTiff = DecodeTiff;
#else
constexpr decltype(&DecodeTiff) kDecodeTiff = nullptr;
#endif

constexpr ReadFormat kRead[] = {
    {"\x89PNG\r\n\x1a\n"sv, 0, "PNG", DecodePng, ""},
    {"\xff\xd8\xff"sv, 0, "JPEG", DecodeJpeg, ""},
    {"BM"sv, 0, "BMP", DecodeBmp, ""},
    {"WEBPVP8"sv, 8, "WebP", kDecodeWebp, "libwebp-dev"},
    {"GIF87a"sv, 0, "GIF", kDecodeGif, "libgif-dev"},
    {"GIF89a"sv, 0, "GIF", kDecodeGif, "libgif-dev"},
    {"II*\0"sv, 0, "TIFF", kDecodeTiff, "libtiff-dev"},
    {"MM\0*"sv, 0, "TIFF", kDecodeTiff, "libtiff-dev"},
    {"II+\0"sv, 0, "TIFF", kDecodeTiff, "libtiff-dev"},
    {"MM\0+"sv, 0, "TIFF", kDecodeTiff, "libtiff-dev"},
};

struct OtherFormat {
  std::string_view magic;
  size_t at;
  std::string_view what;  // "an AVIF picture"
};

constexpr OtherFormat kOther[] = {
    {"ftypavi"sv, 4, "an AVIF picture"},
    {"ftyphei"sv, 4, "a HEIC picture"},
    {"ftypmif1"sv, 4, "a HEIF picture"},
    {"\0\0\0\x0cjP  "sv, 0, "a JPEG 2000 picture"},
    {"\xff\x0a"sv, 0, "a JPEG XL picture"},
    {"\0\0\0\x0cJXL "sv, 0, "a JPEG XL picture"},
    {"8BPS"sv, 0, "a Photoshop picture"},
    {"\0\0\1\0"sv, 0, "an icon"},
    {"P5"sv, 0, "a PGM picture"},
    {"P6"sv, 0, "a PPM picture"},
    {"<svg"sv, 0, "an SVG drawing"},
    {"<?xml"sv, 0, "XML, perhaps an SVG drawing"},
    {"%PDF"sv, 0, "a PDF document"},
    {"<!DOCTYPE html"sv, 0, "a web page"},
    {"<html"sv, 0, "a web page"},
    {"version https://git-lfs"sv, 0, "a Git LFS pointer (git lfs pull fetches the picture)"},
};

template <typename Format>
bool Matches(const Format& format, std::string_view bytes) {
  return bytes.size() >= format.at && bytes.substr(format.at).starts_with(format.magic);
}

constexpr std::string_view kFormats = "PNG, JPEG, WebP, GIF, BMP and TIFF";

}  // namespace

Image LoadImage(const std::filesystem::path& path) {
  const std::string bytes = ReadFile(path);
  return DecodeImage(std::as_bytes(std::span(bytes)), path.string());
}

Image DecodeImage(std::span<const std::byte> bytes, std::string_view file) {
  if (bytes.empty()) Fail("{}: the file is empty; was the image written completely?", file);
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  const auto format = std::ranges::find_if(kRead, [&](const ReadFormat& f) { return Matches(f, text); });
  if (format == std::end(kRead)) {
    const auto other = std::ranges::find_if(kOther, [&](const OtherFormat& f) { return Matches(f, text); });
    Fail("{}: is {}; {} are read: convert it to PNG", file,
         other == std::end(kOther) ? "no picture of a known format" : other->what, kFormats);
  }
  if (format->decode == nullptr) {
    Fail(
        "{}: is a {} picture, and circlet was built without {}; build it again with that package, or convert the "
        "picture to PNG",
        file, format->name, format->package);
  }
  try {
    StoredImage stored = format->decode(bytes, file);
    return Upright(std::move(stored.image), stored.orientation);
  } catch (const std::bad_alloc&) {
    Fail("{}: no memory for its pixels; scale the image down", file);
  }
}

void CheckSize(ImageSize size, size_t bytes, int64_t max_pixels_per_byte, std::string_view file, int64_t free_pixels) {
  const auto [width, height] = size;
  if (width < 1 || height < 1) Fail("{}: {}x{} pixels; the image is empty", file, width, height);
  if (width > kImageLimitSide || height > kImageLimitSide || width * height > kImageLimitPixels) {
    Fail("{}: {}x{} pixels are more than circlet decodes ({} on a side, {} in all); scale the image down", file, width,
         height, kImageLimitSide, kImageLimitPixels);
  }
  if (width * height > free_pixels && width * height / max_pixels_per_byte > static_cast<int64_t>(bytes)) {
    Fail("{}: {}x{} pixels cannot come out of {} bytes; the file is cut off or damaged", file, width, height, bytes);
  }
}

void InkToRgb(const uint8_t* cmyk, uint8_t* rgb) {
  const int light = 255 - cmyk[3];
  for (int c = 0; c < 3; ++c) rgb[c] = static_cast<uint8_t>(light - (cmyk[c] * light + 127) / 255);
}

namespace {

// 0: the block states none, or is damaged.
int ExifOrientation(std::span<const uint8_t> tiff) {
  constexpr uint32_t kOrientationTag = 0x112, kShort = 3;
  if (tiff.size() < 8) return 0;
  const bool little = tiff[0] == 'I' && tiff[1] == 'I';
  if (!little && !(tiff[0] == 'M' && tiff[1] == 'M')) return 0;
  const auto number = [&](size_t at, size_t length) {
    uint32_t value = 0;
    for (size_t i = 0; i < length; ++i) value = value << 8 | tiff[little ? at + length - 1 - i : at + i];
    return value;
  };
  const size_t directory = number(4, 4);
  if (directory > tiff.size() - 2) return 0;
  const size_t entries = number(directory, 2);
  for (size_t i = 0; i < entries; ++i) {
    const size_t entry = directory + 2 + 12 * i;
    if (entry + 12 > tiff.size()) return 0;
    if (number(entry, 2) != kOrientationTag || number(entry + 2, 2) != kShort) continue;
    return static_cast<int>(number(entry + 8, 2));
  }
  return 0;
}

int XmpOrientation(std::string_view xmp) {
  constexpr std::string_view kKey = "tiff:Orientation";
  for (size_t at = 0; (at = xmp.find(kKey, at)) != xmp.npos;) {
    at += kKey.size();
    std::string_view rest = xmp.substr(at);
    rest.remove_prefix(rest.starts_with("=\"") ? 2 : rest.starts_with(">") ? 1 : rest.size());
    if (!rest.empty() && rest[0] >= '0' && rest[0] <= '9') return rest[0] - '0';
  }
  return 0;
}

}  // namespace

int OrientationOf(const Orientations& said) {
  constexpr uint8_t kExif[6] = {'E', 'x', 'i', 'f', 0, 0};
  std::span<const uint8_t> exif = said.exif;
  while (exif.size() >= sizeof kExif && std::equal(kExif, kExif + sizeof kExif, exif.begin()))
    exif = exif.subspan(sizeof kExif);
  const int orientation = ExifOrientation(exif);
  return orientation != 0 ? orientation : XmpOrientation(said.xmp);
}

Image Upright(Image image, int orientation) {
  if (orientation < 2 || orientation > 8) return image;
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
