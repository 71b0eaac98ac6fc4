// Runs a fuzz target over the files of a corpus and over damaged copies of each: every cut and, at every place, some
// changed bytes. Deterministic, so that builds without libFuzzer test the same things each time.
//   json_replay fuzz/corpus/json

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

int64_t runs = 0;

void Run(const std::string& bytes) {
  // Exactly as large as the input, so that a sanitizer sees a read past its end.
  const std::vector<uint8_t> exact(bytes.begin(), bytes.end());
  LLVMFuzzerTestOneInput(exact.data(), exact.size());
  ++runs;
}

void RunDamaged(const std::string& bytes) {
  constexpr size_t kPlaces = 300;  // spread over large files
  const size_t step = std::max<size_t>(1, bytes.size() / kPlaces);
  for (size_t at = 0; at < bytes.size(); at += step) {
    Run(bytes.substr(0, at));
    for (const char byte :
         {'\x00', '\x01', '\x7f', '\xff', '0', '9', '"', '[', '{', '}', ',', ':', '-', '&', '*', '\n'}) {
      std::string damaged = bytes;
      damaged[at] = byte;
      Run(damaged);
    }
    Run(bytes.substr(0, at) + bytes.substr(at / 2));  // a part repeated
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::filesystem::path> files;
  for (int i = 1; i < argc; ++i) {
    for (const auto& entry : std::filesystem::directory_iterator(argv[i])) files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  for (const std::filesystem::path& path : files) {
    std::ifstream file(path, std::ios::binary);
    const std::string bytes{std::istreambuf_iterator<char>(file), {}};
    Run(bytes);
    RunDamaged(bytes);
  }
  std::printf("%lld inputs from %zu files\n", static_cast<long long>(runs), files.size());
  return files.empty() ? 1 : 0;
}
