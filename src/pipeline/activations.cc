#include "pipeline/activations.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "io/mapped_file.h"
#include "io/sha256.h"
#include "io/system_error.h"

namespace circlet {
namespace fs = std::filesystem;

namespace {

std::string HashOf(const Tensor& tensor) {
  Sha256Stream stream;
  const std::string type = tensor.Type().ToString();
  stream.Add(std::as_bytes(std::span(type)));
  stream.Add({tensor.Raw(), static_cast<size_t>(tensor.Bytes())});
  return stream.Finish();
}

}  // namespace

// Gone with its last owner unless it was told to stay. With a name it is append-only, and open only while something is
// transferred: there is one for each key, and a process may have few descriptors. Without a name there is one for all
// keys, and room that is given back is used again.
class ActivationStore::File {
 public:
  File(fs::path path, int number, Files kind) : path_(std::move(path)), number_(number) {
    if (kind == Files::kNamed) {
      Descriptor(*this, "written", O_CREAT);
    } else if (nameless_ = OpenNameless(path_.parent_path()); nameless_ < 0) {
      FailErrno(path_.parent_path(), "written");
    }
  }
  ~File() {
    if (nameless_ >= 0) {
      close(nameless_);
    } else if (!stays_) {
      unlink(path_.c_str());
    }
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
  const fs::path& Path() const { return path_; }
  void Cut(int64_t size) {
    const Descriptor file(*this, "cut to size");
    if (const off_t found = lseek(file.number, 0, SEEK_END); found < size)
      Fail("{}: has {} bytes of {}; start again with --force", path_.string(), found, size);
    if (ftruncate(file.number, size) != 0) FailErrno(path_, "cut to size");
    size_ = size;
  }

  int64_t Add(std::span<const std::byte> bytes) {
    const int64_t offset = Take(static_cast<int64_t>(bytes.size()));
    Transfer(offset, bytes.size(), "written", [&](int file, size_t done, off_t at) {
      return pwrite(file, bytes.data() + done, bytes.size() - done, at);
    });
    return offset;
  }

  // Room that nobody reads any more.
  void GiveBack(int64_t offset, int64_t bytes) {
    auto next = free_.lower_bound(offset);
    if (next != free_.end() && next->first == offset + bytes) {
      bytes += next->second;
      next = free_.erase(next);
    }
    if (next != free_.begin() && std::prev(next)->first + std::prev(next)->second == offset) {
      std::prev(next)->second += bytes;
    } else {
      free_.emplace_hint(next, offset, bytes);
    }
  }

  void Read(int64_t offset, std::span<std::byte> bytes) const {
    Transfer(offset, bytes.size(), "read", [&](int file, size_t done, off_t at) {
      return pread(file, bytes.data() + done, bytes.size() - done, at);
    });
  }

 private:
  struct Descriptor {
    Descriptor(const File& file, std::string_view done, int flags = 0)
        : held(file.nameless_ >= 0),
          number(held ? file.nameless_ : open(file.path_.c_str(), O_RDWR | O_CLOEXEC | flags, 0666)) {
      if (number < 0) FailErrno(file.path_, done);
    }
    ~Descriptor() {
      if (!held) close(number);
    }
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    const bool held;
    const int number;
  };

  // The first free room that is large enough, or else the end.
  int64_t Take(int64_t bytes) {
    const auto room = std::ranges::find_if(free_, [&](const auto& free) { return free.second >= bytes; });
    if (room == free_.end()) return std::exchange(size_, size_ + bytes);
    const auto [offset, size] = *room;
    free_.erase(room);
    if (size > bytes) free_.emplace(offset + bytes, size - bytes);
    return offset;
  }

  template <typename Call>
  void Transfer(int64_t offset, size_t size, const char* verb, const Call& call) const {
    const Descriptor file(*this, verb);
    for (size_t done = 0; done < size;) {
      const ssize_t moved = call(file.number, done, static_cast<off_t>(offset + static_cast<int64_t>(done)));
      if (moved < 0 && errno == EINTR) continue;
      if (moved < 0) FailErrno(path_, verb);
      if (moved == 0)
        Fail("{}: ends before byte {}; another program has changed it during the run, start again", path_.string(),
             offset + static_cast<int64_t>(size));
      done += static_cast<size_t>(moved);
    }
  }

  fs::path path_;
  int number_;
  int nameless_ = -1;  // descriptor
  int64_t size_ = 0;
  int64_t synced_ = -1;
  bool stays_ = false;
  std::map<int64_t, int64_t> free_;  // offset -> bytes; no two touch
};

ActivationStore::~ActivationStore() {
  for (const std::shared_ptr<File>& file : dropped_) file->Stay();
  for (const auto& [key, entry] : entries_)
    if (entry.file && entry.file->Promised()) entry.file->Stay();
}

void ActivationStore::Write(Entry& entry, Slot& slot, const Tensor& tensor) {
  if (entry.file == nullptr && files_ == Files::kNameless) {
    if (nameless_ == nullptr) nameless_ = OpenFile(0);
    entry.file = nameless_;
  } else if (entry.file == nullptr) {
    CreateDirectories(directory_);
    entry.file = OpenFile(next_file_++);
  }
  slot.offset = entry.file->Add({tensor.Raw(), static_cast<size_t>(tensor.Bytes())});
  if (files_ == Files::kNamed) slot.hash = HashOf(tensor);
}

std::shared_ptr<ActivationStore::File> ActivationStore::OpenFile(int number) const {
  return std::make_shared<File>(directory_ / fmt::format("{}.values", number), number, files_);
}

void ActivationStore::GiveUp(Entry& entry) {
  if (entry.file == nullptr) return;
  if (entry.file->Promised()) dropped_.push_back(entry.file);
  if (files_ == Files::kNamed) return;
  for (const auto& [owner, slot] : entry.slots)
    if (slot.offset >= 0) entry.file->GiveBack(slot.offset, slot.type.Bytes());
}

// Tensors for such readers leave memory, until `bytes` fit.
void ActivationStore::MakeRoom(Read readers, int64_t bytes) {
  if (directory_.empty()) return;
  for (auto& [key, entry] : entries_) {
    if (entry.read != readers) continue;
    for (auto& [owner, slot] : entry.slots) {
      if (memory_bytes_ + bytes <= budget_ - aside_) return;
      if (slot.memory.Empty()) continue;
      if (slot.offset < 0) Write(entry, slot, slot.memory);
      memory_bytes_ -= slot.type.Bytes();
      spilled_bytes_ += slot.type.Bytes();
      slot.memory = Tensor();
    }
  }
}

void ActivationStore::SetAside(int64_t bytes) {
  const std::lock_guard lock(mutex_);
  aside_ = bytes;
  MakeRoom(Read::kLate, 0);
  MakeRoom(Read::kSoon, 0);
}

void ActivationStore::Put(int item, Chain chain, const std::string& key, const Tensor& tensor, Read read) {
  const std::lock_guard lock(mutex_);
  Entry& entry = entries_[key];
  entry.read = read;
  const auto [slot, is_new] = entry.slots.try_emplace({item, chain}, Slot{.type = tensor.Type()});
  CIRCLET_CHECK(is_new, "item {} has {} already", item, key);
  held_bytes_ += tensor.Bytes();
  peak_bytes_ = std::max(peak_bytes_, held_bytes_);
  if (read == Read::kSoon) MakeRoom(Read::kLate, tensor.Bytes());
  if (directory_.empty() || memory_bytes_ + tensor.Bytes() <= budget_ - aside_) {
    memory_bytes_ += tensor.Bytes();
    slot->second.memory = tensor;
  } else {
    spilled_bytes_ += tensor.Bytes();
    Write(entry, slot->second, tensor);
  }
}

const ActivationStore::Entry& ActivationStore::EntryOf(const std::string& key, std::pair<int, Chain> owner) const {
  const auto it = entries_.find(key);
  const bool found = it != entries_.end() && it->second.slots.contains(owner);
  if (!found && restored_)
    Fail("{}: item {} has no {} among the values that the unfinished run saved; start again with --force",
         directory_.string(), owner.first, key);
  CIRCLET_CHECK(found, "item {} has no {}", owner.first, key);
  return it->second;
}

TensorType ActivationStore::TypeOf(int item, Chain chain, const std::string& key) const {
  const std::lock_guard lock(mutex_);
  return EntryOf(key, {item, chain}).slots.at({item, chain}).type;
}

bool ActivationStore::Has(int item, Chain chain, const std::string& key) const {
  const std::lock_guard lock(mutex_);
  const auto it = entries_.find(key);
  return it != entries_.end() && it->second.slots.contains({item, chain});
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

void ActivationStore::Drop(const std::string& key, const std::set<int>& kept) {
  const std::lock_guard lock(mutex_);
  const auto it = entries_.find(key);
  if (it == entries_.end()) return;
  Entry& entry = it->second;
  if (std::ranges::all_of(entry.slots, [&](const auto& slot) { return kept.contains(slot.first.first); })) {
    entry.read = Read::kLate;
    return;
  }
  std::map<std::pair<int, Chain>, Tensor> stay;
  for (auto& [owner, slot] : entry.slots) {
    if (!slot.memory.Empty()) memory_bytes_ -= slot.type.Bytes();
    held_bytes_ -= slot.type.Bytes();
    if (!kept.contains(owner.first)) continue;
    Tensor& tensor = stay[owner] = slot.memory;
    if (!tensor.Empty()) continue;
    tensor = Tensor::Uninitialized(slot.type);
    entry.file->Read(slot.offset, {tensor.Raw(), static_cast<size_t>(tensor.Bytes())});
  }
  GiveUp(entry);
  entries_.erase(it);
  for (const auto& [owner, tensor] : stay) {
    Entry& again = entries_[key];
    again.read = Read::kLate;
    again.slots[owner] = {.type = tensor.Type(), .memory = tensor};
    memory_bytes_ += tensor.Bytes();
    held_bytes_ += tensor.Bytes();
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
                       {"offset", slot.offset},
                       {"sha256", slot.hash}});
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
  restored_ = true;
  next_file_ = state.at("next_file").get<int>();
  std::vector<std::string> known;
  for (const auto& [key, described] : state.at("keys").items()) {
    Entry& entry = entries_[key];
    entry.file = OpenFile(described.at("file").get<int>());
    known.push_back(entry.file->Path().filename());
    if (entry.file->Number() >= next_file_)
      Fail("{}: is behind the next file {}; start again with --force", known.back(), next_file_);
    const auto size = described.at("bytes").get<int64_t>();
    entry.file->Cut(size);
    entry.file->Promise();
    entry.read = described.at("late").get<bool>() ? Read::kLate : Read::kSoon;
    for (const nlohmann::json& slot : described.at("slots")) RestoreSlot(entry, slot, size);
  }
  for (const fs::path& file : EntriesOf(directory_))
    if (std::find(known.begin(), known.end(), file.filename()) == known.end()) RemoveFile(file);
}

void ActivationStore::RestoreSlot(Entry& entry, const nlohmann::json& json, int64_t file_bytes) {
  const auto item = json.at("item").get<int>(), chain = json.at("chain").get<int>();
  Slot slot{
      .type = {DTypeFromName(json.at("dtype").get<std::string>()), Shape(json.at("shape").get<std::vector<int64_t>>())},
      .offset = json.at("offset").get<int64_t>(),
      .hash = json.at("sha256").get<std::string>()};
  const auto refuse = [&](std::string_view what) {
    Fail("{}: {} of item {} {}; start again with --force", entry.file->Path().string(), slot.type.ToString(), item,
         what);
  };
  if (chain != static_cast<int>(Chain::kFloat) && chain != static_cast<int>(Chain::kQuant))
    refuse(fmt::format("is of chain {}, known are 0 and 1", chain));
  if (slot.offset < 0 || slot.offset > file_bytes - slot.type.Bytes())
    refuse(fmt::format("at byte {} lies outside the {} bytes of its file", slot.offset, file_bytes));
  const Tensor found = Tensor::Uninitialized(slot.type);
  entry.file->Read(slot.offset, {found.Raw(), static_cast<size_t>(found.Bytes())});
  if (HashOf(found) != slot.hash) refuse("is not what the unfinished run saved (SHA-256)");
  if (!entry.slots.try_emplace({item, static_cast<Chain>(chain)}, std::move(slot)).second) refuse("is there twice");
  held_bytes_ += found.Bytes();
}

}  // namespace circlet
