#include "circlet/preprocess/overlap.h"

#include <functional>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "circlet/io/names.h"

namespace circlet {
namespace {

constexpr size_t kShortest = 32;  // characters of a line that counts

std::string Normalised(std::string_view line) {
  std::string text;
  for (const char c : line) {
    const bool blank = c == ' ' || c == '\t' || c == '\r';
    if (blank && (text.empty() || text.back() == ' ')) continue;
    text += blank ? ' ' : c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  }
  if (text.ends_with(' ')) text.pop_back();
  return text;
}

// body(line, hash) for each line that counts.
void ForLines(std::string_view text, const std::function<void(std::string_view, std::string)>& body) {
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view line = text.substr(begin, end - begin);
    if (const std::string normalised = Normalised(line); normalised.size() >= kShortest)
      body(line, Sha256(std::as_bytes(std::span(normalised))));
    begin = end + 1;
  }
}

std::string HashOf(const Tensor& pixels) { return Sha256({pixels.Raw(), static_cast<size_t>(pixels.Bytes())}); }

std::string Told(int64_t found, int64_t all, const char* what, const std::string& first) {
  if (found == 0) return "";
  return fmt::format("{} of {} {} also stand in the calibration data, the first: {}", found, all, what, first);
}

}  // namespace

void AddLines(std::string_view text, DataHashes& hashes) {
  ForLines(text, [&](std::string_view, std::string hash) { hashes.lines.insert(std::move(hash)); });
}

void AddPictures(const Sample& sample, DataHashes& hashes) {
  if (sample.pixel_values.Empty()) return;
  for (int64_t i = 0; i < sample.pixel_values.GetShape()[0]; ++i)
    hashes.pictures.insert(HashOf(sample.pixel_values.Slice(i, i + 1, 0)));
}

std::string OverlapOf(std::string_view text, const DataHashes& calibration) {
  int64_t all = 0, found = 0;
  std::string first;
  ForLines(text, [&](std::string_view line, const std::string& hash) {
    ++all;
    if (calibration.lines.contains(hash) && found++ == 0) first = fmt::format("\"{}\"", Shortened(std::string(line)));
  });
  return Told(found, all, "lines", first);
}

std::string OverlapOf(std::span<const CaptionTask> captions, const DataHashes& calibration) {
  int64_t found = 0;
  std::string first;
  for (const CaptionTask& task : captions) {
    DataHashes own;
    AddPictures(task.prompt, own);
    for (const std::string& hash : own.pictures)
      if (calibration.pictures.contains(hash) && found++ == 0) first = task.image;
  }
  return Told(found, std::ssize(captions), "pictures", first);
}

}  // namespace circlet
