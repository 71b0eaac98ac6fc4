#include <png.h>

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstring>

#include "circlet/base/error.h"
#include "preprocess/image_formats.h"

namespace circlet {
namespace {

// What a row holds after libpng unpacked it, bytes or big-endian 16-bit numbers, and what is transparent.
struct PixelFormat {
  int color_type;
  int channels;
  bool wide;
  png_colorp palette;
  int palette_size;
  uint8_t alphas[256];  // of the palette's colours
  bool has_key;         // pixels of the colour `key` are transparent
  uint8_t key[3];
};

// One row as RGB over white, each number in 8 bits as Pillow reads it: of 16 bits the high byte, but grey without alpha
// ends at 255. A transparent colour is compared in its low byte, whatever the depth. Returns the first palette index
// that has no colour, or -1.
int ConvertRow(const PixelFormat& format, const uint8_t* in, int64_t width, uint8_t* out) {
  const int bytes = format.wide ? 2 : 1;
  for (int64_t x = 0; x < width; ++x, in += bytes * format.channels, out += 3) {
    uint8_t color[3];
    int alpha = 255;
    const auto grey = [&](uint8_t value) { color[0] = color[1] = color[2] = value; };
    switch (format.color_type) {
      case PNG_COLOR_TYPE_PALETTE: {
        if (in[0] >= format.palette_size) return in[0];
        const png_color& entry = format.palette[in[0]];
        color[0] = entry.red, color[1] = entry.green, color[2] = entry.blue;
        alpha = format.alphas[in[0]];
        break;
      }
      case PNG_COLOR_TYPE_GRAY:
        grey(!format.wide ? in[0] : in[0] == 0 ? in[1] : 255);
        break;
      case PNG_COLOR_TYPE_GRAY_ALPHA:
        grey(in[0]);
        alpha = in[bytes];
        break;
      default:
        for (int c = 0; c < 3; ++c) color[c] = in[bytes * c];
        if (format.color_type == PNG_COLOR_TYPE_RGB_ALPHA) alpha = in[bytes * 3];
    }
    if (format.has_key && std::equal(color, color + 3, format.key)) alpha = 0;
    for (int c = 0; c < 3; ++c) out[c] = OverWhite(color[c], alpha);
  }
  return -1;
}

// ImageMagick's form of EXIF in a text: "\nexif\n   NUMBER\n" and hexadecimal digits.
std::vector<uint8_t> RawProfile(std::string_view text) {
  std::vector<uint8_t> bytes;
  for (int line = 0; line < 3; ++line) text.remove_prefix(std::min(text.find('\n'), text.size() - 1) + 1);
  int high = -1;
  for (const char c : text) {
    const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
    if (digit < 0) continue;
    if (high >= 0) bytes.push_back(static_cast<uint8_t>(high << 4 | digit));
    high = high >= 0 ? -1 : digit;
  }
  return bytes;
}

class PngReader {
 public:
  PngReader(std::span<const std::byte> bytes, std::string_view file) : bytes_(bytes), file_(file) {
    png_ = png_create_read_struct(PNG_LIBPNG_VER_STRING, this, OnError, OnWarning);
    info_ = png_ == nullptr ? nullptr : png_create_info_struct(png_);
    if (info_ == nullptr) {
      png_destroy_read_struct(&png_, nullptr, nullptr);
      Fail("{}: no memory for a PNG reader", file);
    }
    png_set_read_fn(png_, this, OnRead);
  }
  PngReader(const PngReader&) = delete;
  PngReader& operator=(const PngReader&) = delete;
  ~PngReader() { png_destroy_read_struct(&png_, &info_, nullptr); }

  StoredImage Read() {
    if (!ReadHeader()) Damaged();
    StoredImage stored;
    ImageSize& size = stored.image.size;
    size = {png_get_image_width(png_, info_), png_get_image_height(png_, info_)};
    // Deflate gives at most 1032 bytes for one, and the smallest pixels are 8 to a byte.
    CheckSize(size, bytes_.size(), 1032 * 8, file_);
    if (!Prepare()) Damaged();
    const size_t row_bytes = png_get_rowbytes(png_, info_);
    rows_.resize(passes_ == 1 ? row_bytes : row_bytes * size.height);
    stored.image.rgb.resize(3 * size.width * size.height);
    if (!ReadRows(size, row_bytes, stored.image.rgb.data())) Damaged();
    if (bad_index_ >= 0) {
      Fail("{}: a pixel has palette index {}, but the palette has {} colours; the file is damaged", file_, bad_index_,
           format_.palette_size);
    }
    stored.orientation = Orientation();
    return stored;
  }

