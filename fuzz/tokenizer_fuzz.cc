// Any tokenizer.json is refused with an Error, or its ids of a text decode without one.

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "circlet/base/error.h"
#include "circlet/preprocess/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    const circlet::Tokenizer tokenizer = circlet::Tokenizer::Parse(text, "input");
    for (const std::string_view sample : {std::string_view("aab c<x><y>\u00e9??  abc"), text.substr(0, 1000)}) {
      try {
        tokenizer.Decode(tokenizer.Encode(sample, true), false);
      } catch (const circlet::Error&) {  // a character that the vocabulary cannot express
      }
    }
  } catch (const circlet::Error&) {
  }
  return 0;
}
