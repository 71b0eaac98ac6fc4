// Runs that are too large for memory, are killed and go on, or are shared between processes: all must end in the same
// bytes as one run at once.

#include <gmock/gmock.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mount.h>

#include <chrono>
#include <nlohmann/json.hpp>
#include <thread>
#include <tuple>

#include "circlet/io/json.h"
#include "circlet/io/safetensors.h"
#include "circlet/ops/op.h"
#include "golden.h"
#include "program.h"
#ifdef CIRCLET_MPIEXEC
#include "processes.h"
#endif

extern char** environ;

namespace circlet {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kTiny[] = CIRCLET_SOURCE_DIR "/examples/tiny-gemma4";

// The program in the background.
class Running {
 public:
  explicit Running(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), CIRCLET_BINARY);
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    for (const int descriptor : {1, 2})
      posix_spawn_file_actions_addopen(&actions, descriptor, "/dev/null", O_WRONLY, 0);
    CIRCLET_CHECK(posix_spawn(&pid_, CIRCLET_BINARY, &actions, nullptr, argv.data(), environ) == 0, "cannot start");
    posix_spawn_file_actions_destroy(&actions);
  }
  ~Running() { Kill(); }

  bool Ended() {
    if (pid_ > 0 && waitpid(pid_, &status_, WNOHANG) == pid_) pid_ = 0;
    return pid_ == 0;
  }
  void Kill() {
    if (Ended()) return;
    kill(pid_, SIGKILL);
    waitpid(pid_, &status_, 0);
    pid_ = 0;
  }
  int ExitCode() const { return WIFEXITED(status_) ? WEXITSTATUS(status_) : 128 + WTERMSIG(status_); }

 private:
  pid_t pid_ = 0;
  int status_ = 0;
};

// A golden model with text and pictures, 23 phases long.
class LongRunTest : public testing::Test {
 protected:
  LongRunTest() {
    fs::copy(TestData("golden/seed_example/model"), model_);
    UnpackGolden("golden/seed_example/inputs.safetensors.xz", samples_);
  }

  std::vector<std::string> Arguments(const std::string& out, const std::vector<std::string>& more = {}) const {
    std::vector<std::string> arguments{"quantize", model_, "--samples", samples_,       "--recipe", "w8a16",
                                       "--output", out,    "--quiet",   "--save-every", "0"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  }
  std::string Out(const std::string& name = "out") const { return directory_.Path() / name; }

  // An uninterrupted run, to compare with.
  std::string Reference(const std::vector<std::string>& more = {}) const {
    const ProgramResult result = RunProgram(Arguments(Out("reference"), more));
    EXPECT_EQ(result.exit_code, 0) << result.err;
    return Out("reference");
  }

  // Starts a run and kills it once it has saved at least `phases` phases.
  void KillBehind(int phases, const std::vector<std::string>& more = {}) const {
    Running run(Arguments(Out(), more));
    const auto saved = [&] {
      for (int number = phases; number < phases + 40; ++number)
        if (fs::exists(Out() + fmt::format(".partial/unfinished/rank.0/state.{}.json", number))) return true;
      return false;
    };
    while (!saved() && !run.Ended()) std::this_thread::sleep_for(std::chrono::microseconds(200));
    run.Kill();
    ASSERT_EQ(run.ExitCode(), 128 + SIGKILL) << "the run was over before it could be killed";
    ASSERT_FALSE(fs::exists(Out()));
  }

  static std::map<std::string, std::string> Hashes(const fs::path& directory) {
    std::map<std::string, std::string> hashes;
    for (const auto& entry : fs::directory_iterator(directory))
      if (const std::string name = entry.path().filename(); name != "timings.json")
        hashes[name] = entry.is_regular_file() ? Sha256File(entry.path()) : "no file";
    return hashes;
  }

  TempDirectory directory_;
  const std::string model_ = directory_.Path() / "model";
  const std::string samples_ = directory_.Path() / "inputs.safetensors";
};

// ---- Resume
// -----------------------------------------------------------------------------------------------------------

class KilledBehind : public LongRunTest, public testing::WithParamInterface<int> {};

TEST_P(KilledBehind, GoesOnToTheSameBytes) {
  ASSERT_NO_FATAL_FAILURE(KillBehind(GetParam()));
  std::vector<std::string> resume = Arguments(Out(), {"--resume"});
  std::erase(resume, "--quiet");
  const ProgramResult result = RunProgram(resume);
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.err, HasSubstr("going on behind "));
  EXPECT_EQ(Hashes(Out()), Hashes(Reference()));
  EXPECT_FALSE(fs::exists(Out() + ".partial"));
}
INSTANTIATE_TEST_SUITE_P(Phases, KilledBehind, testing::Values(1, 4, 7, 9, 10));

