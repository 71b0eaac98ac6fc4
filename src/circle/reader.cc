#include "circle/reader.h"

#include <flatbuffers/flatbuffers.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "circle/bounds.h"
#include "circle/schema.h"
#include "circlet/base/error.h"
#include "circlet/circle/model.h"
#include "io/mapped_file.h"

namespace circlet::circle {
namespace {

using flatbuffers::String;

constexpr std::string_view kRemedy = "the file is damaged, or its writer is at fault: export it again";
constexpr int kMaxRank = 16;

template <typename T>
T Scalar(const Table& table, int id, T otherwise = T{}) {
  return table.GetField<T>(Slot(id), otherwise);
}

const Table* Child(const Table& table, int id) { return table.GetPointer<const Table*>(Slot(id)); }
const Tables* Children(const Table& table, int id) { return table.GetPointer<const Tables*>(Slot(id)); }
uint32_t Count(const Tables* tables) { return tables != nullptr ? tables->size() : 0; }

// The bytes of one Buffer; `data` is null when it has none.
struct BufferView {
  const uint8_t* data = nullptr;
  uint64_t bytes = 0;
};

class Reader {
 public:
  Reader(std::span<const std::byte> bytes, std::shared_ptr<const void> owner)
      : data_(reinterpret_cast<const uint8_t*>(bytes.data())),
        size_(bytes.size()),
        owner_(std::move(owner)),
        verifier_(data_, std::min<size_t>(size_, FLATBUFFERS_MAX_BUFFER_SIZE - 1)),
        budget_(16 * std::min<uint64_t>(size_, FLATBUFFERS_MAX_BUFFER_SIZE) + (uint64_t{16} << 20)) {}

  FileView Read() {
    const Table& root = Root();
    if (const auto version = Scalar<uint32_t>(root, model_field::kVersion); version != 0)
      Fail("schema version {}; every Circle file has 0; {}", version, kRemedy);
    ReadCodes(Children(root, model_field::kOperatorCodes));
    ReadBuffers(Children(root, model_field::kBuffers));
    const Tables* subgraphs = Children(root, model_field::kSubgraphs);
    if (Count(subgraphs) != 1)
      Fail("{} subgraphs; circlet reads files of exactly one: export each graph to a file of its own",
           Count(subgraphs));
    const Table& subgraph = *subgraphs->Get(0);
    Model model;
    model.description = Text(root, model_field::kDescription);
    model.subgraph_name = Text(subgraph, subgraph_field::kName);
    const Tables* tensors = Children(subgraph, subgraph_field::kTensors);
    for (uint32_t i = 0; i < Count(tensors); ++i) model.tensors.push_back(ReadTensor(*tensors->Get(i), i));
    model.inputs = Numbers<int32_t>(subgraph, subgraph_field::kInputs);
    model.outputs = Numbers<int32_t>(subgraph, subgraph_field::kOutputs);
    const Tables* operators = Children(subgraph, subgraph_field::kOperators);
    for (uint32_t i = 0; i < Count(operators); ++i) model.operators.push_back(ReadOperator(*operators->Get(i), i));
    return {std::move(model), static_cast<int64_t>(size_), external_bytes_};
  }

 private:
  const Table& Root() {
    if (size_ < 8) Fail("{} bytes are too few for a Circle file; {}", size_, kRemedy);
    const std::string identifier(reinterpret_cast<const char*>(data_) + 4, 4);
    if (identifier == "TFL3") Fail("this is a TFLite file (identifier TFL3); circlet reads Circle files (CIR0)");
    if (identifier != kIdentifier) {
      const bool printable = std::ranges::all_of(identifier, [](char c) { return c >= ' ' && c <= '~'; });
      Fail("no Circle file: bytes 4 to 7 are {}, not CIR0; {}",
           printable ? fmt::format("'{}'", identifier) : fmt::format("{:02x}", fmt::join(Bytes(identifier), " ")),
           printable ? "is it a .circle file?" : kRemedy);
    }
    const flatbuffers::uoffset_t offset = verifier_.VerifyOffset(0);
    if (offset == 0) Fail("the offset of the root table leaves the file of {} bytes; {}", size_, kRemedy);
    const Table& root = *reinterpret_cast<const Table*>(data_ + offset);
    CheckTable(root, ModelTable(), "Model");
    return root;
  }

