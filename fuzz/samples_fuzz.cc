// Any file is samples with ids of the vocabulary, or an Error.

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "circlet/base/error.h"
#include "circlet/preprocess/samples.h"
#include "temporary.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Temporary directory;
  const std::filesystem::path path = directory.Write("samples.safetensors", View(data, size));
  const circlet::SampleOptions options{.vocab_size = 100, .max_length = 64, .placeholders = {10, 11, 12}};
  for (const char* group : {"calib", "eval", ""}) {
    try {
      for (const circlet::Sample& sample : circlet::SamplesFromSafetensors(path, group, options).samples) {
        if (sample.input_ids.empty() || sample.token_types.size() != sample.input_ids.size()) std::abort();
        if (!sample.attention_mask.empty() && sample.attention_mask.size() != sample.input_ids.size()) std::abort();
        if (sample.pixel_values.Empty() != sample.image_position_ids.Empty()) std::abort();
      }
    } catch (const circlet::Error&) {
    }
  }
  return 0;
}
