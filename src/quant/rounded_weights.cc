#include <map>
#include <mutex>
#include <utility>

#include "circlet/base/threads.h"
#include "circlet/quant/calibration.h"
#include "ops/codes.h"
#include "ops/table.h"

namespace circlet {

struct RoundedWeights::State {
  // A parameter: its source's values, or codes made of them, and what products take of either.
  struct Weight {
    Tensor codes, operand;
  };

  const Calibration& calibration;
  WeightSource stored;
  Use use;
  WeightSource made;
  std::map<std::string, Weight> weights;
  std::mutex mutex;

  // Codes that are there already, held or made elsewhere; else empty.
  Tensor Found(const std::string& name) {
    const Tensor codes = weights[name].codes.Empty() && made ? made(name) : weights[name].codes;
    return codes.Empty() || codes.Grid() != nullptr ? codes : codes.WithGrid(calibration.GridOf(name));
  }
  // The same, held from here on.
  const Tensor& Held(const std::string& name) { return weights[name].codes = Found(name); }
  // Those, or rounded now. Empty without an integer grid.
  const Tensor& Codes(const std::string& name) {
    if (!Held(name).Empty()) return weights[name].codes;
    return weights[name].codes = calibration.CodesOfRows(name, stored(name), 0);
  }
};

RoundedWeights::RoundedWeights(const Calibration& calibration, WeightSource stored, Use use, WeightSource made)
    : state_(new State{calibration, std::move(stored), use, std::move(made), {}, {}}) {}

void RoundedWeights::Take(const std::string& name, const Tensor& codes) const {
  State::Weight& weight = state_->weights[name];
  CIRCLET_CHECK(weight.codes.Empty() && weight.operand.Empty(), "{} was rounded before", name);
  weight.codes = codes;
}

Tensor RoundedWeights::operator()(const std::string& name) const {
  State& s = *state_;
  const std::lock_guard lock(s.mutex);
  State::Weight& weight = s.weights[name];
  if (!weight.operand.Empty()) return weight.operand;
  const Tensor codes = s.use == Use::kProductsAndFiles ? s.Codes(name) : std::exchange(weight.codes, {});
  if (!codes.Empty()) return weight.operand = s.calibration.OperandOf(codes);
  return weight.operand = s.calibration.RoundedRows(name, s.stored(name), 0);
}

Tensor RoundedWeights::Slice(const std::string& name, int64_t begin, int64_t end) const {
  State& s = *state_;
  const std::lock_guard lock(s.mutex);
  if (const Tensor codes = s.Found(name); !codes.Empty())
    return s.calibration.OperandOf(RowsOfCodes(codes, begin, end));
  const Tensor stored = s.stored(name);
  return s.calibration.RoundedRows(
      name, stored.Grid() != nullptr ? RowsOfCodes(stored, begin, end) : stored.Slice(begin, end, 0), begin);
}

Tensor RoundedWeights::Rows(const std::string& name, std::span<const int64_t> ids) const {
  State& s = *state_;
  Tensor codes, table;
  {
    const std::lock_guard lock(s.mutex);
    codes = s.Held(name);
    if (codes.Empty()) table = s.stored(name);
  }
  if (codes.Empty()) return s.calibration.RoundedRowsAt(name, table, ids);
  return DequantizedRows(codes, ids);
}

Tensor RoundedWeights::Codes(const std::string& name) const {
  const std::lock_guard lock(state_->mutex);
  return state_->Codes(name);
}

bool RoundedWeights::HoldsCodes(const std::string& name) const {
  const std::lock_guard lock(state_->mutex);
  return !state_->Held(name).Empty();
}

Tensor RoundedWeights::Stored(const std::string& name) const { return state_->stored(name); }

}  // namespace circlet
