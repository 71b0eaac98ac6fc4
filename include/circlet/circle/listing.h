#pragma once

// A Circle file for people and for scripts.

#include <filesystem>
#include <string>

namespace circlet::circle {

// Size, constants, operators by name; inputs and outputs; then each operator with its inputs and outputs, by name, with
// type, shape, bytes and grid. Throws what Read throws.
std::string ListingText(const std::filesystem::path& file);
// All of it as JSON, scales and zero points of each channel too: {"file", "bytes", "constant_bytes", "description",
// "inputs", "outputs", "tensors": [..], "operators": [..]}; inputs and outputs are indices of tensors, -1 = absent.
std::string ListingJson(const std::filesystem::path& file);

// The *.circle files of a directory, one a line, and their sum. Throws Error when there is none.
std::string DirectoryText(const std::filesystem::path& directory);
// As JSON: a list of {"file", "bytes", "constant_bytes", "operators", "inputs", "outputs"}, the last two by name.
std::string DirectoryJson(const std::filesystem::path& directory);

}  // namespace circlet::circle
