#pragma once

#include <cerrno>
#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>

#include "circlet/base/error.h"

namespace circlet {

// Throws "path: cannot be DONE: the system's text; what to do" for the present errno.
[[noreturn]] inline void FailErrno(const std::filesystem::path& path, std::string_view done, int error = errno) {
  const std::string_view remedy = [&]() -> std::string_view {
    switch (error) {
      case ENOENT:
        return "; is the path right?";
      case EACCES:
      case EPERM:
      case EROFS:
        return "; change its permissions or choose another place";
      case ENOSPC:
      case EDQUOT:
        return "; free some space or choose another place";
      default:
        return "";
    }
  }();
  Fail("{}: cannot be {}: {}{}", path.string(), done, std::generic_category().message(error), remedy);
}

}  // namespace circlet
