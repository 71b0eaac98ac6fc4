#include <cstdio>
// jpeglib.h needs FILE.
#include <jerror.h>
#include <jpeglib.h>

#include <csetjmp>

#include "circlet/base/error.h"
#include "preprocess/image_formats.h"

namespace circlet {
namespace {

// Adobe's convention, which is the only one in use: the file holds 255 - ink.
void ConvertCmyk(const uint8_t* in, int64_t width, uint8_t* out) {
  for (int64_t x = 0; x < width; ++x, in += 4, out += 3) {
    const uint8_t ink[4] = {static_cast<uint8_t>(255 - in[0]), static_cast<uint8_t>(255 - in[1]),
                            static_cast<uint8_t>(255 - in[2]), static_cast<uint8_t>(255 - in[3])};
    InkToRgb(ink, out);
  }
}

class JpegReader {
 public:
  JpegReader(std::span<const std::byte> bytes, std::string_view file) : bytes_(bytes), file_(file) {
    info_.err = jpeg_std_error(&errors_);
    errors_.error_exit = OnError;
    errors_.emit_message = OnMessage;
    info_.client_data = this;
  }
  JpegReader(const JpegReader&) = delete;
  JpegReader& operator=(const JpegReader&) = delete;
  ~JpegReader() { jpeg_destroy_decompress(&info_); }

  StoredImage Read() {
    if (!ReadHeader()) Damaged();
    StoredImage stored;
    ImageSize& size = stored.image.size;
    size = {info_.image_width, info_.image_height};
    // A block of 64 pixels takes at least one bit, and a colour may be sampled 16 times as densely as another.
    CheckSize(size, bytes_.size(), 64 * 8 * 16, file_);
    row_.resize(4 * size.width);
    stored.image.rgb.resize(3 * size.width * size.height);
    stored.orientation = Orientation();
    if (!ReadRows(size.width, stored.image.rgb.data())) Damaged();
    return stored;
  }

 private:
  static JpegReader& Self(j_common_ptr info) { return *static_cast<JpegReader*>(info->client_data); }
  [[noreturn]] static void OnError(j_common_ptr info) {
    info->err->format_message(info, Self(info).text_);
    std::longjmp(Self(info).jump_, 1);
  }
  // The library fills up what a damaged file lacks with grey and warns; such an image would calibrate nonsense.
  static void OnMessage(j_common_ptr info, int level) {
    if (level >= 0) return;
    const int code = info->err->msg_code;
    const bool harmless = code == JWRN_EXTRANEOUS_DATA || code == JWRN_ADOBE_XFORM || code == JWRN_JFIF_MAJOR;
    if (!harmless) OnError(info);
  }
  // Each scan of a progressive file costs a pass over the whole image, for a few bytes of file.
  static void OnProgress(j_common_ptr info) {
    constexpr int kScanLimit = 500;
    if (reinterpret_cast<j_decompress_ptr>(info)->input_scan_number <= kScanLimit) return;
    std::snprintf(Self(info).text_, JMSG_LENGTH_MAX, "more than %d scans", kScanLimit);
    std::longjmp(Self(info).jump_, 1);
  }
  [[noreturn]] void Damaged() const { Fail("{}: damaged JPEG: {}; export the image again", file_, text_); }

  // The next two return false when the library jumped; they and what they call own nothing.
  bool ReadHeader() {
    if (setjmp(jump_) != 0) return false;
    jpeg_create_decompress(&info_);
    progress_.progress_monitor = OnProgress;
    info_.progress = &progress_;
    jpeg_mem_src(&info_, reinterpret_cast<const uint8_t*>(bytes_.data()), bytes_.size());
    jpeg_save_markers(&info_, kExifMarker, 0xffff);
    jpeg_read_header(&info_, TRUE);
    return true;
  }
  bool ReadRows(int64_t width, uint8_t* rgb) {
    if (setjmp(jump_) != 0) return false;
    const bool cmyk = info_.jpeg_color_space == JCS_CMYK || info_.jpeg_color_space == JCS_YCCK;
    info_.out_color_space = cmyk ? JCS_CMYK : JCS_RGB;
    jpeg_start_decompress(&info_);
    while (info_.output_scanline < info_.output_height) {
      uint8_t* out = rgb + 3 * width * info_.output_scanline;
      JSAMPROW row = cmyk ? row_.data() : out;
      jpeg_read_scanlines(&info_, &row, 1);
      if (cmyk) ConvertCmyk(row, width, out);
    }
    jpeg_finish_decompress(&info_);
    return true;
  }

  int Orientation() const {
    constexpr std::string_view kExif("Exif\0\0", 6), kXmp("http://ns.adobe.com/xap/1.0/\0", 29);
    Orientations said;
    for (jpeg_saved_marker_ptr marker = info_.marker_list; marker != nullptr; marker = marker->next) {
      if (marker->marker != kExifMarker) continue;
      const std::string_view text(reinterpret_cast<const char*>(marker->data), marker->data_length);
      if (text.starts_with(kExif) && said.exif.empty()) said.exif = {marker->data, marker->data_length};
      if (text.starts_with(kXmp) && said.xmp.empty()) said.xmp = text.substr(kXmp.size());
    }
    return OrientationOf(said);
  }

  static constexpr int kExifMarker = JPEG_APP0 + 1;

  std::span<const std::byte> bytes_;
  std::string_view file_;
  jpeg_decompress_struct info_{};
  jpeg_error_mgr errors_{};
  jpeg_progress_mgr progress_{};
  std::jmp_buf jump_;
  char text_[JMSG_LENGTH_MAX] = "";
  std::vector<uint8_t> row_;  // one row of CMYK
};

}  // namespace

StoredImage DecodeJpeg(std::span<const std::byte> bytes, std::string_view file) {
  return JpegReader(bytes, file).Read();
}

}  // namespace circlet
