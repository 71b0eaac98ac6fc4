#include <algorithm>
#include <array>
#include <cstring>

#include "circlet/base/error.h"
#include "preprocess/image_formats.h"

// No library that Debian has reads these files to the values that Pillow gives, so this does: headers of 12, 40, 52,
// 56, 64, 108 and 124 bytes, palettes of 1, 4 and 8 bits, RLE, and pixels of 16, 24 and 32 bits.

namespace circlet {
namespace {

enum Compression : uint32_t { kRaw = 0, kRle8 = 1, kRle4 = 2, kMasks = 3 };

// Where the bytes of a pixel hold red, green, blue and alpha; -1 = no alpha.
struct Layout {
  std::array<uint32_t, 4> masks;
  std::array<int, 4> at;
};

constexpr Layout kLayouts32[] = {
    {{0xff0000, 0xff00, 0xff, 0}, {2, 1, 0, -1}},         {{0xff000000, 0xff0000, 0xff00, 0}, {3, 2, 1, -1}},
    {{0xff000000, 0xff00, 0xff, 0}, {3, 1, 0, -1}},       {{0xff000000, 0xff0000, 0xff00, 0xff}, {3, 2, 1, 0}},
    {{0xff, 0xff00, 0xff0000, 0xff000000}, {0, 1, 2, 3}}, {{0xff0000, 0xff00, 0xff, 0xff000000}, {2, 1, 0, 3}},
    {{0xff000000, 0xff00, 0xff, 0xff0000}, {3, 1, 0, 2}}, {{0, 0, 0, 0}, {2, 1, 0, 3}},
};

class BmpReader {
 public:
  BmpReader(ImageBytes bytes, std::string_view file) : bytes_(bytes), file_(file) {}

  StoredImage Read() {
    ReadHeader();
    const bool is_rle = compression_ == kRle8 || compression_ == kRle4;
    // A run of two bytes stands for up to 255 pixels; else the smallest pixels are 8 to a byte.
    CheckSize(size_, bytes_.size(), 255, file_);
    if (bits_ <= 8) ReadPalette();
    std::vector<uint8_t> rgb(3 * size_.width * size_.height);
    const int64_t stride = is_rle ? size_.width : (size_.width * bits_ + 31) / 32 * 4;
    std::vector<uint8_t> runs;
    if (is_rle) runs = Runs();
    if (!is_rle) Need(static_cast<uint64_t>(pixels_), stride * size_.height);
    const uint8_t* rows = is_rle ? runs.data() : Data() + pixels_;
    for (int64_t y = 0; y < size_.height; ++y) {
      const int64_t row = top_down_ ? y : size_.height - 1 - y;
      ConvertRow(rows + row * stride, is_rle ? 8 : bits_, &rgb[3 * size_.width * y]);
    }
    return {.image = {size_, std::move(rgb)}};
  }

 private:
  const uint8_t* Data() const { return reinterpret_cast<const uint8_t*>(bytes_.data()); }
  void Need(uint64_t at, uint64_t count) const {
    if (at > bytes_.size() || count > bytes_.size() - at)
      Fail("{}: damaged BMP: the file ends too early; export the image again", file_);
  }
  uint32_t Number(uint64_t at, int length) const {
    Need(at, length);
    uint32_t value = 0;
    for (int i = length; i-- > 0;) value = value << 8 | Data()[at + i];
    return value;
  }
  [[noreturn]] void Unsupported(std::string_view what) const {
    Fail("{}: a BMP with {} is not read; convert it to PNG", file_, what);
  }

  void ReadHeader() {
    const uint32_t header = Number(14, 4);
    const bool is_os2 = header == 12;
    constexpr uint32_t kHeaders[] = {12, 40, 52, 56, 64, 108, 124};
    if (std::ranges::find(kHeaders, header) == std::end(kHeaders))
      Unsupported(fmt::format("a header of {} bytes", header));
    palette_at_ = 14 + header;
    entry_bytes_ = is_os2 ? 3 : 4;
    if (is_os2) {
      size_ = {Number(18, 2), Number(20, 2)};
      bits_ = static_cast<int>(Number(24, 2));
    } else {
      const uint32_t height = Number(22, 4);
      top_down_ = height >> 24 == 0xff;
      size_ = {Number(18, 4), top_down_ ? (int64_t{1} << 32) - height : height};
      bits_ = static_cast<int>(Number(28, 2));
      compression_ = Number(30, 4);
      colors_ = Number(46, 4);
    }
    constexpr int kBits[] = {1, 4, 8, 16, 24, 32};
    if (std::ranges::find(kBits, bits_) == std::end(kBits)) Unsupported(fmt::format("{} bits a pixel", bits_));
    if (compression_ > kMasks || (compression_ == kRle8 && bits_ != 8) || (compression_ == kRle4 && bits_ != 4))
      Unsupported(fmt::format("compression {} of {} bits a pixel", compression_, bits_));
    if (compression_ == kMasks) ReadMasks(header);
    if (colors_ == 0 && bits_ <= 8) colors_ = uint32_t{1} << bits_;
    pixels_ = Number(10, 4);
    const int64_t behind_palette = palette_at_ + (bits_ <= 8 ? int64_t{entry_bytes_} * colors_ : 0);
    // Some files leave the palette out of this count.
    if (pixels_ == 0 || (bits_ <= 8 && pixels_ == 14 + header)) pixels_ = behind_palette;
  }

