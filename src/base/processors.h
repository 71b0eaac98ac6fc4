#pragma once

// How many processors a process may use where a container or a batch system grants fewer than the machine has.

#include <filesystem>
#include <optional>

namespace circlet {

// Processors' worth of time that the control groups of this process grant it (cpu.max of version 2, cpu.cfs_quota_us of
// version 1; the smallest on the way to the root); nothing: no limit is set, or none can be read. `root`: of the file
// system.
std::optional<double> ProcessorQuota(const std::filesystem::path& root = "/");

// Processors that the process is bound to (sched_setaffinity), but no more than the quota rounded up; at least 1.
int ProcessorsGranted(const std::filesystem::path& root = "/");

}  // namespace circlet
