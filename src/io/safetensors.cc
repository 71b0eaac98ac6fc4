#include "circlet/io/safetensors.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "circlet/io/names.h"
#include "io/mapped_file.h"

namespace circlet {
namespace fs = std::filesystem;
namespace {

using Json = nlohmann::json;

static_assert(std::endian::native == std::endian::little, "tensor bytes are used as they lie in the file");

constexpr int64_t kHeaderLimitBytes = int64_t{100} << 20;  // as in the format's own reader
constexpr std::string_view kMetadataKey = "__metadata__";
constexpr std::string_view kSingleFile = "model.safetensors";
constexpr std::string_view kIndexFile = "model.safetensors.index.json";

struct TypeName {
  std::string_view name;
  DType type;
};
constexpr std::array<TypeName, 13> kTypeNames{{{"F64", DType::kF64},
                                               {"F32", DType::kF32},
                                               {"F16", DType::kF16},
                                               {"BF16", DType::kBF16},
                                               {"I64", DType::kI64},
                                               {"I32", DType::kI32},
                                               {"I16", DType::kI16},
                                               {"I8", DType::kI8},
                                               {"U64", DType::kU64},
                                               {"U32", DType::kU32},
                                               {"U16", DType::kU16},
                                               {"U8", DType::kU8},
                                               {"BOOL", DType::kBool}}};

// Types of the format that circlet has no tensors of, with their bits. A tensor of one is passed over until somebody
// asks for it: a checkpoint may hold parts that are not run.
struct OpaqueType {
  std::string_view name;
  int64_t bits;
};
constexpr std::array<OpaqueType, 11> kOpaqueTypes{{{"F4", 4},
                                                   {"F6_E2M3", 6},
                                                   {"F6_E3M2", 6},
                                                   {"F8_E5M2", 8},
                                                   {"F8_E4M3", 8},
                                                   {"F8_E8M0", 8},
                                                   {"F8_E4M3FNUZ", 8},
                                                   {"F8_E5M2FNUZ", 8},
                                                   {"C64", 64},
                                                   {"I4", 4},
                                                   {"U4", 4}}};

std::string KnownTypes() {
  std::string known;
  for (const TypeName& entry : kTypeNames) known += (known.empty() ? "" : ", ") + std::string(entry.name);
  return known;
}

struct Entry {
  std::string name;
  TensorType type;
  std::string_view opaque;  // the type's name when it is one of kOpaqueTypes; `type` then counts its bytes
  int64_t begin, end;       // bytes of the data part
};

std::optional<int64_t> NonNegative(const Json& value) {
  if (!value.is_number_unsigned()) return std::nullopt;
  const auto number = value.get<uint64_t>();
  return std::in_range<int64_t>(number) ? std::optional(static_cast<int64_t>(number)) : std::nullopt;
}

int64_t BytesOf(const Shape& shape, int64_t bits) {
  const int64_t elements = shape.Elements();  // an Error past int64
  if (elements > std::numeric_limits<int64_t>::max() / bits) Fail("{} has too many elements", shape.ToString());
  return (elements * bits + 7) / 8;
}

const Json& Field(const Json& fields, const char* name) {
  const auto place = fields.find(name);
  if (place == fields.end()) Fail("\"{}\" is missing; the file is damaged", name);
  return *place;
}

// One tensor of the header; errors leave file and tensor to the caller.
Entry ParseEntry(const std::string& name, const Json& fields, int64_t data_bytes) {
  if (!fields.is_object()) Fail("expected an object with dtype, shape and data_offsets, found {}", Shown(fields));
  Entry entry{.name = name};
  const Json& dtype = Field(fields, "dtype");
  const auto known = std::ranges::find_if(kTypeNames, [&](const TypeName& type) { return dtype == type.name; });
  const auto opaque = std::ranges::find_if(kOpaqueTypes, [&](const OpaqueType& type) { return dtype == type.name; });
  if (known == kTypeNames.end() && opaque == kOpaqueTypes.end())
    Fail("unknown dtype {}; known are {}", Shown(dtype), KnownTypes());

  const Json& shape = Field(fields, "shape");
  std::vector<int64_t> sizes;
  for (const Json& size : shape.is_array() ? shape : Json::array({nullptr})) {
    const std::optional<int64_t> number = NonNegative(size);
    if (!number) Fail("shape must be a list of sizes from 0, found {}; the file is damaged", Shown(shape));
    sizes.push_back(*number);
  }
  entry.type.shape = Shape(std::move(sizes));
  if (opaque != kOpaqueTypes.end()) {
    entry.opaque = opaque->name;
    entry.type = {DType::kU8, {BytesOf(entry.type.shape, opaque->bits)}};
  } else {
    entry.type.dtype = known->type;
  }

  const Json& offsets = Field(fields, "data_offsets");
  const bool pair = offsets.is_array() && offsets.size() == 2;
  const std::optional<int64_t> begin = pair ? NonNegative(offsets[0]) : std::nullopt;
  const std::optional<int64_t> end = pair ? NonNegative(offsets[1]) : std::nullopt;
  if (!begin || !end || *begin > *end) {
    Fail("data_offsets must be [begin, end] with 0 <= begin <= end, found {}; the file is damaged", Shown(offsets));
  }
  entry.begin = *begin;
  entry.end = *end;
  if (entry.end > data_bytes) {
    Fail("ends at data byte {}, the file has {}; the file is cut: copy or download it again", entry.end, data_bytes);
  }
  if (const int64_t bytes = entry.type.Bytes(); bytes != entry.end - entry.begin) {
    Fail("{} takes {} bytes, data_offsets [{}, {}] hold {}; the file is damaged", entry.type.ToString(), bytes,
         entry.begin, entry.end, entry.end - entry.begin);
  }
  return entry;
}

// Every data byte belongs to exactly one tensor, as the format asks.
void CheckLayout(std::vector<Entry>& entries, int64_t data_bytes) {
  std::ranges::sort(entries, {}, [](const Entry& entry) { return std::pair(entry.begin, entry.end); });
  int64_t end = 0;
  const Entry* before = nullptr;
  for (const Entry& entry : entries) {
    if (entry.begin < end) {
      Fail("tensors \"{}\" (bytes {} to {}) and \"{}\" (bytes {} to {}) overlap; the file is damaged",
           Shortened(before->name), before->begin, before->end, Shortened(entry.name), entry.begin, entry.end);
    }
    if (entry.begin > end) {
      Fail("tensor \"{}\": begins at data byte {}, expected {}: bytes between belong to no tensor; the file is damaged",
           Shortened(entry.name), entry.begin, end);
    }
    end = entry.end;
    before = &entry;
  }
  if (end != data_bytes) {
    Fail("{} bytes after the last tensor belong to none (tensors end at data byte {} of {}); the file is damaged",
         data_bytes - end, end, data_bytes);
  }
}

std::map<std::string, std::string> ParseMetadata(const Json& value) {
  if (value.is_null()) return {};  // as the format's own reader has it
  if (!value.is_object()) Fail("{}: expected an object of strings, found {}", kMetadataKey, Shown(value));
  std::map<std::string, std::string> metadata;
  for (const auto& [key, text] : value.items()) {
    if (!text.is_string()) Fail("{}: \"{}\" must be a string, found {}", kMetadataKey, Shortened(key), Shown(text));
    metadata[key] = text.get<std::string>();
  }
  return metadata;
}

size_t Alignment(DType type) { return static_cast<size_t>(std::max(1, BitWidth(type) / 8)); }

}  // namespace

SafetensorsFile SafetensorsFile::Open(const fs::path& path) {
  SafetensorsFile file;
  file.path_ = path;
  file.mapping_ = MappedFile::Open(path);
  const std::span<const std::byte> bytes = file.mapping_->Bytes();
  constexpr size_t kPrefix = 8;
  if (bytes.size() < kPrefix) {
    Fail("{}: has {} bytes, a safetensors file has at least 8; is it the right file, and complete?", path.string(),
         bytes.size());
  }
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data(), kPrefix);
  if (header_bytes > static_cast<uint64_t>(kHeaderLimitBytes)) {
    Fail("{}: the header's length is {}, at most {} is allowed; is it a safetensors file?", path.string(), header_bytes,
         kHeaderLimitBytes);
  }
  if (header_bytes > bytes.size() - kPrefix) {
    Fail("{}: the header's length is {}, the file has {} bytes after it; the file is cut: copy or download it again",
         path.string(), header_bytes, bytes.size() - kPrefix);
  }
  const std::span<const std::byte> data = bytes.subspan(kPrefix + header_bytes);
  const auto data_bytes = static_cast<int64_t>(data.size());
  const Json header =
      ParseJson({reinterpret_cast<const char*>(bytes.data()) + kPrefix, header_bytes}, path.string() + ": header");
  if (!header.is_object()) Fail("{}: header: expected an object, found {}", path.string(), header.type_name());

