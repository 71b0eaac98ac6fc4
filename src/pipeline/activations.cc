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

void ActivationStore::Drop(const std::string& key, int kept) {
  const auto it = tensors_.find(key);
  if (it == tensors_.end()) return;
  std::erase_if(it->second, [&](const auto& entry) {
    if (entry.first.first == kept) return false;
    bytes_ -= entry.second.Bytes();
    return true;
  });
}

}  // namespace circlet
