#include "pipeline/gemma4/agreement.h"

#include <vector>

namespace circlet::gemma4 {

double Divergence(const TailPair& pair) {
  return pair.gap / pair.reference.sum - pair.reference.LogSumExp() + pair.quantized.LogSumExp();
}

ItemAgreement AgreementOf(const Tails& tails, int64_t first) {
  ItemAgreement agreement;
  for (size_t i = first; i + 1 < tails.size(); ++i) {
    ++agreement.tokens;
    agreement.same_top += tails[i].reference.choice == tails[i].quantized.choice;
    agreement.divergence += Divergence(tails[i]);
  }
  return agreement;
}

Agreement AgreementOf(std::span<const ItemAgreement> items) {
  std::vector<Cluster> divergence, same_top;
  Agreement agreement;
  for (const ItemAgreement& item : items) {
    agreement.tokens += item.tokens;
    divergence.push_back({item.tokens, item.divergence});
    same_top.push_back({item.tokens, static_cast<double>(item.same_top)});
  }
  agreement.divergence = MeanOf(divergence);
  agreement.same_top = MeanOf(same_top);
  return agreement;
}

}  // namespace circlet::gemma4