  std::vector<Entry> entries;
  Within(path.string(), [&] {
    for (const auto& item : header.items()) {
      if (item.key() == kMetadataKey) {
        file.metadata_ = ParseMetadata(item.value());
      } else {
        Within(fmt::format("tensor \"{}\"", Shortened(item.key())),
               [&] { entries.push_back(ParseEntry(item.key(), item.value(), data_bytes)); });
      }
    }
    CheckLayout(entries, data_bytes);
  });
  for (const Entry& entry : entries) {
    if (!entry.opaque.empty()) {
      file.opaque_.emplace(entry.name, entry.opaque);
      continue;
    }
    const std::byte* start = data.data() + entry.begin;
    const Tensor mapped(entry.type, const_cast<std::byte*>(start), file.mapping_);
    const bool aligned = reinterpret_cast<uintptr_t>(start) % Alignment(entry.type.dtype) == 0;
    file.tensors_.emplace(entry.name, aligned ? mapped : mapped.Clone());
  }
  return file;
}

const Tensor* SafetensorsFile::Find(std::string_view name) const {
  const auto place = tensors_.find(std::string(name));
  return place == tensors_.end() ? nullptr : &place->second;
}

const Tensor& SafetensorsFile::Get(std::string_view name) const {
  if (const Tensor* tensor = Find(name)) return *tensor;
  if (const auto opaque = opaque_.find(name); opaque != opaque_.end())
    Fail("{}: tensor \"{}\" is of type {}, which circlet does not read; known are {}", path_.string(), Shortened(name),
         opaque->second, KnownTypes());
  std::vector<std::string> names;
  for (const auto& [known, unused] : tensors_) names.push_back(known);
  Fail("{}: tensor \"{}\" is missing among {}{}", path_.string(), Shortened(name), names.size(),
       NearestHint(name, names));
}

