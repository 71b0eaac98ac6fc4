// Any quantization_config beside any tensors is refused with an Error, or gives codes and scales of every packed
// parameter. The input is a config.json, a zero byte and a safetensors file.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "circlet/base/error.h"
#include "circlet/model/gemma4/weights.h"
#include "ops/codes.h"
#include "temporary.h"

namespace {

void CheckCodes(const circlet::Tensor& codes) {
  const circlet::QParams& grid = *codes.Grid();
  if (static_cast<int64_t>(grid.scale.size()) != codes.GetShape()[0]) std::abort();
  for (const float scale : grid.scale)
    if (!(scale > 0) || !std::isfinite(scale)) std::abort();
  const circlet::CodeRange range = circlet::CodesOf(codes.GetDType());
  for (int64_t i = 0; i < codes.Elements(); ++i)
    if (circlet::CodeAt(codes, i) < range.min || circlet::CodeAt(codes, i) > range.max) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Temporary directory;
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t end = input.find('\0');
  directory.Write("config.json", input.substr(0, end));
  directory.Write("model.safetensors", end == input.npos ? std::string_view() : input.substr(end + 1));
  try {
    const circlet::ModelWeights weights =
        circlet::ModelWeights::Open(circlet::ReadConfig(directory.Path()), directory.Path());
    for (const auto& [name, packed] : weights.GetInventory().packed) {
      const circlet::Tensor stored = weights.Stored(name);
      if (packed.form.group == 0) {
        CheckCodes(stored);
      } else if (!weights.Blocks(name) || stored.Elements() != packed.shape.Elements()) {
        std::abort();
      }
      for (const auto& step : {packed.input_step, packed.output_step})
        if (step && (!(*step > 0) || !std::isfinite(*step))) std::abort();
      weights.Release(name);
    }
    for (const auto& [name, stored] : weights.GetInventory().name_in_checkpoint)
      if (weights.Packed(name) == nullptr && weights.Stored(name).GetShape().Rank() == 2) weights.Blocks(name);
  } catch (const circlet::Error&) {
  }
  return 0;
}
