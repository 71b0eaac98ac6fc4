// Any caption file is tasks with a prompt each, or an Error.

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "byte_tokenizer.h"
#include "circlet/base/error.h"
#include "circlet/preprocess/samples.h"
#include "temporary.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const circlet::Processor processor{circlet::Tokenizer::Parse(ByteTokenizer(), "tokenizer.json"), {}, {}};
  static const Temporary directory;
  // P6 is no format that is read: a picture that cannot be read must be an Error of its line.
  directory.Write("picture.png", "P6 2 1 255 ......");
  const std::filesystem::path path = directory.Write("captions.jsonl", View(data, size));
  try {
    for (const circlet::CaptionTask& task :
         circlet::LoadCaptions(path, processor, {.vocab_size = 262, .max_length = 4096}))
      if (task.prompt.input_ids.empty()) std::abort();
  } catch (const circlet::Error&) {
  }
  return 0;
}