// Whatever the run was doing: also in the middle of a stage, of a file, or of saving.
TEST_F(LongRunTest, KilledAgainAndAgainEndsInTheSameBytes) {
  int kills = 0;
  for (int milliseconds = 30;; milliseconds += 13) {
    Running run(Arguments(Out(), {"--resume"}));
    for (int waited = 0; waited < milliseconds && !run.Ended(); ++waited)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    run.Kill();
    if (fs::exists(Out())) break;
    ASSERT_EQ(run.ExitCode(), 128 + SIGKILL);
    ++kills;
    ASSERT_LT(kills, 1000);
  }
  EXPECT_GT(kills, 0);
  EXPECT_EQ(Hashes(Out()), Hashes(Reference()));
}

TEST_F(LongRunTest, FinishedStagesAreNotComputedAgain) {
  ASSERT_NO_FATAL_FAILURE(KillBehind(8));
  std::vector<std::string> resume = Arguments(Out(), {"--resume"});
  std::erase(resume, "--quiet");
  const ProgramResult result = RunProgram(resume);
  EXPECT_EQ(result.exit_code, 0) << result.err;
  for (const char* stage : {"vision.tables: ", "vision.patch_embed: ", "embeddings: "})
    EXPECT_THAT(result.err, Not(HasSubstr(stage)));
  EXPECT_THAT(result.err, HasSubstr("logits: "));
}

TEST_F(LongRunTest, WhatChangedSinceIsNamedAndNothingIsLost) {
  ASSERT_NO_FATAL_FAILURE(KillBehind(5));
  const auto expect_named = [&](const std::vector<std::string>& arguments, const std::string& what) {
    const ProgramResult result = RunProgram(arguments);
    EXPECT_EQ(result.exit_code, 2);
    EXPECT_THAT(result.err,
                AllOf(HasSubstr("cannot go on with the unfinished run"), HasSubstr(what), HasSubstr("--force")));
    EXPECT_TRUE(fs::exists(Out() + ".partial/unfinished"));
  };
  std::vector<std::string> other_recipe = Arguments(Out(), {"--resume"});
  std::ranges::replace(other_recipe, std::string("w8a16"), std::string("w4a16"));
  expect_named(other_recipe, "recipe");
  expect_named(Arguments(Out(), {"--resume", "--dialect", "tico"}), "option --dialect: was \"default\", is \"tico\"");
  expect_named(Arguments(Out(), {"--resume", "--max-seq-len", "64"}), "option --max-seq-len");

  const std::string data = ReadFile(samples_);
  WriteFile(samples_, data.substr(0, data.size() - 1) + static_cast<char>(data.back() ^ 1));
  expect_named(Arguments(Out(), {"--resume"}), "file inputs.safetensors");
  WriteFile(samples_, data);

  const fs::path weights = fs::path(model_) / "model.safetensors";
  const std::string model = ReadFile(weights);
  WriteFile(weights, model.substr(0, model.size() - 1) + static_cast<char>(model.back() ^ 1));
  expect_named(Arguments(Out(), {"--resume"}), "file model.safetensors");
  WriteFile(weights, model);

  const fs::path state = Out() + ".partial/unfinished/rank.0";
  for (const auto& entry : fs::directory_iterator(state))
    if (entry.path().filename().string().starts_with("state.")) {
      nlohmann::json json = ReadJson(entry.path());
      json["identity"]["circlet version"] = "0.0.1";
      WriteJson(entry.path(), json);
    }
  expect_named(Arguments(Out(), {"--resume"}), "circlet version: was \"0.0.1\"");
}

