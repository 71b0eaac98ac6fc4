#include "circlet/preprocess/data_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <zlib.h>

#include <chrono>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "circlet/io/file.h"
#include "error_text.h"
#include "preprocess/data_lines.h"
#include "temp_directory.h"

namespace circlet {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using namespace std::string_view_literals;

std::string Gzip(std::string_view text) {
  z_stream stream{};
  deflateInit2(&stream, 6, Z_DEFLATED, MAX_WBITS + 16, 9, Z_DEFAULT_STRATEGY);
  std::string packed(deflateBound(&stream, text.size()) + 64, '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  stream.avail_in = static_cast<uInt>(text.size());
  stream.next_out = reinterpret_cast<Bytef*>(packed.data());
  stream.avail_out = static_cast<uInt>(packed.size());
  deflate(&stream, Z_FINISH);
  packed.resize(stream.total_out);
  deflateEnd(&stream);
  return packed;
}

class DataFileTest : public ::testing::Test {
 protected:
  std::filesystem::path File(const char* name, std::string_view bytes) {
    const std::filesystem::path path = directory_.Path() / name;
    WriteFile(path, bytes);
    return path;
  }
  // "SOURCE=n" of each line {"n": n}.
  std::vector<std::string> Lines(const char* name, std::string_view bytes) {
    std::vector<std::string> lines;
    ForEachLine(ReadDataFile(File(name, bytes)), [&](const JsonObject& object, const DataLine& line) {
      lines.push_back(fmt::format("{}={}", line.source, object.Required<int64_t>("n")));
    });
    return lines;
  }
  std::string ErrorOf(const char* name, std::string_view bytes) {
    const std::string place = (directory_.Path() / name).string();
    std::string text = ErrorText([&] { Lines(name, bytes); });
    const size_t at = text.find(place);
    return at == text.npos ? text : text.replace(at, place.size(), name);
  }

  TempDirectory directory_;
};

TEST_F(DataFileTest, LinesArraysAndGzipGiveTheSameObjects) {
  const std::string lines = "{\"n\": 1}\r\n\n {\"n\": 2}\n{\"n\": 3}";
  EXPECT_THAT(Lines("a.jsonl", lines), ElementsAre("a.jsonl:1=1", "a.jsonl:3=2", "a.jsonl:4=3"));
  EXPECT_THAT(Lines("b.jsonl", "\xef\xbb\xbf" + lines), ElementsAre("b.jsonl:1=1", "b.jsonl:3=2", "b.jsonl:4=3"));
  EXPECT_THAT(Lines("a.json", "[ {\"n\": 1},\n\n{\"x\": [\"]}\\\"\", {}],\n \"n\": 2} , {\"n\":3}\n]\n"),
              ElementsAre("a.json:1=1", "a.json:3=2", "a.json:4=3"));
  EXPECT_THAT(Lines("a.jsonl.gz", Gzip(lines)), ElementsAre("a.jsonl.gz:1=1", "a.jsonl.gz:3=2", "a.jsonl.gz:4=3"));
  EXPECT_THAT(Lines("two.gz", Gzip("{\"n\": 1}\n") + Gzip("{\"n\": 2}\n")), ElementsAre("two.gz:1=1", "two.gz:2=2"));
}

TEST_F(DataFileTest, TheHashIsThatOfTheBytesRead) {
  const std::string packed = Gzip("{\"n\": 1}");
  const std::filesystem::path path = File("a.gz", packed);
  const DataFile data = ReadDataFile(path);
  EXPECT_EQ(data.sha256, Sha256File(path));
  EXPECT_EQ(data.bytes, static_cast<int64_t>(packed.size()));
  EXPECT_EQ(data.text, "{\"n\": 1}");
  EXPECT_TRUE(data.repeatable);
  EXPECT_EQ(data.directory, directory_.Path());
}

TEST_F(DataFileTest, SyntaxErrorsHaveOneLineNumberAndAColumn) {
  EXPECT_THAT(ErrorOf("a.jsonl", "{\"n\": 1}\n{\"n\": oops}\n"),
              AllOf(HasSubstr("a.jsonl:2: column 7: "), Not(HasSubstr("line "))));
  EXPECT_THAT(ErrorOf("a.json", "[{\"n\": 1},\n{\"n\":\n oops}]"), HasSubstr("a.json:3: column 2: "));
  EXPECT_THAT(ErrorOf("a.json", "[{\"n\": 1}\n{\"n\": 2}]"),
              HasSubstr("a.json:2: expected a comma or ] in the JSON array, found {\"n\": 2}]"));
  EXPECT_THAT(ErrorOf("a.json", "[{\"n\": 1},\n"), HasSubstr("a.json:2: expected an object, as"));
  EXPECT_THAT(ErrorOf("a.json", "[{\"n\": 1}]\n\n7"), HasSubstr("a.json:3: expected nothing after the last ]"));
  EXPECT_THAT(ErrorOf("a.json", "[{\"n\": 1"), HasSubstr("a.json:1: column "));
  EXPECT_THAT(ErrorOf("a.json", "[]"), HasSubstr("a.json: has no samples; it needs a JSON object on each line"));
}

TEST_F(DataFileTest, TextThatIsNoJsonIsShownWithTheCommandThatConverts) {
  EXPECT_THAT(ErrorOf("plain.txt", "Emma was glad.\nShe smiled.\n"),
              AllOf(HasSubstr("plain.txt:1: expected a JSON object on each line"), HasSubstr("found Emma was glad."),
                    HasSubstr("jq -Rc '{text: .}' plain.txt > plain.txt.jsonl")));
  EXPECT_THAT(ErrorOf("t.csv", "text,label\nx,1\n"), HasSubstr("csv.DictReader(sys.stdin)]\" < t.csv > t.csv.jsonl"));
  EXPECT_THAT(ErrorOf("mixed.jsonl", "{\"n\": 1}\nEmma\x01\xff" + std::string(500, 'a')),
              AllOf(HasSubstr("mixed.jsonl:2: expected"), HasSubstr("found Emma??aaa"), Not(HasSubstr("jq")),
                    Not(HasSubstr(std::string(60, 'a')))));
}

TEST_F(DataFileTest, OtherFormatsAreNamedWithTheCommandsThatConvert) {
  const auto error = [&](std::string_view bytes) {
    return ErrorOf("data", std::string(bytes) + std::string(600, ' '));
  };
  EXPECT_THAT(
      error("{\n  \"type\": \"text\"\n}\n"),
      AllOf(HasSubstr("data:1: expected a whole JSON object on each line"), HasSubstr("`jq -c . data > data.jsonl`")));
  EXPECT_THAT(error("{\"n\": 1}\n{\n\"n\": 2\n}\n"), HasSubstr("data:2: expected a whole JSON object on each line"));
  EXPECT_THAT(error("PAR1"), AllOf(HasSubstr("data: is a parquet file"), HasSubstr("`pip install pandas pyarrow`"),
                                   HasSubstr("pandas.read_parquet('data').to_json('data.jsonl'")));
  EXPECT_THAT(error("ARROW1"), HasSubstr("is an Arrow file"));
  EXPECT_THAT(error("PK\3\4"), HasSubstr("is a zip archive, and JSON lines are read (one object a line, or gzip of "
                                         "them); unpack it with `unzip data`"));
  EXPECT_THAT(error("\x28\xb5\x2f\xfd"), HasSubstr("`zstd -d data`"));
  EXPECT_THAT(error("\xfd\x37zXZ\0"sv), HasSubstr("`xz -dk data`"));
  EXPECT_THAT(error("BZh9"), HasSubstr("`bzip2 -dk data`"));
  EXPECT_THAT(error("\xff\xfe{\0"sv), HasSubstr("is UTF-16 text"));
  EXPECT_THAT(error("{\0\"\0"sv), HasSubstr("`iconv -f UTF-16LE -t UTF-8 data > data.jsonl`"));
  EXPECT_THAT(error("\xff\xfe\0\0"sv), HasSubstr("is UTF-32 text"));
  EXPECT_THAT(ErrorOf("data", std::string(257, 'a') + "ustar"), HasSubstr("is a tar archive"));
  EXPECT_THAT(ErrorOf("data", Gzip(Gzip("{}"))), HasSubstr("is gzip inside gzip"));
}

TEST_F(DataFileTest, DamagedAndCutGzipIsAnError) {
  const std::string packed = Gzip("{\"n\": 1}\n{\"n\": 2}\n{\"n\": 3}\n");
  for (size_t length = 2; length < packed.size(); ++length)
    EXPECT_THAT(ErrorOf("a.gz", packed.substr(0, length)), HasSubstr("a.gz: the gzip file ends too early")) << length;
  std::string damaged = packed;
  damaged[packed.size() - 6] ^= 1;
  EXPECT_THAT(ErrorOf("a.gz", damaged), HasSubstr("a.gz: damaged gzip: incorrect data check"));
}

TEST_F(DataFileTest, WhatUnpacksWithoutEndIsRefused) {
  const std::string zeros = Gzip(std::string(size_t{1} << 20, ' '));
  std::string bomb;
  for (int64_t i = 0; i <= kTextLimitBytes >> 20; ++i) bomb += zeros;
  EXPECT_THAT(ErrorOf("bomb.gz", bomb), HasSubstr("bomb.gz: unpacks to more than 256.0 MiB; give a part of it"));
}

TEST_F(DataFileTest, APipeIsReadToItsEndAlsoFromALateAndSlowWriter) {
  const std::filesystem::path path = directory_.Path() / "fifo";
  ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
  std::thread writer([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(250));
    std::ofstream out(path);
    out << "{\"n\": 1}\n" << std::flush;
    std::this_thread::sleep_for(std::chrono::milliseconds(250));
    out << "{\"n\": 2}\n";
  });
  const DataFile data = ReadDataFile(path);
  writer.join();
  EXPECT_EQ(data.text, "{\"n\": 1}\n{\"n\": 2}\n");
  EXPECT_EQ(data.name, "pipe");
  EXPECT_FALSE(data.repeatable);
  EXPECT_EQ(data.directory, "");
}

TEST_F(DataFileTest, WhatHasNoEndIsRefused) {
  const std::filesystem::path path = directory_.Path() / "fifo";
  ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
  EXPECT_THAT(ErrorText([&] { ReadDataFile(path); }), HasSubstr("fifo: is a pipe that no program writes to"));
  EXPECT_THAT(ErrorText([&] { ReadDataFile("/dev/zero"); }), HasSubstr("/dev/zero: has more than 256.0 MiB"));
  EXPECT_THAT(ErrorText([&] { ReadDataFile(directory_.Path()); }), HasSubstr("is a directory; name a file"));
  EXPECT_THAT(ErrorText([&] { ReadDataFile(directory_.Path() / "none"); }), HasSubstr("none: cannot be opened"));
}

}  // namespace
}  // namespace circlet
