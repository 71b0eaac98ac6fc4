#include "circlet/preprocess/data_file.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include <memory>
#include <span>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "io/system_error.h"

namespace circlet {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void FailTooLarge(const std::string& place, std::string_view what) {
  Fail("{}: {} more than {}; give a part of it, some hundred samples are enough to calibrate", place, what,
       HumanBytes(kTextLimitBytes));
}

// Everything up to the end. A named pipe that was opened without waiting reads as ended while no program has opened its
// other side, so that gets some seconds; a program that writes slowly is waited for.
std::string ReadAll(int file, bool is_pipe, const std::string& place) {
  constexpr int kPatienceMs = 3000, kStepMs = 100;
  constexpr size_t kBlock = size_t{1} << 18;
  std::string bytes;
  int waited = 0;
  for (bool had_writer = false;;) {
    const size_t before = bytes.size();
    bytes.resize(before + kBlock);
    const ssize_t got = read(file, bytes.data() + before, kBlock);
    const int error = errno;
    bytes.resize(before + static_cast<size_t>(std::max<ssize_t>(got, 0)));
    if (bytes.size() > static_cast<size_t>(kTextLimitBytes)) FailTooLarge(place, "has");
    pollfd state{file, POLLIN, 0};
    if (got > 0) {
      had_writer = true;
    } else if (got == 0) {
      if (had_writer || !is_pipe) return bytes;
      poll(&state, 1, kStepMs);
      if ((state.revents & POLLHUP) != 0) return bytes;
      if ((waited += kStepMs) > kPatienceMs)
        Fail("{}: is a pipe that no program writes to; start that program first, or name a file", place);
    } else if (error == EAGAIN) {
      had_writer = true;
      poll(&state, 1, -1);
    } else if (error != EINTR) {
      FailErrno(place, "read", error);
    }
  }
}

DataFile ReadBytes(const fs::path& path) {
  DataFile data;
  const bool standard = path == "-" || path == "/dev/stdin";
  data.place = standard ? "standard input" : path.string();
  const int file = standard ? dup(STDIN_FILENO) : open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (file < 0) FailErrno(data.place, "opened");
  const std::shared_ptr<const void> closer(nullptr, [file](const void*) { close(file); });
  struct stat status {};
  if (fstat(file, &status) != 0) FailErrno(data.place, "opened");
  if (S_ISDIR(status.st_mode)) Fail("{}: is a directory; name a file", data.place);
  if (isatty(file) != 0) Fail("{}: is a terminal; give a file, or pipe the samples in", data.place);
  data.repeatable = S_ISREG(status.st_mode);
  data.name = standard ? "stdin" : data.repeatable ? path.filename().string() : "pipe";
  data.directory = standard || !data.repeatable ? fs::path() : path.parent_path();
  data.text = ReadAll(file, S_ISFIFO(status.st_mode), data.place);
  data.bytes = static_cast<int64_t>(data.text.size());
  data.sha256 = Sha256(std::as_bytes(std::span(data.text)));
  return data;
}

// --- gzip ---

bool IsGzip(std::string_view bytes) { return bytes.starts_with("\x1f\x8b"); }

// All members, one behind another.
std::string Unpack(const std::string& packed, const std::string& place) {
  z_stream stream{};
  constexpr int kGzip = 16;
  if (inflateInit2(&stream, MAX_WBITS + kGzip) != Z_OK) Fail("{}: no memory to unpack it", place);
  const std::shared_ptr<const void> closer(nullptr, [&](const void*) { inflateEnd(&stream); });
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(packed.data()));
  stream.avail_in = static_cast<uInt>(packed.size());  // kTextLimitBytes fits
  constexpr size_t kBlock = size_t{1} << 18;
  std::string text;
  for (;;) {
    const size_t before = text.size();
    text.resize(before + kBlock);
    stream.next_out = reinterpret_cast<Bytef*>(text.data() + before);
    stream.avail_out = kBlock;
    const int result = inflate(&stream, Z_NO_FLUSH);
    text.resize(before + kBlock - stream.avail_out);
    if (text.size() > static_cast<size_t>(kTextLimitBytes)) FailTooLarge(place, "unpacks to");
    if (result == Z_STREAM_END) {
      if (stream.avail_in == 0 || *stream.next_in != 0x1f) return text;
      inflateReset(&stream);
    } else if (result == Z_BUF_ERROR) {
      Fail("{}: the gzip file ends too early; was it copied completely?", place);
    } else if (result != Z_OK) {
      Fail("{}: damaged gzip: {}; write the file again", place, stream.msg == nullptr ? "bad data" : stream.msg);
    }
  }
}

