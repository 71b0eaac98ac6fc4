#include <map>
#include <utility>

#include "circlet/quant/calibration.h"

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

  // Codes that are there already, held or made by an earlier object; else empty.
  const Tensor& Held(const std::string& name) {
    Tensor& codes = weights[name].codes;
    if (codes.Empty() && made) codes = made(name);
    if (!codes.Empty() && codes.Grid() == nullptr) codes = codes.WithGrid(calibration.GridOf(name));
    return codes;
  }
  // Those, or rounded now. Empty without an integer grid.
  const Tensor& Codes(const std::string& name) {
    if (!Held(name).Empty()) return weights[name].codes;
    return weights[name].codes = calibration.CodesOfRows(name, stored(name), 0);
  }
};

RoundedWeights::RoundedWeights(const Calibration& calibration, WeightSource stored, Use use, WeightSource made)
    : state_(std::make_shared<State>(State{calibration, std::move(stored), use, std::move(made), {}})) {}

void RoundedWeights::Take(const std::string& name, const Tensor& codes) const {
  State::Weight& weight = state_->weights[name];
  CIRCLET_CHECK(weight.codes.Empty() && weight.operand.Empty(), "{} was rounded before", name);
  weight.codes = codes;
}

Tensor RoundedWeights::operator()(const std::string& name) const {
  State& s = *state_;
  State::Weight& weight = s.weights[name];
  if (!weight.operand.Empty()) return weight.operand;
  const Tensor codes = s.use == Use::kProductsAndFiles ? s.Codes(name) : std::exchange(weight.codes, {});
  if (!codes.Empty()) return weight.operand = s.calibration.OperandOf(codes);
  return weight.operand = s.calibration.RoundedRows(name, s.stored(name), 0);
}

Tensor RoundedWeights::Codes(const std::string& name) const { return state_->Codes(name); }

bool RoundedWeights::HoldsCodes(const std::string& name) const { return !state_->Held(name).Empty(); }

Tensor RoundedWeights::Stored(const std::string& name) const { return state_->stored(name); }

}  // namespace circlet