TEST_F(LongRunTest, AnUnfinishedRunIsNotThrownAwayUnasked) {
  ASSERT_NO_FATAL_FAILURE(KillBehind(5));
  const ProgramResult refused = RunProgram(Arguments(Out()));
  EXPECT_EQ(refused.exit_code, 2);
  EXPECT_THAT(refused.err, AllOf(HasSubstr("unfinished run"), HasSubstr("--resume"), HasSubstr("--force")));
  EXPECT_EQ(RunProgram(Arguments(Out(), {"--force"})).exit_code, 0);
  EXPECT_EQ(Hashes(Out()), Hashes(Reference()));
}

TEST_F(LongRunTest, OtherDialectsAndFrozenGridsGoOnToo) {
  const std::string frozen = directory_.Path() / "frozen.json";
  fs::copy(Reference() + "/qparams.json", frozen);
  for (const std::vector<std::string>& more : {std::vector<std::string>{"--dialect", "tico"}, {"--qparams", frozen}}) {
    ASSERT_NO_FATAL_FAILURE(KillBehind(8, more));
    std::vector<std::string> resume = more;
    resume.push_back("--resume");
    const ProgramResult result = RunProgram(Arguments(Out(), resume));
    ASSERT_EQ(result.exit_code, 0) << result.err;
    fs::remove_all(Out("reference"));
    EXPECT_EQ(Hashes(Out()), Hashes(Reference(more))) << more[0];
    fs::remove_all(Out());
  }
}

TEST_F(LongRunTest, SavedStagesCannotBeGoneOnWith) {
  const ProgramResult result = RunProgram(Arguments(Out(), {"--resume", "--save-stages"}));
  EXPECT_EQ(result.exit_code, 2);
  EXPECT_THAT(result.err, HasSubstr("--save-stages"));
}

// A limit on the size of files stands for a full disk: the largest one does not fit.
TEST_F(LongRunTest, AFullDiskKeepsWhatWasSaved) {
  const std::string reference = Reference();
  uintmax_t largest = 0;
  for (const auto& entry : fs::directory_iterator(reference)) largest = std::max(largest, entry.file_size());
  const ProgramResult full =
      RunProgram(Arguments(Out()), fmt::format("trap \"\" XFSZ; ulimit -f {}; ", largest / 1024 - 1));
  EXPECT_EQ(full.exit_code, 2);
  EXPECT_THAT(full.err, HasSubstr("File too large"));
  EXPECT_FALSE(fs::exists(Out()));
  const ProgramResult resumed = RunProgram(Arguments(Out(), {"--resume"}));
  ASSERT_EQ(resumed.exit_code, 0) << resumed.err;
  EXPECT_EQ(Hashes(Out()), Hashes(reference));
}

TEST_F(LongRunTest, AFolderOfTheUserIsNotTakenForAnUnfinishedRun) {
  fs::create_directory(Out() + ".partial");
  WriteFile(Out() + ".partial/notes.txt", "mine");
  for (const char* flag : {"--quiet", "--force", "--resume"}) {
    const ProgramResult result = RunProgram(Arguments(Out(), {flag}));
    EXPECT_EQ(result.exit_code, 2);
    EXPECT_THAT(result.err, AllOf(HasSubstr("out.partial"), HasSubstr("move it away")));
  }
  EXPECT_EQ(ReadFile(Out() + ".partial/notes.txt"), "mine");
}