// --- What else it may be ---

struct Format {
  std::string_view magic;
  size_t at;
  std::string_view what, remedy;  // FILE in a remedy is the file's name
};

constexpr std::string_view kPandas =
    "convert it with `pip install pandas pyarrow` and `python3 -c \"import pandas; "
    "pandas.read_parquet('FILE').to_json('FILE.jsonl', orient='records', lines=True)\"`";
constexpr std::string_view kFeather =
    "convert it with `pip install pandas pyarrow` and `python3 -c \"import pandas; "
    "pandas.read_feather('FILE').to_json('FILE.jsonl', orient='records', lines=True)\"`";
constexpr std::string_view kUtf16 = "convert it with `iconv -f UTF-16 -t UTF-8 FILE > FILE.jsonl`";
constexpr std::string_view kUtf32 = "convert it with `iconv -f UTF-32 -t UTF-8 FILE > FILE.jsonl`";

using namespace std::string_view_literals;  // magics hold zeros
constexpr Format kFormats[] = {
    {"PAR1"sv, 0, "a parquet file", kPandas},
    {"ARROW1"sv, 0, "an Arrow file", kFeather},
    {"FEA1"sv, 0, "a Feather file", kFeather},
    {"\xff\xff\xff\xff"sv, 0, "an Arrow stream",
     "convert it with `pip install datasets` and `python3 -c \"import datasets; "
     "datasets.Dataset.from_file('FILE').to_json('FILE.jsonl')\"`"},
    {"PK\3\4"sv, 0, "a zip archive", "unpack it with `unzip FILE`"},
    {"ustar"sv, 257, "a tar archive", "unpack it with `tar xf FILE`"},
    {"\x28\xb5\x2f\xfd"sv, 0, "a zstd file", "unpack it with `zstd -d FILE`"},
    {"\xfd"
     "7zXZ\0"sv,
     0, "an xz file", "unpack it with `xz -dk FILE`"},
    {"BZh"sv, 0, "a bzip2 file", "unpack it with `bzip2 -dk FILE`"},
    {"\x1f\x8b"sv, 0, "gzip inside gzip", "unpack it once with `gzip -dk FILE`"},
    {"\xff\xfe\0\0"sv, 0, "UTF-32 text", kUtf32},
    {"\0\0\xfe\xff"sv, 0, "UTF-32 text", kUtf32},
    {"\xff\xfe"sv, 0, "UTF-16 text", kUtf16},
    {"\xfe\xff"sv, 0, "UTF-16 text", kUtf16},
    {"{\0"sv, 0, "UTF-16 text", "convert it with `iconv -f UTF-16LE -t UTF-8 FILE > FILE.jsonl`"},
    {"\0{"sv, 0, "UTF-16 text", "convert it with `iconv -f UTF-16BE -t UTF-8 FILE > FILE.jsonl`"},
    {"SQLite format 3\0"sv, 0, "an SQLite database", "write its rows out as JSON lines"},
    {"\x89HDF"sv, 0, "an HDF5 file", "write its rows out as JSON lines"},
};

void RefuseOtherFormats(const DataFile& data) {
  for (const Format& format : kFormats) {
    if (data.text.size() < format.at || !std::string_view(data.text).substr(format.at).starts_with(format.magic))
      continue;
    std::string remedy(format.remedy);
    for (size_t at = 0; (at = remedy.find("FILE", at)) != remedy.npos; at += data.name.size())
      remedy.replace(at, 4, data.name);
    Fail("{}: is {}, and JSON lines are read (one object a line, or gzip of them); {}", data.place, format.what,
         remedy);
  }
}

}  // namespace

DataFile ReadDataFile(const fs::path& path) {
  if (path.string().find("://") != std::string::npos)
    Fail("{}: circlet downloads nothing; fetch the file, and give its path", path.string());
  DataFile data = ReadBytes(path);
  if (IsGzip(data.text)) data.text = Unpack(data.text, data.place);
  RefuseOtherFormats(data);
  return data;
}

}  // namespace circlet
