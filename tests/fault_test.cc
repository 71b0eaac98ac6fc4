// Whatever goes wrong while a result is written, nothing is lost: under its name lies the old result or the new one,
// whole, and a further run ends in the same bytes as one that nothing happened to.
//
// The preloaded tests/fault_shim.cc makes one file-system call of the program go wrong. A few calls are tried;
// CIRCLET_FAULT_ROUNDS=N tries N times as many, spread over all calls (scripts/faults.sh).

#include <gmock/gmock.h>
#include <signal.h>
#include <sys/mount.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

#include "circlet/io/json.h"
#include "golden.h"
#include "paths.h"
#include "program.h"

namespace circlet {
namespace {

namespace fs = std::filesystem;
using ::testing::AnyOf;
using ::testing::Eq;
using Files = std::map<std::string, std::string>;  // SHA-256 by name

const std::string kTiny = SourcePath("examples/tiny-gemma4");
constexpr int kKilled = 128 + SIGKILL;

int Rounds() {
  const char* rounds = std::getenv("CIRCLET_FAULT_ROUNDS");
  return rounds == nullptr ? 1 : std::max(1, std::atoi(rounds));
}

// `count` calls, spread over first .. last so that every round of a longer test meets others.
std::vector<int64_t> Spread(int64_t first, int64_t last, int64_t count) {
  count *= Rounds();
  std::vector<int64_t> calls;
  for (int64_t i = 0; i < count; ++i) calls.push_back(first + (last - first) * (2 * i + 1) / (2 * count));
  calls.erase(std::unique(calls.begin(), calls.end()), calls.end());
  return calls;
}

// A result as others see it: timings.json differs from run to run, and the mark of a replacement is no part of it.
Files FilesIn(const fs::path& directory) {
  Files files;
  if (!fs::exists(directory)) return files;
  for (const auto& entry : fs::directory_iterator(directory))
    if (const std::string name = entry.path().filename(); name != "timings.json" && name != "unfinished")
      files[name] = entry.is_regular_file() ? Sha256File(entry.path()) : "no file";
  return files;
}

class FaultTest : public testing::Test {
 protected:
  // Two texts of the bundled model: 20 stages, a state behind each.
  std::vector<std::string> Arguments(const std::vector<std::string>& more = {}) const {
    std::vector<std::string> arguments{"--threads", "1",         "quantize",     kTiny,     "--random-samples", "2x6",
                                       "--recipe",  "w8a16",     "--text-only",  "--units", "deployment",       "--quiet",
                                       "--output",  Out(),       "--save-every", "0"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  }
  fs::path Out() const { return work_ / "out"; }

  ProgramResult Run(const std::vector<std::string>& more = {}) const { return RunProgram(Arguments(more), kEnvironment); }

  // With call `at` going wrong.
  ProgramResult RunWith(const std::string& mode, int64_t at, const std::vector<std::string>& more = {},
                        int error = EIO) const {
    return RunProgram(Arguments(more),
                      fmt::format("{}export LD_PRELOAD='{}' FAULT_UNDER='{}' FAULT_AT={} FAULT_MODE={} FAULT_ERRNO={}; ",
                                  kEnvironment, CIRCLET_FAULT_SHIM, work_.string(), at, mode, error));
  }

  int64_t Calls(const std::vector<std::string>& more = {}) const {
    const fs::path count = directory_.Path() / "count";
    const ProgramResult result = RunProgram(
        Arguments(more), fmt::format("{}export LD_PRELOAD='{}' FAULT_UNDER='{}' FAULT_COUNT='{}'; ", kEnvironment,
                                     CIRCLET_FAULT_SHIM, work_.string(), count.string()));
    EXPECT_EQ(result.exit_code, 0) << result.err;
    const int64_t calls = std::stoll(ReadFile(count));
    EXPECT_GT(calls, 100) << "the shim does not see the program's calls";
    return calls;
  }

  // The result of a run that nothing happens to, and an empty place again.
  Files Undisturbed(const std::vector<std::string>& more = {}) const {
    const ProgramResult result = Run(more);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    const Files files = FilesIn(Out());
    fs::remove_all(Out());
    return files;
  }

  void Clear() const {
    for (const auto& entry : fs::directory_iterator(work_)) fs::remove_all(entry.path());
  }

  void ExpectNothingBeside() const {
    for (const auto& entry : fs::directory_iterator(work_))
      EXPECT_EQ(entry.path().filename(), "out") << "is left beside the result";
    EXPECT_FALSE(fs::exists(Out() / "unfinished"));
  }

  // In memory where there is such a place: a run waits for the disk some 300 times.
  TempDirectory directory_{fs::is_directory("/dev/shm") ? "/dev/shm" : fs::temp_directory_path()};
  const fs::path work_ = [this] {
    fs::create_directory(directory_.Path() / "work");
    return directory_.Path() / "work";
  }();
  // Not executed once more for its settings: calls would count twice.
  static constexpr char kEnvironment[] = "export OMP_WAIT_POLICY=passive; ";
};

TEST_F(FaultTest, KilledAnywhereARunGoesOnToTheSameBytes) {
  const Files expected = Undisturbed();
  const int64_t calls = Calls();
  Clear();
  int kills = 0;
  for (const int64_t at : Spread(1, calls, 7)) {
    SCOPED_TRACE(fmt::format("killed at call {} of {}", at, calls));
    ASSERT_EQ(RunWith(at % 2 == 0 ? "kill" : "tear", at).exit_code, kKilled);
    ++kills;
    EXPECT_THAT(FilesIn(Out()), AnyOf(Eq(Files()), Eq(expected)));
    // Once more, inside --resume; that may end before the call.
    kills += RunWith("kill", at / 2 + 5, {"--resume"}).exit_code == kKilled ? 1 : 0;
    EXPECT_THAT(FilesIn(Out()), AnyOf(Eq(Files()), Eq(expected)));
    const ProgramResult resumed = Run({"--resume"});
    ASSERT_EQ(resumed.exit_code, 0) << resumed.err;
    EXPECT_EQ(FilesIn(Out()), expected);
    ExpectNothingBeside();
    Clear();
  }
  fmt::print("{} kills\n", kills);
}

// The old result has files that the new one has not, and the other way round.
class ReplaceTest : public FaultTest {
 protected:
  void SetUp() override {
    new_ = Undisturbed();
    const ProgramResult result = Run(kOld);
    ASSERT_EQ(result.exit_code, 0) << result.err;
    fs::copy(Out(), old_copy_);
    WriteFile(old_copy_ / "old_only.q.circle", "from an older version");
    nlohmann::json manifest = ReadJson(old_copy_ / "manifest.json");
    manifest["outputs"].push_back({{"file", "old_only.q.circle"}, {"bytes", 21}, {"sha256", ""}});
    WriteJson(old_copy_ / "manifest.json", manifest);
    old_ = FilesIn(old_copy_);
  }

