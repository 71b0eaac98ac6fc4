// The program amid what others decide: variables of the environment, limits, signals, pipes in place of files, full
// disks.

#include <gmock/gmock.h>
#include <omp.h>
#include <sys/stat.h>

#include <algorithm>
#include <fstream>
#include <random>
#include <thread>

#include "circlet/base/threads.h"
#include "circlet/io/safetensors.h"
#include "golden.h"
#include "golden_model_test.h"
#include "io/mapped_file.h"
#include "ops/gemm.h"
#include "paths.h"
#include "program.h"

namespace circlet {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::StartsWith;

const std::string kTiny = SourcePath("examples/tiny-gemma4");

class EnvironmentTest : public GoldenModelTest {
 protected:
  // The files of a run by name, but for its times.
  std::map<std::string, std::string> Bytes(const std::string& shell, const std::vector<std::string>& more = {}) const {
    fs::remove_all(out_);
    const ProgramResult result = RunProgram(Quantize(more), shell);
    EXPECT_EQ(result.exit_code, 0) << shell << result.err;
    std::map<std::string, std::string> files;
    if (result.exit_code == 0)
      for (const auto& entry : fs::directory_iterator(out_))
        if (entry.path().filename() != "timings.json") files[entry.path().filename()] = ReadFile(entry.path());
    return files;
  }

