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
    for (size_t i = 0; i < part.size(); ++i) {
      const int64_t row = (first + static_cast<int64_t>(i)) / width;
      const int32_t zero_point = grid.zero_point[grid.PerChannel() ? static_cast<size_t>(row) : 0];
      part[i] = static_cast<int8_t>(part[i] + shift - zero_point);
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
