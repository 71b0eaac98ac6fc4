#include "pipeline/gemma4/context.h"

#include <algorithm>

namespace circlet::gemma4 {

int64_t Sequence::FirstRead() const { return std::max<int64_t>(0, answer - 1); }

int64_t Sequence::Last() const {
  for (int64_t i = static_cast<int64_t>(keep.size()) - 1; i > 0; --i)
    if (keep[i] != 0) return i;
  return 0;
}

const Item* Context::Verify() const {
  const auto item = std::ranges::find(texts, ItemKind::kVerify, &Item::kind);
  return item == texts.end() ? nullptr : &*item;
}

const Item* Context::VerifyPicture() const {
  const Item* verify = Verify();
  if (verify == nullptr || SequenceOf(*verify).pictures.size() != 1) return nullptr;
  return &ImageItem(SequenceOf(*verify).pictures[0]);
}

Graph Context::Build(const std::function<void(const BlockBuilder&)>& body) const {
  Graph graph;
  body(BlockBuilder(graph, GetDialect()));
  return graph;
}

Tensor ChainTables::For(Chain chain, const std::string& point, const Tensor& table) {
  if (chain == Chain::kFloat) return table;
  const std::lock_guard lock(mutex_);
  Tensor& rounded = rounded_[table.Raw()];
  if (rounded.Empty()) rounded = Rounded(calibration_, point, table);
  return rounded;
}

UnitValue StoredAt(std::string key, int64_t position) {
  return {.reads = {{.key = std::move(key)}}, .make = [position](std::span<const Tensor> read) {
            return read[0].Slice(position, position + 1, 1).Clone();
          }};
}

UnitValue Given(std::function<Tensor()> make) {
  return {.make = [make = std::move(make)](std::span<const Tensor>) { return make(); }};
}

}  // namespace circlet::gemma4
