#include "pipeline/output_directory.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <map>
#include <nlohmann/json.hpp>

#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "io/system_error.h"

namespace circlet {
namespace fs = std::filesystem;
namespace {

constexpr char kStateFolder[] = "unfinished";
constexpr char kReplaceMark[] = "replace";

bool IsFile(const fs::path& path) { return fs::is_regular_file(fs::symlink_status(path)); }
bool IsFolder(const fs::path& path) { return fs::is_directory(fs::symlink_status(path)); }
bool IsMarked(const fs::path& directory) { return IsFile(directory / kStateFolder / kReplaceMark); }

// The directory that `asked` names, free of links, "." and "..": what is written beside it takes a parent and a name.
fs::path Resolve(const fs::path& asked) {
  std::error_code error;
  fs::path path = fs::weakly_canonical(fs::absolute(asked, error), error).lexically_normal();
  if (error) FailErrno(asked, "used for output", error.value());
  if (path.filename().empty()) path = path.parent_path();
  if (path.filename().empty()) Fail("{}: cannot be an output; name a directory in it", asked.string());
  if (fs::is_symlink(fs::symlink_status(path)))
    Fail("{}: is a link to {}, which is missing; make that directory, or choose another output", asked.string(),
         fs::read_symlink(path).string());
  // Room for ".partial", and behind that for the longest file of a run while it is written.
  constexpr size_t kLongestInside = 200, kSuffix = 8;
  if (path.filename().string().size() + kSuffix > NAME_MAX)
    Fail("{}: the name has {} bytes, at most {} leave room for NAME.partial beside it; choose a shorter one",
         asked.string(), path.filename().string().size(), NAME_MAX - kSuffix);
  if (path.string().size() + kSuffix + kLongestInside >= PATH_MAX)
    Fail("{}: the path has {} bytes, at most {} leave room for the files in it; choose a shorter one", asked.string(),
         path.string().size(), PATH_MAX - 1 - kSuffix - kLongestInside);
  return path;
}

// Where another file system begins: a result made beside it cannot move there.
bool IsMountPoint(const fs::path& path) {
  struct statx status {};
  if (statx(AT_FDCWD, path.c_str(), 0, STATX_BASIC_STATS, &status) != 0) return false;
  return (status.stx_attributes & STATX_ATTR_MOUNT_ROOT) != 0;
}

// The files that the manifest in `directory` lists, with their SHA-256, and timings.json, which it does not. It may be
// damaged or foreign: what is no plain name is not ours.
std::map<std::string, std::string> Listed(const fs::path& directory) {
  std::map<std::string, std::string> files;
  if (!IsFile(directory / kManifestFile)) return files;
  const nlohmann::json manifest = ReadJson(directory / kManifestFile);
  const auto outputs = manifest.is_object() ? manifest.find("outputs") : manifest.end();
  if (outputs == manifest.end() || !outputs->is_array()) return files;
  for (const nlohmann::json& entry : *outputs) {
    const auto text = [&](const char* key) {
      const auto value = entry.is_object() ? entry.find(key) : entry.end();
      return value != entry.end() && value->is_string() ? value->get<std::string>() : std::string();
    };
    const std::string name = text("file");
    if (!name.empty() && name != "." && name != ".." && fs::path(name).filename() == name) files[name] = text("sha256");
  }
  return files;
}

// What an earlier run wrote to `directory` and may be replaced.
bool IsOwn(const fs::path& path, const std::map<std::string, std::string>& listed) {
  const std::string name = path.filename();
  if (name == kStateFolder) return IsMarked(path.parent_path());
  if (!IsFile(path) || listed.empty()) return false;
  return listed.contains(name) || name == kManifestFile || name == kTimingsFile || IsLeftover(path);
}

// A folder with nothing in it but processes' folders and the mark.
bool IsStateFolder(const fs::path& path) {
  if (!IsFolder(path)) return false;
  return std::ranges::all_of(EntriesOf(path), [](const fs::path& entry) {
    const std::string name = entry.filename();
    return name == kReplaceMark || IsLeftover(entry) || (IsFolder(entry) && name.starts_with("rank."));
  });
}

// Whether `partial` is a run's, at whatever moment that was killed: empty before its first step and behind the last of
// RemoveRun, else with its state, or complete.
bool IsRun(const fs::path& partial) {
  return IsFolder(partial) &&
         (fs::is_empty(partial) || IsStateFolder(partial / kStateFolder) || !Listed(partial).empty());
}

// What a run saved there, from which another can go on.
std::vector<fs::path> SavedStates(const fs::path& partial) {
  std::vector<fs::path> states;
  if (!IsFolder(partial / kStateFolder)) return states;
  for (const fs::path& rank : EntriesOf(partial / kStateFolder))
    if (IsFolder(rank))
      for (const fs::path& entry : EntriesOf(rank))
        if (entry.filename().string().starts_with("state.")) states.push_back(entry);
  return states;
}
bool HoldsState(const fs::path& partial) { return !SavedStates(partial).empty(); }

// What cannot be removed stays, and is found by the next run. Saved states go first, so that no run goes on with a part
// of one; then the manifest, so that nothing else is complete; the state folder, by which it is known as a run's, last.
void RemoveRun(const fs::path& partial) {
  std::error_code ignored;
  try {
    if (!IsFolder(partial)) return;
    fs::create_directory(partial / kStateFolder, ignored);
    for (const fs::path& state : SavedStates(partial)) fs::remove(state, ignored);
    fs::remove(partial / kManifestFile, ignored);
    for (const fs::path& entry : EntriesOf(partial))
      if (entry.filename() != kStateFolder) fs::remove_all(entry, ignored);
    fs::remove_all(partial, ignored);
  } catch (const std::exception&) {
  }
}

void RemoveAll(const fs::path& path) {
  std::error_code error;
  fs::remove_all(path, error);
  if (error) FailErrno(path, "removed", error.value());
}

void Rename(const fs::path& from, const fs::path& to) {
  if (rename(from.c_str(), to.c_str()) != 0) FailErrno(to, "put in place");
}

// False where the file system cannot do it.
bool Exchange(const fs::path& a, const fs::path& b) {
  if (renameat2(AT_FDCWD, a.c_str(), AT_FDCWD, b.c_str(), RENAME_EXCHANGE) == 0) return true;
  if (errno == EINVAL || errno == ENOSYS || errno == EOPNOTSUPP || errno == EXDEV) return false;
  FailErrno(b, "replaced");
}

void CheckPlace(const fs::path& asked, const fs::path& output, const fs::path& partial, OutputDirectory::Mode mode) {
  using Mode = OutputDirectory::Mode;
  if (fs::exists(output)) {
    if (!IsFolder(output)) Fail("{}: is a file, the output must be a directory; choose another name", asked.string());
    if (access(output.c_str(), R_OK | W_OK | X_OK) != 0) FailErrno(asked, "written");
    if (IsMountPoint(output))
      Fail(
          "{}: is where another file system begins, and a result cannot move there in one step; name a directory in it",
          asked.string());
    if (mode == Mode::kForce && IsFile(output / kManifestFile) && Listed(output).empty())
      Fail("{}: holds a {} that is not circlet's; choose another directory", asked.string(), kManifestFile);
  }
  if (fs::exists(fs::symlink_status(partial)) && !IsRun(partial))
    Fail("{}: is in the way and no unfinished run of circlet; move it away, or choose another output",
         partial.string());
  const bool unfinished = HoldsState(partial);
  const bool may_replace = mode == Mode::kForce || (mode == Mode::kResume && (!unfinished || IsMarked(partial)));
  if (fs::exists(output) && !may_replace) PrepareOutputDirectory(asked);
  if (unfinished && mode == Mode::kNew)
    Fail("{}: holds an unfinished run; --resume goes on with it, --force starts again", partial.string());
}

}  // namespace

void OutputDirectory::Check(const fs::path& asked, Mode mode) {
  const fs::path output = Resolve(asked);
  CheckPlace(asked, output, output.string() + ".partial", mode);
}

std::string FirstDamaged(const fs::path& directory, const fs::path& moved) {
  const std::map<std::string, std::string> listed = Listed(directory);
  if (listed.empty()) Fail("{}: lists no files; start again with --force", (directory / kManifestFile).string());
  for (const auto& [name, hash] : listed) {
    const fs::path path = (IsFile(directory / name) ? directory : moved) / name;
    if (!IsFile(path) || Sha256File(path) != hash) return path;
  }
  return "";
}

OutputDirectory::OutputDirectory(fs::path asked, Mode mode, bool first)
    : asked_(std::move(asked)),
      final_(Resolve(asked_)),
      partial_(final_.string() + ".partial"),
      mode_(mode),
      first_(first) {
  if (!first_) return;
  Within(asked_.string(), [&] {
    CreateDirectories(final_.parent_path());
    lock_.emplace(final_);
  });
  Settle();
  CheckPlace(asked_, final_, partial_, mode_);
  goes_on_ = kept_ = mode_ == Mode::kResume && HoldsState(partial_);
}

OutputDirectory::~OutputDirectory() {
  if (first_ && !kept_) RemoveRun(partial_);
}

fs::path OutputDirectory::State() const { return partial_ / kStateFolder; }
bool OutputDirectory::Taken() const { return fs::exists(final_) && !(IsFolder(final_) && fs::is_empty(final_)); }

bool OutputDirectory::IsCurrent() const {
  std::error_code error;
  return fs::equivalent(final_, ".", error) && !error;
}

// Ends what a killed run had begun: it was complete, and had leave to take its name.
void OutputDirectory::Settle() {
  if (IsFile(final_ / kManifestFile) && IsStateFolder(final_ / kStateFolder)) {
    if (IsMarked(final_)) Retire();
    if (std::error_code none; fs::is_empty(final_ / kStateFolder, none)) RemoveAll(final_ / kStateFolder);
    if (fs::exists(final_ / kStateFolder)) return;
  }
  if (!IsFile(partial_ / kManifestFile) || !IsFolder(partial_)) return;
  if (Taken() && !IsMarked(partial_)) return;
  try {
    if (const std::string damaged = FirstDamaged(partial_, final_); !damaged.empty())
      Fail("{}: is not the file that the run wrote before it was stopped (SHA-256); start again with --force", damaged);
  } catch (const Error&) {
    if (mode_ != Mode::kForce) throw;
    return RemoveRun(partial_);
  }
  TakeName();
}

void OutputDirectory::Begin() {
  if (goes_on_) return RemoveLeftovers(partial_);
  RemoveRun(partial_);
  Within(asked_.string(), [&] { PrepareOutputDirectory(partial_); });
  CreateDirectories(State());
  if (mode_ == Mode::kForce && Taken()) Mark();
}

void OutputDirectory::Mark() {
  CreateDirectories(State());
  WriteFile(State() / kReplaceMark, "");
}

void OutputDirectory::TakeName() {
  kept_ = true;
  const bool taken = Taken(), current = IsCurrent();
  if (taken && !IsMarked(partial_)) PrepareOutputDirectory(asked_);
  if (taken || current) {
    Mark();
    for (const fs::path& entry : EntriesOf(State()))
      if (entry.filename() != kReplaceMark) RemoveAll(entry);
  } else {
    RemoveAll(State());
    Rename(partial_, final_);
    return SyncDirectory(final_.parent_path());
  }
  const std::map<std::string, std::string> old = Listed(final_);
  const bool all_own =
      taken && std::ranges::all_of(EntriesOf(final_), [&](const fs::path& entry) { return IsOwn(entry, old); });
  const bool all_here = std::ranges::all_of(  // else MoveIn has begun
      Listed(partial_), [&](const auto& listed) { return IsFile(partial_ / listed.first); });
  if (current || !all_own || !all_here || !Exchange(partial_, final_)) return MoveIn();
  SyncDirectory(final_.parent_path());
  Retire();
}

// The result has its name; what it replaced lies in Partial(). The mark goes last.
void OutputDirectory::Retire() {
  RemoveRun(partial_);
  std::error_code ignored;
  if (!fs::exists(partial_)) fs::remove_all(final_ / kStateFolder, ignored);
}

// File by file; until the manifest has moved, the next run goes on with it.
void OutputDirectory::MoveIn() {
  std::map<std::string, std::string> files = Listed(partial_);
  files[kTimingsFile];
  const std::map<std::string, std::string> old = Listed(final_);
  for (const fs::path& entry : EntriesOf(final_))
    if (entry.filename() != kManifestFile && !files.contains(entry.filename()) && IsOwn(entry, old)) RemoveFile(entry);
  for (const auto& [name, hash] : files)
    if (IsFile(partial_ / name)) Rename(partial_ / name, final_ / name);
  Rename(partial_ / kManifestFile, final_ / kManifestFile);
  SyncDirectory(final_);
  RemoveRun(partial_);
}

}  // namespace circlet
