#include "circle/writer.h"

#include <flatbuffers/flatbuffers.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <map>
#include <set>
#include <tuple>

#include "circle/bounds.h"
#include "circle/schema.h"
#include "circlet/base/error.h"
#include "circlet/io/file.h"

namespace circlet::circle {
namespace {

using flatbuffers::FlatBufferBuilder;
using TableOffset = Offset<Table>;
using StringOffset = Offset<flatbuffers::String>;

static_assert(std::endian::native == std::endian::little, "payloads are written as they lie in memory");

constexpr int64_t kPayloadAlignment = 16;
constexpr int64_t kLengthBytes = sizeof(uint32_t);
// What a 32-bit offset of FlatBuffers reaches.
constexpr int64_t kFlatBufferLimit = (int64_t{1} << 31) - 2;

int64_t AlignUp(int64_t offset) { return (offset + kPayloadAlignment - 1) / kPayloadAlignment * kPayloadAlignment; }

template <typename T>
T As(const CircleOption& option) {
  return static_cast<T>(std::get<int64_t>(option.value));
}

class HeadBuilder {
 public:
  explicit HeadBuilder(const Model& model) : model_(model) { CollectPayloads(); }

  FilePlan Build(const WriteOptions& options) {
    int64_t payload_bytes = 0;
    for (const Payload& payload : payloads_) payload_bytes += payload.bytes;
    FilePlan plan = BuildAs(/*external=*/payload_bytes > options.inline_limit_bytes);
    if (plan.file_bytes > kFlatBufferLimit && payload_bytes <= options.inline_limit_bytes) plan = BuildAs(true);
    CIRCLET_CHECK(static_cast<int64_t>(plan.head.size()) <= kFlatBufferLimit, "tables of {} bytes", plan.head.size());
    return plan;
  }

 private:
  // One buffer for each distinct constant, in the order of the tensors; buffer 0 stays empty (format.md 1.2).
  void CollectPayloads() {
    std::map<std::tuple<const void*, DType, int64_t>, uint32_t> buffer_of;
    for (const Tensor& tensor : model_.tensors) {
      if (!tensor.IsConstant()) {
        buffers_.push_back(0);
        continue;
      }
      const void* const source =
          tensor.lazy != nullptr ? static_cast<const void*>(tensor.lazy.get()) : tensor.data.Raw();
      const int64_t bytes = tensor.type.Bytes();
      const auto [entry, is_new] =
          buffer_of.try_emplace({source, tensor.type.dtype, bytes}, static_cast<uint32_t>(payloads_.size() + 1));
      if (is_new) payloads_.push_back({.data = tensor.data.Raw(), .lazy = tensor.lazy, .bytes = bytes});
      buffers_.push_back(entry->second);
    }
  }

  FilePlan BuildAs(bool external) {
    // Readers take Buffer.size of 0 for "no payload", and one byte is not worth 16.
    for (Payload& payload : payloads_) payload.inline_vector = !external || payload.bytes <= 1;
    fbb_ = FlatBufferBuilder(1 << 16);
    fbb_.Finish(TableOffset(ModelRoot().o), kIdentifier);
    const std::span<const std::byte> bytes = std::as_bytes(std::span(fbb_.GetBufferPointer(), fbb_.GetSize()));
    FilePlan plan{{bytes.begin(), bytes.end()}, payloads_, 0};
    Place(plan);
    return plan;
  }

  // Gives each payload its place behind the FlatBuffer and stores it in the payload's Buffer table.
  void Place(FilePlan& plan) const {
    auto* head = reinterpret_cast<uint8_t*>(plan.head.data());
    auto* root = flatbuffers::GetMutableRoot<Table>(head);
    const auto* buffers = root->GetPointer<const Vector<TableOffset>*>(Slot(model_field::kBuffers));
    const auto store = [&](uint32_t buffer, int id, auto value) {
      auto* table = const_cast<Table*>(reinterpret_cast<const Table*>(buffers->Get(buffer)));
      std::memcpy(table->GetAddressOf(Slot(id)), &value, sizeof(value));
    };
    int64_t end = static_cast<int64_t>(plan.head.size());
    for (uint32_t k = 0; k < plan.payloads.size(); ++k) {
      Payload& payload = plan.payloads[k];
      payload.offset = AlignUp(end + (payload.inline_vector ? kLengthBytes : 0));
      if (payload.inline_vector) {
        const auto* table = reinterpret_cast<const Table*>(buffers->Get(k + 1));
        const int64_t field = table->GetAddressOf(Slot(buffer_field::kData)) - head;
        store(k + 1, buffer_field::kData, static_cast<flatbuffers::uoffset_t>(payload.offset - kLengthBytes - field));
      } else {
        store(k + 1, buffer_field::kOffset, static_cast<uint64_t>(payload.offset));
        store(k + 1, buffer_field::kSize, static_cast<uint64_t>(payload.bytes));
      }
      end = payload.offset + payload.bytes;
    }
    plan.file_bytes = end;
  }

