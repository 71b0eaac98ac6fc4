#include <webp/decode.h>
#include <webp/demux.h>

#include <memory>

#include "circlet/base/error.h"
#include "preprocess/image_formats.h"

namespace circlet {
namespace {

// A chunk beside the pixels, "EXIF" or "XMP "; its bytes stay in the file. Empty when there is none.
std::span<const uint8_t> Chunk(const WebPDemuxer* demuxer, const char* name) {
  WebPChunkIterator chunk;
  std::span<const uint8_t> bytes;
  if (WebPDemuxGetChunk(demuxer, name, 1, &chunk) != 0) {
    bytes = {chunk.chunk.bytes, chunk.chunk.size};
    WebPDemuxReleaseChunkIterator(&chunk);
  }
  return bytes;
}

}  // namespace

// The first frame on its canvas, whose rest is transparent, or black in a file without transparency.
StoredImage DecodeWebp(ImageBytes bytes, std::string_view file) {
  const WebPData data{reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()};
  const std::unique_ptr<WebPDemuxer, decltype(&WebPDemuxDelete)> demuxer(WebPDemux(&data), WebPDemuxDelete);
  if (demuxer == nullptr) Fail("{}: damaged WebP, or it ends too early; export the image again", file);
  const ImageSize size{WebPDemuxGetI(demuxer.get(), WEBP_FF_CANVAS_WIDTH),
                       WebPDemuxGetI(demuxer.get(), WEBP_FF_CANVAS_HEIGHT)};
  // A macroblock of 256 pixels takes some bits; the lossless form stores an even picture in nothing at all.
  CheckSize(size, bytes.size(), 4096, file, kFreePixels);
  const bool has_alpha = (WebPDemuxGetI(demuxer.get(), WEBP_FF_FORMAT_FLAGS) & ALPHA_FLAG) != 0;

  WebPAnimDecoderOptions options;
  if (WebPAnimDecoderOptionsInit(&options) == 0)
    Fail("{}: the WebP library has another version than its headers", file);
  options.color_mode = MODE_RGBA;
  const std::unique_ptr<WebPAnimDecoder, decltype(&WebPAnimDecoderDelete)> decoder(WebPAnimDecoderNew(&data, &options),
                                                                                   WebPAnimDecoderDelete);
  uint8_t* rgba = nullptr;
  int time = 0;
  if (decoder == nullptr || WebPAnimDecoderGetNext(decoder.get(), &rgba, &time) == 0)
    Fail("{}: damaged WebP: its first frame cannot be decoded; export the image again", file);

  StoredImage stored;
  stored.image.size = size;
  stored.image.rgb.resize(3 * size.width * size.height);
  uint8_t* out = stored.image.rgb.data();
  for (int64_t i = 0, pixels = size.width * size.height; i < pixels; ++i, rgba += 4, out += 3)
    for (int c = 0; c < 3; ++c) out[c] = has_alpha ? OverWhite(rgba[c], rgba[3]) : rgba[c];
  const std::span<const uint8_t> xmp = Chunk(demuxer.get(), "XMP ");
  stored.orientation = OrientationOf(
      {.exif = Chunk(demuxer.get(), "EXIF"), .xmp = {reinterpret_cast<const char*>(xmp.data()), xmp.size()}});
  return stored;
}

}  // namespace circlet