  void ReadMasks(uint32_t header) {
    if (bits_ < 16) Unsupported(fmt::format("masks for {} bits a pixel", bits_));
    std::array<uint32_t, 4> masks{};
    const int count = header >= 56 ? 4 : 3;  // the oldest header has them behind it
    for (int i = 0; i < count; ++i) masks[i] = Number(54 + 4 * i, 4);
    if (header == 40) palette_at_ += 12;
    if (bits_ == 32) {
      const auto found = std::ranges::find(kLayouts32, masks, &Layout::masks);
      if (found != std::end(kLayouts32)) {
        at_ = found->at;
        return;
      }
    } else {
      const auto are = [&](uint32_t r, uint32_t g, uint32_t b) {
        return masks[0] == r && masks[1] == g && masks[2] == b;
      };
      has_565_ = bits_ == 16 && are(0xf800, 0x7e0, 0x1f);
      if (has_565_ || (bits_ == 16 ? are(0x7c00, 0x3e0, 0x1f) : are(0xff0000, 0xff00, 0xff))) return;
    }
    Unsupported(fmt::format("the colour masks {:x}, {:x}, {:x}, {:x}", masks[0], masks[1], masks[2], masks[3]));
  }

  void ReadPalette() {
    if (colors_ > 65536) Unsupported(fmt::format("a palette of {} colours", colors_));
    Need(palette_at_, uint64_t{colors_} * entry_bytes_);
  }

  // One palette index a pixel. Runs go on behind what came before; a jump leaves pixels of index 0.
  std::vector<uint8_t> Runs() const {
    const size_t width = size_.width, all = width * size_.height;
    std::vector<uint8_t> indices;
    uint64_t at = pixels_;
    size_t x = 0;
    const auto nibble = [](uint32_t pair, size_t i) {
      return static_cast<uint8_t>(i % 2 == 0 ? pair >> 4 : pair & 15);
    };
    while (indices.size() < all) {
      const uint32_t count = Number(at, 1), value = Number(at + 1, 1);
      at += 2;
      if (count > 0) {
        const size_t pixels = std::min<size_t>(count, width - std::min(width, x));
        for (size_t i = 0; i < pixels; ++i)
          indices.push_back(compression_ == kRle4 ? nibble(value, i) : static_cast<uint8_t>(value));
        x += pixels;
      } else if (value == 0) {
        indices.resize((indices.size() + width - 1) / width * width);
        x = 0;
      } else if (value == 1) {
        Fail("{}: damaged BMP: its runs end after {} of {} pixels; export the image again", file_, indices.size(), all);
      } else if (value == 2) {
        indices.resize(std::min(all, indices.size() + Number(at, 1) + Number(at + 1, 1) * width));
        at += 2;
        x = indices.size() % width;
      } else {
        const size_t pixels = std::min<size_t>(all - indices.size(), value);
        const size_t stored = compression_ == kRle4 ? (pixels + 1) / 2 : pixels;
        Need(at, stored);
        for (size_t i = 0; i < pixels; ++i)
          indices.push_back(compression_ == kRle4 ? nibble(Data()[at + i / 2], i) : Data()[at + i]);
        x += value;
        at += stored;
        at += at % 2;
      }
    }
    indices.resize(all);
    return indices;
  }

  void ConvertRow(const uint8_t* row, int bits, uint8_t* out) const {
    for (int64_t x = 0; x < size_.width; ++x, out += 3) {
      if (bits <= 8) {
        const int64_t bit = x * bits;
        PutColor(row[bit / 8] >> (8 - bits - bit % 8) & ((1 << bits) - 1), out);
      } else if (bits == 16) {
        const int pixel = row[2 * x] | row[2 * x + 1] << 8;
        const auto widened = [&](int shift, int most) {
          return static_cast<uint8_t>((pixel >> shift & most) * 255 / most);
        };
        out[0] = widened(has_565_ ? 11 : 10, 31);
        out[1] = widened(5, has_565_ ? 63 : 31);
        out[2] = widened(0, 31);
      } else {
        const uint8_t* pixel = row + x * (bits / 8);
        const int alpha = at_[3] < 0 ? 255 : pixel[at_[3]];
        for (int c = 0; c < 3; ++c) out[c] = OverWhite(pixel[at_[c]], alpha);
      }
    }
  }

  void PutColor(uint32_t index, uint8_t* out) const {
    if (index >= colors_) {
      Fail("{}: a pixel has palette index {}, but the palette has {} colours; the file is damaged", file_, index,
           colors_);
    }
    const uint8_t* color = Data() + palette_at_ + uint64_t{index} * entry_bytes_;  // blue, green, red
    for (int c = 0; c < 3; ++c) out[c] = color[2 - c];
  }

  ImageBytes bytes_;
  std::string_view file_;
  ImageSize size_;
  int bits_ = 0;
  uint32_t compression_ = kRaw, colors_ = 0;
  bool top_down_ = false, has_565_ = false;
  int64_t pixels_ = 0, palette_at_ = 0;
  int entry_bytes_ = 4;
  std::array<int, 4> at_{2, 1, 0, -1};
};

}  // namespace

StoredImage DecodeBmp(ImageBytes bytes, std::string_view file) { return BmpReader(bytes, file).Read(); }

}  // namespace circlet
