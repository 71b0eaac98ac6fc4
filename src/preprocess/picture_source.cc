#include "preprocess/picture_source.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"

namespace circlet {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kKeys[] = {"path", "image", "url", "base64", "image_url"};
constexpr size_t kLongestPath = 4096;  // of the system

bool HasScheme(std::string_view source, std::string_view scheme) {
  return source.size() >= scheme.size() && std::equal(scheme.begin(), scheme.end(), source.begin(), [](char a, char b) {
           return a == (b >= 'A' && b <= 'Z' ? static_cast<char>(b - 'A' + 'a') : b);
         });
}

int Base64Digit(char c) {
  if (c >= 'A' && c <= 'Z') return c - 'A';
  if (c >= 'a' && c <= 'z') return c - 'a' + 26;
  if (c >= '0' && c <= '9') return c - '0' + 52;
  return c == '+' || c == '-' ? 62 : c == '/' || c == '_' ? 63 : -1;  // both alphabets of RFC 4648
}
bool IsBlank(char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }

// Long enough to be a picture, and nothing that a base64 text does not hold.
bool LooksLikeBase64(std::string_view text) {
  constexpr size_t kShortest = 60;
  return text.size() >= kShortest &&
         std::ranges::all_of(text, [](char c) { return Base64Digit(c) >= 0 || c == '=' || IsBlank(c); });
}

std::string FromBase64(std::string_view text, std::string_view name) {
  std::string bytes;
  uint32_t bits = 0;
  int count = 0;
  bool ended = false;
  for (const char c : text) {
    if (IsBlank(c)) continue;
    const int digit = Base64Digit(c);
    if (c == '=') {
      ended = true;
      continue;
    }
    if (digit < 0 || ended)
      Fail("{}: its base64 has a character that does not belong there; encode the file again", name);
    bits = bits << 6 | static_cast<uint32_t>(digit);
    if ((count = (count + 1) % 4) != 1) bytes += static_cast<char>(bits >> ((4 - count) % 4 * 2));
  }
  if (count == 1) Fail("{}: its base64 ends in the middle of a byte; was it cut off?", name);
  return bytes;
}

std::string Unescaped(std::string_view url, std::string_view name) {
  std::string path;
  const auto hex = [](char c) {
    return c >= '0' && c <= '9' ? c - '0' : (c | 0x20) >= 'a' && (c | 0x20) <= 'f' ? (c | 0x20) - 'a' + 10 : -1;
  };
  for (size_t i = 0; i < url.size(); ++i) {
    if (url[i] != '%') {
      path += url[i];
      continue;
    }
    if (i + 2 >= url.size() || hex(url[i + 1]) < 0 || hex(url[i + 2]) < 0)
      Fail("{}: a % in a file: URL needs two hexadecimal digits; write it as %25", name);
    path += static_cast<char>(hex(url[i + 1]) << 4 | hex(url[i + 2]));
    i += 2;
  }
  return path;
}

Image LoadPath(const std::string& path, const fs::path& directory, std::string_view name) {
  if (path.find('\0') != path.npos) Fail("{}: a path cannot hold a NUL character; correct it", name);
  if (path.size() > kLongestPath) Fail("{}: a path of {} characters; is it a picture's content?", name, path.size());
  return LoadImage(directory / path);
}

Image Decode(const std::string& bytes, std::string_view name) {
  return DecodeImage(std::as_bytes(std::span(bytes)), name);
}

// "data:image/png;base64," and the like.
std::string_view HeadOf(std::string_view uri) { return uri.substr(0, std::min(uri.find(','), uri.size())); }

}  // namespace

bool NamesPicture(const JsonObject& part) {
  return std::ranges::any_of(kKeys, [&](std::string_view key) { return part.Has(key); });
}

std::string PictureOf(const JsonObject& part) {
  std::string_view found;
  for (const std::string_view key : kKeys) {
    if (!part.Has(key)) continue;
    if (!found.empty()) part.FailAt(key, fmt::format("names a picture, and so does \"{}\"; leave one of them", found));
    found = key;
  }
  if (found.empty())
    part.FailAt(
        "path",
        "is missing, and so are image, url and base64; name the picture in one of them, or beside the messages in "
        "images");
  return part.Raw(found).is_object() ? PictureOf(part.Object(found)) : part.Required<std::string>(found);
}

Image LoadPicture(std::string_view source, const fs::path& directory) {
  const std::string name = PictureName(source);
  if (HasScheme(source, "http://") || HasScheme(source, "https://"))
    Fail("{}: circlet downloads nothing; fetch the picture and name the file", name);
  if (HasScheme(source, "data:")) {
    const std::string_view head = HeadOf(source);
    if (head.size() == source.size() || !head.ends_with(";base64"))
      Fail("{}: expected data:image/...;base64, and the picture; encode it so", name);
    return Decode(FromBase64(source.substr(head.size() + 1), name), name);
  }
  if (HasScheme(source, "file:")) {
    std::string_view path = source.substr(5);
    if (path.starts_with("//")) {  // a host stands between these and the path
      const std::string_view host = path.substr(2, path.find('/', 2) - 2);
      if (!host.empty() && host != "localhost") Fail("{}: is on the host {}; name a file of this one", name, host);
      path.remove_prefix(2 + host.size());
    }
    return LoadPath(Unescaped(path, name), directory, name);
  }
  if (LooksLikeBase64(source)) {
    std::error_code ignored;
    if (source.size() > kLongestPath || !fs::exists(directory / source, ignored)) {
      return Decode(FromBase64(source, name), name);
    }
  }
  return LoadPath(std::string(source), directory, name);
}

std::string PictureName(std::string_view source) {
  constexpr size_t kMostShown = 200, kHead = 40;
  if (HasScheme(source, "data:"))
    return fmt::format("{}, {} characters", HeadOf(source).substr(0, kHead), source.size());
  std::string shown(source.size() > kMostShown ? source.substr(0, kHead) : source);
  std::ranges::replace_if(
      shown, [](char c) { return static_cast<unsigned char>(c) < 0x20; }, '?');
  return source.size() > kMostShown ? fmt::format("{}..., {} characters", shown, source.size()) : shown;
}

}  // namespace circlet
