#include "circlet/ops/op.h"

#include <algorithm>

namespace circlet {

bool Bf16Supported() {
#ifdef __x86_64__
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

void ShapeError(std::string_view op, Types in, std::string_view rule) {
  std::string types;
  for (const TensorType& type : in) types += (types.empty() ? "" : ", ") + type.ToString();
  Fail("{}: inputs are ({}); {}", op, types, rule);
}

void ExpectInputs(std::string_view op, Types in, size_t count) {
  if (in.size() != count)
    ShapeError(op, in, fmt::format("it takes {} input{}, not {}", count, count == 1 ? "" : "s", in.size()));
}

Shape Broadcast(std::string_view op, const Shape& a, const Shape& b) {
  std::vector<int64_t> sizes(static_cast<size_t>(std::max(a.Rank(), b.Rank())));
  for (int i = 1; i <= static_cast<int>(sizes.size()); ++i) {
    const int64_t m = i <= a.Rank() ? a[-i] : 1;
    const int64_t n = i <= b.Rank() ? b[-i] : 1;
    if (m != n && m != 1 && n != 1)
      Fail("{}: shapes {} and {} do not broadcast: sizes {} and {} at axis -{}; they must be equal or one of them 1",
           op, a.ToString(), b.ToString(), m, n, i);
    sizes[sizes.size() - static_cast<size_t>(i)] = m == 1 ? n : m;
  }
  return Shape(std::move(sizes));
}

namespace {

const CircleOption* Find(const CircleNode& node, std::string_view name) {
  const auto it = std::find_if(node.options.begin(), node.options.end(),
                               [&](const CircleOption& option) { return option.name == name; });
  return it == node.options.end() ? nullptr : &*it;
}

}  // namespace

int64_t CircleNode::Int(std::string_view option, int64_t otherwise) const {
  const CircleOption* found = Find(*this, option);
  if (found == nullptr) return otherwise;
  const auto* value = std::get_if<int64_t>(&found->value);
  if (value == nullptr) Fail("option {} is not a whole number; the file disagrees with the Circle schema", option);
  return *value;
}

double CircleNode::Real(std::string_view option, double otherwise) const {
  const CircleOption* found = Find(*this, option);
  if (found == nullptr) return otherwise;
  const auto* value = std::get_if<double>(&found->value);
  if (value == nullptr) Fail("option {} is not a real number; the file disagrees with the Circle schema", option);
  return *value;
}

std::vector<int64_t> CircleNode::Constant(int input) const {
  const size_t index = static_cast<size_t>(input);
  if (!Has(input)) Fail("input {} is absent; a constant int32 or int64 tensor must stand there", input);
  if (index >= constants.size() || constants[index].Empty())
    Fail("input {} ({}) is computed; it must be a constant int32 or int64 tensor", input, types[index]->ToString());
  const Tensor& tensor = constants[index];
  if (tensor.GetShape().Rank() > 1 || (tensor.GetDType() != DType::kI32 && tensor.GetDType() != DType::kI64))
    Fail("input {} is {}; it must be an int32 or int64 vector or scalar", input, tensor.Type().ToString());
  if (tensor.GetDType() == DType::kI64) {
    const std::span<int64_t> values = tensor.As<int64_t>();
    return {values.begin(), values.end()};
  }
  const std::span<int32_t> values = tensor.As<int32_t>();
  return {values.begin(), values.end()};
}

}  // namespace circlet