  TableOffset ModelRoot() {
    const auto buffers = Buffers();
    const auto subgraph = SubgraphTable();
    const auto subgraphs = fbb_.CreateVector(&subgraph, 1);
    const auto codes = OperatorCodes();
    const auto description = fbb_.CreateString(model_.description);
    const auto start = fbb_.StartTable();
    fbb_.AddOffset(Slot(model_field::kOperatorCodes), codes);
    fbb_.AddOffset(Slot(model_field::kSubgraphs), subgraphs);
    fbb_.AddOffset(Slot(model_field::kDescription), description);
    fbb_.AddOffset(Slot(model_field::kBuffers), buffers);
    return fbb_.EndTable(start);
  }

  // With placeholders that are not the default, so that the slots exist.
  Offset<Vector<TableOffset>> Buffers() {
    std::vector<TableOffset> buffers;
    buffers.emplace_back(fbb_.EndTable(fbb_.StartTable()));
    for (const Payload& payload : payloads_) {
      const auto start = fbb_.StartTable();
      if (payload.inline_vector) {
        fbb_.AddElement<flatbuffers::uoffset_t>(Slot(buffer_field::kData), 1, 0);
      } else {
        fbb_.AddElement<uint64_t>(Slot(buffer_field::kOffset), 1, 0);
        fbb_.AddElement<uint64_t>(Slot(buffer_field::kSize), 1, 0);
      }
      buffers.emplace_back(fbb_.EndTable(start));
    }
    return fbb_.CreateVector(buffers);
  }

  TableOffset SubgraphTable() {
    const std::vector<std::string> names = WrittenNames(model_.tensors);
    std::vector<TableOffset> tensors;
    for (size_t i = 0; i < names.size(); ++i) tensors.push_back(TensorTable(model_.tensors[i], names[i], buffers_[i]));
    std::vector<TableOffset> operators;
    for (const Operator& op : model_.operators) operators.push_back(OperatorTable(op));
    const auto tensor_vector = fbb_.CreateVector(tensors);
    const auto operator_vector = fbb_.CreateVector(operators);
    const auto inputs = fbb_.CreateVector(model_.inputs);
    const auto outputs = fbb_.CreateVector(model_.outputs);
    const auto name = fbb_.CreateString(model_.subgraph_name);
    const auto start = fbb_.StartTable();
    fbb_.AddOffset(Slot(subgraph_field::kTensors), tensor_vector);
    fbb_.AddOffset(Slot(subgraph_field::kInputs), inputs);
    fbb_.AddOffset(Slot(subgraph_field::kOutputs), outputs);
    fbb_.AddOffset(Slot(subgraph_field::kOperators), operator_vector);
    fbb_.AddOffset(Slot(subgraph_field::kName), name);
    return fbb_.EndTable(start);
  }

  TableOffset TensorTable(const Tensor& tensor, const std::string& name, uint32_t buffer) {
    std::vector<int32_t> sizes;
    for (const int64_t size : tensor.type.shape.Sizes()) sizes.push_back(static_cast<int32_t>(size));
    const auto shape = fbb_.CreateVector(sizes);
    const auto name_offset = fbb_.CreateString(name);
    const std::optional<int8_t> type = TensorTypeOf(tensor.type.dtype);
    CIRCLET_CHECK(type.has_value(), "tensor \"{}\": Circle has no {}", tensor.name, Name(tensor.type.dtype));
    TableOffset quantization;
    if (tensor.qparams.has_value()) quantization = QuantizationTable(*tensor.qparams);
    Offset<Vector<int32_t>> signature;
    if (!tensor.signature.empty()) signature = fbb_.CreateVector(tensor.signature);
    const auto start = fbb_.StartTable();
    fbb_.AddOffset(Slot(tensor_field::kShape), shape);
    fbb_.AddElement<int8_t>(Slot(tensor_field::kType), *type, 0);
    fbb_.AddElement<uint32_t>(Slot(tensor_field::kBuffer), buffer, 0);
    fbb_.AddOffset(Slot(tensor_field::kName), name_offset);
    fbb_.AddOffset(Slot(tensor_field::kQuantization), quantization);
    fbb_.AddOffset(Slot(tensor_field::kShapeSignature), signature);
    // Tells a scalar from an unknown rank.
    fbb_.AddElement<uint8_t>(Slot(tensor_field::kHasRank), sizes.empty() ? 1 : 0, 0);
    return fbb_.EndTable(start);
  }

