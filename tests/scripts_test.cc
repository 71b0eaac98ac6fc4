// What demo.sh, test.sh and fresh_machine.sh say on a machine that they can do nothing on. Stubs stand for its
// programs.

#include <gmock/gmock.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "paths.h"
#include "program.h"

namespace circlet {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::StartsWith;

class ScriptsTest : public testing::Test {
 protected:
  // A PATH with nothing on it but what every Debian has and a package database in which cmake and libpng-dev are
  // missing.
  ScriptsTest() {
    for (const char* name : {"bash", "dirname", "env", "grep", "mktemp", "rm", "sed", "tail"})
      std::filesystem::create_symlink(std::filesystem::path("/usr/bin") / name, bin_.Path() / name);
    Stub("dpkg-query", "case \"$3\" in cmake|libpng-dev) exit 1 ;; *) echo 'install ok installed' ;; esac");
    Stub("id", "echo 0");
    Stub("apt-get", "echo 'Reading package lists...'");
    for (const char* name : {"cmake", "ctest", "nproc"}) Stub(name, "echo \"the script went on to $0\"; exit 99");
  }

  void Stub(const std::string& name, const std::string& body) const {
    const std::filesystem::path path = bin_.Path() / name;
    std::filesystem::remove(path);
    std::ofstream(path) << "#!/bin/sh\n" << body << "\n";
    std::filesystem::permissions(path, std::filesystem::perms::owner_all);
  }

  ProgramResult Run(const std::string& script) const {
    return RunProgram({SourcePath("scripts/") + script},
                      fmt::format("export PATH='{}'; unset CCACHE_DIR; < /dev/null ", bin_.Path().string()),
                      "/bin/bash");
  }

  static void ExpectOneLine(const ProgramResult& result, int exit_code) {
    EXPECT_EQ(result.exit_code, exit_code) << result.out;
    EXPECT_EQ(std::ranges::count(result.err, '\n'), 1) << result.err;
    EXPECT_THAT(result.out, Not(HasSubstr("went on")));
  }

  TempDirectory bin_;
};

constexpr const char* kRemedy = "As root: apt-get install --no-install-recommends cmake libpng-dev";

TEST_F(ScriptsTest, WithoutRootRightsTheMissingPackagesAreNamed) {
  Stub("id", "echo 1000");
  for (const std::string script : {"demo.sh", "test.sh"}) {
    const ProgramResult result = Run(script);
    ExpectOneLine(result, 2);
    EXPECT_THAT(result.err,
                AllOf(StartsWith(script + ": cannot install cmake libpng-dev: this is not root and there is no "
                                          "sudo."),
                      HasSubstr(kRemedy)));
    EXPECT_THAT(result.out, IsEmpty());
  }
}

TEST_F(ScriptsTest, ASudoThatRefusesIsToldApartFromNoSudo) {
  Stub("id", "echo 1000");
  Stub("sudo", "echo 'sudo: a password is required' >&2; exit 1");
  const ProgramResult result = Run("demo.sh");
  ExpectOneLine(result, 2);
  EXPECT_THAT(result.err, AllOf(HasSubstr("this is not root and sudo refuses"), HasSubstr(kRemedy)));
}

TEST_F(ScriptsTest, WithoutNetworkTheMissingPackagesAreNamed) {
  Stub("apt-get",
       "for i in 1 2 3 4 5; do echo \"Err:$i the archive\"; done\n"
       "[ \"$1\" = update ] || echo 'E: Unable to fetch some archives' >&2\nexit 100");
  for (const std::string script : {"demo.sh", "test.sh"}) {
    const ProgramResult result = Run(script);
    ExpectOneLine(result, 2);
    EXPECT_THAT(
        result.err,
        AllOf(StartsWith(script + ": cannot install cmake libpng-dev: the package archive is out of reach; E: Unable "
                                  "to fetch some archives."),
              HasSubstr(kRemedy)));
  }
}

TEST_F(ScriptsTest, AnUnknownPackageIsAptsOwnError) {
  Stub("apt-get", "[ \"$1\" = update ] || { echo 'E: Unable to locate package libpng-dev' >&2; exit 100; }");
  const ProgramResult result = Run("demo.sh");
  ExpectOneLine(result, 2);
  EXPECT_THAT(result.err,
              StartsWith("demo.sh: cannot install cmake libpng-dev: E: Unable to locate package libpng-dev."));
}

TEST_F(ScriptsTest, OneSourceOutOfReachDoesNotMatterWhenThePackagesCome) {
  Stub("apt-get", "[ \"$1\" != update ]");
  EXPECT_THAT(Run("test.sh").out, StartsWith("installing cmake libpng-dev\n"));
}

TEST_F(ScriptsTest, NothingIsInstalledWhenNothingIsMissing) {
  Stub("dpkg-query", "echo 'install ok installed'");
  Stub("apt-get", "echo 'apt-get was called'; exit 100");
  Stub("cmake", "echo configured; exit 99");
  const ProgramResult result = Run("test.sh");
  EXPECT_THAT(result.out + result.err, Not(HasSubstr("apt-get")));
}

// ctest alone is content with a build that has no tests.
TEST(TestScript, NoTestsAreNoSuccess) {
  std::istringstream script(ReadFile(SourcePath("scripts/test.sh")));
  int calls = 0;
  for (std::string line; std::getline(script, line);) {
    if (!line.starts_with("ctest ")) continue;
    ++calls;
    EXPECT_THAT(line, HasSubstr(" --no-tests=error ")) << line;
  }
  EXPECT_EQ(calls, 2);
}

TEST_F(ScriptsTest, FreshMachineNeedsRootRights) {
  Stub("id", "echo 1000");
  const ProgramResult result = Run("fresh_machine.sh");
  ExpectOneLine(result, 77);
  EXPECT_EQ(result.err, "fresh_machine.sh: no bare Debian 12 can be made here: it takes root rights\n");
}

TEST_F(ScriptsTest, FreshMachineNeedsDebootstrap) {
  Stub("unshare", "exit 0");
  Stub("dpkg-query", "exit 1");
  Stub("apt-get", "exit 100");
  const ProgramResult result = Run("fresh_machine.sh");
  ExpectOneLine(result, 77);
  EXPECT_THAT(result.err, HasSubstr("cannot install debootstrap: the package archive is out of reach"));
}

TEST_F(ScriptsTest, FreshMachineNeedsTheArchive) {
  for (const char* name : {"awk", "kill"}) Stub(name, "exit 0");
  Stub("unshare", "exit 0");
  Stub("dpkg-query", "echo 'install ok installed'");
  Stub("apt-get", "exit 0");
  const ProgramResult result = Run("fresh_machine.sh");
  ExpectOneLine(result, 77);
  EXPECT_THAT(result.err, HasSubstr("do not name the archive of bookworm"));
}

}  // namespace
}  // namespace circlet