TEST_F(LongRunTest, WhatARunLeavesThatWasKilledAtItsVeryStartIsNotInTheWay) {
  for (const char* leftover : {".partial", ".partial/unfinished", ".partial/unfinished/rank.0/values"}) {
    fs::create_directories(Out() + leftover);
    const ProgramResult result = RunProgram(Arguments(Out()));
    EXPECT_EQ(result.exit_code, 0) << leftover << ": " << result.err;
    fs::remove_all(Out());
  }
  fs::create_directories(Out() + ".partial/unfinished/business");
  EXPECT_EQ(RunProgram(Arguments(Out(), {"--force"})).exit_code, 2);
  EXPECT_TRUE(fs::exists(Out() + ".partial/unfinished/business"));
}

TEST_F(LongRunTest, KilledWhileItTookItsNameGoesOnOrIsFinished) {
  ASSERT_NO_FATAL_FAILURE(KillBehind(7));
  fs::rename(Out() + ".partial/unfinished", Out() + ".unfinished");
  for (const char* last : {"manifest.json", "timings.json"}) WriteFile(Out() + ".partial/" + last, "{}");
  EXPECT_EQ(RunProgram(Arguments(Out(), {"--resume"})).exit_code, 0);
  EXPECT_EQ(Hashes(Out()), Hashes(Reference()));
  // Behind the rename nothing but the state is left to clear away.
  fs::create_directories(Out() + ".unfinished/rank.0");
  EXPECT_EQ(RunProgram(Arguments(Out(), {"--force"})).exit_code, 0);
  EXPECT_FALSE(fs::exists(Out() + ".unfinished"));
  fs::create_directories(Out() + ".unfinished/business");
  EXPECT_EQ(RunProgram(Arguments(Out(), {"--force"})).exit_code, 2);
  EXPECT_TRUE(fs::exists(Out() + ".unfinished/business"));
}

TEST_F(LongRunTest, ResumeWithoutAnUnfinishedRunStarts) {
  const ProgramResult result = RunProgram(Arguments(Out(), {"--resume"}));
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_TRUE(fs::exists(Out() + "/manifest.json"));
}

TEST_F(LongRunTest, ADamagedStateIsAnError) {
  ASSERT_NO_FATAL_FAILURE(KillBehind(6));
  const fs::path folder = Out() + ".partial/unfinished/rank.0";
  const auto expect_refused = [&](const std::string& what) {
    const ProgramResult result = RunProgram(Arguments(Out(), {"--resume"}));
    EXPECT_EQ(result.exit_code, 2) << result.err;
    EXPECT_THAT(result.err, AllOf(HasSubstr(what), HasSubstr("--force")));
  };
  fs::path values;
  for (const auto& entry : fs::directory_iterator(folder / "values"))
    if (fs::file_size(entry.path()) > 0) values = entry.path();
  const std::string bytes = ReadFile(values);
  WriteFile(values, bytes.substr(1));
  expect_refused(values.filename());
  WriteFile(values, bytes);
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (!entry.path().filename().string().starts_with("state.")) continue;
    nlohmann::json json = ReadJson(entry.path());
    json.erase("units");
    WriteJson(entry.path(), json);
  }
  expect_refused("is damaged");
}

// ---- Memory
// -----------------------------------------------------------------------------------------------------------

