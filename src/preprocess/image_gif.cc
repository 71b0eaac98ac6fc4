#include <gif_lib.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "circlet/base/error.h"
#include "preprocess/image_formats.h"

namespace circlet {
namespace {

class GifReader {
 public:
  GifReader(ImageBytes bytes, std::string_view file) : bytes_(bytes), file_(file) {
    int error = 0;
    gif_.reset(DGifOpen(this, OnRead, &error));
    if (gif_ == nullptr) Damaged(error);
  }

  // The first frame on its screen, which grows when the frame reaches past it.
  StoredImage Read() {
    FindFrame();
    const GifImageDesc& frame = gif_->Image;
    const ImageSize size{std::max<int64_t>(gif_->SWidth, int64_t{frame.Left} + frame.Width),
                         std::max<int64_t>(gif_->SHeight, int64_t{frame.Top} + frame.Height)};
    // A code of 12 bits stands for at most 4096 pixels; the screen around the frame takes no bytes.
    CheckSize(size, bytes_.size(), 4096, file_, kFreePixels);
    if (frame.Width < 1 || frame.Height < 1) Fail("{}: the first frame is empty; export the image again", file_);

    std::vector<uint8_t> indices(size.width * size.height, static_cast<uint8_t>(std::max(transparent_, 0)));
    const auto read_row = [&](int64_t y) {
      if (DGifGetLine(gif_.get(), &indices[(frame.Top + y) * size.width + frame.Left], frame.Width) == GIF_ERROR)
        Damaged(gif_->Error);
    };
    if (frame.Interlace) {
      constexpr int kFirst[4] = {0, 4, 2, 1}, kStep[4] = {8, 8, 4, 2};
      for (int pass = 0; pass < 4; ++pass)
        for (int64_t y = kFirst[pass]; y < frame.Height; y += kStep[pass]) read_row(y);
    } else {
      for (int64_t y = 0; y < frame.Height; ++y) read_row(y);
    }
    return {.image = {size, Colors(indices)}};
  }

 private:
  struct Closer {
    void operator()(GifFileType* gif) const { DGifCloseFile(gif, nullptr); }
  };

  [[noreturn]] void Damaged(int error) const {
    const char* text = GifErrorString(error);
    Fail("{}: damaged GIF: {}; export the image again", file_, text == nullptr ? "it has no picture" : text);
  }
  static int OnRead(GifFileType* gif, GifByteType* out, int count) {
    auto* self = static_cast<GifReader*>(gif->UserData);
    const size_t got = std::min(static_cast<size_t>(count), self->bytes_.size() - self->used_);
    if (got > 0) std::memcpy(out, self->bytes_.data() + self->used_, got);
    self->used_ += got;
    return static_cast<int>(got);
  }

  // Reads up to the first frame's pixels.
  void FindFrame() {
    for (;;) {
      GifRecordType type;
      if (DGifGetRecordType(gif_.get(), &type) == GIF_ERROR) Damaged(gif_->Error);
      if (type == TERMINATE_RECORD_TYPE) Damaged(0);
      if (type == IMAGE_DESC_RECORD_TYPE) {
        if (DGifGetImageDesc(gif_.get()) == GIF_ERROR) Damaged(gif_->Error);
        return;
      }
      if (type != EXTENSION_RECORD_TYPE) continue;
      int code = 0;
      GifByteType* block = nullptr;  // its length, then its bytes
      if (DGifGetExtension(gif_.get(), &code, &block) == GIF_ERROR) Damaged(gif_->Error);
      if (code == GRAPHICS_EXT_FUNC_CODE && block != nullptr && block[0] >= 4 && (block[1] & 1) != 0)
        transparent_ = block[4];
      while (block != nullptr)
        if (DGifGetExtensionNext(gif_.get(), &block) == GIF_ERROR) Damaged(gif_->Error);
    }
  }

  std::vector<uint8_t> Colors(const std::vector<uint8_t>& indices) const {
    const ColorMapObject* map = gif_->Image.ColorMap != nullptr ? gif_->Image.ColorMap : gif_->SColorMap;
    std::vector<uint8_t> rgb(3 * indices.size());
    uint8_t* out = rgb.data();
    for (const uint8_t index : indices) {
      if (index == transparent_) {
        std::fill_n(out, 3, uint8_t{255});
      } else if (map == nullptr) {  // a file without colours holds grey
        std::fill_n(out, 3, index);
      } else if (index < map->ColorCount) {
        const GifColorType& color = map->Colors[index];
        out[0] = color.Red, out[1] = color.Green, out[2] = color.Blue;
      } else {
        Fail("{}: a pixel has palette index {}, but the palette has {} colours; the file is damaged", file_, index,
             map->ColorCount);
      }
      out += 3;
    }
    return rgb;
  }

  ImageBytes bytes_;
  size_t used_ = 0;
  std::string_view file_;
  std::unique_ptr<GifFileType, Closer> gif_;
  int transparent_ = -1;  // palette index; -1 = none
};

}  // namespace

StoredImage DecodeGif(ImageBytes bytes, std::string_view file) { return GifReader(bytes, file).Read(); }

}  // namespace circlet
