#pragma once

// A Circle file as plain data: what the writer writes and the reader reads. Knows the format, no model, no algorithm
// (format.md; docs/circle_format.md).

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "circlet/base/qparams.h"
#include "circlet/base/tensor.h"
#include "circlet/ops/op.h"

namespace circlet::circle {

// A constant too large for memory, whose bytes are made while the file is written. Pieces that begin at multiples of 16
// bytes may be asked for in any order, any number of times.
class LazyConstant {
 public:
  virtual ~LazyConstant() = default;
  // Bytes first .. first + out.size() - 1 of the storage form.
  virtual void Fill(int64_t first, std::span<std::byte> out) const = 0;
};

struct Tensor {
  std::string name;
  TensorType type;                 // unknown sizes hold 1
  std::vector<int32_t> signature;  // empty = static; else -1 at unknown sizes
  std::optional<QParams> qparams;
  circlet::Tensor data;  // constant value in storage form (4-bit packed); empty = computed, input or lazy
  std::shared_ptr<const LazyConstant> lazy;  // such a value instead, of type.Bytes() bytes; files are read without

  bool IsConstant() const { return !data.Empty() || lazy != nullptr; }
};

struct Operator {
  int32_t code = 0;                   // builtin operator
  std::vector<CircleOption> options;  // fields at their default may be absent
  std::vector<int32_t> inputs;        // tensor indices, -1 = absent
  std::vector<int32_t> outputs;
};

struct Model {
  std::string description = "circle";
  std::string subgraph_name = "subgraph";
  std::vector<Tensor> tensors;
  std::vector<int32_t> inputs;
  std::vector<int32_t> outputs;
  std::vector<Operator> operators;  // execution order
};

struct WriteOptions {
  // Constants go behind the FlatBuffer (Buffer.offset/size) when together they are larger than this.
  int64_t inline_limit_bytes = (int64_t{1} << 31) - 1 - (int64_t{16} << 20);
};

// Writes the file whole or not at all; constants may be mapped and are streamed when they lie behind the FlatBuffer.
// Constant tensors with the same data pointer (or lazy constant) and type share one buffer. Lazy constants are made in
// pieces of 4 MiB. Returns the file's size in bytes.
int64_t Write(const Model& model, const std::filesystem::path& path, const WriteOptions& options = {});

// Maps a file and checks it: FlatBuffers' verifier, then indices, ranges, quantization lengths, shape x type = bytes,
// operator order, option tables. Every fault is an Error naming the file, the place and the values. Constants point into
// the mapping.
Model Read(const std::filesystem::path& path);
// The same from memory (fuzzing, tests); `name` stands for the file in errors.
Model Parse(std::span<const std::byte> bytes, std::shared_ptr<const void> owner, const std::string& name);

// Every semantic fault of a model, empty = none (the checks of Read, for a model in memory before it is written).
std::vector<std::string> Verify(const Model& model);

// Readable listing: inputs, outputs, one operator a line, "INDEX NAME {options} (inputs) -> outputs". A tensor is
// "#index:TYPE[shape]:const:s=scale,z=zero_point", or "perch(axis,n,s0,z0)" for a grid with a scale for each channel.
std::string Dump(const Model& model);

// "FULLY_CONNECTED" for 9; "OPERATOR_77" for codes that the schema table lacks.
std::string OperatorName(int32_t code);

}  // namespace circlet::circle
