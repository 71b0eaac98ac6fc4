// Runs that are too large for memory, are killed and go on, or are shared between processes: all must end in the same
// bytes as one run at once.

#include <gmock/gmock.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mount.h>

#include <chrono>
#include <cstdio>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>
#include <tuple>
#include <utility>

#include "circlet/io/json.h"
#include "circlet/io/safetensors.h"
#include "circlet/ops/op.h"
#include "golden.h"
#include "io/output_lock.h"
#include "paths.h"
#include "program.h"
#ifdef CIRCLET_MPIEXEC
#include "processes.h"
#endif

extern char** environ;

namespace circlet {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::ContainsRegex;
using ::testing::HasSubstr;
using ::testing::Not;

const std::string kTiny = SourcePath("examples/tiny-gemma4");

// The program in the background.
class Running {
 public:
  explicit Running(std::vector<std::string> arguments, const std::string& err = "/dev/null") {
    arguments.insert(arguments.begin(), kCircletBinary);
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
    posix_spawn_file_actions_addopen(&actions, 2, err.c_str(), O_WRONLY | O_CREAT, 0666);
    CIRCLET_CHECK(posix_spawn(&pid_, kCircletBinary, &actions, nullptr, argv.data(), environ) == 0, "cannot start");
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
  // Its exit code, behind `signal` when `there` holds.
  template <typename Condition>
  int Stop(int signal, const Condition& there) {
    while (!there() && !Ended()) std::this_thread::sleep_for(std::chrono::microseconds(200));
    if (!Ended()) kill(pid_, signal);
    return Wait();
  }
  int Wait() {
    if (!Ended()) waitpid(std::exchange(pid_, 0), &status_, 0);
    return ExitCode();
  }
  pid_t Pid() const { return pid_; }
  int ExitCode() const { return WIFEXITED(status_) ? WEXITSTATUS(status_) : 128 + WTERMSIG(status_); }

 private:
  pid_t pid_ = 0;
  int status_ = 0;
};

// A golden model with text and pictures, 11 phases long.
class LongRunTest : public testing::Test {
 protected:
  LongRunTest() {
    fs::copy(TestData("golden/seed_example/model"), model_);
    UnpackGolden("golden/seed_example/inputs.safetensors.xz", samples_);
  }