void SafetensorsFile::Release(const Tensor& tensor) const {
  mapping_->Release({tensor.Raw(), static_cast<size_t>(tensor.Bytes())});
}

void SafetensorsFile::Prefetch(const Tensor& tensor) const {
  mapping_->Prefetch({tensor.Raw(), static_cast<size_t>(tensor.Bytes())});
}

void SafetensorsFile::RequireUnchanged() const { mapping_->RequireUnchanged(); }

// --- Checkpoint ---

namespace {

// The shards that an index lists, sorted, "./" in front of a name taken off.
std::vector<std::string> ReadShards(const fs::path& index_path) {
  const Json index = ReadJson(index_path);
  const JsonObject map = JsonObject(index, index_path.string()).Object("weight_map");
  std::set<std::string> shards;
  for (const std::string& name : map.Keys()) {
    auto shard = map.Required<std::string>(name);
    while (shard.starts_with("./")) shard.erase(0, 2);
    // The checkpoint may come from anywhere: it must not make us open files elsewhere.
    if (shard.empty() || shard == "." || shard == ".." ||
        shard.find_first_of(std::string_view("/\\\0", 3)) != shard.npos) {
      map.FailAt(name,
                 fmt::format("the shard \"{}\" is no plain file name; shards lie beside the index", Shortened(shard)));
    }
    shards.insert(std::move(shard));
  }
  if (shards.empty()) map.FailAt("", "lists no tensors; the index is damaged: download it again");
  return {shards.begin(), shards.end()};
}

bool SameBytes(const Tensor& a, const Tensor& b) {
  return a.Type() == b.Type() && std::memcmp(a.Raw(), b.Raw(), static_cast<size_t>(a.Bytes())) == 0;
}

}  // namespace

