#include "base/processors.h"

#include <gmock/gmock.h>
#include <omp.h>
#include <sched.h>

#include <thread>

#include "circlet/io/file.h"
#include "temp_directory.h"

namespace circlet {
namespace {

namespace fs = std::filesystem;
using ::testing::Optional;

// A file system with the control groups that a test writes down.
class ProcessorsTest : public testing::Test {
 protected:
  void Write(const fs::path& file, const std::string& text) {
    fs::create_directories((root_.Path() / file).parent_path());
    WriteFile(root_.Path() / file, text);
  }
  std::optional<double> Quota() const { return ProcessorQuota(root_.Path()); }

  TempDirectory root_;
};

TEST_F(ProcessorsTest, NoGroupsAreNoLimit) {
  EXPECT_EQ(Quota(), std::nullopt);
  EXPECT_EQ(ProcessorsGranted(root_.Path()), omp_get_num_procs());
}

TEST_F(ProcessorsTest, TheSmallestQuotaOnTheWayToTheRootOfVersion2Counts) {
  Write("proc/self/cgroup", "0::/a/b\n");
  Write("sys/fs/cgroup/a/b/cpu.max", "max 100000\n");
  EXPECT_EQ(Quota(), std::nullopt);
  Write("sys/fs/cgroup/a/cpu.max", "150000 100000\n");
  EXPECT_THAT(Quota(), Optional(1.5));
  Write("sys/fs/cgroup/a/b/cpu.max", "400000 100000\n");
  EXPECT_THAT(Quota(), Optional(1.5));
  Write("sys/fs/cgroup/a/b/cpu.max", "50000 100000\n");
  EXPECT_THAT(Quota(), Optional(0.5));
}

TEST_F(ProcessorsTest, AContainerSeesItsGroupAsTheRoot) {
  Write("proc/self/cgroup", "0::/docker/0123\n");
  Write("sys/fs/cgroup/cpu.max", "200000 100000\n");
  EXPECT_THAT(Quota(), Optional(2.0));
}

TEST_F(ProcessorsTest, QuotasOfVersion1AreRead) {
  Write("proc/self/cgroup", "5:memory:/job\n4:cpuacct,cpu:/job\n3:cpuset:/other\n0::/\n");
  Write("sys/fs/cgroup/cpuacct,cpu/job/cpu.cfs_quota_us", "-1\n");
  Write("sys/fs/cgroup/cpuacct,cpu/job/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(Quota(), std::nullopt);
  Write("sys/fs/cgroup/cpuacct,cpu/job/cpu.cfs_quota_us", "250000\n");
  EXPECT_THAT(Quota(), Optional(2.5));
}

TEST_F(ProcessorsTest, WhatIsNoNumberIsNoLimit) {
  Write("proc/self/cgroup", "0::/../..\nnonsense\n1:cpu\n");
  for (const char* text : {"", "\n", "0 100000", "-5 100000", "100000", "100000 0", "x 1", "100000 y", "nan 1"}) {
    Write("sys/fs/cgroup/cpu.max", text);
    EXPECT_EQ(Quota(), std::nullopt) << text;
  }
}

TEST_F(ProcessorsTest, QuotasAreRoundedUpAndNeverAboveWhatTheProcessIsBoundTo) {
  Write("proc/self/cgroup", "0::/\n");
  for (const auto& [quota, granted] : {std::pair{"1000", 1}, {"100000", 1}, {"100000000", omp_get_num_procs()}}) {
    Write("sys/fs/cgroup/cpu.max", std::string(quota) + " 100000");
    EXPECT_EQ(ProcessorsGranted(root_.Path()), granted) << quota;
  }
  if (omp_get_num_procs() < 2) return;
  Write("sys/fs/cgroup/cpu.max", "110000 100000");
  EXPECT_EQ(ProcessorsGranted(root_.Path()), 2);
}

TEST_F(ProcessorsTest, AProcessBoundToOneProcessorHasOne) {
  std::thread([&] {  // whose binding ends with it
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    ASSERT_EQ(sched_setaffinity(0, sizeof one, &one), 0);
    EXPECT_EQ(ProcessorsGranted(root_.Path()), 1);
  })
      .join();
}

}  // namespace
}  // namespace circlet