  std::vector<std::string> Arguments(const std::string& out, const std::vector<std::string>& more = {}) const {
    std::vector<std::string> arguments{"quantize", model_, "--samples", samples_,       "--recipe", recipe_,
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

  // A state as a run writes it: whoever changes it on purpose can do so too.
  static void WriteSigned(const fs::path& path, nlohmann::json state) {
    state.erase("sha256");
    const std::string text = state.dump();
    state["sha256"] = Sha256(std::as_bytes(std::span(text)));
    WriteJson(path, state);
  }

  // The newest saved state; one before it, which the kill may have left, goes.
  fs::path State() const {
    const fs::path folder = Out() + ".partial/unfinished/rank.0";
    fs::path newest;
    for (int number = 40; number > 0; --number)
      if (const fs::path state = folder / fmt::format("state.{}.json", number); !fs::exists(state)) {
      } else if (newest.empty()) {
        newest = state;
      } else {
        fs::remove(state);
      }
    return newest;
  }

  void ExpectNoResume(const std::string& what) const {
    const ProgramResult result = RunProgram(Arguments(Out(), {"--resume"}));
    EXPECT_EQ(result.exit_code, 2) << result.err;
    EXPECT_THAT(result.err, AllOf(HasSubstr(what), HasSubstr("start again with --force")));
    EXPECT_FALSE(fs::exists(Out()));
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
  std::string recipe_ = "w8a16";
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
  EXPECT_THAT(result.err, HasSubstr("going on after "));
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

// Weights that are rounded with the moments of their inputs.
class RoundedByMoments : public LongRunTest {
 protected:
  RoundedByMoments() { recipe_ = "w4a16-gptq"; }
};

TEST_F(RoundedByMoments, KilledGoesOnToTheSameBytes) {
  const std::map<std::string, std::string> expected = Hashes(Reference());
  int kills = 0;
  for (int milliseconds = 40; !fs::exists(Out()); milliseconds += 60, ++kills) {
    Running run(Arguments(Out(), {"--resume"}));
    for (int waited = 0; waited < milliseconds && !run.Ended(); ++waited)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    run.Kill();
    ASSERT_LT(kills, 1000);
  }
  EXPECT_GT(kills, 1);
  EXPECT_EQ(Hashes(Out()), expected);
}

// With everything that a moment and a target may hold.
const std::vector<std::string> kAllOfRounding{"--set", "pipeline.gptq.token_weights=stream", "--set",
                                              "pipeline.gptq.residual_target=0.5"};

TEST_F(RoundedByMoments, AnyThreadsAndMemoryGiveTheSameBytes) {
  const std::map<std::string, std::string> expected = Hashes(Reference(kAllOfRounding));
  for (const std::vector<std::string>& more :
       {std::vector<std::string>{"--threads", "1"}, {"--threads", "3"}, {"--memory-limit", "30MiB"}}) {
    std::vector<std::string> arguments = Arguments(Out(), more);
    arguments.insert(arguments.end(), kAllOfRounding.begin(), kAllOfRounding.end());
    const ProgramResult result = RunProgram(arguments);
    ASSERT_EQ(result.exit_code, 0) << result.err;
    EXPECT_EQ(Hashes(Out()), expected) << more[0] << " " << more[1];
    fs::remove_all(Out());
  }
}

TEST_F(RoundedByMoments, LinearsOfPicturesAndTheirProjectionAreRoundedToo) {
  const nlohmann::json report = ReadJson(fs::path(Reference()) / "report.json");
  std::set<std::string> names;
  for (const nlohmann::json& linear : report.at("linears")) names.insert(linear.at("name").get<std::string>());
  for (const char* name :
       {"model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight",
        "model.vision_tower.encoder.layers.0.mlp.down_proj.linear.weight",
        "model.embed_vision.embedding_projection.weight", "model.language_model.layers.0.mlp.down_proj.weight"})
    EXPECT_TRUE(names.contains(name)) << name;
  EXPECT_FALSE(names.contains("lm_head.weight"));
}

TEST_F(LongRunTest, FinishedStagesAreNotComputedAgain) {
  ASSERT_NO_FATAL_FAILURE(KillBehind(8));
  std::vector<std::string> resume = Arguments(Out(), {"--resume"});
  std::erase(resume, "--quiet");
  const ProgramResult result = RunProgram(resume);
  EXPECT_EQ(result.exit_code, 0) << result.err;
  for (const char* stage : {"] vision.tables ", "] vision.patch_embed ", "] embeddings "})
    EXPECT_THAT(result.err, Not(HasSubstr(stage)));
  EXPECT_THAT(result.err, HasSubstr("] logits "));
}

// Which channels stand how often is measured before the first stage, and once.
TEST_F(LongRunTest, AWiderStreamGoesOnToTheSameBytesAndIsNotMeasuredAgain) {
  const std::vector<std::string> widen{"--widen", "16"};
  ASSERT_NO_FATAL_FAILURE(KillBehind(3, widen));
  std::vector<std::string> resume = Arguments(Out(), {"--widen", "16", "--resume"});
  std::erase(resume, "--quiet");
  const ProgramResult result = RunProgram(resume);
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.err, Not(HasSubstr("residual stream: ")));
  std::vector<std::string> whole = Arguments(Out("threads"), widen);
  std::erase(whole, "--quiet");
  whole.insert(whole.begin(), {"--threads", "3"});
  const ProgramResult threads = RunProgram(whole);
  EXPECT_THAT(threads.err, HasSubstr("residual stream: "));
  const std::map<std::string, std::string> expected = Hashes(Reference(widen));
  EXPECT_EQ(Hashes(Out()), expected);
  EXPECT_EQ(Hashes(Out("threads")), expected);
}

TEST_F(LongRunTest, AnotherWidthThanTheUnfinishedRunsIsRefused) {
  ASSERT_NO_FATAL_FAILURE(KillBehind(3, {"--widen", "16"}));
  const ProgramResult result = RunProgram(Arguments(Out(), {"--widen", "32", "--resume"}));
  EXPECT_EQ(result.exit_code, 2);
  EXPECT_THAT(result.err, HasSubstr("cannot go on with the unfinished run: option --widen: was \"16\", is \"32\""));
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
      WriteSigned(entry.path(), json);
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

// Only the name is missing: any further run gives it, and then does what it was asked for.
TEST_F(LongRunTest, ACompleteRunWithoutItsNameGetsIt) {
  const std::string reference = Reference();
  const auto expect_named = [&](const std::vector<std::string>& more, int exit_code) {
    fs::copy(reference, Out() + ".partial", fs::copy_options::recursive);
    EXPECT_EQ(RunProgram(Arguments(Out(), more)).exit_code, exit_code);
    EXPECT_EQ(Hashes(Out()), Hashes(reference));
    EXPECT_FALSE(fs::exists(Out() + ".partial"));
    fs::remove_all(Out());
  };
  expect_named({"--resume"}, 0);
  expect_named({}, 2);
  expect_named({"--dialect", "tico"}, 2);

  fs::copy(reference, Out() + ".partial", fs::copy_options::recursive);
  WriteFile(Out() + ".partial/report.json", "{}");
  ExpectNoResume("report.json: is not the file that the run wrote before it was stopped");
  EXPECT_EQ(RunProgram(Arguments(Out(), {"--force"})).exit_code, 0);
  EXPECT_EQ(Hashes(Out()), Hashes(reference));
}

TEST_F(LongRunTest, ResumeWithoutAnUnfinishedRunStartsAndSaysSo) {
  std::vector<std::string> resume = Arguments(Out(), {"--resume"});
  std::erase(resume, "--quiet");
  const ProgramResult result = RunProgram(resume);
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.err, HasSubstr("no saved state to go on from, the run starts at its beginning"));
  EXPECT_TRUE(fs::exists(Out() + "/manifest.json"));
}

// So that a loop of runs with --resume ends.
TEST_F(LongRunTest, ResumeOfAFinishedRunIsDone) {
  const std::string out = Reference();
  const auto before = fs::last_write_time(out + "/manifest.json");
  const ProgramResult again = RunProgram(Arguments(out, {"--resume"}));
  EXPECT_EQ(again.exit_code, 0) << again.err;
  EXPECT_THAT(again.out, HasSubstr("is complete already"));
  EXPECT_EQ(fs::last_write_time(out + "/manifest.json"), before);

  const ProgramResult other = RunProgram(Arguments(out, {"--resume", "--dialect", "tico"}));
  EXPECT_EQ(other.exit_code, 2);
  EXPECT_THAT(other.err, AllOf(HasSubstr("holds the result of another run"), HasSubstr("--force")));

  WriteFile(out + "/report.json", "{}");
  const ProgramResult damaged = RunProgram(Arguments(out, {"--resume"}));
  EXPECT_EQ(damaged.exit_code, 2);
  EXPECT_THAT(damaged.err, AllOf(HasSubstr("report.json: is not the file that the finished run wrote"), HasSubstr("--force")));
}

TEST_F(LongRunTest, ResumeAndForceContradict) {
  const ProgramResult result = RunProgram(Arguments(Out(), {"--resume", "--force"}));
  EXPECT_EQ(result.exit_code, 2);
  EXPECT_THAT(result.err, HasSubstr("give one of them"));
}

// The numbers of a state are believed only where they agree with the run.
TEST_F(LongRunTest, AStateUnderAnotherNameIsRefused) {
  ASSERT_NO_FATAL_FAILURE(KillBehind(3));
  const fs::path right = State();
  const nlohmann::json state = ReadJson(right);
  for (const char* number : {"999", "2147483647", "0", "-1", "1"}) {
    const fs::path wrong = right.parent_path() / fmt::format("state.{}.json", number);
    fs::rename(right, wrong);
    ExpectNoResume(wrong.filename().string() + ": is damaged (it says that ");
    nlohmann::json forged = state;
    forged["done"] = std::stoi(number);
    if (std::string(number) != "1") {
      WriteSigned(wrong, forged);
      ExpectNoResume(wrong.filename().string() + ": is damaged (it says that ");
    }
    fs::remove(wrong);
    WriteJson(right, state);
  }
  nlohmann::json last = state;  // as many as there are, but without the last one's result
  last["done"] = 11;
  WriteSigned(right.parent_path() / "state.11.json", last);
  fs::remove(right);
  ExpectNoResume("state.11.json: has no head");
}

// Every byte that a run goes on from is under a hash.
TEST_F(LongRunTest, AChangedBitIsNamed) {
  ASSERT_NO_FATAL_FAILURE(KillBehind(9));
  const fs::path partial = Out() + ".partial";
  std::vector<fs::path> files{State()};
  const auto add_one = [&](const fs::path& folder, const std::string& ending) {
    for (const auto& entry : fs::directory_iterator(folder))
      if (entry.path().filename().string().ends_with(ending) && entry.file_size() > 0) return files.push_back(entry.path());
    FAIL() << "no " << ending << " in " << folder;
  };
  add_one(partial, ".q.circle");
  add_one(partial, "context.safetensors");
  add_one(State().parent_path() / "values", ".values");
  for (const auto& entry : fs::directory_iterator(State().parent_path()))
    if (entry.path().filename().string().starts_with("params.")) files.push_back(entry.path());
  ASSERT_GT(files.size(), 4u);
  for (const fs::path& file : files) {
    const std::string bytes = ReadFile(file);
    std::string changed = bytes;
    // In a number of a state, so that it is still JSON.
    const size_t at = file == State() ? bytes.find_first_of("0123456789", bytes.find("accumulated")) : bytes.size() / 2;
    changed[at] ^= 1;
    WriteFile(file, changed);
    ExpectNoResume(file.filename());
    WriteFile(file, bytes.substr(0, bytes.size() - 2));
    ExpectNoResume(file.filename());
    WriteFile(file, bytes);
  }
  EXPECT_EQ(RunProgram(Arguments(Out(), {"--resume"})).exit_code, 0);
}

TEST_F(LongRunTest, ChangedFieldsOfAStateAreNamed) {
  ASSERT_NO_FATAL_FAILURE(KillBehind(9));
  const fs::path path = State();
  const nlohmann::json state = ReadJson(path);
  fs::copy(Out() + ".partial", Out("kept"), fs::copy_options::recursive);
  const auto expect_refused = [&](const char* pointer, const nlohmann::json& value, const std::string& what) {
    nlohmann::json changed = state;
    const nlohmann::json::json_pointer place(pointer);
    ASSERT_TRUE(changed.contains(place)) << pointer;
    changed[place] = value;
    WriteSigned(path, changed);
    ExpectNoResume(what);
    fs::remove_all(Out() + ".partial");  // a run that missed a value late has gone on until there
    fs::copy(Out("kept"), Out() + ".partial", fs::copy_options::recursive);
  };
  std::string key;
  for (const auto& [name, described] : state["values"]["keys"].items())
    if (name.find("codes.") == std::string::npos && !described["slots"].empty()) key = name;
  const std::string slots = "/values/keys/" + key + "/slots", slot = slots + "/0";
  const nlohmann::json first = state.at(nlohmann::json::json_pointer(slot));
  expect_refused((slot + "/chain").c_str(), 7, "is of chain 7");
  expect_refused((slot + "/item").c_str(), 99, "among the values that the unfinished run saved");
  expect_refused((slot + "/offset").c_str(), first["offset"].get<int64_t>() + 4, "values: ");
  expect_refused((slot + "/offset").c_str(), -1, "lies outside");
  expect_refused((slot + "/dtype").c_str(), "int32", "is not what the unfinished run saved");
  nlohmann::json turned = first["shape"];
  turned.push_back(1);
  expect_refused((slot + "/shape").c_str(), turned, "is not what the unfinished run saved");
  expect_refused(slots.c_str(), nlohmann::json::array(), "among the values that the unfinished run saved");
  expect_refused("/units/units", 7, "is damaged");
  expect_refused("/units/codes", {{"x", {"codes.nowhere", 3}}}, "among the values that the unfinished run saved");
}

TEST_F(LongRunTest, ADamagedStateIsAnError) {
  ASSERT_NO_FATAL_FAILURE(KillBehind(6));
  const fs::path path = State();
  nlohmann::json json = ReadJson(path);
  json.erase("units");
  WriteJson(path, json);
  ExpectNoResume("is damaged (its SHA-256 is another)");
  WriteSigned(path, json);
  ExpectNoResume("is damaged");
}

// ---- The output directory
// ---------------------------------------------------------------------------------------------

TEST_F(LongRunTest, OneRunAtATimeWritesToAnOutput) {
  ASSERT_NO_FATAL_FAILURE(KillBehind(3));
  {
    const OutputLock other(Out());
    for (const char* flag : {"--quiet", "--resume", "--force"}) {
      const ProgramResult refused = RunProgram(Arguments(Out(), {flag}));
      EXPECT_EQ(refused.exit_code, 2);
      EXPECT_THAT(refused.err, HasSubstr(fmt::format("another run (process {}) is writing there", getpid())));
    }
  }
  EXPECT_FALSE(fs::exists(Out() + ".lock"));
  EXPECT_EQ(RunProgram(Arguments(Out(), {"--resume"})).exit_code, 0);
  EXPECT_EQ(Hashes(Out()), Hashes(Reference()));
}

TEST_F(LongRunTest, OfRunsThatStartTogetherOneWritesTheResult) {
  std::vector<std::unique_ptr<Running>> runs;
  for (int i = 0; i < 4; ++i) runs.push_back(std::make_unique<Running>(Arguments(Out())));
  int done = 0;
  for (const auto& run : runs) {
    EXPECT_THAT(run->Wait(), testing::AnyOf(0, 2));
    done += run->ExitCode() == 0 ? 1 : 0;
  }
  EXPECT_EQ(done, 1);
  EXPECT_EQ(Hashes(Out()), Hashes(Reference()));
  for (const char* beside : {".lock", ".partial"}) EXPECT_FALSE(fs::exists(Out() + beside));
}

TEST_F(LongRunTest, TheLockOfAKilledRunIsTakenAndAFileOfTheUserIsNot) {
  WriteFile(Out() + ".lock", "4711");
  EXPECT_EQ(RunProgram(Arguments(Out())).exit_code, 0);
  EXPECT_FALSE(fs::exists(Out() + ".lock"));
  WriteFile(Out() + ".lock", "my notes");
  const ProgramResult result = RunProgram(Arguments(Out(), {"--force"}));
  EXPECT_EQ(result.exit_code, 2);
  EXPECT_THAT(result.err, HasSubstr("out.lock: is in the way"));
  EXPECT_EQ(ReadFile(Out() + ".lock"), "my notes");
}

// A shell that stands in the folder sees the result there.
TEST_F(LongRunTest, TheCurrentDirectoryTakesAResult) {
  const fs::path folder = Out();
  fs::create_directory(folder);
  for (const char* name : {".", "./", "../out/."}) {
    const std::string there = "cd '" + folder.string() + "'; ";
    const ProgramResult result = RunProgram(Arguments(name), there);
    ASSERT_EQ(result.exit_code, 0) << name << ": " << result.err;
    EXPECT_EQ(Hashes(folder), Hashes(fs::exists(Out("reference")) ? Out("reference") : Reference()));
    EXPECT_EQ(RunProgram({"verify", "."}, there).exit_code, 0);
    const ProgramResult refused = RunProgram(Arguments(name), there);
    EXPECT_EQ(refused.exit_code, 2);
    EXPECT_THAT(refused.err, HasSubstr(std::string(name) + ": is not empty"));
    EXPECT_EQ(RunProgram(Arguments(name, {"--force"}), there).exit_code, 0);
    EXPECT_EQ(Hashes(folder), Hashes(Out("reference")));
    for (const auto& entry : fs::directory_iterator(folder)) fs::remove_all(entry.path());  // the folder stays the same
  }
}

TEST_F(LongRunTest, WhatCannotBeAnOutputIsRefusedAtTheStart) {
  const auto expect_refused = [&](const std::string& output, const std::string& what) {
    std::vector<std::string> arguments = Arguments(output);
    std::erase(arguments, "--quiet");
    const ProgramResult result = RunProgram(arguments);
    EXPECT_EQ(result.exit_code, 2) << output;
    EXPECT_THAT(result.err, AllOf(HasSubstr(output), HasSubstr(what), Not(HasSubstr("logits"))));
  };
  fs::create_symlink("nowhere", Out("link"));
  expect_refused(Out("link"), "is a link to nowhere, which is missing");
  fs::create_symlink("loop", Out("loop"));
  expect_refused(Out("loop"), "Too many levels of symbolic links");
  expect_refused("/", "cannot be an output");
  expect_refused("/proc/circlet", "cannot be written");
  expect_refused("/dev/null", "is a file");
  expect_refused(Out(std::string(250, 'n')), "at most 247 leave room");
  std::string deep = directory_.Path();
  while (deep.size() < 3900) deep += "/" + std::string(100, 'd');
  expect_refused(deep, "choose a shorter one");
  WriteFile(Out("file"), "");
  expect_refused(Out("file") + "/out", "Not a directory");
  EXPECT_FALSE(fs::exists(Out("link") + ".partial"));
  if (fs::create_directory(Out("mounted")); mount("tmpfs", Out("mounted").c_str(), "tmpfs", 0, "size=1m") == 0) {
    expect_refused(Out("mounted"), "name a directory in it");
    umount(Out("mounted").c_str());
  }
}

TEST_F(LongRunTest, ALinkToADirectoryIsThatDirectory) {
  fs::create_directory(Out("real"));
  fs::create_symlink("real", Out());
  EXPECT_EQ(RunProgram(Arguments(Out())).exit_code, 0);
  EXPECT_TRUE(fs::is_symlink(Out()));
  EXPECT_EQ(Hashes(Out("real")), Hashes(Reference()));
}

TEST_F(LongRunTest, ForceReplacesWhatTheManifestListsAndNothingElse) {
  EXPECT_EQ(RunProgram(Arguments(Out(), {"--dialect", "tico"})).exit_code, 0);
  const fs::path out = Out();
  WriteFile(directory_.Path() / "outside.txt", "dear");
  WriteFile(out / "thesis.txt", "dear");
  WriteFile(out / "stale.q.circle", "x");
  fs::create_directory(out / "folder");
  nlohmann::json manifest = ReadJson(out / "manifest.json");
  for (const char* file : {"stale.q.circle", "../outside.txt", "folder", "gone.json"})
    manifest["outputs"].push_back({{"file", file}, {"sha256", ""}});
  manifest["outputs"].push_back(7);
  WriteJson(out / "manifest.json", manifest);
  EXPECT_EQ(RunProgram(Arguments(Out(), {"--force"})).exit_code, 0);
  std::map<std::string, std::string> expected = Hashes(Reference());
  expected["thesis.txt"] = Sha256File(directory_.Path() / "outside.txt");
  expected["folder"] = "no file";
  EXPECT_EQ(Hashes(out), expected);

  WriteFile(out / "manifest.json", "{\"files\": [\"a\"]}");
  const ProgramResult foreign = RunProgram(Arguments(Out(), {"--force"}));
  EXPECT_EQ(foreign.exit_code, 2);
  EXPECT_THAT(foreign.err, HasSubstr("holds a manifest.json that is not circlet's"));
}

TEST_F(LongRunTest, FourBitActivationsAreStoredInBytes) {
  for (const char* type : {"uint4", "int4"}) {
    const ProgramResult result = RunProgram(
        Arguments(Out(type), {"--set", fmt::format("pipeline.0.activation={{dtype: {}}}", type)}));
    ASSERT_EQ(result.exit_code, 0) << result.err;
    const ProgramResult verify = RunProgram({"verify", Out(type)});
    EXPECT_EQ(verify.exit_code, 0) << verify.err;
    EXPECT_THAT(verify.out, HasSubstr("to the last code"));
    EXPECT_EQ(SafetensorsFile::Open(Out(type) + "/verify.safetensors").Get("decoder_layer_decode_0.out.0").GetDType(),
              type[0] == 'u' ? DType::kU8 : DType::kI8);
  }
}

// ---- Stopped
// ----------------------------------------------------------------------------------------------------------

class Stopped : public LongRunTest, public testing::WithParamInterface<int> {
 protected:
  const std::string err_ = directory_.Path() / "err";
};

TEST_P(Stopped, SaysWhereAndHowToGoOn) {
  Running run(Arguments(Out(), {"--force"}), err_);
  EXPECT_EQ(run.Stop(GetParam(), [&] { return fs::exists(Out() + ".partial/unfinished/rank.0/state.4.json"); }),
            128 + GetParam());
  const std::string err = ReadFile(err_);
  EXPECT_THAT(err, AllOf(testing::StartsWith("circlet: stopped; "), HasSubstr(" of 11 stages are saved, the last is "),
                         HasSubstr("; go on with: "), testing::EndsWith(" --quiet --save-every 0 --resume\n")));
  const size_t command = err.find("go on with: ");
  ASSERT_NE(command, err.npos);
  EXPECT_EQ(std::system((err.substr(command + 12, err.size() - command - 13) + " > /dev/null").c_str()), 0);
  EXPECT_EQ(Hashes(Out()), Hashes(Reference()));
}

TEST_P(Stopped, SaysThatNothingIsSavedYet) {
  std::vector<std::string> arguments = Arguments(Out());
  arguments.back() = "60";
  Running run(arguments, err_);
  EXPECT_EQ(run.Stop(GetParam(), [&] { return fs::exists(Out() + ".partial"); }), 128 + GetParam());
  EXPECT_THAT(ReadFile(err_),
              AllOf(HasSubstr("stopped; nothing is saved yet, start again with: "), Not(HasSubstr("--resume"))));
  EXPECT_EQ(RunProgram(Arguments(Out())).exit_code, 0);
}
INSTANTIATE_TEST_SUITE_P(Signals, Stopped, testing::Values(SIGINT, SIGTERM));

// ---- Memory
// -----------------------------------------------------------------------------------------------------------

TEST(MemoryLimit, SpillsAndEndsInTheSameBytes) {
  const TempDirectory directory;
  const auto run = [&](const std::string& name, const std::string& limit) {
    // What a stage takes grows with the threads that run items side by side.
    return RunProgram({"--threads", "2", "quantize", kTiny, "--data", kTiny + "/eval/calib.jsonl", "--recipe", "w8a16",
                       "--eval-text", kTiny + "/eval/heldout.txt", "--eval-windows", "10", "--output",
                       directory.Path() / name, "--memory-limit", limit});
  };
  const ProgramResult all = run("all", "3GB");
  ASSERT_EQ(all.exit_code, 0) << all.err;
  EXPECT_THAT(all.out, AllOf(Not(HasSubstr("memory limit")), Not(HasSubstr("of its own"))));
  // Less than the activations, and so little that the head runs in slices of the vocabulary.
  const ProgramResult little = run("little", "60MiB");
  ASSERT_EQ(little.exit_code, 0) << little.err;
  EXPECT_THAT(little.err, AllOf(HasSubstr("pass the memory limit"), HasSubstr("goes to files")));
  EXPECT_THAT(little.out, HasSubstr("activations past the memory limit went to files: "));
  EXPECT_THAT(little.out, ContainsRegex("memory: [0-9.]+ MiB of its own, more than the limit of 60.0 MiB; "));
  for (const auto& entry : fs::directory_iterator(directory.Path() / "all")) {
    const std::string name = entry.path().filename();
    if (name == "timings.json") continue;
    EXPECT_EQ(Sha256File(entry.path()), Sha256File(directory.Path() / "little" / name)) << name;
  }

  const ProgramResult refused = run("refused", "20MiB");
  EXPECT_EQ(refused.exit_code, 2);
  EXPECT_THAT(refused.err, AllOf(HasSubstr("--memory-limit 20.0 MiB"), HasSubstr("the largest stage alone takes")));
}

// Its files have no names, so that nothing is left of a killed run either.
TEST(MemoryLimit, EvaluateSpillsToo) {
  const TempDirectory scratch;
  const ProgramResult result =
      RunProgram({"evaluate", kTiny, "--data", kTiny + "/eval/calib.jsonl", "--memory-limit", "30MiB"},
                 "export TMPDIR=" + scratch.Path().string() + "; ");
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("went to files"));
  EXPECT_TRUE(fs::is_empty(scratch.Path()));

  setenv("TMPDIR", scratch.Path().c_str(), 1);
  Running run({"evaluate", kTiny, "--data", kTiny + "/eval/calib.jsonl", "--memory-limit", "30MiB"});
  const auto spills = [&] {
    std::error_code gone;
    for (const auto& entry : fs::directory_iterator(fmt::format("/proc/{}/fd", run.Pid()), gone))
      if (fs::read_symlink(entry.path(), gone).string().starts_with(scratch.Path().string())) return true;
    return false;
  };
  EXPECT_EQ(run.Stop(SIGKILL, spills), 128 + SIGKILL);
  unsetenv("TMPDIR");
  EXPECT_TRUE(fs::is_empty(scratch.Path()));

  const ProgramResult nowhere =
      RunProgram({"evaluate", kTiny, "--data", kTiny + "/eval/calib.jsonl"}, "export TMPDIR=/nonexistent; ");
  EXPECT_EQ(nowhere.exit_code, 2);
  EXPECT_THAT(nowhere.err, AllOf(HasSubstr("TMPDIR=/nonexistent: "), HasSubstr("set it to a directory with room")));
}

// Stage by stage: the whole model's values at once, in both readings, would take more than twice what it may take here.
TEST(MemoryLimit, ATraceStaysBelowItAndSaysTheSame) {
  const TempDirectory directory;
  const std::string all = directory.Path() / "all.json", little = directory.Path() / "little.json";
  const auto arguments = [](const std::string& json, const std::string& limit) {
    return std::vector<std::string>{"--threads", "2",       "trace",    kTiny,  "--data", kTiny + "/eval/calib.jsonl",
                                    "--recipe",  "w8a16",   "--json",   json,   "--memory-limit", limit};
  };
  Running run(arguments(all, "150MiB"));
  int64_t peak = 0;
  while (!run.Ended()) {
    std::ifstream status(fmt::format("/proc/{}/status", run.Pid()));
    int64_t kib = 0;
    for (std::string line; std::getline(status, line);)
      if (std::sscanf(line.c_str(), "RssAnon: %ld kB", &kib) == 1) peak = std::max(peak, kib);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_EQ(run.ExitCode(), 0);
#ifndef __SANITIZE_ADDRESS__
  EXPECT_LT(peak, 150 << 10);
#endif
  EXPECT_GT(peak, 10 << 10);

  const ProgramResult result = RunProgram(arguments(little, "50MiB"));
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.err, AllOf(HasSubstr("goes to files"), HasSubstr("of its own, more than the limit of 50.0 MiB")));
  EXPECT_EQ(ReadFile(all), ReadFile(little));
}

// ---- bf16
// -------------------------------------------------------------------------------------------------------------

TEST(ComputeBf16, SaysWhatItChangesAndFilesStayExact) {
  const TempDirectory directory;
  const std::string out = directory.Path() / "out";
  const ProgramResult result = RunProgram({"quantize", kTiny, "--data", kTiny + "/eval/calib.jsonl", "--recipe",
                                           "w8a16", "--output", out, "--compute", "bf16", "--timings", "--quiet"});
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
      RunProgram({"quantize", kTiny, "--data", kTiny + "/eval/calib.jsonl", "--output", out, "--dry-run"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.out, AllOf(HasSubstr("vision.layers.3"), HasSubstr("layers.9"), HasSubstr("logits"),
                                HasSubstr("GFLOP"), HasSubstr("time: "), HasSubstr("memory: "), HasSubstr("disk: ")));
  EXPECT_TRUE(fs::is_empty(directory.Path()));
}

// What a run leaves out, does not use or assumes is known before it.
TEST(DryRun, HasTheNotesOfTheRun) {
  const TempDirectory directory;
  for (const char* file :
       {"model.safetensors", "tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"})
    fs::create_symlink(fs::path(kTiny) / file, directory.Path() / file);
  nlohmann::json config = nlohmann::json::parse(ReadFile(fs::path(kTiny) / "config.json"));
  config["text_config"]["colour"] = "blue";
  WriteFile(directory.Path() / "config.json", config.dump());
  WriteFile(directory.Path() / "data.jsonl",
            R"({"type": "text", "text": "One two three four five six seven eight nine"}
{"type": "chat", "messages": [{"role": "user", "content": [{"type": "image", "path": "none.png"}]}]})");
  std::vector<std::string> arguments{"quantize",      directory.Path(),
                                     "--data",        directory.Path() / "data.jsonl",
                                     "--text-only",   "--truncate",
                                     "--max-seq-len", "8",
                                     "--output",      directory.Path() / "out",
                                     "--units",       "deployment",
                                     "--quiet"};
  const auto notes = [&] {
    const ProgramResult result = RunProgram(arguments);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    std::istringstream text(result.out);
    std::vector<std::string> found;
    for (std::string line; std::getline(text, line);)
      for (const char* begin : {"note: ", "left out: ", "1 of "})
        if (line.starts_with(begin)) found.push_back(line);
    return found;
  };
  const std::vector<std::string> of_run = notes();
  arguments.insert(arguments.end(), {"--dry-run", "--force"});
  EXPECT_EQ(notes(), of_run);
  EXPECT_THAT(of_run, testing::ElementsAre(HasSubstr("cut to 8 tokens"), "left out: data.jsonl:2",
                                           "note: vision units are left out: --text-only", HasSubstr("colour")));
}

// The files themselves, not the activations beside them: near what a run writes, and never a run that does not fit.
TEST(DryRun, TheDiskIsWhatARunTakesAndATakenOutputIsRefused) {
  const TempDirectory directory;
  for (const auto& [recipe, units] : {std::pair{"default", "auto"}, std::pair{"w4a16", "deployment"}}) {
    const fs::path out = directory.Path() / recipe;
    std::vector<std::string> arguments{"quantize", kTiny,       "--data",  kTiny + "/eval/calib.jsonl",
                                       "--recipe", recipe,      "--units", units,
                                       "--output", out.string()};
    arguments.push_back("--dry-run");
    const ProgramResult dry = RunProgram(arguments);
    ASSERT_EQ(dry.exit_code, 0) << dry.err;
    double predicted = 0;
    ASSERT_EQ(std::sscanf(dry.out.substr(dry.out.find("disk: ")).c_str(), "disk: %lf MiB of files", &predicted), 1);
    arguments.back() = "--quiet";
    ASSERT_EQ(RunProgram(arguments).exit_code, 0);
    double bytes = 0;
    for (const auto& entry : fs::directory_iterator(out)) bytes += static_cast<double>(entry.file_size());
    EXPECT_NEAR(predicted * (1 << 20) / bytes, 1, 0.25) << recipe;
    arguments.back() = "--dry-run";
    const ProgramResult taken = RunProgram(arguments);
    EXPECT_EQ(taken.exit_code, 2);
    EXPECT_THAT(taken.err, HasSubstr("is not empty (it holds \""));
  }
}

TEST(DryRun, RefusesAnUnfinishedRunAsTheRunDoes) {
  const TempDirectory directory;
  const fs::path out = directory.Path() / "out", state = out.string() + ".partial/unfinished/rank.0";
  fs::create_directories(state);
  WriteFile(state / "state.1", "{}");
  std::vector<std::string> arguments{"quantize", kTiny, "--random-samples", "2x16", "--quiet", "--output", out};
  const ProgramResult run = RunProgram(arguments);
  arguments.emplace_back("--dry-run");
  const ProgramResult dry = RunProgram(arguments);
  EXPECT_EQ(dry.exit_code, 2);
  EXPECT_THAT(dry.err, HasSubstr("out.partial: holds an unfinished run; --resume goes on with it, --force starts again"));
  EXPECT_EQ(dry.err, run.err);
  EXPECT_TRUE(fs::exists(state / "state.1"));
  arguments.emplace_back("--force");
  EXPECT_EQ(RunProgram(arguments).exit_code, 0);
  EXPECT_TRUE(fs::exists(state / "state.1"));
}

TEST(DryRun, RefusesWhatNoMemoryCouldHold) {
  for (const auto& [samples, images, message] :
       {std::tuple{"1000000x1000000", "0", "--random-samples 1000000x1000000: 1000000000000 tokens, at most 268435456"},
        {"2x8", "999999999999", "--random-images: \"999999999999\" is no whole number from 0 to 256"}}) {
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
    const ProgramResult result =
        RunProgram({"quantize", kTiny, "--data", kTiny + "/eval/calib.jsonl", "--output", disk / "out", flag});
    EXPECT_EQ(result.exit_code, 2);
    EXPECT_THAT(result.err, AllOf(HasSubstr("B are free, "), HasSubstr("are needed")));
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

TEST_F(ManyProcesses, MeasureATextAndAnswersLikeOne) {
  const std::string captions = ReadFile(kTiny + "/eval/captions.jsonl"), data = ReadFile(kTiny + "/eval/calib.jsonl");
  fs::create_directory_symlink(kTiny + "/eval/images", Out("images"));
  WriteFile(Out("captions.jsonl"), captions.substr(0, captions.find("\n{\"image\": \"images/eval_004")));
  WriteFile(Out("calib.jsonl"), data.substr(0, data.find('\n')) + data.substr(data.rfind('\n', data.size() - 2)));
  std::string text, json;
  for (const int processes : {1, 2, 3}) {
    const std::string file = Out(fmt::format("{}.json", processes));
    const ProgramResult result =
        RunCirclet(processes, {"evaluate", kTiny, "--data", Out("calib.jsonl"), "--recipe", "w4a16", "--eval-text",
                               kTiny + "/eval/heldout.txt", "--eval-windows", "5", "--eval-captions",
                               Out("captions.jsonl"), "--quiet", "--json", file});
    ASSERT_EQ(result.exit_code, 0) << result.err;
    if (processes == 1) {
      text = result.out;
      json = ReadFile(file);
    }
    EXPECT_EQ(result.out, text) << processes << " processes";
    EXPECT_EQ(ReadFile(file), json) << processes << " processes";
  }
  EXPECT_THAT(text, AllOf(HasSubstr("same top-1"), HasSubstr("captions: ")));
}

TEST_F(ManyProcesses, MeasureTheStreamTogether) {
  const std::vector<std::string> widen{"--widen", "16"};
  const std::map<std::string, std::string> expected = Hashes(Reference(widen));
  for (const int processes : {2, 3}) {
    const ProgramResult result = RunCirclet(processes, Arguments(Out(), {"--widen", "16", "--force"}));
    ASSERT_EQ(result.exit_code, 0) << result.err;
    EXPECT_EQ(Hashes(Out()), expected) << processes << " processes";
  }
}

TEST_F(ManyProcesses, MergeMomentsExactly) {
  recipe_ = "w4a16-gptq";
  const std::map<std::string, std::string> expected = Hashes(Reference(kAllOfRounding));
  std::vector<std::string> arguments = Arguments(Out(), {"--force"});
  arguments.insert(arguments.end(), kAllOfRounding.begin(), kAllOfRounding.end());
  for (const int processes : {2, 3}) {
    const ProgramResult result = RunCirclet(processes, arguments);
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
    ASSERT_LT(kills, 50);
    // The kill takes mpirun; its processes may work on for a moment.
    if (killed.err.find("another run") != killed.err.npos) continue;
    ASSERT_EQ(killed.exit_code, 128 + SIGKILL) << killed.err;
  }
  EXPECT_EQ(Hashes(Out()), expected);
}

#endif

}  // namespace
}  // namespace circlet