  void PutOld() const {
    Clear();
    fs::copy(old_copy_, Out(), fs::copy_options::recursive);
  }

  // The kills of `count` points among the last `last` calls of a run that replaces the old result; `check` looks at what
  // lies there.
  template <typename Check>
  void KillReplacement(int64_t count, int64_t last, const Check& check) {
    PutOld();
    const int64_t calls = Calls({"--force"});
    int kills = 0;
    for (const int64_t at : Spread(calls - last, calls + 1, count)) {
      SCOPED_TRACE(fmt::format("killed at call {} of {}", at, calls));
      PutOld();
      ASSERT_EQ(RunWith("kill", at, {"--force"}).exit_code, kKilled);
      check();
      // Whether it goes on or starts again, and killed once more.
      const char* const flag = kills++ % 2 == 0 ? "--resume" : "--force";
      RunWith("kill", 1 + at % 40, {flag});
      check();
      const ProgramResult result = Run({flag});
      ASSERT_EQ(result.exit_code, 0) << flag << ": " << result.err;
      check_end();
      ExpectNothingBeside();
    }
    fmt::print("{} kills\n", 2 * kills);
  }

  std::function<void()> check_end = [this] { EXPECT_EQ(FilesIn(Out()), new_); };
  const std::vector<std::string> kOld{"--dialect", "tico"};
  const fs::path old_copy_ = directory_.Path() / "old";
  Files old_, new_;
};

TEST_F(ReplaceTest, KilledWhileItReplacesAResultLeavesTheOldOrTheNew) {
  KillReplacement(12, 90, [&] { EXPECT_THAT(FilesIn(Out()), AnyOf(Eq(old_), Eq(new_))); });
}

// Files of others stay, so that the result's files move in one by one.
TEST_F(ReplaceTest, KilledBesideFilesOfOthersItKeepsThemAndEndsInTheNew) {
  fs::create_directory(old_copy_ / "mine");
  WriteFile(old_copy_ / "mine/thesis.txt", "dear");
  Files expected = new_;
  expected["mine"] = "no file";
  check_end = [&] {
    EXPECT_EQ(FilesIn(Out()), expected);
    EXPECT_EQ(ReadFile(Out() / "mine/thesis.txt"), "dear");
  };
  KillReplacement(6, 90, [&] { EXPECT_EQ(ReadFile(Out() / "mine/thesis.txt"), "dear"); });
}

TEST_F(FaultTest, AFailedCallIsAnErrorAndTheRunGoesOn) {
  const Files expected = Undisturbed();
  const int64_t calls = Calls();
  Clear();
  int failed = 0, survived = 0, round = 0;
  for (const int64_t at : Spread(1, calls, 10)) {
    constexpr int kErrors[] = {ENOSPC, EIO, EMFILE, EACCES};
    const int error = kErrors[round % 4];
    const char* const mode = round++ / 4 % 2 == 0 ? "fail" : "fail-on";
    SCOPED_TRACE(fmt::format("{} {} at call {} of {}", mode, error, at, calls));
    const ProgramResult result = RunWith(mode, at, {}, error);
    EXPECT_THAT(result.exit_code, AnyOf(0, 2)) << result.err;
    EXPECT_EQ(result.err.empty(), result.exit_code == 0) << result.err;
    ++(result.exit_code == 0 ? survived : failed);
    EXPECT_THAT(FilesIn(Out()), AnyOf(Eq(Files()), Eq(expected)));
    const ProgramResult resumed = Run({"--resume"});
    ASSERT_EQ(resumed.exit_code, 0) << resumed.err;
    EXPECT_EQ(FilesIn(Out()), expected);
    ExpectNothingBeside();
    Clear();
  }
  EXPECT_GT(failed, 0);
  fmt::print("{} runs failed, {} did without the call\n", failed, survived);
}

TEST_F(FaultTest, ShortReadsAndWritesChangeNothing) {
  const Files expected = Undisturbed();
  const ProgramResult result = RunWith("short", 1);
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_EQ(FilesIn(Out()), expected);
}

// A disk of a size of its own takes a mount, which only root may make.
TEST_F(FaultTest, AFullDiskLosesNothing) {
  const Files expected = Undisturbed();
  const fs::path disk = work_ / "disk";
  fs::create_directory(disk);
  const auto mounted = [&](int64_t kibibytes, int flags) {
    return mount("tmpfs", disk.c_str(), "tmpfs", flags, fmt::format("size={}k", kibibytes).c_str()) == 0;
  };
  constexpr int64_t kRoom = 64 << 10;
  int full = 0;
  for (const int64_t kept : Spread(0, 6 << 10, 2)) {
    SCOPED_TRACE(fmt::format("{} KiB of room", kept));
    if (!mounted(kRoom, 0)) GTEST_SKIP() << "mounting a small disk takes root";
    const std::shared_ptr<void> unmount(nullptr, [&](void*) { umount(disk.c_str()); });
    // Room enough when the run begins, and then another takes it.
    const std::vector<std::string> there{"--output", disk / "out"};
    const auto arguments = [&](const std::vector<std::string>& more) {
      std::vector<std::string> all = Arguments(more);
      std::ranges::replace(all, Out().string(), (disk / "out").string());
      return all;
    };
    ASSERT_TRUE(fs::create_directory(disk / "filler"));
    const std::string fill =
        fmt::format("{}( while [ ! -e '{}/out.partial' ]; do sleep 0.01; done; head -c {}K /dev/zero > '{}/filler/zeros' ) "
                    "2> /dev/null & sleep 0.05; ",
                    kEnvironment, disk.string(), kRoom - kept, disk.string());
    const ProgramResult result = RunProgram(arguments({}), fill);
    EXPECT_THAT(result.exit_code, AnyOf(0, 2)) << result.err;
    full += result.exit_code == 2;
    EXPECT_THAT(FilesIn(disk / "out"), AnyOf(Eq(Files()), Eq(expected)));
    fs::remove_all(disk / "filler");
    const ProgramResult resumed = RunProgram(arguments({"--resume"}), kEnvironment);
    EXPECT_EQ(resumed.exit_code, 0) << resumed.err;
    EXPECT_EQ(FilesIn(disk / "out"), expected);
  }
  fmt::print("{} full disks\n", full);
}

}  // namespace
}  // namespace circlet
