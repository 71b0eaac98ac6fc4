#include "pipeline/activations.h"

#include "circlet/base/error.h"

namespace circlet {

void ActivationStore::Put(int item, Chain chain, const std::string& key, Tensor tensor) {
  Tensor& slot = tensors_[key][{item, chain}];
  if (!slot.Empty()) bytes_ -= slot.Bytes();
  bytes_ += tensor.Bytes();
  slot = std::move(tensor);
}

bool ActivationStore::Has(int item, Chain chain, const std::string& key) const {
  const auto it = tensors_.find(key);
  return it != tensors_.end() && it->second.contains({item, chain});
}

Tensor ActivationStore::Get(int item, Chain chain, const std::string& key) const {
  CIRCLET_CHECK(Has(item, chain, key), "item {} has no {}", item, key);
  return tensors_.at(key).at({item, chain});
}

void ActivationStore::Drop(const std::string& key) {
  const auto it = tensors_.find(key);
  if (it == tensors_.end()) return;
  for (const auto& [slot, tensor] : it->second) bytes_ -= tensor.Bytes();
  tensors_.erase(it);
}

}  // namespace circlet
