#pragma once

#include <cstdlib>
#include <filesystem>
#include <string>

#include "circlet/base/error.h"

namespace circlet {

// An empty directory that lives as long as the object.
class TempDirectory {
 public:
  explicit TempDirectory(const std::filesystem::path& parent = std::filesystem::temp_directory_path()) {
    std::string name = (parent / "circlet-test-XXXXXX").string();
    CIRCLET_CHECK(mkdtemp(name.data()) != nullptr, "cannot create {}", name);
    path_ = name;
  }
  TempDirectory(const TempDirectory&) = delete;
  TempDirectory& operator=(const TempDirectory&) = delete;
  ~TempDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  const std::filesystem::path& Path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace circlet
