#include <fmt/ranges.h>

#include <algorithm>

#include "circle/schema.h"
#include "circlet/base/error.h"
#include "circlet/circle/model.h"

namespace circlet::circle {
namespace {

// "keep_num_dims" as the schema's other spelling, "keepNumDims".
std::string CamelCase(std::string_view snake) {
  std::string camel;
  for (size_t i = 0; i < snake.size(); ++i) {
    const bool starts_word = snake[i] == '_' && i + 1 < snake.size();
    if (starts_word) ++i;
    camel += starts_word && snake[i] >= 'a' && snake[i] <= 'z' ? static_cast<char>(snake[i] - 'a' + 'A') : snake[i];
  }
  return camel;
}

// The shortest decimals that read back as the same number; always with a point or an exponent.
template <typename T>
std::string Real(T value) {
  std::string text = fmt::format("{}", value);
  return text.find_first_not_of("-0123456789") == std::string::npos ? text + ".0" : text;
}

std::string OptionText(const FieldSchema& field, const CircleOption* option) {
  const auto integer = [&] {
    return option != nullptr ? std::get<int64_t>(option->value) : static_cast<int64_t>(field.default_value);
  };
  switch (field.kind) {
    case FieldKind::kBool:
      return integer() != 0 ? "True" : "False";
    case FieldKind::kFloat:
      return Real(option != nullptr ? std::get<double>(option->value) : field.default_value);
    case FieldKind::kInt32s:
      return option != nullptr ? fmt::format("{}", std::get<std::vector<int32_t>>(option->value)) : "None";
    case FieldKind::kString:
      return option != nullptr ? fmt::format("\"{}\"", std::get<std::string>(option->value)) : "None";
    default:
      return std::to_string(integer());
  }
}

std::string OptionsText(const Operator& op) {
  const OperatorSchema* schema = FindOperator(op.code);
  if (schema == nullptr || schema->options.fields.empty()) return "";
  std::vector<std::string> texts;
  for (const FieldSchema& field : schema->options.fields) {
    const auto option = std::ranges::find(op.options, field.name, &CircleOption::name);
    texts.push_back(CamelCase(field.name) + "=" + OptionText(field, option != op.options.end() ? &*option : nullptr));
  }
  std::ranges::sort(texts);
  return fmt::format(" {{{}}}", fmt::join(texts, ","));
}

std::string TensorText(const Model& model, int32_t index) {
  if (index == -1) return "-";
  if (index < 0 || static_cast<size_t>(index) >= model.tensors.size()) return fmt::format("#{}:?", index);
  const Tensor& tensor = model.tensors[static_cast<size_t>(index)];
  const std::optional<int8_t> type = TensorTypeOf(tensor.type.dtype);
  std::string text = fmt::format("#{}:{}", index, type.has_value() ? TensorTypeName(*type) : "?");
  text +=
      tensor.signature.empty() ? tensor.type.shape.ToString() : fmt::format("[{}]", fmt::join(tensor.signature, ","));
  if (tensor.IsConstant()) text += ":const";
  if (tensor.qparams.has_value() && !tensor.qparams->scale.empty() && !tensor.qparams->zero_point.empty()) {
    const QParams& grid = *tensor.qparams;
    if (grid.scale.size() == 1)
      text += fmt::format(":s={},z={}", Real(grid.scale[0]), grid.zero_point[0]);
    else
      text += fmt::format(":perch(axis={},n={},s0={},z0={})", grid.axis, grid.scale.size(), Real(grid.scale[0]),
                          grid.zero_point[0]);
  }
  return text;
}

std::string TensorTexts(const Model& model, const std::vector<int32_t>& indices, std::string_view separator) {
  std::vector<std::string> texts;
  for (const int32_t index : indices) texts.push_back(TensorText(model, index));
  return fmt::format("{}", fmt::join(texts, separator));
}

}  // namespace

std::string Dump(const Model& model) {
  std::string text = fmt::format("inputs: {}\noutputs: {}\n", TensorTexts(model, model.inputs, " "),
                                 TensorTexts(model, model.outputs, " "));
  for (size_t i = 0; i < model.operators.size(); ++i) {
    const Operator& op = model.operators[i];
    text += fmt::format("{} {}{} ({}) -> {}\n", i, OperatorName(op.code), OptionsText(op),
                        TensorTexts(model, op.inputs, ", "), TensorTexts(model, op.outputs, ", "));
  }
  return text;
}

}  // namespace circlet::circle
