#include "io/sha256.h"

#include <openssl/evp.h>

#include <algorithm>
#include <array>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "io/mapped_file.h"

namespace circlet {

Sha256Stream::Sha256Stream() : context_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
  CIRCLET_CHECK(context_ != nullptr && EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) == 1,
                "OpenSSL has no SHA-256");
}

void Sha256Stream::Add(std::span<const std::byte> bytes) {
  CIRCLET_CHECK(EVP_DigestUpdate(context_.get(), bytes.data(), bytes.size()) == 1, "{} bytes", bytes.size());
}

std::string Sha256Stream::Finish() {
  std::array<unsigned char, 32> digest;
  CIRCLET_CHECK(EVP_DigestFinal_ex(context_.get(), digest.data(), nullptr) == 1, "finished twice");
  std::string digits;
  for (const unsigned char byte : digest) digits += fmt::format("{:02x}", byte);
  return digits;
}

std::string Sha256(std::span<const std::byte> bytes) {
  Sha256Stream stream;
  stream.Add(bytes);
  return stream.Finish();
}

std::string Sha256File(const std::filesystem::path& path) {
  constexpr size_t kPiece =
      size_t{16} << 20;  // released behind the reading, so that a large file does not fill the memory
  const auto file = MappedFile::Open(path);
  Sha256Stream stream;
  for (size_t at = 0; at < file->Bytes().size(); at += kPiece) {
    const auto piece = file->Bytes().subspan(at, std::min(kPiece, file->Bytes().size() - at));
    stream.Add(piece);
    file->Release(piece);
  }
  return stream.Finish();
}

}  // namespace circlet
