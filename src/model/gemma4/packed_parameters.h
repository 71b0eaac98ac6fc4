#pragma once

// Which parameters of a checkpoint are packed, and what of them lies where (docs/packed.md).

#include <map>
#include <string>
#include <vector>

#include "circlet/io/safetensors.h"
#include "circlet/model/gemma4/weights.h"

namespace circlet {

using StoredNames = std::map<std::string, std::string, std::less<>>;  // canonical -> stored

// Finds the tensors of packed parameters among the stored names, checks types, shapes and every scale, and takes them
// out of `names`.
class PackedFinder {
 public:
  PackedFinder(const Gemma4Config& config, const Checkpoint& checkpoint, StoredNames& names)
      : config_(config), checkpoint_(checkpoint), names_(names) {}

  // Whether the parameter is packed. If so it is added to `inventory`, or what is wrong with it to `problems`.
  bool Take(const Parameter& parameter, Inventory& inventory, std::vector<std::string>& problems);
  // Whether a tensor was not there at all.
  bool MissesTensors() const { return misses_tensors_; }
  // Steps of the caches of keys and values that layers say.
  void TakeCacheSteps(Inventory& inventory);

 private:
  PackedForm FormOf(const Parameter& parameter) const;
  // Types and shape are checked; throws Error.
  const Tensor& Part(const std::string& canonical, std::initializer_list<DType> types, const Shape& shape,
                     std::string* stored = nullptr);
  void TakeGemma(const Parameter& parameter, const std::string& module, PackedParameter& packed);
  void TakeGroups(const Parameter& parameter, const std::string& module, PackedParameter& packed);
  std::string WrittenName(const std::string& canonical) const;

  const Gemma4Config& config_;
  const Checkpoint& checkpoint_;
  StoredNames& names_;
  bool misses_tensors_ = false;
};

// The values or codes of a packed parameter (ModelWeights::Stored).
Tensor Unpacked(const Checkpoint& checkpoint, const PackedParameter& packed);
// A parameter in blocks as it is stored; `packed.form.group` is not 0.
BlockWeight BlocksOf(const Checkpoint& checkpoint, const PackedParameter& packed);

}  // namespace circlet
