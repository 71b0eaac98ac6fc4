#pragma once

// Two hash tables for the half million entries of a large tokenizer: open addressing in one block of memory, built
// once, never shrunk. std::unordered_map takes three times as long to fill and to search here.

#include <bit>
#include <cstdint>
#include <functional>
#include <string_view>
#include <vector>

namespace circlet {

// Pair of 32-bit numbers -> 32-bit number.
class PairTable {
 public:
  static constexpr uint32_t kNone = UINT32_MAX;

  void Reserve(size_t count) {
    slots_.assign(std::bit_ceil(2 * count + 2), Slot{});
    used_ = 0;
  }
  uint32_t Find(uint32_t a, uint32_t b) const {
    if (slots_.empty()) return kNone;
    const uint64_t key = Key(a, b);
    for (size_t i = Home(key);; i = (i + 1) & (slots_.size() - 1)) {
      if (slots_[i].value == kNone) return kNone;
      if (slots_[i].key == key) return slots_[i].value;
    }
  }
  // Replaces the value of a pair that is there already; `value` is not kNone.
  void Set(uint32_t a, uint32_t b, uint32_t value) {
    if (2 * (used_ + 1) > slots_.size()) Grow();
    const uint64_t key = Key(a, b);
    size_t i = Home(key);
    while (slots_[i].value != kNone && slots_[i].key != key) i = (i + 1) & (slots_.size() - 1);
    used_ += slots_[i].value == kNone;
    slots_[i] = {key, value};
  }

 private:
  struct Slot {
    uint64_t key = 0;
    uint32_t value = kNone;
  };

  static uint64_t Key(uint32_t a, uint32_t b) { return uint64_t{a} << 32 | b; }
  // Multiplicative hashing: the high bits of the product are the well-mixed ones.
  size_t Home(uint64_t key) const { return (key * 0x9e3779b97f4a7c15u) >> (64 - std::countr_zero(slots_.size())); }
  void Grow() {
    std::vector<Slot> old = std::move(slots_);
    slots_.assign(std::max<size_t>(16, 2 * old.size()), Slot{});
    used_ = 0;
    for (const Slot& slot : old) {
      if (slot.value != kNone) Set(static_cast<uint32_t>(slot.key >> 32), static_cast<uint32_t>(slot.key), slot.value);
    }
  }

  std::vector<Slot> slots_;
  size_t used_ = 0;
};

// Piece -> id; the pieces themselves stay with the caller, in a list indexed by id.
class PieceTable {
 public:
  static constexpr int32_t kNone = -1;

  void Reserve(size_t count) { slots_.assign(std::bit_ceil(2 * count + 2), Slot{}); }
  int32_t Find(std::string_view piece, const std::vector<std::string_view>& pieces) const {
    return slots_[Home(piece, pieces)].id;
  }
  // `pieces[id]` must hold the piece; no more pieces than were reserved.
  void Insert(int32_t id, const std::vector<std::string_view>& pieces) {
    slots_[Home(pieces[id], pieces)] = {Hash(pieces[id]), id};
  }

 private:
  struct Slot {
    uint32_t hash = 0;
    int32_t id = kNone;
  };

  static uint32_t Hash(std::string_view piece) { return static_cast<uint32_t>(std::hash<std::string_view>()(piece)); }
  // The slot that holds the piece, or the free one where it belongs.
  size_t Home(std::string_view piece, const std::vector<std::string_view>& pieces) const {
    const uint32_t hash = Hash(piece);
    size_t i = hash & (slots_.size() - 1);
    while (slots_[i].id != kNone && (slots_[i].hash != hash || pieces[slots_[i].id] != piece))
      i = (i + 1) & (slots_.size() - 1);
    return i;
  }

  std::vector<Slot> slots_;
};

}  // namespace circlet
