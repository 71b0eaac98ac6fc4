// Any bytes are an Error or an image of as many bytes as its size says.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>

#include "circlet/base/error.h"
#include "circlet/preprocess/image.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const circlet::Image image = circlet::DecodeImage(std::as_bytes(std::span(data, size)), "input");
    if (image.rgb.size() != static_cast<size_t>(3 * image.size.width * image.size.height)) std::abort();
  } catch (const circlet::Error&) {
  }
  return 0;
}
