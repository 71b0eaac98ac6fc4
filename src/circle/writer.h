#pragma once

// The writer in two steps: Plan builds the FlatBuffer without payloads and decides where each constant goes; Write and
// Serialize put the two together. Payloads always follow the tables, so that constants of any size are streamed from
// where they lie and never copied into memory:
//
//   [ FlatBuffer: tables, names, grids ][ payload 0 ][ payload 1 ] ...
//
// Inline, a payload is the byte vector that Buffer.data refers to (a 4-byte length, then the bytes); past the limit it
// is bare and Buffer.offset/size hold its place (format.md 1.3). The bytes start at multiples of 16 either way.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "circlet/circle/model.h"

namespace circlet::circle {

struct Payload {
  int64_t offset = 0;  // of the first byte in the file
  const std::byte* data = nullptr;  // null: made by `lazy`
  std::shared_ptr<const LazyConstant> lazy;
  int64_t bytes = 0;
  bool inline_vector = true;  // its length stands in the 4 bytes before `offset`
};

struct FilePlan {
  std::vector<std::byte> head;  // the FlatBuffer; starts the file
  std::vector<Payload> payloads;
  int64_t file_bytes = 0;
};

// What the tensors are called in the file: empty and repeated names get a suffix, as readers look tensors up by name.
std::vector<std::string> WrittenNames(const std::vector<Tensor>& tensors);

FilePlan Plan(const Model& model, const WriteOptions& options);

// The whole file in memory, without Write's checks of the model: for tests and fuzzing.
std::vector<std::byte> Serialize(const Model& model, const WriteOptions& options = {});

}  // namespace circlet::circle