  TableOffset QuantizationTable(const QParams& qparams) {
    const auto scale = fbb_.CreateVector(qparams.scale);
    const std::vector<int64_t> zero_points(qparams.zero_point.begin(), qparams.zero_point.end());
    const auto zero_point = fbb_.CreateVector(zero_points);
    const auto start = fbb_.StartTable();
    fbb_.AddOffset(Slot(quantization_field::kScale), scale);
    fbb_.AddOffset(Slot(quantization_field::kZeroPoint), zero_point);
    fbb_.AddElement<int32_t>(Slot(quantization_field::kQuantizedDimension), std::max(0, qparams.axis), 0);
    return fbb_.EndTable(start);
  }

  TableOffset OperatorTable(const Operator& op) {
    const OperatorSchema* schema = FindOperator(op.code);
    CIRCLET_CHECK(schema != nullptr, "operator {} is not in the schema table", OperatorName(op.code));
    const auto inputs = fbb_.CreateVector(op.inputs);
    const auto outputs = fbb_.CreateVector(op.outputs);
    TableOffset options;
    if (schema->options_type != 0) options = OptionsTable(op, *schema);
    const auto start = fbb_.StartTable();
    fbb_.AddElement<uint32_t>(Slot(operator_field::kOpcodeIndex), CodeIndex(op.code), 0);
    fbb_.AddOffset(Slot(operator_field::kInputs), inputs);
    fbb_.AddOffset(Slot(operator_field::kOutputs), outputs);
    fbb_.AddElement<uint8_t>(Slot(operator_field::kOptionsType), schema->options_type, 0);
    fbb_.AddOffset(Slot(operator_field::kOptions), options);
    return fbb_.EndTable(start);
  }

  // Present even when it is empty: several loaders dereference it unchecked (format.md 3.2).
  TableOffset OptionsTable(const Operator& op, const OperatorSchema& schema) {
    struct Entry {
      const CircleOption* option;
      const FieldSchema* field;
      flatbuffers::uoffset_t offset;  // of a vector or string
    };
    std::vector<Entry> entries;
    for (const CircleOption& option : op.options) {
      const auto field = std::ranges::find(schema.options.fields, option.name, &FieldSchema::name);
      CIRCLET_CHECK(field != schema.options.fields.end() && Fits(option, *field),
                    "{} has no option \"{}\" of this kind", schema.name, option.name);
      flatbuffers::uoffset_t offset = 0;
      if (field->kind == FieldKind::kInt32s) offset = fbb_.CreateVector(std::get<std::vector<int32_t>>(option.value)).o;
      if (field->kind == FieldKind::kString) offset = fbb_.CreateString(std::get<std::string>(option.value)).o;
      entries.push_back({&option, &*field, offset});
    }
    const auto start = fbb_.StartTable();
    for (const auto& [option, field, offset] : entries) AddOption(*option, *field, offset);
    return fbb_.EndTable(start);
  }

  void AddOption(const CircleOption& option, const FieldSchema& field, flatbuffers::uoffset_t offset) {
    const auto slot = Slot(field.id);
    switch (field.kind) {
      case FieldKind::kBool:
        return fbb_.AddElement<uint8_t>(slot, As<uint8_t>(option), static_cast<uint8_t>(field.default_value));
      case FieldKind::kInt8:
        return fbb_.AddElement<int8_t>(slot, As<int8_t>(option), static_cast<int8_t>(field.default_value));
      case FieldKind::kInt32:
        return fbb_.AddElement<int32_t>(slot, As<int32_t>(option), static_cast<int32_t>(field.default_value));
      case FieldKind::kUint32:
        return fbb_.AddElement<uint32_t>(slot, As<uint32_t>(option), static_cast<uint32_t>(field.default_value));
      case FieldKind::kFloat:
        return fbb_.AddElement<float>(slot, static_cast<float>(std::get<double>(option.value)),
                                      static_cast<float>(field.default_value));
      default:
        return fbb_.AddOffset(slot, TableOffset(offset));
    }
  }

  // One entry for each operator, in order of first use.
  uint32_t CodeIndex(int32_t code) {
    const auto found = std::ranges::find(codes_, code);
    if (found == codes_.end()) codes_.push_back(code);
    return static_cast<uint32_t>(std::ranges::find(codes_, code) - codes_.begin());
  }

