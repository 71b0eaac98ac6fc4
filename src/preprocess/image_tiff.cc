#include <tiffio.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>

#include "circlet/base/error.h"
#include "preprocess/image_formats.h"

namespace circlet {
namespace {

enum class Alpha { kNone, kPremultiplied, kSeparate };

// The first picture of a file. Its numbers are read as bytes, one a sample, and then turned into colours, as Pillow
// does.
class TiffReader {
 public:
  TiffReader(ImageBytes bytes, std::string_view file) : bytes_(bytes), file_(file) {
    const std::unique_ptr<TIFFOpenOptions, decltype(&TIFFOpenOptionsFree)> options(TIFFOpenOptionsAlloc(),
                                                                                   TIFFOpenOptionsFree);
    if (options == nullptr) Fail("{}: no memory for a TIFF reader", file);
    TIFFOpenOptionsSetErrorHandlerExtR(options.get(), OnError, this);
    TIFFOpenOptionsSetWarningHandlerExtR(options.get(), OnWarning, this);
    TIFFOpenOptionsSetMaxSingleMemAlloc(options.get(), tmsize_t{1} << 30);
    tiff_.reset(TIFFClientOpenExt("picture", "rm", this, OnRead, OnWrite, OnSeek, OnClose, OnSize, nullptr, nullptr,
                                  options.get()));
    if (tiff_ == nullptr) Damaged();
  }

  StoredImage Read() {
    ReadHeader();
    samples_.resize(size_.width * size_.height * kept_);
    if (TIFFIsTiled(tiff_.get()) != 0)
      ReadTiles();
    else
      ReadRows();
    StoredImage stored;
    stored.image.size = size_;
    stored.image.rgb.resize(3 * size_.width * size_.height);
    const uint8_t* in = samples_.data();
    uint8_t* out = stored.image.rgb.data();
    for (int64_t i = 0, pixels = size_.width * size_.height; i < pixels; ++i, in += kept_, out += 3) Convert(in, out);
    stored.orientation = Orientation();
    return stored;
  }

 private:
  struct Closer {
    void operator()(TIFF* tiff) const { TIFFClose(tiff); }
  };

  // --- What libtiff calls ---
  static TiffReader& Self(void* data) { return *static_cast<TiffReader*>(data); }
  static int OnError(TIFF*, void* data, const char*, const char* format, va_list values) {
    char* text = Self(data).text_;
    if (text[0] == '\0') std::vsnprintf(text, sizeof(text_), format, values);  // the first is the cause
    return 1;
  }
  // Of a palette that cannot be read libtiff only warns, and takes the file for grey.
  static int OnWarning(TIFF*, void* data, const char*, const char* format, va_list values) {
    char text[sizeof(text_)];
    std::vsnprintf(text, sizeof(text), format, values);
    TiffReader& self = Self(data);
    if (std::strstr(text, "ColorMap") != nullptr && self.text_[0] == '\0') {
      std::memcpy(self.text_, text, sizeof(text));
      self.lost_palette_ = true;
    }
    return 1;
  }
  static tmsize_t OnRead(thandle_t data, void* out, tmsize_t count) {
    TiffReader& self = Self(data);
    const uint64_t left = self.at_ < self.bytes_.size() ? self.bytes_.size() - self.at_ : 0;
    const auto got = static_cast<tmsize_t>(std::min<uint64_t>(left, static_cast<uint64_t>(count)));
    if (got > 0) std::memcpy(out, self.bytes_.data() + self.at_, static_cast<size_t>(got));
    self.at_ += static_cast<uint64_t>(got);
    return got;
  }
  static tmsize_t OnWrite(thandle_t, void*, tmsize_t) { return 0; }
  static toff_t OnSeek(thandle_t data, toff_t offset, int from) {
    TiffReader& self = Self(data);
    self.at_ = offset + (from == SEEK_CUR ? self.at_ : from == SEEK_END ? self.bytes_.size() : 0);
    return self.at_;
  }
  static int OnClose(thandle_t) { return 0; }
  static toff_t OnSize(thandle_t data) { return Self(data).bytes_.size(); }

  [[noreturn]] void Damaged() const {
    Fail("{}: damaged TIFF: {}; export the image again", file_, text_[0] == '\0' ? "it has no picture" : text_);
  }
  [[noreturn]] void Unsupported(std::string_view what) const {
    Fail("{}: a TIFF with {} is not read; convert it to PNG", file_, what);
  }

  uint32_t Field(uint32_t tag, uint32_t fallback) const {
    uint16_t value = 0;
    return TIFFGetField(tiff_.get(), tag, &value) == 1 ? value : fallback;
  }