std::vector<std::string> Checkpoint::FilesOf(const fs::path& directory) {
  if (!fs::is_directory(directory)) Fail("{}: is no directory; name the checkpoint's directory", directory.string());
  if (fs::exists(directory / kSingleFile)) return {std::string(kSingleFile)};
  const fs::path index_path = directory / kIndexFile;
  if (!fs::exists(index_path)) {
    Fail("{}: holds neither {} nor {}; is it a checkpoint directory, downloaded completely?", directory.string(),
         kSingleFile, kIndexFile);
  }
  return ReadShards(index_path);
}

Checkpoint Checkpoint::Open(const fs::path& directory) {
  Checkpoint checkpoint;
  checkpoint.directory_ = directory;
  for (const std::string& name : FilesOf(directory)) {
    if (!fs::exists(directory / name))
      Fail("{}: shard \"{}\" of {} is missing; download it", directory.string(), name, kIndexFile);
    const int number = static_cast<int>(checkpoint.files_.size());
    const SafetensorsFile& file = checkpoint.files_.emplace_back(SafetensorsFile::Open(directory / name));
    for (const auto& [tensor, value] : file.Tensors()) {
      const auto [place, is_new] = checkpoint.file_of_.emplace(tensor, number);
      if (is_new) continue;
      const SafetensorsFile& other = checkpoint.files_[place->second];
      if (!SameBytes(value, *other.Find(tensor)))
        Fail("{}: tensor \"{}\" is also in {}, with other values; are the files of one download?", file.Path().string(),
             Shortened(tensor), other.Path().filename().string());
    }
    for (const auto& [tensor, type] : file.Opaque()) checkpoint.opaque_.emplace(tensor, type);
  }
  return checkpoint;
}

const Tensor* Checkpoint::Find(std::string_view name) const {
  const auto place = file_of_.find(name);
  return place == file_of_.end() ? nullptr : files_[place->second].Find(name);
}

const Tensor& Checkpoint::Get(std::string_view name, const Shape& expected) const {
  const Tensor* tensor = Find(name);
  if (tensor == nullptr) {
    Fail("{}: tensor \"{}\" {} is missing{}; was a shard left out of the download, or is config.json of another model?",
         directory_.string(), name, expected.ToString(), NearestHint(name, Names()));
  }
  if (tensor->GetShape() != expected) {
    Fail("{}: tensor \"{}\" has shape {}, config.json asks for {}; are the files of one checkpoint?",
         (directory_ / FileOf(name)).string(), name, tensor->GetShape().ToString(), expected.ToString());
  }
  return *tensor;
}

std::vector<std::string> Checkpoint::Names() const {
  std::vector<std::string> names;
  for (const auto& [name, unused] : file_of_) names.push_back(name);
  return names;
}

std::string Checkpoint::FileOf(std::string_view name) const {
  const auto place = file_of_.find(name);
  CIRCLET_CHECK(place != file_of_.end(), "the checkpoint has no tensor \"{}\"", name);
  return files_[place->second].Path().filename().string();
}

void Checkpoint::Release(std::string_view name) const {
  const auto place = file_of_.find(name);
  CIRCLET_CHECK(place != file_of_.end(), "the checkpoint has no tensor \"{}\"", name);
  const SafetensorsFile& file = files_[place->second];
  file.Release(*file.Find(name));
}

void Checkpoint::Prefetch(std::string_view name) const {
  const auto place = file_of_.find(name);
  CIRCLET_CHECK(place != file_of_.end(), "the checkpoint has no tensor \"{}\"", name);
  const SafetensorsFile& file = files_[place->second];
  file.Prefetch(*file.Find(name));
}

void Checkpoint::RequireUnchanged() const {
  for (const SafetensorsFile& file : files_) file.RequireUnchanged();
}

// --- Writer ---

struct SafetensorsWriter::State {
  std::map<std::string, std::string> metadata;
  std::vector<Entry> entries;
  std::set<std::string> names;
  size_t written = 0;         // whole tensors
  int64_t partial_bytes = 0;  // of the tensor after them
  AtomicFile file;