  Offset<Vector<TableOffset>> OperatorCodes() {
    std::vector<TableOffset> codes;
    for (const int32_t code : codes_) {
      const auto start = fbb_.StartTable();
      // Old readers know only the 8-bit field, in which 127 sends them to the wide one (format.md 3.1).
      fbb_.AddElement<int8_t>(Slot(code_field::kDeprecatedBuiltinCode), static_cast<int8_t>(std::min(127, code)), 0);
      fbb_.AddElement<int32_t>(Slot(code_field::kVersion), 1, 1);
      fbb_.AddElement<int32_t>(Slot(code_field::kBuiltinCode), code, 0);
      codes.emplace_back(fbb_.EndTable(start));
    }
    return fbb_.CreateVector(codes);
  }

  const Model& model_;
  FlatBufferBuilder fbb_;
  std::vector<Payload> payloads_;
  std::vector<uint32_t> buffers_;  // by tensor
  std::vector<int32_t> codes_;
};

// Hands out a payload in order: whole where it lies in memory, else in pieces as they are made.
void Stream(const Payload& payload, const std::function<void(std::span<const std::byte>)>& take) {
  if (payload.lazy == nullptr) return take({payload.data, static_cast<size_t>(payload.bytes)});
  constexpr int64_t kPieceBytes = int64_t{4} << 20;
  std::vector<std::byte> piece(static_cast<size_t>(std::min(kPieceBytes, payload.bytes)));
  for (int64_t first = 0; first < payload.bytes; first += kPieceBytes) {
    const auto part = std::span(piece).first(static_cast<size_t>(std::min(kPieceBytes, payload.bytes - first)));
    payload.lazy->Fill(first, part);
    take(part);
  }
}

}  // namespace

std::vector<std::string> WrittenNames(const std::vector<Tensor>& tensors) {
  std::set<std::string> taken;
  for (const Tensor& tensor : tensors) taken.insert(tensor.name);
  std::set<std::string> used;
  std::vector<std::string> names;
  for (const Tensor& tensor : tensors) {
    const std::string stem = tensor.name.empty() ? "tensor" : tensor.name;
    std::string name = stem;
    for (int k = 1; used.contains(name) || (name != tensor.name && taken.contains(name)); ++k)
      name = fmt::format("{}_{}", stem, k);
    used.insert(name);
    names.push_back(std::move(name));
  }
  return names;
}

FilePlan Plan(const Model& model, const WriteOptions& options) { return HeadBuilder(model).Build(options); }

int64_t Write(const Model& model, const std::filesystem::path& path, const WriteOptions& options) {
  const std::vector<std::string> faults = Verify(model);
  CIRCLET_CHECK(faults.empty(), "{}: {} faults, the first: {}", path.string(), faults.size(), faults[0]);
  const FilePlan plan = Plan(model, options);
  AtomicFile file(path);
  file.Write(plan.head);
  for (const Payload& payload : plan.payloads) {
    constexpr std::array<std::byte, kPayloadAlignment + kLengthBytes> kPadding{};
    const int64_t begin = payload.offset - (payload.inline_vector ? kLengthBytes : 0);
    file.Write(std::span(kPadding).first(static_cast<size_t>(begin - file.Size())));
    if (payload.inline_vector) {
      const auto length = static_cast<uint32_t>(payload.bytes);
      file.Write(std::as_bytes(std::span(&length, 1)));
    }
    Stream(payload, [&](std::span<const std::byte> piece) { file.Write(piece); });
  }
  CIRCLET_CHECK(file.Size() == plan.file_bytes, "{} bytes written, {} planned", file.Size(), plan.file_bytes);
  file.Commit();
  return plan.file_bytes;
}

std::vector<std::byte> Serialize(const Model& model, const WriteOptions& options) {
  const FilePlan plan = Plan(model, options);
  std::vector<std::byte> file(static_cast<size_t>(plan.file_bytes));
  std::ranges::copy(plan.head, file.begin());
  for (const Payload& payload : plan.payloads) {
    if (payload.inline_vector) {
      const auto length = static_cast<uint32_t>(payload.bytes);
      std::memcpy(file.data() + payload.offset - kLengthBytes, &length, kLengthBytes);
    }
    auto to = file.begin() + payload.offset;
    Stream(payload, [&](std::span<const std::byte> piece) { to = std::ranges::copy(piece, to).out; });
  }
  return file;
}

}  // namespace circlet::circle