  void ReadHeader() {
    if (lost_palette_) Damaged();
    TIFF* tiff = tiff_.get();
    uint32_t width = 0, height = 0;
    TIFFGetField(tiff, TIFFTAG_IMAGEWIDTH, &width);
    TIFFGetField(tiff, TIFFTAG_IMAGELENGTH, &height);
    size_ = {width, height};
    CheckSize(size_, bytes_.size(), 1032 * 8, file_, kFreePixels);

    photometric_ = Field(TIFFTAG_PHOTOMETRIC, PHOTOMETRIC_MINISWHITE);
    const uint32_t compression = Field(TIFFTAG_COMPRESSION, COMPRESSION_NONE);
    if (TIFFIsCODECConfigured(static_cast<uint16_t>(compression)) == 0 || compression == COMPRESSION_OJPEG)
      Unsupported(fmt::format("compression {}", compression));
    separate_ = Field(TIFFTAG_PLANARCONFIG, PLANARCONFIG_CONTIG) == PLANARCONFIG_SEPARATE;
    bits_ = static_cast<int>(Field(TIFFTAG_BITSPERSAMPLE, 1));
    stored_ = static_cast<int>(Field(TIFFTAG_SAMPLESPERPIXEL, 1));
    if (photometric_ == PHOTOMETRIC_YCBCR) {
      if (compression != COMPRESSION_JPEG || separate_ || stored_ != 3) Unsupported("YCbCr colours outside JPEG");
      if (TIFFSetField(tiff, TIFFTAG_JPEGCOLORMODE, JPEGCOLORMODE_RGB) == 0) Damaged();
      photometric_ = PHOTOMETRIC_RGB;
    }
    if (const uint32_t format = Field(TIFFTAG_SAMPLEFORMAT, SAMPLEFORMAT_UINT); format != SAMPLEFORMAT_UINT)
      Unsupported(format == SAMPLEFORMAT_IEEEFP ? "float samples" : "signed samples");
    ReadSamples();
    if (photometric_ == PHOTOMETRIC_PALETTE &&
        TIFFGetField(tiff, TIFFTAG_COLORMAP, &palette_[0], &palette_[1], &palette_[2]) == 0)
      Fail("{}: damaged TIFF: it has no palette; export the image again", file_);
  }

  // Which samples make the colour, and whether one is its alpha.
  void ReadSamples() {
    const bool grey = photometric_ == PHOTOMETRIC_MINISWHITE || photometric_ == PHOTOMETRIC_MINISBLACK;
    const bool palette = photometric_ == PHOTOMETRIC_PALETTE;
    if (!grey && !palette && photometric_ != PHOTOMETRIC_RGB && photometric_ != PHOTOMETRIC_SEPARATED)
      Unsupported(fmt::format("colours of kind {} (PhotometricInterpretation)", photometric_));
    const int base = grey || palette ? 1 : photometric_ == PHOTOMETRIC_RGB ? 3 : 4;
    constexpr int kMostSamples = 6;
    uint16_t extras = 0;
    const uint16_t* kinds = nullptr;
    const bool told = TIFFGetField(tiff_.get(), TIFFTAG_EXTRASAMPLES, &extras, &kinds) == 1 && extras > 0;
    if (stored_ > kMostSamples || stored_ < base || (!told && stored_ != base && !(base == 3 && stored_ == 4)))
      Unsupported(fmt::format("{} samples a pixel of these colours", stored_));
    if (stored_ > base) {
      constexpr int kCorelDraw = 999;  // means separate alpha
      const int kind = told ? kinds[0] : EXTRASAMPLE_UNASSALPHA;
      alpha_ = kind == EXTRASAMPLE_ASSOCALPHA                         ? Alpha::kPremultiplied
               : kind == EXTRASAMPLE_UNASSALPHA || kind == kCorelDraw ? Alpha::kSeparate
                                                                      : Alpha::kNone;
    }
    if (alpha_ == Alpha::kPremultiplied && base != 3) Unsupported("premultiplied alpha in these colours");
    const bool small = bits_ == 1 || bits_ == 2 || bits_ == 4;
    const bool wide = bits_ == 16 && !palette && (!grey || stored_ == 1);
    if (bits_ != 8 && !wide && !(small && base == 1 && stored_ == 1))
      Unsupported(fmt::format("{} samples of {} bits", stored_, bits_));
    kept_ = base + (alpha_ == Alpha::kNone ? 0 : 1);
    clips_ = grey && bits_ == 16;
  }

  // `count` pixels of a row that libtiff has unpacked; `plane`: the sample that it holds, when each has its own.
  void Unpack(const uint8_t* in, int64_t y, int64_t x, int64_t count, int plane) {
    const int per_pixel = separate_ ? 1 : stored_;
    const int first = separate_ ? plane : 0;
    uint8_t* out = &samples_[(y * size_.width + x) * kept_];
    for (int64_t i = 0; i < count; ++i, out += kept_) {
      for (int s = 0; s < per_pixel && first + s < kept_; ++s) {
        const int64_t at = i * per_pixel + s;
        if (bits_ == 16) {
          uint16_t value;
          std::memcpy(&value, in + 2 * at, sizeof value);
          out[first + s] = static_cast<uint8_t>(clips_ ? std::min<uint16_t>(value, 255) : value >> 8);
        } else {
          const int64_t bit = at * bits_;
          out[first + s] = static_cast<uint8_t>(in[bit / 8] >> (8 - bits_ - bit % 8) & ((1 << bits_) - 1));
        }
      }
    }
  }