TEST(MemoryLimit, SpillsAndEndsInTheSameBytes) {
  const TempDirectory directory;
  const auto run = [&](const std::string& name, const std::string& limit) {
    // What a stage takes grows with the threads that run items side by side.
    return RunProgram({"--threads", "2", "quantize", kTiny, "--data", std::string(kTiny) + "/eval/calib.jsonl",
                       "--recipe", "w8a16", "--eval-text", std::string(kTiny) + "/eval/heldout.txt", "--eval-windows",
                       "10", "--output", directory.Path() / name, "--memory-limit", limit});
  };
  const ProgramResult all = run("all", "3GB");
  ASSERT_EQ(all.exit_code, 0) << all.err;
  EXPECT_THAT(all.out, Not(HasSubstr("memory limit")));
  // Less than the activations, and so little that the head runs in slices of the vocabulary.
  const ProgramResult little = run("little", "60MiB");
  ASSERT_EQ(little.exit_code, 0) << little.err;
  EXPECT_THAT(little.err, AllOf(HasSubstr("pass the memory limit"), HasSubstr("goes to files")));
  EXPECT_THAT(little.out, HasSubstr("activations past the memory limit went to files: "));
  for (const auto& entry : fs::directory_iterator(directory.Path() / "all")) {
    const std::string name = entry.path().filename();
    if (name == "timings.json") continue;
    EXPECT_EQ(Sha256File(entry.path()), Sha256File(directory.Path() / "little" / name)) << name;
  }

  const ProgramResult refused = run("refused", "20MiB");
  EXPECT_EQ(refused.exit_code, 2);
  EXPECT_THAT(refused.err, AllOf(HasSubstr("--memory-limit 20.0 MiB"), HasSubstr("the largest stage alone takes")));
}

TEST(MemoryLimit, EvaluateSpillsToo) {
  const TempDirectory scratch;
  const ProgramResult result =
      RunProgram({"evaluate", kTiny, "--data", std::string(kTiny) + "/eval/calib.jsonl", "--memory-limit", "50MiB"},
                 "export TMPDIR=" + scratch.Path().string() + "; ");
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("went to files"));
  EXPECT_TRUE(fs::is_empty(scratch.Path()));
}

// ---- bf16
// -------------------------------------------------------------------------------------------------------------

TEST(ComputeBf16, SaysWhatItChangesAndFilesStayExact) {
  const TempDirectory directory;
  const std::string out = directory.Path() / "out";
  const ProgramResult result =
      RunProgram({"quantize", kTiny, "--data", std::string(kTiny) + "/eval/calib.jsonl", "--recipe", "w8a16",
                  "--output", out, "--compute", "bf16", "--timings", "--quiet"});
  if (!Bf16Supported()) {
    EXPECT_EQ(result.exit_code, 2);
    EXPECT_THAT(result.err, HasSubstr("takes a processor with AVX-512 BF16"));
    return;
  }
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("products in bf16"), HasSubstr("alone in oneDNN")));
  const nlohmann::json change = ReadJson(fs::path(out) / "report.json").at("compute");
  EXPECT_EQ(change.at("products"), "bf16");
  EXPECT_GT(change.at("points").get<int>(), 500);
  // A product's relative error is of the order of 2^-9 for each factor; measured here: 0.05 % on average, 0.9 % at
  // most, and 0.33 % of the logits' range. Nothing at all would mean that float32 was compared with itself.
  EXPECT_GT(change.at("mean_range_change").get<double>(), 0.0001);
  EXPECT_LT(change.at("mean_range_change").get<double>(), 0.0015);
  EXPECT_LT(change.at("max_range_change").get<double>(), 0.03);
  EXPECT_GT(change.at("logits").at("peir").get<double>(), 0.0003);
  EXPECT_LT(change.at("logits").at("peir").get<double>(), 0.01);
  const ProgramResult verify = RunProgram({"verify", out});
  EXPECT_EQ(verify.exit_code, 0) << verify.out;
  EXPECT_THAT(verify.out, HasSubstr("to the last code"));
}

// ---- Dry run
// ----------------------------------------------------------------------------------------------------------

TEST(DryRun, SaysWhatIsNeededAndWritesNothing) {
  const TempDirectory directory;
  const std::string out = directory.Path() / "deep/out";
  const ProgramResult result =
      RunProgram({"quantize", kTiny, "--data", std::string(kTiny) + "/eval/calib.jsonl", "--output", out, "--dry-run"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("vision.layers.3"), HasSubstr("layers.9"), HasSubstr("logits"),
                                HasSubstr("GFLOP"), HasSubstr("time: "), HasSubstr("memory: "), HasSubstr("disk: ")));
  EXPECT_TRUE(fs::is_empty(directory.Path()));
}

