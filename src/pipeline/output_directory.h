#pragma once

// The life of an output directory, from the first file of a run to its name.

#include <filesystem>
#include <optional>
#include <string>

#include "io/output_lock.h"

namespace circlet {

inline constexpr char kManifestFile[] = "manifest.json";
inline constexpr char kTimingsFile[] = "timings.json";

// What a run fills, and what it may do with what is there:
//
//   NAME.lock                        held while a process works there
//   NAME.partial/                    where everything is written
//   NAME.partial/unfinished/         what the run goes on from when it is killed (run_state.h)
//   NAME.partial/unfinished/replace  the run was told to replace what lies under NAME
//   NAME.partial/manifest.json       written last: with it nothing is missing but the name
//
// The name is taken by one rename; where a result is replaced, by an exchange of both directories, so that a kill leaves
// the old one or the new one. Three cases take the files one by one instead, the manifest last: a directory that holds
// files of others, which stay; the current directory, which shells stand in; a file system without exchange. The next
// process to open the output ends what a killed one had begun.
class OutputDirectory {
 public:
  enum class Mode {
    kNew,     // nothing may be there
    kResume,  // an unfinished run goes on
    kForce,   // what an earlier run left is replaced
  };

  // `asked` may be relative, a link or ".". Throws Error when another process works there, for a path that cannot be an
  // output, and for what `mode` does not allow to be there. `first` is false in all processes of a run but one: these use
  // what that one prepares.
  OutputDirectory(std::filesystem::path asked, Mode mode, bool first);
  // The errors that the constructor would throw for what is there, without making or moving anything.
  static void Check(const std::filesystem::path& asked, Mode mode);
  // Removes what the run has written, unless it took its name or Keep() was called.
  ~OutputDirectory();

  const std::filesystem::path& Partial() const { return partial_; }
  const std::filesystem::path& Final() const { return final_; }
  std::filesystem::path State() const;
  bool GoesOn() const { return goes_on_; }  // with an unfinished run
  bool Taken() const;                       // something lies under the name

  // Makes Partial() ready: empty, or as the unfinished run left it.
  void Begin();
  // From now on the unfinished run outlives this object.
  void Keep() { kept_ = true; }
  // Partial() is complete, its manifest last.
  void TakeName();

 private:
  void Settle();
  void Retire();
  void MoveIn();
  void Mark();
  bool IsCurrent() const;

  std::filesystem::path asked_, final_, partial_;
  Mode mode_;
  bool first_;
  bool goes_on_ = false, kept_ = false;
  std::optional<OutputLock> lock_;
};

// The first file under `directory` that is missing or is not what its manifest lists (SHA-256), looked for in `moved`
// too; "" when all are right. Throws Error for a manifest that lists nothing.
std::string FirstDamaged(const std::filesystem::path& directory, const std::filesystem::path& moved);

}  // namespace circlet
