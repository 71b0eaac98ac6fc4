// Several processes of one run, started by mpirun.

#include <gmock/gmock.h>

#include <filesystem>

#include "circlet/base/communicator.h"
#include "paths.h"
#include "program.h"
#ifdef CIRCLET_MPIEXEC
#include "processes.h"
#endif

namespace circlet {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::StartsWith;

TEST(CommunicatorTest, WithoutALauncherThisProcessIsAlone) {
  EXPECT_EQ(World().Rank(), 0);
  EXPECT_EQ(World().Size(), 1);
  EXPECT_THAT(World().AllGather("mine"), testing::ElementsAre("mine"));
  World().Barrier();
}

// The environment that a launcher gives, without one.
ProgramResult RunAsProcess(int rank, const std::vector<std::string>& arguments) {
  return RunProgram(arguments, fmt::format("export PMI_RANK={} PMI_SIZE=2; ", rank));
}

// Only quantize and evaluate share their work: whatever else a launcher starts several times is done as often.
TEST(LaunchedTest, EveryProcessDoesACommandThatIsNotShared) {
  for (const int rank : {0, 1}) {
    const ProgramResult version = RunAsProcess(rank, {"--version"});
    EXPECT_EQ(version.exit_code, 0);
    EXPECT_THAT(version.out, StartsWith("circlet "));
    for (const std::vector<std::string>& arguments :
         {std::vector<std::string>{"--versio"}, {"show", "missing"}, {"verify", "missing"}, {"verify"},
          {"run", "missing", "--inputs", "missing", "--outputs", "out"}, {"inspect"}, {"example", "missing"}}) {
      const ProgramResult result = RunAsProcess(rank, arguments);
      EXPECT_EQ(result.exit_code, 2) << testing::PrintToString(arguments);
      EXPECT_THAT(result.err, StartsWith("circlet: ")) << testing::PrintToString(arguments);
    }
  }
}

TEST(LaunchedTest, AMistakeInASharedCommandIsToldByTheFirstProcessOnly) {
  const ProgramResult first = RunAsProcess(0, {"quantize", "--bogus"}), second = RunAsProcess(1, {"quantize", "--bogus"});
  EXPECT_EQ(first.exit_code, 2);
  EXPECT_THAT(first.err, HasSubstr("--bogus"));
  EXPECT_EQ(second.exit_code, 2);
  EXPECT_THAT(second.out + second.err, IsEmpty());
}

// An MPI that another launcher would have to start, and no MPI at all, give texts of their own.
TEST(LaunchedTest, ProcessesThatCannotBeConnectedAreRefused) {
  const ProgramResult result = RunAsProcess(0, {"quantize", "missing"});
  EXPECT_EQ(result.exit_code, 2);
  EXPECT_THAT(result.err, AllOf(StartsWith("circlet: 2 processes were started together"), HasSubstr("MPI")));
}

#ifdef CIRCLET_MPIEXEC

class ProcessesTest : public testing::TestWithParam<int> {
 protected:
  ProgramResult Run(const std::string& what) const {
    const TempDirectory directory;
    const std::string program = std::filesystem::path(kCircletBinary).parent_path() / "processes_program";
    return RunProcesses(GetParam(), {program, what, std::to_string(GetParam()), directory.Path()});
  }
};

TEST_P(ProcessesTest, GatherBytesOfAnyLength) {
  const ProgramResult result = Run("gather");
  EXPECT_EQ(result.exit_code, 0) << result.err;
}

TEST_P(ProcessesTest, WaitForEachOtherAtABarrier) {
  const ProgramResult result = Run("barrier");
  EXPECT_EQ(result.exit_code, 0) << result.err;
}

TEST_P(ProcessesTest, EndTogetherWhenOneAborts) { EXPECT_EQ(Run("abort").exit_code, 2); }

// One line and no word from the launcher, whichever process fails and however many do.
TEST_P(ProcessesTest, TellAFailureOnce) {
  for (const std::vector<std::string>& arguments :
       {std::vector<std::string>{"quantize", "missing", "--random-samples", "1x8", "--output", "never"},
        {"evaluate", "--no-such-flag"}}) {
    const ProgramResult result = RunCirclet(GetParam(), arguments);
    EXPECT_EQ(result.exit_code, 2) << arguments[0];
    // Libraries of the launcher may add lines of their own: hwloc warns where there is no /sys.
    const size_t line = result.err.find("circlet: ");
    ASSERT_NE(line, std::string::npos) << result.err;
    EXPECT_EQ(result.err.find("circlet: ", line + 1), std::string::npos) << result.err;
    EXPECT_THAT(result.err, Not(HasSubstr("mpirun")));
    EXPECT_THAT(result.out, IsEmpty());
  }
}

TEST_P(ProcessesTest, PrintOneReport) {
  const ProgramResult result =
      RunCirclet(GetParam(), {"evaluate", SourcePath("examples/tiny-gemma4"), "--random-samples", "2x8", "--quiet"});
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_THAT(result.err, AllOf(Not(HasSubstr("circlet")), Not(HasSubstr("logits"))));  // --quiet
  const size_t summary = result.out.find("Quantization Error Summary");
  EXPECT_NE(summary, std::string::npos);
  EXPECT_EQ(result.out.find("Quantization Error Summary", summary + 1), std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(, ProcessesTest, testing::Values(1, 2, 3),
                         [](const auto& count) { return fmt::format("Of{}", count.param); });

#endif

}  // namespace
}  // namespace circlet
