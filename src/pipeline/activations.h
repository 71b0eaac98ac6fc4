#pragma once

// What is passed from stage to stage, in memory as far as the budget reaches and in files beyond it.

#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json_fwd.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "circlet/base/tensor.h"

namespace circlet {

// The two chains of values that run through the stages: the float model's, and the one that is fake-quantized from the
// first stage on.
enum class Chain { kFloat, kQuant };

// Tensors by key, item and chain. One named file for each key, so that a key's disk goes when the key does; without
// names one file for all, whose room goes to later keys. All functions may be called from several threads.
class ActivationStore {
 public:
  // Files go with the store, unless Save() has promised them to another process.
  ~ActivationStore();

  // Tensors past `memory_bytes` go to files in `directory`. Without it everything stays in memory.
  enum class Files {
    kNamed,    // for Save(); the directory is made when it is needed
    kNameless  // one, unlinked while it is open, so that nothing is left of it however the process ends
  };
  void UseFiles(std::filesystem::path directory, int64_t memory_bytes, Files files = Files::kNamed) {
    directory_ = std::move(directory);
    budget_ = memory_bytes;
    files_ = files;
  }

  // Leaves `bytes` of the budget to others until the next call; what does not fit beside them goes to files, that for
  // late readers first.
  void SetAside(int64_t bytes);

  // When values are read again: by the next stage, or one part at a time by stages far ahead. Those leave memory first.
  enum class Read { kSoon, kLate };

  // Throws Error when the disk is full.
  void Put(int item, Chain chain, const std::string& key, const Tensor& tensor, Read read = Read::kSoon);
  // CHECKs that it is there; behind Restore() a missing one is an Error.
  Tensor Get(int item, Chain chain, const std::string& key) const;
  TensorType TypeOf(int item, Chain chain, const std::string& key) const;
  bool Has(int item, Chain chain, const std::string& key) const;
  // Forgets `key` of every item but those of `kept`.
  void Drop(const std::string& key, const std::set<int>& kept = {});

  int64_t SpilledBytes() const { return spilled_bytes_; }  // that did not fit in memory, over the whole run
  int64_t PeakBytes() const { return peak_bytes_; }        // that lived at a time, in memory or in files

  // Brings everything to the disk and says where it lies, for Restore in another process; call it between stages. From
  // now on files of dropped keys stay until Forget(), so that an older state remains whole until the next one is safe.
  nlohmann::json Save();
  void Forget();
  // Takes the files of an earlier process and removes those that `state` does not know. Throws Error for a value that
  // is not what was saved.
  void Restore(const nlohmann::json& state);

 private:
  class File;
  struct Slot {
    TensorType type;
    Tensor memory;        // empty: in the file only
    int64_t offset = -1;  // in the file; -1: in memory only
    std::string hash;     // of what is in a named file, type and bytes
  };
  struct Entry {
    std::map<std::pair<int, Chain>, Slot> slots;
    std::shared_ptr<File> file;
    Read read = Read::kSoon;
  };
  std::shared_ptr<File> OpenFile(int number) const;
  // The caller holds the lock.
  const Entry& EntryOf(const std::string& key, std::pair<int, Chain> owner) const;
  void Write(Entry& entry, Slot& slot, const Tensor& tensor);
  void MakeRoom(Read readers, int64_t bytes);
  void GiveUp(Entry& entry);
  void RestoreSlot(Entry& entry, const nlohmann::json& json, int64_t file_bytes);

  std::filesystem::path directory_;
  Files files_ = Files::kNamed;
  int64_t budget_ = 0, aside_ = 0;
  bool restored_ = false;
  mutable std::mutex mutex_;
  std::map<std::string, Entry> entries_;
  std::shared_ptr<File> nameless_;
  std::vector<std::shared_ptr<File>> dropped_;
  int64_t memory_bytes_ = 0, spilled_bytes_ = 0;
  int64_t held_bytes_ = 0, peak_bytes_ = 0;
  int next_file_ = 0;
};

}  // namespace circlet
