#include "circlet/io/file.h"

#include <gmock/gmock.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <csignal>
#include <nlohmann/json.hpp>

#include "circlet/io/json.h"
#include "error_text.h"
#include "io/sha256.h"
#include "io/system_error.h"
#include "temp_directory.h"

namespace circlet {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;
using ::testing::UnorderedElementsAre;

std::vector<std::string> NamesIn(const fs::path& directory) {
  std::vector<std::string> names;
  for (const fs::directory_entry& entry : fs::directory_iterator(directory)) names.push_back(entry.path().filename());
  return names;
}

TEST(ReadFileTest, GivesTheBytesWithZerosAndWithoutEnd) {
  const TempDirectory directory;
  const std::string bytes("a\0b\n\xff", 5);
  WriteFile(directory.Path() / "x", bytes);
  EXPECT_EQ(ReadFile(directory.Path() / "x"), bytes);
  WriteFile(directory.Path() / "empty", "");
  EXPECT_EQ(ReadFile(directory.Path() / "empty"), "");
}

TEST(ReadFileTest, MissingFileDirectoryAndLargeFileHaveTheirOwnTexts) {
  const TempDirectory directory;
  const fs::path path = directory.Path() / "x";
  EXPECT_EQ(ErrorText([&] { ReadFile(path); }),
            path.string() + ": cannot be opened: No such file or directory; is the path right?");
  EXPECT_EQ(ErrorText([&] { ReadFile(directory.Path()); }),
            directory.Path().string() + ": is a directory; name a file");
  WriteFile(path, std::string(2048, 'x'));
  EXPECT_EQ(ErrorText([&] { ReadFile(path, 2047); }),
            path.string() + ": has 2.0 KiB, at most 2.0 KiB are read; is it the right file?");
  EXPECT_EQ(ReadFile(path, 2048).size(), 2048);
}

TEST(AtomicFileTest, NothingIsVisibleBeforeCommitAndOnlyTheFileBehindIt) {
  const TempDirectory directory;
  const fs::path path = directory.Path() / "out.bin";
  WriteFile(path, "old");
  {
    AtomicFile file(path);
    file.Write("new ");
    file.Write(std::string(1 << 20, 'x'));  // past the gathering buffer
    file.Write("end");
    EXPECT_EQ(file.Size(), (1 << 20) + 7);
    EXPECT_EQ(ReadFile(path), "old");
    file.Commit();
  }
  EXPECT_EQ(ReadFile(path), "new " + std::string(1 << 20, 'x') + "end");
  EXPECT_THAT(NamesIn(directory.Path()), UnorderedElementsAre("out.bin"));
}

TEST(AtomicFileTest, WithoutCommitTheOldFileStaysAndNothingElse) {
  const TempDirectory directory;
  WriteFile(directory.Path() / "out.bin", "old");
  { AtomicFile(directory.Path() / "out.bin").Write("half"); }
  EXPECT_EQ(ReadFile(directory.Path() / "out.bin"), "old");
  EXPECT_THAT(NamesIn(directory.Path()), UnorderedElementsAre("out.bin"));
}

TEST(AtomicFileTest, MissingDirectoryNamesTheFinalPath) {
  const TempDirectory directory;
  const fs::path path = directory.Path() / "no" / "out.bin";
  EXPECT_EQ(ErrorText([&] { WriteFile(path, ""); }),
            path.string() + ": cannot be written: No such file or directory; is the path right?");
}

TEST(AtomicFileTest, TakesThePlaceOfNothingButARegularFile) {
  const TempDirectory directory;
  const fs::path pipe = directory.Path() / "pipe", link = directory.Path() / "link", file = directory.Path() / "file";
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  WriteFile(file, "old");
  fs::create_symlink(file, link);
  EXPECT_EQ(ErrorText([&] { WriteFile(pipe, "new"); }), pipe.string() + ": is a pipe; name a file");
  EXPECT_EQ(ErrorText([&] { WriteFile(directory.Path(), "new"); }),
            directory.Path().string() + ": is a directory; name a file");
  EXPECT_EQ(ErrorText([&] { WriteFile(link, "new"); }),
            link.string() + ": is a link to " + file.string() + "; name the file itself");
  EXPECT_EQ(ErrorText([] { RequireWritable(""); }), "\"\": names no file; give its name, too");
  EXPECT_EQ(ErrorText([] { RequireWritable("/dev/null"); }), "/dev/null: is a device; name a file");
  EXPECT_EQ(ReadFile(file), "old");
  EXPECT_TRUE(fs::is_fifo(pipe));
  EXPECT_THAT(NamesIn(directory.Path()), UnorderedElementsAre("file", "link", "pipe"));
}

TEST(AtomicFileTest, AFailedWriteIsAnErrorWithTheSystemsTextAndLeavesNothing) {
  const TempDirectory directory;
  const fs::path path = directory.Path() / "out.bin";
  // A file size limit fails like a full disk does: in write(), or only when the rest is flushed by Commit().
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit small = before;
  small.rlim_cur = 1000;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const std::string at_write = ErrorText([&] { AtomicFile(path).Write(std::string(1 << 20, 'x')); });
  const std::string at_commit = ErrorText([&] { WriteFile(path, std::string(2000, 'x')); });
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(at_write, path.string() + ": cannot be written: File too large");
  EXPECT_EQ(at_commit, at_write);
  EXPECT_TRUE(fs::is_empty(directory.Path()));
}

TEST(AtomicFileTest, AFullDiskSaysWhatToDo) {
  EXPECT_EQ(ErrorText([] { FailErrno("out/x.circle", "written", ENOSPC); }),
            "out/x.circle: cannot be written: No space left on device; free some space or choose another place");
}

TEST(RequireFreeSpaceTest, NamesBothFigures) {
  const TempDirectory directory;
  EXPECT_NO_THROW(RequireFreeSpace(directory.Path(), 1));
  EXPECT_THAT(ErrorText([&] { RequireFreeSpace(directory.Path(), int64_t{1} << 60); }),
              AllOf(StartsWith(directory.Path().string() + ": "),
                    HasSubstr(" are free, 1048576.0 TiB are needed; free some space or choose another place")));
}

TEST(Sha256Test, AgreesWithTheStandardsExamples) {
  const auto of = [](std::string_view text) { return Sha256(std::as_bytes(std::span(text))); };
  EXPECT_EQ(of(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(of("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(of("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(of(std::string(1'000'000, 'a')), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(Sha256Test, PiecesOfAnySizeGiveTheSameHashAsTheWhole) {
  std::string text;
  for (int i = 0; i < 300; ++i) text += static_cast<char>(i * 7);
  const auto bytes = std::as_bytes(std::span(text));
  for (size_t length : {0, 1, 55, 56, 57, 63, 64, 65, 119, 120, 128, 300}) {
    for (size_t piece : {1, 13, 64, 100}) {
      Sha256Stream stream;
      for (size_t at = 0; at < length; at += piece) stream.Add(bytes.subspan(at, std::min(piece, length - at)));
      EXPECT_EQ(stream.Finish(), Sha256(bytes.first(length))) << length << " by " << piece;
    }
  }
}

TEST(Sha256Test, OfAFileEqualsThatOfItsBytes) {
  const TempDirectory directory;
  const std::string text((17 << 20) + 5, 'q');  // more than one piece
  WriteFile(directory.Path() / "x", text);
  EXPECT_EQ(Sha256File(directory.Path() / "x"), Sha256(std::as_bytes(std::span(text))));
}

TEST(OutputDirectoryTest, IsCreatedWithItsParentsAndTakenWhenEmpty) {
  const TempDirectory directory;
  const fs::path out = directory.Path() / "a" / "b";
  PrepareOutputDirectory(out);
  EXPECT_TRUE(fs::is_directory(out));
  PrepareOutputDirectory(out);
}

TEST(OutputDirectoryTest, OneWithFilesIsRefusedWithoutForce) {
  const TempDirectory directory;
  WriteFile(directory.Path() / "thesis.txt", "dear");
  EXPECT_EQ(ErrorText([&] { PrepareOutputDirectory(directory.Path()); }),
            directory.Path().string() +
                ": is not empty (it holds \"thesis.txt\"); pass --force to replace it, or choose "
                "another directory");
  EXPECT_EQ(ReadFile(directory.Path() / "thesis.txt"), "dear");
}

TEST(CreateDirectoriesTest, MakesParentsAndNamesWhatCannotBe) {
  const TempDirectory directory;
  CreateDirectories(directory.Path() / "a" / "b");
  CreateDirectories(directory.Path() / "a" / "b");
  EXPECT_TRUE(fs::is_directory(directory.Path() / "a" / "b"));
  WriteFile(directory.Path() / "file", "");
  EXPECT_EQ(ErrorText([&] { CreateDirectories(directory.Path() / "file" / "b"); }),
            (directory.Path() / "file" / "b").string() + ": cannot be created: Not a directory");
}

TEST(OutputDirectoryTest, AFileInItsPlaceIsAnError) {
  const TempDirectory directory;
  WriteFile(directory.Path() / "out", "");
  EXPECT_EQ(ErrorText([&] { PrepareOutputDirectory(directory.Path() / "out"); }),
            (directory.Path() / "out").string() + ": is a file, the output must be a directory; choose another name");
}

TEST(OutputDirectoryTest, OneThatCannotBeCreatedNamesItsPathAndReason) {
  const fs::path path = "/proc/circlet/out";
  EXPECT_THAT(ErrorText([&] { PrepareOutputDirectory(path); }),
              StartsWith("/proc/circlet/out: cannot be used for output: No such file or directory"));
}

TEST(HumanBytesTest, PicksTheUnitThatKeepsThreeDigits) {
  EXPECT_EQ(HumanBytes(0), "0 B");
  EXPECT_EQ(HumanBytes(1023), "1023 B");
  EXPECT_EQ(HumanBytes(1024), "1.0 KiB");
  EXPECT_EQ(HumanBytes((1 << 20) - 1), "1.0 MiB");
  EXPECT_EQ(HumanBytes(int64_t{5} << 30), "5.0 GiB");
}

}  // namespace
}  // namespace circlet
