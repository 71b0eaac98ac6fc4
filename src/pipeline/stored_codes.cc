#include "pipeline/stored_codes.h"

#include <algorithm>
#include <vector>

#include "circlet/io/file.h"
#include "io/sha256.h"
#include "ops/codes.h"

namespace circlet {

CodesChecksum DescribeCodes(const std::string& parameter, int bits, const Tensor& codes) {
  constexpr int64_t kPiece = int64_t{1} << 20;
  const QParams& grid = *codes.Grid();
  const int64_t width = codes.GetShape()[-1];
  // SignedCodes takes 128 off uint8 codes alone.
  const int32_t shift = codes.GetDType() == DType::kU8 ? 128 : 0;
  Sha256Stream stream;
  std::vector<int8_t> piece(static_cast<size_t>(std::min(kPiece, codes.Elements())));
  for (int64_t first = 0; first < codes.Elements(); first += kPiece) {
    const std::span<int8_t> part(piece.data(), static_cast<size_t>(std::min(kPiece, codes.Elements() - first)));
    SignedCodes(codes, first, part);
    for (int64_t begin = 0, end = 0; begin < std::ssize(part); begin = end) {
      const int64_t row = (first + begin) / width;
      end = std::min(std::ssize(part), (row + 1) * width - first);
      const int32_t offset = shift - grid.zero_point[grid.PerChannel() ? static_cast<size_t>(row) : 0];
      if (offset == 0) continue;
      for (int8_t& code : part.subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin)))
        code = static_cast<int8_t>(code + offset);
    }
    stream.Add(std::as_bytes(part));
  }
  return {.parameter = parameter,
          .bits = bits,
          .codes = codes.Elements(),
          .codes_sha256 = stream.Finish(),
          .scales_sha256 = Sha256(std::as_bytes(std::span(grid.scale)))};
}

}  // namespace circlet