 private:
  [[noreturn]] static void OnError(png_structp png, png_const_charp text) {
    auto* self = static_cast<PngReader*>(png_get_error_ptr(png));
    std::snprintf(self->text_, sizeof(self->text_), "%s", text);
    std::longjmp(self->jump_, 1);
  }
  static void OnWarning(png_structp, png_const_charp) {}
  static void OnRead(png_structp png, png_bytep out, size_t count) {
    auto* self = static_cast<PngReader*>(png_get_io_ptr(png));
    if (count > self->bytes_.size() - self->used_) png_error(png, "the file ends too early");
    std::memcpy(out, self->bytes_.data() + self->used_, count);
    self->used_ += count;
  }
  [[noreturn]] void Damaged() const { Fail("{}: damaged PNG: {}; export the image again", file_, text_); }

  int Orientation() const {
    Orientations said;
    std::vector<uint8_t> profile;
    if (exif_ != nullptr) said.exif = {exif_, exif_size_};
    png_textp texts = nullptr;
    const int count = png_get_text(png_, info_, &texts, nullptr);
    for (int i = 0; i < count; ++i) {
      const std::string_view key = texts[i].key, text = texts[i].text == nullptr ? "" : texts[i].text;
      if (key == "XML:com.adobe.xmp") said.xmp = text;
      if (key == "Raw profile type exif" && exif_ == nullptr && !text.empty()) said.exif = profile = RawProfile(text);
    }
    return OrientationOf(said);
  }

  // The next three return false when libpng jumped; they and what they call own nothing.
  bool ReadHeader() {
    if (setjmp(jump_) != 0) return false;
    png_set_user_limits(png_, PNG_UINT_31_MAX, PNG_UINT_31_MAX);  // CheckSize judges
    png_read_info(png_, info_);
    return true;
  }
  bool Prepare() {
    if (setjmp(jump_) != 0) return false;
    const int depth = png_get_bit_depth(png_, info_);
    format_.color_type = png_get_color_type(png_, info_);
    format_.wide = depth == 16;
    if (format_.color_type == PNG_COLOR_TYPE_PALETTE) {
      png_set_packing(png_);
      if (png_get_PLTE(png_, info_, &format_.palette, &format_.palette_size) == 0) png_error(png_, "no palette");
    } else if (depth < 8) {
      png_set_expand_gray_1_2_4_to_8(png_);
    }
    ReadTransparency(depth);
    passes_ = png_set_interlace_handling(png_);
    png_read_update_info(png_, info_);
    format_.channels = png_get_channels(png_, info_);
    return true;
  }
  void ReadTransparency(int depth) {
    std::fill(std::begin(format_.alphas), std::end(format_.alphas), uint8_t{255});
    png_bytep alphas = nullptr;
    int count = 0;
    png_color_16p key = nullptr;
    if (png_get_tRNS(png_, info_, &alphas, &count, &key) == 0) return;
    if (format_.color_type == PNG_COLOR_TYPE_PALETTE) {
      std::copy_n(alphas, std::min(count, 256), format_.alphas);
      return;
    }
    format_.has_key = true;
    const bool grey = format_.color_type == PNG_COLOR_TYPE_GRAY;
    const png_uint_16 wide[3] = {grey ? key->gray : key->red, grey ? key->gray : key->green,
                                 grey ? key->gray : key->blue};
    for (int c = 0; c < 3; ++c) format_.key[c] = static_cast<uint8_t>(depth == 1 && wide[c] != 0 ? 255 : wide[c]);
  }
  bool ReadRows(ImageSize size, size_t row_bytes, uint8_t* rgb) {
    if (setjmp(jump_) != 0) return false;
    for (int pass = 0; pass < passes_; ++pass) {
      for (int64_t y = 0; y < size.height; ++y) {
        uint8_t* row = rows_.data() + (passes_ == 1 ? 0 : row_bytes * y);
        png_read_row(png_, row, nullptr);
        if (pass + 1 == passes_)
          bad_index_ = std::max(bad_index_, ConvertRow(format_, row, size.width, rgb + 3 * size.width * y));
      }
    }
    png_read_end(png_, info_);
    png_get_eXIf_1(png_, info_, &exif_size_, &exif_);
    return true;
  }

  std::span<const std::byte> bytes_;
  size_t used_ = 0;
  std::string_view file_;
  png_structp png_ = nullptr;
  png_infop info_ = nullptr;
  std::jmp_buf jump_;
  char text_[128] = "";
  PixelFormat format_{};
  int passes_ = 1;
  std::vector<uint8_t> rows_;  // one row, or all of an interlaced image
  int bad_index_ = -1;
  png_bytep exif_ = nullptr;
  png_uint_32 exif_size_ = 0;
};

}  // namespace

StoredImage DecodePng(std::span<const std::byte> bytes, std::string_view file) { return PngReader(bytes, file).Read(); }

}  // namespace circlet
