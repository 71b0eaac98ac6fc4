#include "pipeline/activations.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "io/system_error.h"

namespace circlet {
namespace fs = std::filesystem;

// Append-only; gone with its last owner unless it was told to stay. It is open only while something is transferred:
// there is one for each key, and a process may have few descriptors.
class ActivationStore::File {
 public:
  File(fs::path path, int number) : path_(std::move(path)), number_(number) { Descriptor(*this, "written", O_CREAT); }
  ~File() {
    if (!stays_) unlink(path_.c_str());
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int Number() const { return number_; }
  int64_t Size() const { return size_; }
  void Stay() { stays_ = true; }
  // Brings all of it to the disk: a saved state counts on it from now on.
  void Promise() {
    if (synced_ == size_) return;
    if (const Descriptor file(*this, "written"); fdatasync(file.number) != 0) FailErrno(path_, "written");
    synced_ = size_;
  }
  bool Promised() const { return synced_ >= 0; }
  void Cut(int64_t size) {
    const Descriptor file(*this, "cut to size");
    if (const off_t found = lseek(file.number, 0, SEEK_END); found < size)
      Fail("{}: has {} bytes of {}; start again with --force", path_.string(), found, size);
    if (ftruncate(file.number, size) != 0) FailErrno(path_, "cut to size");
    size_ = size;
  }

  int64_t Append(std::span<const std::byte> bytes) {
    const int64_t offset = size_;
    size_ += static_cast<int64_t>(bytes.size());
    Transfer(offset, bytes.size(), "written", [&](int file, size_t done, off_t at) {
      return pwrite(file, bytes.data() + done, bytes.size() - done, at);
    });
    return offset;
  }

  void Read(int64_t offset, std::span<std::byte> bytes) const {
    Transfer(offset, bytes.size(), "read", [&](int file, size_t done, off_t at) {
      return pread(file, bytes.data() + done, bytes.size() - done, at);
    });
  }

 private:
  struct Descriptor {
    Descriptor(const File& file, std::string_view done, int flags = 0)
        : number(open(file.path_.c_str(), O_RDWR | O_CLOEXEC | flags, 0666)) {
      if (number < 0) FailErrno(file.path_, done);
    }
    ~Descriptor() { close(number); }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    const int number;
  };

  template <typename Call>
  void Transfer(int64_t offset, size_t size, const char* verb, const Call& call) const {
    const Descriptor file(*this, verb);
    for (size_t done = 0; done < size;) {
      const ssize_t moved = call(file.number, done, static_cast<off_t>(offset + static_cast<int64_t>(done)));
      if (moved < 0 && errno == EINTR) continue;
      if (moved < 0) FailErrno(path_, verb);
      CIRCLET_CHECK(moved > 0, "{} ends before byte {}", path_.string(), offset + size);
      done += static_cast<size_t>(moved);
    }
  }

  fs::path path_;
  int number_;
  int64_t size_ = 0;
  int64_t synced_ = -1;
  bool stays_ = false;
};

ActivationStore::~ActivationStore() {
  for (const std::shared_ptr<File>& file : dropped_) file->Stay();
  for (const auto& [key, entry] : entries_)
    if (entry.file && entry.file->Promised()) entry.file->Stay();
}

void ActivationStore::Write(Entry& entry, Slot& slot, const Tensor& tensor) {
  if (entry.file == nullptr) {
    CreateDirectories(directory_);
    const int number = next_file_++;
    entry.file = std::make_shared<File>(directory_ / fmt::format("{}.values", number), number);
  }
  slot.offset = entry.file->Append({tensor.Raw(), static_cast<size_t>(tensor.Bytes())});
}

// Late readers' tensors leave memory, until `bytes` fit.
void ActivationStore::MakeRoom(int64_t bytes) {
  if (directory_.empty()) return;
  for (auto& [key, entry] : entries_) {
    if (entry.read != Read::kLate) continue;
    for (auto& [owner, slot] : entry.slots) {
      if (memory_bytes_ + bytes <= budget_) return;
      if (slot.memory.Empty()) continue;
      if (slot.offset < 0) Write(entry, slot, slot.memory);
      memory_bytes_ -= slot.type.Bytes();
      spilled_bytes_ += slot.type.Bytes();
      slot.memory = Tensor();
    }
  }
}

void ActivationStore::Put(int item, Chain chain, const std::string& key, const Tensor& tensor, Read read) {
  const std::lock_guard lock(mutex_);
  Entry& entry = entries_[key];
  entry.read = read;
  const auto [slot, is_new] = entry.slots.try_emplace({item, chain}, Slot{.type = tensor.Type()});
  CIRCLET_CHECK(is_new, "item {} has {} already", item, key);
  if (read == Read::kSoon) MakeRoom(tensor.Bytes());
  if (directory_.empty() || memory_bytes_ + tensor.Bytes() <= budget_) {
    memory_bytes_ += tensor.Bytes();
    slot->second.memory = tensor;
  } else {
    spilled_bytes_ += tensor.Bytes();
    Write(entry, slot->second, tensor);
  }
}

const ActivationStore::Entry& ActivationStore::EntryOf(const std::string& key, std::pair<int, Chain> owner) const {
  const auto it = entries_.find(key);
  CIRCLET_CHECK(it != entries_.end() && it->second.slots.contains(owner), "item {} has no {}", owner.first, key);
  return it->second;
}

TensorType ActivationStore::TypeOf(int item, Chain chain, const std::string& key) const {
  const std::lock_guard lock(mutex_);
  return EntryOf(key, {item, chain}).slots.at({item, chain}).type;
}

Tensor ActivationStore::Get(int item, Chain chain, const std::string& key) const {
  std::shared_ptr<File> file;
  Slot slot;
  {
    const std::lock_guard lock(mutex_);
    const Entry& entry = EntryOf(key, {item, chain});
    slot = entry.slots.at({item, chain});
    file = entry.file;
  }
  if (!slot.memory.Empty()) return slot.memory;
  Tensor tensor = Tensor::Uninitialized(slot.type);
  file->Read(slot.offset, {tensor.Raw(), static_cast<size_t>(tensor.Bytes())});
  return tensor;
}

void ActivationStore::Drop(const std::string& key, int kept) {
  const std::lock_guard lock(mutex_);
  const auto it = entries_.find(key);
  if (it == entries_.end()) return;
  Entry& entry = it->second;
  std::map<std::pair<int, Chain>, Tensor> stay;
  for (auto& [owner, slot] : entry.slots) {
    if (!slot.memory.Empty()) memory_bytes_ -= slot.type.Bytes();
    if (owner.first != kept) continue;
    Tensor& tensor = stay[owner] = slot.memory;
    if (!tensor.Empty()) continue;
    tensor = Tensor::Uninitialized(slot.type);
    entry.file->Read(slot.offset, {tensor.Raw(), static_cast<size_t>(tensor.Bytes())});
  }
  if (entry.file && entry.file->Promised()) dropped_.push_back(entry.file);
  entries_.erase(it);
  for (const auto& [owner, tensor] : stay) {
    Entry& again = entries_[key];
    again.read = Read::kLate;
    again.slots[owner] = {.type = tensor.Type(), .memory = tensor};
    memory_bytes_ += tensor.Bytes();
  }
}

nlohmann::json ActivationStore::Save() {
  const std::lock_guard lock(mutex_);
  nlohmann::json keys = nlohmann::json::object();
  for (auto& [key, entry] : entries_) {
    nlohmann::json slots = nlohmann::json::array();
    for (auto& [owner, slot] : entry.slots) {
      if (slot.offset < 0) Write(entry, slot, slot.memory);
      slots.push_back({{"item", owner.first},
                       {"chain", static_cast<int>(owner.second)},
                       {"dtype", Name(slot.type.dtype)},
                       {"shape", slot.type.shape.Sizes()},
                       {"offset", slot.offset}});
    }
    entry.file->Promise();
    keys[key] = {{"file", entry.file->Number()},
                 {"bytes", entry.file->Size()},
                 {"late", entry.read == Read::kLate},
                 {"slots", std::move(slots)}};
  }
  return {{"keys", std::move(keys)}, {"next_file", next_file_}};
}

void ActivationStore::Forget() {
  const std::lock_guard lock(mutex_);
  dropped_.clear();
}

void ActivationStore::Restore(const nlohmann::json& state) {
  const std::lock_guard lock(mutex_);
  CreateDirectories(directory_);
  next_file_ = state.at("next_file").get<int>();
  std::vector<std::string> known;
  for (const auto& [key, described] : state.at("keys").items()) {
    Entry& entry = entries_[key];
    const int number = described.at("file").get<int>();
    known.push_back(fmt::format("{}.values", number));
    entry.file = std::make_shared<File>(directory_ / known.back(), number);
    const auto size = described.at("bytes").get<int64_t>();
    entry.file->Cut(size);
    entry.file->Promise();
    entry.read = described.at("late").get<bool>() ? Read::kLate : Read::kSoon;
    for (const nlohmann::json& slot : described.at("slots")) {
      const std::pair owner{slot.at("item").get<int>(), static_cast<Chain>(slot.at("chain").get<int>())};
      entry.slots[owner] = {.type = {DTypeFromName(slot.at("dtype").get<std::string>()),
                                     Shape(slot.at("shape").get<std::vector<int64_t>>())},
                            .offset = slot.at("offset").get<int64_t>()};
      const Slot& restored = entry.slots[owner];
      if (restored.offset < 0 || restored.offset > size - restored.type.Bytes())
        Fail("{}: item {} lies outside the {} bytes of its file; start again with --force", key, owner.first, size);
    }
  }
  for (const auto& file : fs::directory_iterator(directory_))
    if (std::find(known.begin(), known.end(), file.path().filename()) == known.end()) fs::remove(file.path());
}

}  // namespace circlet
