// Any calibration file is an Error or samples with ids of the vocabulary and one type an id.

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "byte_tokenizer.h"
#include "circlet/base/error.h"
#include "circlet/preprocess/samples.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const circlet::Processor processor{
      circlet::Tokenizer::Parse(ByteTokenizer(), "tokenizer.json"),
      circlet::ChatTemplate::Parse("{{ bos_token }}{% for m in messages %}{{ m.role }}{% for p in m.content or [] %}"
                                   "{{ '<|image|>' if p.type == 'image' else p.text or p }}{% endfor %}{% endfor %}"
                                   "{{ tools | tojson }}",
                                   "chat_template.jinja", {{"bos_token", "<bos>"}}),
      {}};
  static const std::filesystem::path path =
      std::filesystem::temp_directory_path() / fmt::format("circlet-jsonl-fuzz-{}.jsonl", getpid());
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(size));
  try {
    const circlet::SampleSet set = circlet::LoadJsonl(path, processor, {.vocab_size = 262, .max_length = 4096});
    for (const circlet::Sample& sample : set.samples)
      if (sample.input_ids.empty() || sample.token_types.size() != sample.input_ids.size()) std::abort();
  } catch (const circlet::Error&) {
  }
  std::filesystem::remove(path);
  return 0;
}
