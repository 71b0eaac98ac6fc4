#include <cmath>

#include "circlet/base/error.h"
#include "preprocess/jinja/evaluator.h"
#include "preprocess/jinja/text.h"

namespace circlet::jinja {
namespace {

[[noreturn]] void FailTypes(std::string_view sign, const Value& a, const Value& b) {
  RequireDefined(a);
  RequireDefined(b);
  Fail("{} between values of type {} and {}", sign, a.TypeName(), b.TypeName());
}

void Check(bool overflow) {
  if (overflow) Fail("the result does not fit in 64 bits");
}

int64_t Power(int64_t base, int64_t exponent) {
  int64_t result = 1;
  for (bool overflow = false; exponent > 0; exponent >>= 1) {
    if (exponent & 1) overflow |= __builtin_mul_overflow(result, base, &result);
    if (exponent > 1) overflow |= __builtin_mul_overflow(base, base, &base);
    Check(overflow);
  }
  return result;
}

// Rounds down, as Python does.
double FloorMod(double a, double b) {
  double rest = std::fmod(a, b);
  if (rest == 0) return std::copysign(0.0, b);
  if ((rest < 0) != (b < 0)) rest += b;
  return rest;
}

double FloorDivide(double a, double b) {
  const double rest = FloorMod(a, b);
  return std::round((a - rest) / b);
}

Value Integers(std::string_view sign, int64_t a, int64_t b) {
  if (sign == "+" || sign == "-" || sign == "*") {
    int64_t result = 0;
    Check(sign == "+"   ? __builtin_add_overflow(a, b, &result)
          : sign == "-" ? __builtin_sub_overflow(a, b, &result)
                        : __builtin_mul_overflow(a, b, &result));
    return result;
  }
  if (sign == "**") {
    if (b >= 0) return Power(a, b);
    if (a == 0) Fail("0 to a negative power");
    return std::pow(static_cast<double>(a), static_cast<double>(b));
  }
  if (b == 0) Fail("division by zero");
  if (sign == "/") return static_cast<double>(static_cast<long double>(a) / static_cast<long double>(b));
  if (b == -1) {
    Check(a == INT64_MIN);
    return sign == "%" ? int64_t{0} : -a;
  }
  const bool down = a % b != 0 && (a < 0) != (b < 0);
  return sign == "%" ? a % b + (down ? b : 0) : a / b - (down ? 1 : 0);
}

Value Floats(std::string_view sign, double a, double b) {
  if (sign == "+") return a + b;
  if (sign == "-") return a - b;
  if (sign == "*") return a * b;
  if (sign == "**") {
    if (a == 0 && b < 0) Fail("0 to a negative power");
    if (a < 0 && b != std::floor(b)) Fail("a negative number to a power that is no integer");
    const double power = std::pow(a, b);
    if (std::isinf(power) && !std::isinf(a) && !std::isinf(b)) Fail("the result is too large for a float");
    return power;
  }
  if (b == 0) Fail("division by zero");
  if (sign == "/") return a / b;
  return sign == "%" ? FloorMod(a, b) : FloorDivide(a, b);
}

}  // namespace

Value Evaluator::Arithmetic(std::string_view sign, const Value& a, const Value& b) {
  if (const auto x = a.Integer(), y = b.Integer(); x && y) return Integers(sign, *x, *y);
  if (const auto x = a.Number(), y = b.Number(); x && y) return Floats(sign, *x, *y);
  const std::string *text = a.AsText(), *other = b.AsText();
  if (sign == "+" && text != nullptr && other != nullptr) {
    meter_.Bytes(static_cast<int64_t>(text->size() + other->size()));
    if (a.IsSafe() == b.IsSafe()) return Value(*text + *other, a.IsSafe());
    return String(a.IsSafe() ? *text + Escape(*other) : Escape(*text) + *other, true);
  }
  if (sign == "%" && text != nullptr) {
    if (a.IsSafe()) Fail("% of a text that is marked safe is not supported");
    return String(PercentFormat(*text, b, meter_));
  }
  const auto repeatable = [](const Value& value) {
    const Sequence* sequence = value.AsSequence();
    return value.AsText() != nullptr ||
           (sequence != nullptr && (sequence->IsTuple() || sequence->form == Sequence::Form::kList));
  };
  if (sign == "*" && repeatable(a) && b.Integer()) return Repeat(a, *b.Integer());
  if (sign == "*" && repeatable(b) && a.Integer()) return Repeat(b, *a.Integer());
  const Sequence *x = a.AsSequence(), *y = b.AsSequence();
  const bool joins =
      sign == "+" && x != nullptr && y != nullptr && repeatable(a) && repeatable(b) && x->IsTuple() == y->IsTuple();
  if (!joins) FailTypes(sign, a, b);
  std::vector<Value> items = x->items;
  items.insert(items.end(), y->items.begin(), y->items.end());
  return MakeSequence(std::move(items), x->IsTuple() ? Sequence::Form::kTuple : Sequence::Form::kList, meter_);
}

}  // namespace circlet::jinja