  static std::vector<uint8_t> Bytes(const std::string& text) { return {text.begin(), text.end()}; }

  void CheckTable(const Table& table, const TableSchema& schema, const std::string& place) {
    try {
      CheckBounds(verifier_, table, schema, place);
    } catch (const Error& error) {
      Fail("{} ({} bytes); {}", error.what(), size_, kRemedy);
    }
  }

  // Offsets may share what they refer to, so that a small file claims an enormous model; an honest one refers to each
  // byte about once.
  void Spend(uint64_t bytes) {
    if (bytes > budget_)
      Fail(
          "names, lists and copied constants are more than 16 times the file ({} bytes), as offsets refer to the same "
          "bytes again and again; {}",
          size_, kRemedy);
    budget_ -= bytes;
  }

  std::string Text(const Table& table, int id) {
    const auto* text = table.GetPointer<const String*>(Slot(id));
    if (text == nullptr) return {};
    Spend(text->size());
    return text->str();
  }

  // FlatBuffers' vectors need not be aligned to their elements in a damaged file: copied bytewise.
  template <typename T>
  std::vector<T> Numbers(const Table& table, int id) {
    const auto* vector = table.GetPointer<const Vector<T>*>(Slot(id));
    if (vector == nullptr || vector->size() == 0) return {};
    Spend(vector->size() * sizeof(T));
    std::vector<T> values(vector->size());
    std::memcpy(values.data(), vector->Data(), values.size() * sizeof(T));
    return values;
  }

  // format.md 3.1: the narrow field holds min(127, code); files older than the wide field have 0 there.
  void ReadCodes(const Tables* codes) {
    for (uint32_t i = 0; i < Count(codes); ++i) {
      const Table& table = *codes->Get(i);
      const auto narrow = Scalar<int8_t>(table, code_field::kDeprecatedBuiltinCode);
      const auto wide = Scalar<int32_t>(table, code_field::kBuiltinCode);
      if (narrow != std::min(127, wide) && (wide != 0 || narrow == 127))
        Fail(
            "operator code {}: deprecated_builtin_code is {}, builtin_code {} ({}); the first must be the smaller of "
            "127 and the second; {}",
            i, narrow, wide, OperatorName(wide), kRemedy);
      const int32_t code = wide == 0 ? narrow : wide;
      if (code == kCustomCode)
        Fail(
            "operator code {}: custom operator \"{}\"; circlet knows builtin operators only: export the model without "
            "it",
            i, Text(table, code_field::kCustomCode));
      if (FindOperator(code) == nullptr)
        Fail("operator code {}: builtin operator {} is unknown to circlet; export the model without it", i, code);
      codes_.push_back(code);
    }
  }

  void ReadBuffers(const Tables* buffers) {
    if (Count(buffers) == 0) Fail("no buffers; buffer 0 must exist and be empty; {}", kRemedy);
    std::map<uint64_t, std::pair<uint64_t, uint32_t>> ranges;  // offset to end and buffer
    for (uint32_t i = 0; i < Count(buffers); ++i) {
      const Table& table = *buffers->Get(i);
      const auto* inline_data = table.GetPointer<const Vector<uint8_t>*>(Slot(buffer_field::kData));
      const auto offset = Scalar<uint64_t>(table, buffer_field::kOffset);
      const auto bytes = Scalar<uint64_t>(table, buffer_field::kSize);
      const bool external = offset > 1 || bytes > 0;
      if (i == 0 && (external || (inline_data != nullptr && inline_data->size() > 0)))
        Fail("buffer 0 has a payload; it must be empty, as tensors without data refer to it; {}", kRemedy);
      if (external && inline_data != nullptr)
        Fail("buffer {}: both inline data ({} bytes) and an external range (offset {}, {} bytes); {}", i,
             inline_data->size(), offset, bytes, kRemedy);
      if (external) CheckRange(i, offset, bytes, ranges);
      if (external) external_bytes_ += static_cast<int64_t>(bytes);
      if (external)
        buffers_.push_back({data_ + offset, bytes});
      else if (inline_data != nullptr && i != 0)
        buffers_.push_back({inline_data->data(), inline_data->size()});
      else
        buffers_.push_back({});
    }
  }