  // Bytes that libtiff must hand over for `count` pixels.
  int64_t BytesOf(int64_t count) const { return (count * (separate_ ? 1 : stored_) * bits_ + 7) / 8; }
  int Planes() const { return separate_ ? kept_ : 1; }

  void ReadRows() {
    const tmsize_t row_bytes = TIFFScanlineSize(tiff_.get());
    if (row_bytes < BytesOf(size_.width)) Damaged();
    std::vector<uint8_t> row(row_bytes);
    for (int plane = 0; plane < Planes(); ++plane) {
      for (int64_t y = 0; y < size_.height; ++y) {
        if (TIFFReadScanline(tiff_.get(), row.data(), static_cast<uint32_t>(y), static_cast<uint16_t>(plane)) < 0)
          Damaged();
        Unpack(row.data(), y, 0, size_.width, plane);
      }
    }
  }

  void ReadTiles() {
    uint32_t tile_width = 0, tile_height = 0;
    TIFFGetField(tiff_.get(), TIFFTAG_TILEWIDTH, &tile_width);
    TIFFGetField(tiff_.get(), TIFFTAG_TILELENGTH, &tile_height);
    CheckSize({tile_width, tile_height}, bytes_.size(), 1032 * 8, file_, kFreePixels);
    const tmsize_t tile_bytes = TIFFTileSize(tiff_.get()), row_bytes = TIFFTileRowSize(tiff_.get());
    if (row_bytes < BytesOf(tile_width) || tile_bytes < row_bytes * tmsize_t{tile_height}) Damaged();
    std::vector<uint8_t> tile(tile_bytes);
    for (int plane = 0; plane < Planes(); ++plane) {
      for (int64_t y = 0; y < size_.height; y += tile_height) {
        for (int64_t x = 0; x < size_.width; x += tile_width) {
          if (TIFFReadTile(tiff_.get(), tile.data(), static_cast<uint32_t>(x), static_cast<uint32_t>(y), 0,
                           static_cast<uint16_t>(plane)) < 0)
            Damaged();
          const int64_t rows = std::min<int64_t>(tile_height, size_.height - y);
          for (int64_t r = 0; r < rows; ++r)
            Unpack(&tile[r * row_bytes], y + r, x, std::min<int64_t>(tile_width, size_.width - x), plane);
        }
      }
    }
  }

  void Convert(const uint8_t* in, uint8_t* out) const {
    uint8_t color[3];
    switch (photometric_) {
      case PHOTOMETRIC_PALETTE:
        for (int c = 0; c < 3; ++c) color[c] = static_cast<uint8_t>(palette_[c][in[0]] >> 8);
        break;
      case PHOTOMETRIC_RGB:
        std::copy_n(in, 3, color);
        break;
      case PHOTOMETRIC_SEPARATED:
        InkToRgb(in, color);
        break;
      default: {
        const int most = bits_ < 8 ? (1 << bits_) - 1 : 255;
        const int value = in[0] * (255 / most);
        const bool inverts = photometric_ == PHOTOMETRIC_MINISWHITE && bits_ <= 8;  // Pillow leaves 16 bits alone
        std::fill_n(color, 3, static_cast<uint8_t>(inverts ? 255 - value : value));
      }
    }
    const int alpha = alpha_ == Alpha::kNone ? 255 : in[kept_ - 1];
    if (alpha_ == Alpha::kPremultiplied && alpha > 0)
      for (uint8_t& value : color) value = static_cast<uint8_t>(std::min(255, value * 255 / alpha));
    for (int c = 0; c < 3; ++c) out[c] = OverWhite(color[c], alpha);
  }

  int Orientation() const {
    if (const uint32_t orientation = Field(TIFFTAG_ORIENTATION, 0); orientation != 0)
      return static_cast<int>(orientation);
    uint32_t length = 0;
    const char* xmp = nullptr;
    if (TIFFGetField(tiff_.get(), TIFFTAG_XMLPACKET, &length, &xmp) != 1) return 1;
    return OrientationOf({.exif = {}, .xmp = {xmp, length}});
  }

  ImageBytes bytes_;
  uint64_t at_ = 0;
  std::string_view file_;
  char text_[256] = "";
  std::unique_ptr<TIFF, Closer> tiff_;
  ImageSize size_;
  uint32_t photometric_ = 0;
  int bits_ = 1, stored_ = 1, kept_ = 1;  // samples a pixel in the file, and those that are used
  bool separate_ = false;                 // each sample in a plane of its own
  bool clips_ = false;                    // 16-bit grey ends at 255
  Alpha alpha_ = Alpha::kNone;
  uint16_t* palette_[3] = {};
  bool lost_palette_ = false;
  std::vector<uint8_t> samples_;
};

}  // namespace

StoredImage DecodeTiff(ImageBytes bytes, std::string_view file) { return TiffReader(bytes, file).Read(); }

}  // namespace circlet
