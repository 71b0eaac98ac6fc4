// The small JSON files of a checkpoint beside config.json: any of them is refused with an Error, or the checkpoint
// opens. The first byte says which file the rest is: i model.safetensors.index.json, c tokenizer_config.json, s
// special_tokens_map.json, a added_tokens.json.

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string_view>

#include "circlet/base/error.h"
#include "circlet/io/safetensors.h"
#include "circlet/preprocess/tokenizer.h"

namespace {

namespace fs = std::filesystem;

// With two shards and a tokenizer of five pieces.
fs::path MakeDirectory() {
  const fs::path directory = fs::temp_directory_path() / fmt::format("circlet-index-fuzz-{}", getpid());
  fs::create_directories(directory);
  for (const char* shard : {"a", "b"})
    circlet::WriteSafetensors(directory / fmt::format("{}.safetensors", shard),
                              {{shard, circlet::Tensor(circlet::TensorType{circlet::DType::kF32, {2}})}});
  std::ofstream(directory / "tokenizer.json")
      << R"({"added_tokens":[{"id":3,"content":"<x>","special":true}],"normalizer":{"type":"Replace",)"
         R"("pattern":{"String":" "},"content":"_"},"model":{"type":"BPE","unk_token":"?","merges":[["a","b"]],)"
         R"("vocab":{"?":0,"a":1,"b":2,"<x>":3,"ab":4}}})";
  return directory;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const fs::path directory = MakeDirectory();
  if (size == 0) return 0;
  const char* name = nullptr;
  switch (data[0]) {
    case 'i':
      name = "model.safetensors.index.json";
      break;
    case 'c':
      name = "tokenizer_config.json";
      break;
    case 's':
      name = "special_tokens_map.json";
      break;
    case 'a':
      name = "added_tokens.json";
      break;
    default:
      return 0;
  }
  std::ofstream(directory / name, std::ios::binary)
      .write(reinterpret_cast<const char*>(data) + 1, static_cast<std::streamsize>(size) - 1);
  try {
    if (data[0] == 'i') {
      const circlet::Checkpoint checkpoint = circlet::Checkpoint::Open(directory);
      for (const std::string& tensor : checkpoint.Names())
        if (checkpoint.Find(tensor) == nullptr) std::abort();
    } else {
      const circlet::Tokenizer tokenizer = circlet::Tokenizer::Load(directory);
      for (const int64_t id : tokenizer.Encode("ab <x> \n<y> a<my_tok>b", true))
        if (id >= tokenizer.IdLimit()) std::abort();
    }
  } catch (const circlet::Error&) {
  }
  fs::remove(directory / name);
  return 0;
}