  void CheckRange(uint32_t buffer, uint64_t offset, uint64_t bytes,
                  std::map<uint64_t, std::pair<uint64_t, uint32_t>>& ranges) const {
    if (offset < 8 || bytes == 0 || offset > size_ || bytes > size_ - offset)
      Fail("buffer {}: {} bytes at offset {} are not inside the file of {} bytes; was it cut off while copying?",
           buffer, bytes, offset, size_);
    const auto next = ranges.lower_bound(offset);
    const auto overlaps = [&](uint64_t begin, const std::pair<uint64_t, uint32_t>& other) {
      if (begin < offset + bytes && offset < other.first)
        Fail("buffer {} ({} bytes at offset {}) overlaps buffer {} ({} bytes at offset {}); {}", buffer, bytes, offset,
             other.second, other.first - begin, begin, kRemedy);
    };
    if (next != ranges.end()) overlaps(next->first, next->second);
    if (next != ranges.begin()) overlaps(std::prev(next)->first, std::prev(next)->second);
    ranges[offset] = {offset + bytes, buffer};
  }

  Tensor ReadTensor(const Table& table, uint32_t index) {
    Tensor tensor;
    tensor.name = Text(table, tensor_field::kName);
    return Within(fmt::format("tensor {} \"{}\"", index, tensor.name), [&] {
      const auto type = Scalar<int8_t>(table, tensor_field::kType);
      const std::optional<DType> dtype = DTypeOf(type);
      if (!dtype.has_value())
        Fail(
            "element type {} is not supported; circlet reads dense numbers, bool and 4-bit codes: export another "
            "format",
            TensorTypeName(type));
      tensor.type.dtype = *dtype;
      const std::vector<int32_t> sizes = Numbers<int32_t>(table, tensor_field::kShape);
      if (sizes.size() > kMaxRank) Fail("{} axes; at most {} make sense; {}", sizes.size(), kMaxRank, kRemedy);
      tensor.type.shape = Shape(std::vector<int64_t>(sizes.begin(), sizes.end()));
      if (const auto bad = std::ranges::find_if(sizes, [](int32_t size) { return size < 0; }); bad != sizes.end())
        Fail("shape {} has the negative size {}; unknown sizes belong into shape_signature; {}",
             tensor.type.shape.ToString(), *bad, kRemedy);
      tensor.signature = Numbers<int32_t>(table, tensor_field::kShapeSignature);
      RefuseExtensions(table);
      if (const Table* quantization = Child(table, tensor_field::kQuantization); quantization != nullptr)
        tensor.qparams = ReadQuantization(*quantization, *dtype);
      const auto buffer = Scalar<uint32_t>(table, tensor_field::kBuffer);
      if (buffer >= buffers_.size())
        Fail("buffer {}, but the file has buffers 0 to {}; {}", buffer, buffers_.size() - 1, kRemedy);
      if (buffers_[buffer].data != nullptr) tensor.data = Constant(tensor.type, buffers_[buffer]);
      return std::move(tensor);
    });
  }

