#pragma once

// When values of the store are made, read for the last time and dropped, and how much stands in it: derived from what
// phases declare.

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "circlet/quant/calibration.h"
#include "pipeline/phase.h"

namespace circlet {

// What one phase does to the store.
struct PhaseFlow {
  std::string name;
  struct Made {
    std::string key;
    int64_t bytes = 0;       // of all items of this process, in the chains that they run in
    int64_t kept_bytes = 0;  // of those, the verification sample's
  };
  std::vector<Made> makes;              // by the stage
  std::vector<std::string> reads;       // by the stage, of every item
  std::vector<Made> unit_makes;         // by the units, of the verification sample
  std::vector<std::string> unit_reads;  // likewise
  std::vector<std::string> codes;       // parameters whose codes `unit_makes` counts
};

// `writes`: whether this process writes units. What they read counts in every process, so that all drop the same.
PhaseFlow FlowOf(const PhaseSpec& phase, int rank, bool writes);

// A parameter's codes are a value too, where a unit behind a later phase is written from them: they are made once, with
// the stage that multiplies the parameter. Not those of tables whose rows steps look up (Step::fresh). Adds them to
// `flows` as made and read by units.
std::string CodesKey(const std::string& parameter);
inline constexpr int kCodesItem = -1;  // whose value they are in the store
void AddCodes(std::span<const PhaseSpec> phases, const Calibration& calibration, std::vector<PhaseFlow>& flows);

class Schedule {
 public:
  // Throws Bug when a phase reads what no phase up to it makes.
  explicit Schedule(std::vector<PhaseFlow> phases);

  struct Drop {
    std::string key;
    bool keeps_verification = false;  // a unit reads the verification sample's value later
    bool operator==(const Drop&) const = default;
  };
  // What nothing reads behind a phase. The stage that reads a key last needs all its items, the units behind it only
  // those of the verification sample.
  const std::vector<Drop>& After(int phase) const { return drops_[phase]; }

  // Parameters whose codes the store takes behind a phase.
  const std::vector<std::string>& CodesMadeIn(int phase) const { return codes_[phase]; }

  // What the store holds at the end of a phase, before anything is dropped.
  int64_t BytesIn(int phase) const { return bytes_[phase]; }
  int64_t PeakBytes() const;

 private:
  std::vector<std::vector<Drop>> drops_;  // by phase
  std::vector<std::vector<std::string>> codes_;
  std::vector<int64_t> bytes_;
};

}  // namespace circlet
