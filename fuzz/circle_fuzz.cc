// Any bytes are a model or an Error; every constant of a model can be read, and a model that was read has no faults.

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "circlet/base/error.h"
#include "circlet/circle/model.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const circlet::circle::Model model =
        circlet::circle::Parse({reinterpret_cast<const std::byte*>(data), size}, nullptr, "input");
    if (!circlet::circle::Verify(model).empty() || circlet::circle::Dump(model).empty()) std::abort();
    for (const circlet::circle::Tensor& tensor : model.tensors) {
      if (!tensor.data.Empty() && tensor.data.Clone().Bytes() != tensor.data.Bytes()) std::abort();
    }
  } catch (const circlet::Error&) {
  }
  return 0;
}