  // The user can mend it: exit code 2 and one line that begins with the program's name.
  static void ExpectRefused(const ProgramResult& result, const testing::Matcher<std::string>& message,
                            const std::string& what = "") {
    EXPECT_EQ(result.exit_code, 2) << what << result.err;
    EXPECT_THAT(result.err, AllOf(StartsWith("circlet: "), message, Not(HasSubstr("bug")))) << what;
    EXPECT_EQ(std::ranges::count(result.err, '\n'), 1) << what << result.err;
  }
};

// ---- Threads --------------------------------------------------------------------------------------------------------

// Each setting bounds, nests, binds or moves OpenMP's threads, or asks oneDNN for less exact products.
TEST_F(EnvironmentTest, SettingsOfOpenMpAndOneDnnChangeNoByte) {
  const auto alone = Bytes("", {"--threads", "1"});
  ASSERT_FALSE(alone.empty());
  for (const char* settings :
       {"OMP_NUM_THREADS=4", "OMP_DYNAMIC=true OMP_NUM_THREADS=4", "OMP_THREAD_LIMIT=1 OMP_NUM_THREADS=4",
        "OMP_THREAD_LIMIT=3 OMP_NUM_THREADS=4", "OMP_MAX_ACTIVE_LEVELS=0 OMP_NUM_THREADS=4",
        "OMP_NESTED=true OMP_NUM_THREADS=3,2,2", "OMP_MAX_ACTIVE_LEVELS=3 OMP_NUM_THREADS=3,2,2",
        "OMP_PROC_BIND=close OMP_PLACES={0} OMP_NUM_THREADS=4", "OMP_SCHEDULE=dynamic,1 OMP_NUM_THREADS=3",
        "OMP_STACKSIZE=16K OMP_NUM_THREADS=4", "OMP_WAIT_POLICY=active OMP_DYNAMIC=true OMP_NUM_THREADS=4",
        "KMP_AFFINITY=compact KMP_DYNAMIC_MODE=load_balance OMP_DYNAMIC=true OMP_NUM_THREADS=4",
        "ONEDNN_DEFAULT_FPMATH_MODE=ANY OMP_NUM_THREADS=2"})
    EXPECT_EQ(Bytes(fmt::format("export {}; ", settings)), alone) << settings;
}

TEST_F(EnvironmentTest, FewerThreadsThanWereAskedForAreTold) {
  const ProgramResult result = RunProgram(Quantize({"--threads", "4"}), "export OMP_THREAD_LIMIT=2; ");
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_THAT(result.err, AllOf(StartsWith("circlet: --threads 4: OpenMP gives 2"), HasSubstr("OMP_THREAD_LIMIT")));
}

TEST_F(EnvironmentTest, ThreadsThatTheSystemRefusesToStartAreTold) {
  ExpectRefused(RunProgram(Quantize({"--threads", "900"}), "ulimit -v 2000000; "),
                AllOf(StartsWith("circlet: 900 threads: only "), HasSubstr("--threads")));
}

int ThreadsOfARegion() {
  int count = 0;
#pragma omp parallel num_threads(Threads())
#pragma omp master
  count = omp_get_num_threads();
  return count;
}

// The library alone, in a program with settings of its own.
TEST(ThreadsTest, AParallelRegionGetsWhatIsPromised) {
  omp_set_dynamic(1);
  for (const int count : {7, 1, 3}) {
    SetThreads(count);
    EXPECT_EQ(Threads(), count);
    EXPECT_EQ(ThreadsOfARegion(), count);
  }
  omp_set_max_active_levels(0);
  SetThreads(5);
  EXPECT_EQ(Threads(), 1);
  EXPECT_EQ(ThreadsOfARegion(), 1);
  omp_set_max_active_levels(1);
  SetThreads(2);
}

TEST(ThreadsTest, AProductInAParallelRegionOfTheCallerIsWhole) {
  constexpr int64_t kM = 65, kN = 129, kK = 70;
  std::mt19937 engine(1);
  std::normal_distribution<float> normal;
  std::vector<float> x(kM * kK), w(kN * kK), alone(kM * kN);
  for (float& value : x) value = normal(engine);
  for (float& value : w) value = normal(engine);
  SetThreads(1);
  gemm::Linear(x.data(), w.data(), nullptr, kM, kN, kK, alone.data());
  SetThreads(4);
  std::vector<std::vector<float>> found(3, std::vector<float>(alone.size()));
#pragma omp parallel for num_threads(3)
  for (int i = 0; i < 3; ++i) gemm::Linear(x.data(), w.data(), nullptr, kM, kN, kK, found[i].data());
  for (const std::vector<float>& y : found) EXPECT_EQ(y, alone);
  SetThreads(2);
}

// A dry run measures products on the threads that a run would have.
TEST_F(EnvironmentTest, AProcessTakesTheProcessorsThatItIsGranted) {
  const auto threads = [&](const std::string& shell, std::vector<std::string> more = {}) {
    more.push_back("--dry-run");
    const std::string text = RunProgram(Quantize(more), shell).out;
    const std::string word = "GFLOP/s (--threads ";
    const size_t at = text.find(word);
    return at == text.npos ? text : text.substr(at + word.size(), text.find(')', at) - at - word.size());
  };
  const int processors = omp_get_num_procs();
  EXPECT_EQ(threads("unset OMP_NUM_THREADS; "), std::to_string(processors));
  EXPECT_EQ(threads("unset OMP_NUM_THREADS; taskset -pc 0 $(exec sh -c 'echo $PPID') >&2; "), "1");
  EXPECT_EQ(threads("export OMP_NUM_THREADS=3; taskset -pc 0 $(exec sh -c 'echo $PPID') >&2; "), "3");
  EXPECT_EQ(threads("unset OMP_NUM_THREADS; ", {"--threads", "3"}), "3");
}

TEST_F(EnvironmentTest, AQuotaOfProcessorTimeBoundsTheThreads) {
  const fs::path group = "/sys/fs/cgroup/cpu/circlet-test";  // version 1: any process may be put in
  std::error_code error;
  fs::create_directory(group, error);  // may be left of a run that was killed
  if (!std::ofstream(group / "cpu.cfs_quota_us").is_open()) {
    fs::remove(group, error);
    GTEST_SKIP() << "a group with a quota takes root and the cpu controller of version 1 mounted at "
                 << group.parent_path() << "; what is read of any group is held by ProcessorsTest";
  }
  std::ofstream(group / "cpu.cfs_quota_us") << 100000;
  const ProgramResult result = RunProgram(
      Quantize({"--dry-run"}), fmt::format("unset OMP_NUM_THREADS; echo 0 > '{}'; ", (group / "tasks").string()));
  EXPECT_THAT(result.out, HasSubstr("(--threads 1)")) << result.err;
  for (int tries = 0; tries < 100 && !fs::remove(group, error); ++tries)
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
}

// ---- Instruction sets ----------------------------------------------------------------------------------------------

constexpr char kOlder[] = "export ONEDNN_MAX_CPU_ISA=AVX2; ";  // stands for a processor without AVX-512

// Linears of 16-bit weights are float32 products, in oneDNN.
const std::vector<std::string> kFloatSums{"--set", "pipeline.0.linear_weight=int16"};

TEST_F(EnvironmentTest, FilesMadeOnAnotherInstructionSetAreVerifiedWithinBounds) {
  const std::string here = RunProgram({"--version"}).out, there = RunProgram({"--version"}, kOlder).out;
  if (here == there) GTEST_SKIP() << "this processor has no other set than " << here;
  for (const bool made_there : {false, true}) {
    fs::remove_all(out_);
    const std::vector<std::string> wide{"quantize", kTiny,      "--random-samples", "4x60",    "--random-images",
                                        "1",        "--recipe", "default",          "--units", "deployment",
                                        "--output", out_,       "--quiet"};
    ASSERT_EQ(RunProgram(wide, made_there ? kOlder : "").exit_code, 0);
    const ProgramResult same = RunProgram({"verify", out_}, made_there ? kOlder : "");
    EXPECT_EQ(same.exit_code, 0) << same.out;
    EXPECT_THAT(same.out, HasSubstr("to the last code"));
    const ProgramResult other = RunProgram({"verify", out_}, made_there ? "" : kOlder);
    EXPECT_EQ(other.exit_code, 0) << other.out;
    EXPECT_THAT(other.out, AllOf(HasSubstr("made with AVX3"), HasSubstr(", this is AVX3"), HasSubstr("1 %"),
                                 HasSubstr("but for rounding")));
  }
}

// Linears of 8-bit weights are sums of integers, the same on every processor: nothing is excused.
TEST_F(EnvironmentTest, SumsOfIntegersAreTheSameOnAnotherInstructionSet) {
  ASSERT_EQ(RunProgram(Quantize()).exit_code, 0);
  for (const char* set : {kOlder, "export ONEDNN_MAX_CPU_ISA=SSE41; ", "export ONEDNN_MAX_CPU_ISA=AVX512_CORE; "}) {
    const ProgramResult other = RunProgram({"verify", out_}, set);
    EXPECT_EQ(other.exit_code, 0) << set << other.out;
    EXPECT_THAT(other.out, HasSubstr("to the last code")) << set;
  }
  std::map<std::string, Tensor> codes;
  {
    const SafetensorsFile stored = SafetensorsFile::Open(out_ + "/verify.safetensors");
    for (const char* end : {"lm_head.in.0", "lm_head.out.0"}) {
      const auto same = stored.Metadata().find(end);
      codes[end] = stored.Get(same == stored.Metadata().end() ? end : same->second).Clone();
    }
  }
  codes.at("lm_head.out.0").As<int16_t>()[7] += 1;
  const std::string changed = directory_.Path() / "changed.safetensors";
  WriteSafetensors(changed, codes);
  EXPECT_EQ(RunProgram({"verify", out_, "--samples", changed}, kOlder).exit_code, 1) << "one code, one step";
}

// A fault is no rounding: codes that are off by more than the bound fail on any instruction set.
TEST_F(EnvironmentTest, AnotherInstructionSetExcusesNoLargeStep) {
  if (RunProgram({"--version"}).out == RunProgram({"--version"}, kOlder).out) GTEST_SKIP() << "there is no other set";
  ASSERT_EQ(RunProgram(Quantize(kFloatSums)).exit_code, 0);
  const std::string kEnd = "decoder_layer_prefill_0.out.0";
  std::map<std::string, Tensor> codes;
  {
    const SafetensorsFile stored = SafetensorsFile::Open(out_ + "/verify.safetensors");
    for (const char* end : {"in.0", "in.1", "in.2", "in.3", "in.4", "out.0"}) {
      const std::string key = fmt::format("decoder_layer_prefill_0.{}", end);
      const auto same = stored.Metadata().find(key);
      codes[key] = stored.Get(same == stored.Metadata().end() ? key : same->second).Clone();
    }
  }
  int16_t* const values = codes.at(kEnd).As<int16_t>().data();
  const auto [least, most] = std::minmax_element(values, values + codes.at(kEnd).Elements());
  const int largest = std::max(-*least, +*most);
  const std::string changed = directory_.Path() / "changed.safetensors";
  const int16_t before = values[0];
  for (const auto& [step, exit_code] : {std::pair{largest / 500, 0}, {largest / 30, 1}}) {
    values[0] = static_cast<int16_t>(before > 0 ? before - step : before + step);
    WriteSafetensors(changed, codes);
    EXPECT_EQ(RunProgram({"verify", out_, "--samples", changed}).exit_code, 1) << step;
    EXPECT_EQ(RunProgram({"verify", out_, "--samples", changed}, kOlder).exit_code, exit_code) << step;
  }
}

// ---- Files that change, block or turn in circles -------------------------------------------------------------------

// What a shell does to the checkpoint as soon as a run has mapped it, which is when the output's folder is there.
ProgramResult RunWhile(const fs::path& directory, const std::string& change) {
  fs::copy(kTiny, directory / "tiny", fs::copy_options::recursive);
  const std::string weights = directory / "tiny" / "model.safetensors", out = directory / "changed";
  const std::string meanwhile = fmt::format(
      "(while ! [ -e '{0}.partial' ] && ! [ -e '{0}' ]; do :; done; W='{1}'; {2}) & ", out, weights, change);
  return RunProgram({"quantize", directory / "tiny", "--random-samples", "8x60", "--output", out, "--quiet"},
                    meanwhile);
}

TEST_F(EnvironmentTest, ACheckpointThatIsCutDuringTheRunIsNamed) {
  ExpectRefused(RunWhile(directory_.Path(), "truncate -s 4096 \"$W\""),
                AllOf(HasSubstr("model.safetensors: cannot be read any more"), HasSubstr("cut")));
}

TEST_F(EnvironmentTest, ACheckpointThatIsWrittenToDuringTheRunIsNamed) {
  ExpectRefused(
      RunWhile(directory_.Path(), "dd if=/dev/zero of=\"$W\" bs=1 count=4 seek=60000 conv=notrunc 2> /dev/null"),
      AllOf(HasSubstr("model.safetensors: was written to"), HasSubstr("run again")));
  EXPECT_FALSE(fs::exists(directory_.Path() / "changed"));
}

TEST_F(EnvironmentTest, ACheckpointThatIsReplacedDuringTheRunIsNamed) {
  ExpectRefused(RunWhile(directory_.Path(), "cp \"$W\" \"$W.new\"; mv \"$W.new\" \"$W\""),
                HasSubstr("model.safetensors: was replaced"));
  EXPECT_FALSE(fs::exists(directory_.Path() / "changed"));
}

TEST_F(EnvironmentTest, ADeletedFileKeepsItsBytesAndAddressesLeadToTheirFile) {
  const fs::path path = directory_.Path() / "file";
  WriteFile(path, "some bytes");
  const auto file = MappedFile::Open(path);
  EXPECT_STREQ(PathOfMapping(file->Bytes().data() + 3), path.c_str());
  EXPECT_EQ(PathOfMapping(file->Bytes().data() + file->Bytes().size()), nullptr);
  file->RequireUnchanged();
  fs::remove(path);
  file->RequireUnchanged();
  EXPECT_EQ(static_cast<char>(file->Bytes()[5]), 'b');
  WriteFile(path, "other text");
  EXPECT_THROW(file->RequireUnchanged(), Error);
}

// Opened like a file, a pipe waits for a writer that never comes, and a device has no end.
TEST_F(EnvironmentTest, PipesAndDevicesInPlaceOfFilesAreRefusedAtOnce) {
  const std::string pipe = directory_.Path() / "pipe.json";
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  const auto with = [&](std::vector<std::string> arguments, const std::string& what) {
    ExpectRefused(RunProgram(arguments, "ulimit -t 20; "),
                  AnyOf(HasSubstr(pipe + ": is a pipe"), HasSubstr("is a device")), what + ": ");
  };
  const std::string data = kTiny + "/eval/calib.jsonl";
  const std::vector<std::string> text{"quantize", kTiny, "--data", data, "--output", out_, "--quiet"};
  const auto text_with = [&](const std::string& flag) {
    std::vector<std::string> arguments = text;
    arguments.insert(arguments.end(), {flag, pipe});
    with(arguments, flag);
  };
  for (const char* flag : {"--qparams", "--eval-text", "--eval-captions", "--recipe", "--vision-profile"})
    text_with(flag);
  for (const char* flag : {"--data", "--samples"}) with({"quantize", kTiny, flag, pipe, "--output", out_}, flag);
  with({"quantize", kTiny, "--samples", "/dev/zero", "--output", out_}, "device");
  ExpectRefused(RunProgram({"quantize", kTiny, "--data", "/dev/zero", "--output", out_}, "ulimit -t 20; "),
                HasSubstr("/dev/zero: has more than "));
  for (const std::string& place : {pipe, std::string("/dev/zero")}) {
    with({"show", place}, "show");
    with({"run", place, "--inputs", samples_, "--outputs", out_}, "run");
  }
  with({"inspect", "--config", pipe, "--case", "all"}, "inspect");

  const std::string line = directory_.Path() / "data.jsonl";
  WriteFile(
      line,
      fmt::format(
          R"({{"type": "chat", "messages": [{{"role": "user", "content": [{{"type": "image", "image": "{}"}}]}}]}})",
          pipe));
  with({"quantize", kTiny, "--data", line, "--output", out_}, "picture");

  for (const char* name : {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja",
                           "processor_config.json", "generation_config.json"}) {
    const fs::path model = directory_.Path() / "tiny";
    fs::remove_all(model);
    fs::copy(kTiny, model);
    if (!fs::exists(model / name)) continue;
    fs::remove(model / name);
    ASSERT_EQ(mkfifo((model / name).c_str(), 0600), 0);
    const ProgramResult result =
        RunProgram({"quantize", model, "--data", data, "--output", out_, "--quiet"}, "ulimit -t 20; ");
    ExpectRefused(result, HasSubstr(fmt::format("{}: is a pipe", name)), name);
  }
}

TEST_F(EnvironmentTest, LinksInACircleAreErrorsOfTheFile) {
  const auto loop = [](const fs::path& path) {
    fs::remove(path);
    fs::create_symlink(path.filename(), path);
  };
  for (const char* name : {"model.safetensors", "config.json", "chat_template.jinja"}) {
    const fs::path model = directory_.Path() / "tiny";
    fs::remove_all(model);
    fs::copy(kTiny, model);
    loop(model / name);
    ExpectRefused(RunProgram({"quantize", model, "--data", kTiny + "/eval/calib.jsonl", "--output", out_}),
                  AllOf(HasSubstr(name), HasSubstr("symbolic links")), name);
  }
  loop(directory_.Path() / "loop");
  ExpectRefused(RunProgram({"quantize", model_, "--samples", samples_, "--output", directory_.Path() / "loop"}),
                HasSubstr("symbolic links"));
  ExpectRefused(RunProgram({"verify", directory_.Path() / "loop"}), HasSubstr("symbolic links"));
}

TEST_F(EnvironmentTest, NamesLongerThanTheSystemTakesAreErrors) {
  for (const size_t length : {size_t{250}, size_t{5000}})
    ExpectRefused(RunProgram({"quantize", model_, "--samples", samples_, "--output",
                              directory_.Path() / std::string(length, 'n'), "--quiet"}),
                  AnyOf(HasSubstr("name too long"), HasSubstr("at most 247 leave room")), fmt::to_string(length));
}

TEST_F(EnvironmentTest, AMissingTemporaryDirectoryIsNamed) {
  ExpectRefused(RunProgram({"evaluate", model_, "--samples", samples_, "--quiet"}, "export TMPDIR=/nonexistent; "),
                AllOf(HasSubstr("TMPDIR"), HasSubstr("/nonexistent")));
}

// ---- Output that cannot be written ---------------------------------------------------------------------------------

TEST_F(EnvironmentTest, AFullStandardOutputIsAnError) {
  ASSERT_EQ(RunProgram(Quantize()).exit_code, 0);
  const std::string again = directory_.Path() / "again";
  for (const std::vector<std::string>& arguments :
       {std::vector<std::string>{"verify", out_},
        {"show", out_ + "/lm_head.q.circle"},
        {"--help"},
        {"--version"},
        {"help", "quantize"},
        {"inspect", "--list-cases"},
        {"evaluate", model_, "--samples", samples_, "--quiet"},
        {"quantize", model_, "--samples", samples_, "--output", again, "--quiet"},
        {"quantize", model_, "--samples", samples_, "--output", again + "2", "--dry-run"}}) {
    const ProgramResult result = RunProgram(arguments, "exec > /dev/full; ");
    EXPECT_EQ(result.exit_code, 2) << arguments[0];
    EXPECT_THAT(result.err, AllOf(HasSubstr("circlet: standard output: cannot be written: No space left on device"),
                                  Not(HasSubstr("bug"))))
        << arguments[0];
  }
  EXPECT_TRUE(fs::exists(again + "/manifest.json")) << "the files are whole";
}

TEST_F(EnvironmentTest, AnErrorKeepsItsExitCodeWhereItCannotBeTold) {
  for (const char* shell : {"exec 2> /dev/full; ", "exec 2>&-; ", "exec > /dev/full 2> /dev/full; "})
    EXPECT_EQ(RunProgram({"verify", "missing"}, shell).exit_code, 2) << shell;
}

TEST_F(EnvironmentTest, AFilePastTheLimitIsToldLikeAFullDisk) {
  ExpectRefused(RunProgram(Quantize(), "ulimit -f 8; "), HasSubstr("File too large"));
  EXPECT_FALSE(fs::exists(out_));
}

// ---- Memory and descriptors ----------------------------------------------------------------------------------------

// Wherever an allocation fails first, there is no signal and no bug.
TEST_F(EnvironmentTest, TooLittleMemoryIsTold) {
  bool enough = false;
  for (int megabytes = 56; megabytes < 400 && !enough; megabytes += 5) {
    const ProgramResult result =
        RunProgram(Quantize({"--threads", "2"}), fmt::format("ulimit -v {}; ", megabytes * 1000));
    enough = result.exit_code == 0;
    // The libraries do not fit, or what they do before main() does not: there is no line of ours yet.
    if (result.exit_code == 127 || result.err.starts_with("terminate called without an active exception")) continue;
    if (!enough)
      ExpectRefused(result, AnyOf(HasSubstr("emory"), HasSubstr("threads")), fmt::format("{} MB: ", megabytes));
  }
  EXPECT_TRUE(enough);
}

TEST_F(EnvironmentTest, FilesOfActivationsTakeNoDescriptors) {
  const ProgramResult result = RunProgram({"quantize", kTiny, "--random-samples", "2x30", "--units", "deployment",
                                           "--output", out_, "--save-every", "0", "--quiet"},
                                          "ulimit -n 12; ");
  EXPECT_EQ(result.exit_code, 0) << result.err;
}

// ---- The command line ----------------------------------------------------------------------------------------------

TEST_F(EnvironmentTest, FlagsAreRefusedInTheProgramsOwnWords) {
  const std::vector<std::pair<std::vector<std::string>, std::string>> refused{
      {{"--compute", "fp16"}, "--compute: \"fp16\" is none of float32, bf16"},
      {{"--units", "some"}, "--units: \"some\" is none of auto, deployment, all"},
      {{"--memory-limit", "lots"}, "--memory-limit: \"lots\" is no size; write a number and its unit: 3GB"},
      {{"--memory-limit", "3QB"}, "--memory-limit: \"3QB\" is no size"},
      {{"--memory-limit", ""}, "--memory-limit: \"\" is no size"},
      {{"--memory-limit", "-1GB"}, "--memory-limit: \"-1GB\" is no size"},
      {{"--memory-limit", "99999999999TB"}, "--memory-limit: \"99999999999TB\" is no size"},
      {{"--eval-windows", ""}, "--eval-windows: \"\" is no whole number from 1 to 2147483647"},
      {{"--eval-windows", "0"}, "--eval-windows: \"0\" is no whole number from 1 to"},
      {{"--max-seq-len", "abc"}, "--max-seq-len: \"abc\" is no whole number from 2 to 1048576"},
      {{"--threads", "1.5"}, "--threads: \"1.5\" is no whole number from 1 to 1024"},
      {{"--save-every", "often"}, "--save-every: \"often\" is no number from 0 to 86400"},
      {{"--random-images", "-1"}, "--random-images: \"-1\" is no whole number from 0 to 256"},
      {{"--recipe"}, "--recipe"}};
  for (const auto& [flags, text] : refused) ExpectRefused(RunProgram(Quantize(flags)), HasSubstr(text), text);
  ExpectRefused(RunProgram({"inspect", "--mode", "x"}), HasSubstr("--mode: \"x\" is none of wrapper-smoke, trace"));
  ExpectRefused(RunProgram({"example", "model", "--seed", "x"}), HasSubstr("--seed: \"x\" is no whole number"));
  ExpectRefused(RunProgram({}), HasSubstr("give a command"));
  ExpectRefused(RunProgram({"show"}), HasSubstr("FILE is required; `circlet show --help`"));
}

TEST_F(EnvironmentTest, SizesMayHaveFractionsAndUnits) {
  for (const char* size : {"1 GB", "1g", "999999999"})
    EXPECT_EQ(RunProgram(Quantize({"--memory-limit", size, "--dry-run"})).exit_code, 0) << size;
  EXPECT_THAT(RunProgram(Quantize({"--memory-limit", "512.5MiB", "--dry-run"})).out, HasSubstr("limit 512.5 MiB"));
}

TEST_F(EnvironmentTest, ThreadsAreTakenBeforeAndBehindTheVerb) {
  for (const std::vector<std::string>& arguments :
       {std::vector<std::string>{"--threads", "2", "inspect", "--list-cases"},
        {"inspect", "--list-cases", "--threads", "2"}})
    EXPECT_EQ(RunProgram(arguments).exit_code, 0);
}

TEST_F(EnvironmentTest, HelpIsGivenInAllItsUsualForms) {
  const std::string all = RunProgram({"--help"}).out, quantize = RunProgram({"quantize", "--help"}).out;
  ASSERT_THAT(quantize, AllOf(HasSubstr("--memory-limit"), HasSubstr("--threads")));
  EXPECT_EQ(RunProgram({"help"}).out, all);
  EXPECT_EQ(RunProgram({"help", "quantize"}).out, quantize);
  EXPECT_EQ(RunProgram({"help", "quantize"}).exit_code, 0);
  ExpectRefused(RunProgram({"help", "quantise"}), AllOf(HasSubstr("quantise"), HasSubstr("nearest: \"quantize\"")));
}

TEST_F(EnvironmentTest, HelpIsInGroupsAndFitsTheTerminal) {
  for (const int columns : {50, 80}) {
    const ProgramResult help = RunProgram({"quantize", "--help"}, fmt::format("export COLUMNS={}; ", columns));
    EXPECT_THAT(help.out, AllOf(HasSubstr("\nData:\n"), HasSubstr("\nRecipe:\n"), HasSubstr("\nMeasuring:\n"),
                                HasSubstr("\nOutput:\n"), HasSubstr("\nLong runs:\n"), HasSubstr("--data FILE"),
                                HasSubstr("--recipe NAME|FILE"), HasSubstr("(default auto)"), Not(HasSubstr("TEXT"))));
    std::istringstream lines(help.out.substr(0, help.out.find("Example:")));
    for (std::string line; std::getline(lines, line);) EXPECT_LE(line.size(), columns) << line;
  }
}

// Of what a command has, the man page and the completion lack nothing.
TEST_F(EnvironmentTest, TheManPageAndTheCompletionHaveEveryOption) {
  std::string man = RunProgram({"man"}).out, completion = RunProgram({"completion"}).out;
  for (size_t at = man.find("\\-"); at != man.npos; at = man.find("\\-", at)) man.erase(at, 1);
  int options = 0;
  for (const char* verb : {"quantize", "evaluate", "verify", "show", "run", "smoke", "trace", "example"}) {
    const std::string help = RunProgram({verb, "--help"}).out;
    for (size_t at = help.find("\n  --"); at != help.npos; at = help.find("\n  --", at + 1), ++options) {
      const std::string option = help.substr(at + 3, help.find_first_of(", \n", at + 3) - at - 3);
      if (option != "--threads") EXPECT_THAT(man, HasSubstr("\\fB" + option)) << verb;
      EXPECT_THAT(completion, HasSubstr(option)) << verb;
    }
  }
  EXPECT_GT(options, 60);
}

TEST_F(EnvironmentTest, TheCompletionOffersCommandsOptionsAndChoices) {
  const auto offered = [](const std::string& words, int at) {
    const std::string line =
        fmt::format("source <({} completion); COMP_WORDS=({}); COMP_CWORD={}; _circlet; echo \"${{COMPREPLY[*]}}\"",
                    kCircletBinary, words, at);
    return RunProgram({"-c", line}, "", "/bin/bash").out;
  };
  EXPECT_EQ(offered("circlet quan", 1), "quantize\n");
  EXPECT_EQ(offered("circlet quantize --eval-t", 2), "--eval-text\n");
  EXPECT_EQ(offered("circlet quantize --compute \"\"", 3), "float32 bf16\n");
  EXPECT_EQ(offered("circlet verify --resu", 2), "\n") << "an option of another command";
  EXPECT_EQ(offered("circlet quantize --data mo", 3), "\n") << "bash completes file names";
}

TEST_F(EnvironmentTest, TheVersionSaysWhatDecidesBytes) {
  EXPECT_THAT(RunProgram({"--version"}).out,
              testing::MatchesRegex("circlet [0-9.]+ \\([A-Z0-9_ ]+, MPI (yes|no)\\)\n"));
}

}  // namespace
}  // namespace circlet