  static void RefuseExtensions(const Table& table) {
    if (Scalar<uint8_t>(table, tensor_field::kIsVariable) != 0)
      Fail("is a variable tensor; circlet reads files without state: export caches as inputs and outputs");
    if (table.CheckField(Slot(tensor_field::kSparsity)))
      Fail("has sparsity parameters; circlet reads dense tensors only: export it dense");
    if (const auto compression = Scalar<int8_t>(table, tensor_field::kCompressionType); compression != 0)
      Fail("compression_type {}; circlet reads uncompressed tensors only: export it uncompressed", compression);
  }

  std::optional<QParams> ReadQuantization(const Table& table, DType dtype) {
    if (const auto details = Scalar<uint8_t>(table, quantization_field::kDetailsType); details != 0)
      Fail("quantization details of type {}; circlet reads scale and zero point only: export affine quantization",
           details);
    QParams qparams{.dtype = dtype};
    qparams.scale = Numbers<float>(table, quantization_field::kScale);
    const std::vector<int64_t> zero_points = Numbers<int64_t>(table, quantization_field::kZeroPoint);
    if (zero_points.size() != qparams.scale.size())
      Fail("{} scales, but {} zero points; {}", qparams.scale.size(), zero_points.size(), kRemedy);
    if (qparams.scale.empty()) return std::nullopt;
    for (size_t i = 0; i < zero_points.size(); ++i) {
      if (zero_points[i] != static_cast<int32_t>(zero_points[i]))
        Fail("zero point {} is {}, which leaves int32; {}", i, zero_points[i], kRemedy);
    }
    qparams.zero_point.assign(zero_points.begin(), zero_points.end());
    if (qparams.scale.size() > 1) {
      qparams.axis = Scalar<int32_t>(table, quantization_field::kQuantizedDimension);
      if (qparams.axis < 0) Fail("quantized_dimension {}; axes are counted from 0; {}", qparams.axis, kRemedy);
    }
    return qparams;
  }

  circlet::Tensor Constant(const TensorType& type, const BufferView& buffer) {
    const int64_t bytes = type.Bytes();
    if (static_cast<uint64_t>(bytes) != buffer.bytes)
      Fail("its buffer holds {} bytes, {} takes {}; {}", buffer.bytes, type.ToString(), bytes, kRemedy);
    // Kernels look at the elements in place; exporters are known to align payloads to 4 bytes only.
    const size_t alignment = std::max(1, BitWidth(type.dtype) / 8);
    auto* data = const_cast<uint8_t*>(buffer.data);
    if (reinterpret_cast<uintptr_t>(data) % alignment == 0) return {type, data, owner_};
    circlet::Tensor& copy = aligned_[data];
    if (copy.Empty() || copy.Bytes() != bytes || copy.GetDType() != type.dtype) {
      Spend(buffer.bytes);
      copy = circlet::Tensor(type, data, owner_).Clone();
    }
    return copy.Reshaped(type.shape);
  }

  Operator ReadOperator(const Table& table, uint32_t index) {
    const auto code_index = Scalar<uint32_t>(table, operator_field::kOpcodeIndex);
    if (code_index >= codes_.size())
      Fail("operator {}: opcode_index {}, but the file has {} operator codes; {}", index, code_index, codes_.size(),
           kRemedy);
    Operator op{.code = codes_[code_index]};
    return Within(fmt::format("operator {} {}", index, OperatorName(op.code)), [&] {
      if (Scalar<uint64_t>(table, operator_field::kLargeCustomOptionsOffset) != 0 ||
          Scalar<uint8_t>(table, operator_field::kOptions2Type) != 0)
        Fail("has custom or second options, which none of circlet's operators takes; {}", kRemedy);
      op.inputs = Numbers<int32_t>(table, operator_field::kInputs);
      op.outputs = Numbers<int32_t>(table, operator_field::kOutputs);
      op.options = ReadOptions(table, *FindOperator(op.code));
      return std::move(op);
    });
  }

