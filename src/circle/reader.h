#pragma once

// What a file tells beyond its model; Read and Parse hand on the model alone.

#include <filesystem>
#include <memory>
#include <span>
#include <string>

#include "circlet/circle/model.h"

namespace circlet::circle {

struct FileView {
  Model model;
  int64_t file_bytes = 0;
  int64_t external_bytes = 0;  // payloads behind the FlatBuffer (Buffer.offset/size)
};

FileView OpenFile(const std::filesystem::path& path);
FileView ParseFile(std::span<const std::byte> bytes, std::shared_ptr<const void> owner, const std::string& name);

}  // namespace circlet::circle
