// Any file opens or is an Error; the bytes of every tensor of an open file can be read.

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "circlet/base/error.h"
#include "circlet/io/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::string path =
      (std::filesystem::temp_directory_path() / ("circlet-fuzz-" + std::to_string(getpid()))).string();
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(size));
  try {
    const circlet::SafetensorsFile file = circlet::SafetensorsFile::Open(path);
    for (const auto& [name, tensor] : file.Tensors()) {
      const circlet::Tensor copy = tensor.Clone();
      file.Release(tensor);
      if (copy.Bytes() != tensor.Bytes()) std::abort();
    }
  } catch (const circlet::Error&) {
  }
  std::filesystem::remove(path);
  return 0;
}
