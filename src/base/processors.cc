#include "base/processors.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <string>

namespace circlet {
namespace {

namespace fs = std::filesystem;

std::string FirstLine(const fs::path& file) {
  std::ifstream stream(file);
  std::string line;
  std::getline(stream, line);
  return line;
}

// Quota and period as numbers; "max", -1 and what is no number are no limit.
std::optional<double> Ratio(const std::string& quota, const std::string& period) {
  char* end = nullptr;
  const double part = std::strtod(quota.c_str(), &end);
  if (quota.empty() || *end != '\0' || !(part > 0)) return std::nullopt;
  const double whole = std::strtod(period.c_str(), &end);
  if (period.empty() || *end != '\0' || !(whole > 0)) return std::nullopt;
  return part / whole;
}

std::optional<double> QuotaOfGroup(const fs::path& group) {
  if (const std::string both = FirstLine(group / "cpu.max"); !both.empty()) {
    const size_t blank = std::min(both.find(' '), both.size() - 1);
    return Ratio(both.substr(0, blank), both.substr(blank + 1));
  }
  return Ratio(FirstLine(group / "cpu.cfs_quota_us"), FirstLine(group / "cpu.cfs_period_us"));
}

// A container may see its own group as the root of what is mounted, while the path names it as the host does: groups
// that are not there have no limit, and the walk ends at the root.
void NarrowByGroups(const fs::path& mounted, const fs::path& path, std::optional<double>& least) {
  const fs::path relative = path.lexically_normal().relative_path();
  for (fs::path group = mounted / relative;; group = group.parent_path()) {
    if (const auto quota = QuotaOfGroup(group)) least = std::min(*quota, least.value_or(*quota));
    if (group == mounted || !group.has_relative_path()) return;
  }
}

}  // namespace

std::optional<double> ProcessorQuota(const fs::path& root) {
  const fs::path mounted = root / "sys/fs/cgroup";
  std::optional<double> least;
  std::ifstream groups(root / "proc/self/cgroup");  // lines NUMBER:CONTROLLERS:PATH; version 2 names no controllers
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == line.npos || second == line.npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool has_time = ("," + controllers + ",").find(",cpu,") != std::string::npos;
    if (!controllers.empty() && !has_time) continue;
    NarrowByGroups(controllers.empty() ? mounted : mounted / controllers, line.substr(second + 1), least);
  }
  return least;
}

int ProcessorsGranted(const fs::path& root) {
  const int bound = std::max(1, omp_get_num_procs());
  const std::optional<double> quota = ProcessorQuota(root);
  if (!quota || *quota >= bound) return bound;
  return std::max(1, static_cast<int>(std::ceil(*quota)));
}

}  // namespace circlet