  std::vector<CircleOption> ReadOptions(const Table& table, const OperatorSchema& schema) {
    const auto type = Scalar<uint8_t>(table, operator_field::kOptionsType);
    const Table* options = Child(table, operator_field::kOptions);
    if (type != 0 && type != schema.options_type)
      Fail("options of type {}, expected {} ({}); {}", type, schema.options_type, schema.options.name, kRemedy);
    // Without fields there is nothing to miss.
    if (schema.options.fields.empty()) return {};
    if (type == 0 || options == nullptr) Fail("its {} are missing; {}", schema.options.name, kRemedy);
    CheckTable(*options, schema.options, std::string(schema.options.name));
    std::vector<CircleOption> values;
    for (const FieldSchema& field : schema.options.fields) {
      if (!options->CheckField(Slot(field.id)) &&
          (field.kind == FieldKind::kInt32s || field.kind == FieldKind::kString))
        continue;
      values.push_back(ReadOption(*options, field));
    }
    return values;
  }

  CircleOption ReadOption(const Table& options, const FieldSchema& field) {
    const std::string name(field.name);
    const double otherwise = field.default_value;
    switch (field.kind) {
      case FieldKind::kBool:
        return {name, int64_t{Scalar(options, field.id, static_cast<uint8_t>(otherwise)) != 0}};
      case FieldKind::kInt8:
        return {name, int64_t{Scalar(options, field.id, static_cast<int8_t>(otherwise))}};
      case FieldKind::kInt32:
        return {name, int64_t{Scalar(options, field.id, static_cast<int32_t>(otherwise))}};
      case FieldKind::kUint32:
        return {name, int64_t{Scalar(options, field.id, static_cast<uint32_t>(otherwise))}};
      case FieldKind::kFloat:
        return {name, double{Scalar(options, field.id, static_cast<float>(otherwise))}};
      case FieldKind::kInt32s:
        return {name, Numbers<int32_t>(options, field.id)};
      case FieldKind::kString:
        return {name, Text(options, field.id)};
      default:
        CIRCLET_CHECK(false, "option {} has a kind that options lack", name);
    }
  }

  const uint8_t* data_;
  size_t size_;
  std::shared_ptr<const void> owner_;
  flatbuffers::Verifier verifier_;
  uint64_t budget_;
  std::vector<int32_t> codes_;
  std::vector<BufferView> buffers_;
  int64_t external_bytes_ = 0;
  std::map<const uint8_t*, circlet::Tensor> aligned_;  // copies of misaligned payloads
};

}  // namespace

FileView ParseFile(std::span<const std::byte> bytes, std::shared_ptr<const void> owner, const std::string& name) {
  // Scalars are read in place.
  if (reinterpret_cast<uintptr_t>(bytes.data()) % alignof(std::max_align_t) != 0) {
    const TensorType type{DType::kU8, Shape{static_cast<int64_t>(bytes.size())}};
    const circlet::Tensor copy = circlet::Tensor(type, const_cast<std::byte*>(bytes.data()), nullptr).Clone();
    return ParseFile({copy.Raw(), bytes.size()}, std::make_shared<circlet::Tensor>(copy), name);
  }
  return Within(name, [&] {
    FileView file = Reader(bytes, std::move(owner)).Read();
    const std::vector<std::string> faults = Verify(file.model);
    if (faults.size() == 1) Fail("{}; {}", faults[0], kRemedy);
    if (!faults.empty()) Fail("{} (and {} more faults); {}", faults[0], faults.size() - 1, kRemedy);
    return file;
  });
}

FileView OpenFile(const std::filesystem::path& path) {
  const std::shared_ptr<const MappedFile> file = MappedFile::Open(path);
  return ParseFile(file->Bytes(), file, path.string());
}

Model Parse(std::span<const std::byte> bytes, std::shared_ptr<const void> owner, const std::string& name) {
  return ParseFile(bytes, std::move(owner), name).model;
}

Model Read(const std::filesystem::path& path) { return OpenFile(path).model; }

}  // namespace circlet::circle
