#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

namespace circlet {

// What samples are read from, whole and once: a file, a named pipe or standard input.
struct DataFile {
  std::string place;                // in front of errors: "/data/calib.jsonl", "standard input"
  std::string name;                 // "calib.jsonl", "stdin", "pipe"
  std::filesystem::path directory;  // what paths of pictures are relative to: the file's; for a pipe the current one
  bool repeatable = true;           // a regular file, which another process can read too
  std::string text;                 // unpacked UTF-8
  int64_t bytes = 0;                // as read, before unpacking
  std::string sha256;               // of those bytes
};

// `path`: a file or a pipe; "-" and /dev/stdin are standard input. gzip is unpacked. Throws Error for a directory, a
// terminal, a pipe that no program writes to, more than kTextLimitBytes (also unpacked), and for other formats, with
// the command that converts them: parquet, Arrow, zip, tar, zstd, xz, bzip2, UTF-16 and UTF-32.
DataFile ReadDataFile(const std::filesystem::path& path);

}  // namespace circlet