  // JSON by hand: the order of declaration has to survive.
  void WriteHeader() {
    std::string header = "{";
    if (!metadata.empty()) header += fmt::format("\"{}\":{}", kMetadataKey, Json(metadata).dump());
    for (const Entry& entry : entries) {
      const auto dtype = std::ranges::find(kTypeNames, entry.type.dtype, &TypeName::type);
      header +=
          fmt::format("{}{}:{{\"dtype\":\"{}\",\"shape\":{},\"data_offsets\":[{},{}]}}", header.size() > 1 ? "," : "",
                      Json(entry.name).dump(), dtype->name, entry.type.shape.ToString(), entry.begin, entry.end);
    }
    header += '}';
    header.resize((header.size() + 7) / 8 * 8, ' ');
    const uint64_t length = header.size();
    file.Write(std::as_bytes(std::span(&length, 1)));
    file.Write(header);
  }
};

SafetensorsWriter::SafetensorsWriter(fs::path path, std::map<std::string, std::string> metadata)
    : state_(new State{.metadata = std::move(metadata), .file = AtomicFile(std::move(path))}) {}
SafetensorsWriter::~SafetensorsWriter() = default;
SafetensorsWriter::SafetensorsWriter(SafetensorsWriter&&) noexcept = default;

void SafetensorsWriter::Declare(std::string name, TensorType type) {
  State& state = *state_;
  CIRCLET_CHECK(state.file.Size() == 0, "\"{}\" is declared behind the first Write", name);
  CIRCLET_CHECK(name != kMetadataKey && state.names.insert(name).second, "\"{}\" is declared twice", name);
  if (std::ranges::find(kTypeNames, type.dtype, &TypeName::type) == kTypeNames.end()) {
    Fail("{}: tensor \"{}\": safetensors has no {}; known are {}", state.file.Path().string(), name, Name(type.dtype),
         KnownTypes());
  }
  const int64_t begin = state.entries.empty() ? 0 : state.entries.back().end;
  const int64_t bytes = type.Bytes();
  state.entries.push_back(
      {.name = std::move(name), .type = std::move(type), .opaque = {}, .begin = begin, .end = begin + bytes});
}

void SafetensorsWriter::Write(const Tensor& tensor) {
  State& state = *state_;
  CIRCLET_CHECK(state.written < state.entries.size(), "{} tensors were declared", state.entries.size());
  const Entry& entry = state.entries[state.written];
  CIRCLET_CHECK(state.partial_bytes == 0, "\"{}\" has {} bytes already", entry.name, state.partial_bytes);
  CIRCLET_CHECK(tensor.Type() == entry.type, "\"{}\" was declared as {}, is {}", entry.name, entry.type.ToString(),
                tensor.Type().ToString());
  Append({tensor.Raw(), static_cast<size_t>(tensor.Bytes())});
}

void SafetensorsWriter::Append(std::span<const std::byte> bytes) {
  State& state = *state_;
  CIRCLET_CHECK(state.written < state.entries.size(), "{} tensors were declared", state.entries.size());
  const Entry& entry = state.entries[state.written];
  const int64_t size = entry.end - entry.begin;
  const int64_t left = size - state.partial_bytes;
  CIRCLET_CHECK(std::ssize(bytes) <= left, "\"{}\" has {} bytes left, {} come", entry.name, left, bytes.size());
  if (state.file.Size() == 0) state.WriteHeader();
  state.file.Write(bytes);
  state.partial_bytes += std::ssize(bytes);
  if (state.partial_bytes < size) return;
  ++state.written;
  state.partial_bytes = 0;
}

void SafetensorsWriter::Finish() {
  State& state = *state_;
  CIRCLET_CHECK(state.written == state.entries.size(), "{} of {} declared tensors were written", state.written,
                state.entries.size());
  if (state.entries.empty()) state.WriteHeader();
  state.file.Commit();
}

void WriteSafetensors(const fs::path& path, const std::map<std::string, Tensor>& tensors,
                      const std::map<std::string, std::string>& metadata) {
  SafetensorsWriter writer(path, metadata);
  for (const auto& [name, tensor] : tensors) writer.Declare(name, tensor.Type());
  for (const auto& [name, tensor] : tensors) writer.Write(tensor);
  writer.Finish();
}

}  // namespace circlet
