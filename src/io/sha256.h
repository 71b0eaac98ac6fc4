#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>

struct evp_md_ctx_st;  // OpenSSL's EVP_MD_CTX

namespace circlet {

// SHA-256 of bytes that come in pieces (FIPS 180-4).
class Sha256Stream {
 public:
  Sha256Stream();
  void Add(std::span<const std::byte> bytes);
  // 64 lower-case hexadecimal digits; the stream is spent.
  std::string Finish();

 private:
  std::shared_ptr<evp_md_ctx_st> context_;
};

}  // namespace circlet