TEST(DryRun, RefusesWhatNoMemoryCouldHold) {
  for (const auto& [samples, images, message] :
       {std::tuple{"1000000x1000000", "0", "--random-samples 1000000x1000000: 1000000000000 tokens, at most 268435456"},
        {"2x8", "999999999999", "--random-images: Value 999999999999 not in range"}}) {
    const ProgramResult result = RunProgram({"quantize", kTiny, "--random-samples", samples, "--random-images", images,
                                             "--output", "never", "--dry-run"});
    EXPECT_EQ(result.exit_code, 2);
    EXPECT_THAT(result.err, HasSubstr(message));
  }
}

// A disk of a size of its own takes a mount, which only root may make; CI is root.
TEST(DryRun, RefusesADiskThatIsTooSmallAndSoDoesTheRun) {
  const TempDirectory directory;
  const fs::path disk = directory.Path() / "disk";
  fs::create_directory(disk);
  if (mount("tmpfs", disk.c_str(), "tmpfs", 0, "size=1m") != 0) GTEST_SKIP() << "mounting a small disk takes root";
  for (const char* flag : {"--dry-run", "--quiet"}) {
    const ProgramResult result = RunProgram(
        {"quantize", kTiny, "--data", std::string(kTiny) + "/eval/calib.jsonl", "--output", disk / "out", flag});
    EXPECT_EQ(result.exit_code, 2);
    EXPECT_THAT(result.err, AllOf(HasSubstr("1.0 MiB are free"), HasSubstr("are needed")));
    EXPECT_TRUE(fs::is_empty(disk));
  }
  umount(disk.c_str());
}

// ---- Many processes
// ---------------------------------------------------------------------------------------------------

#ifdef CIRCLET_MPIEXEC

class ManyProcesses : public LongRunTest {};

TEST_F(ManyProcesses, GiveTheBytesOfOne) {
  const std::map<std::string, std::string> expected = Hashes(Reference());
  for (const int processes : {2, 3}) {
    const ProgramResult result = RunCirclet(processes, Arguments(Out(), {"--force"}));
    ASSERT_EQ(result.exit_code, 0) << result.err;
    EXPECT_EQ(Hashes(Out()), expected) << processes << " processes";
  }
}

TEST_F(ManyProcesses, MergePercentilesExactly) {
  const std::vector<std::string> percentile{
      "--set", "pipeline.0.activation={dtype: int16, observer: percentile, percentile: 99.5}"};
  const std::map<std::string, std::string> expected = Hashes(Reference(percentile));
  const ProgramResult result = RunCirclet(2, Arguments(Out(), percentile));
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_EQ(Hashes(Out()), expected);
}

TEST_F(ManyProcesses, CannotMergeMovingAveragesAndSaySo) {
  const ProgramResult result =
      RunCirclet(2, Arguments(Out(), {"--set", "pipeline.0.activation={dtype: int16, observer: ema}"}));
  EXPECT_EQ(result.exit_code, 2);
  EXPECT_THAT(result.err,
              AllOf(HasSubstr("EMA observer depends on the order of the samples"), HasSubstr("run one process")));
  EXPECT_EQ(result.err.find("circlet: "), result.err.rfind("circlet: ")) << result.err;
  EXPECT_FALSE(fs::exists(Out()));
}

TEST_F(ManyProcesses, GoOnTogether) {
  const std::map<std::string, std::string> expected = Hashes(Reference());
  int kills = 0;
  for (int tenths = 12;; tenths += 2, ++kills) {
    const ProgramResult killed =
        RunCirclet(2, Arguments(Out(), {"--resume"}),
                   {"timeout", "-s", "KILL", fmt::format("{}.{}", tenths / 10, tenths % 10)});
    if (fs::exists(Out())) break;
    ASSERT_EQ(killed.exit_code, 128 + SIGKILL) << killed.err;
    ASSERT_LT(kills, 50);
  }
  EXPECT_EQ(Hashes(Out()), expected);
}

#endif

}  // namespace
}  // namespace circlet
