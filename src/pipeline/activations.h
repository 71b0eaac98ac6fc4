#pragma once

#include <map>
#include <string>
#include <utility>

#include "circlet/base/tensor.h"

namespace circlet {

// The two chains of values that run through the stages: the float model's, and the one that is fake-quantized from the
// first stage on.
enum class Chain { kFloat, kQuant };

// What is passed from stage to stage, by item and name.
class ActivationStore {
 public:
  void Put(int item, Chain chain, const std::string& key, Tensor tensor);
  // CHECKs that it is there.
  Tensor Get(int item, Chain chain, const std::string& key) const;
  bool Has(int item, Chain chain, const std::string& key) const;
  // Forgets `key` of every item but `kept`.
  void Drop(const std::string& key, int kept = -1);
  int64_t Bytes() const { return bytes_; }

 private:
  using Slot = std::pair<int, Chain>;
  std::map<std::string, std::map<Slot, Tensor>> tensors_;
  int64_t bytes_ = 0;
};

}  // namespace circlet
