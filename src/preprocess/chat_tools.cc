#include "preprocess/chat_tools.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"

namespace circlet {
namespace {

using nlohmann::json;

char ToLower(char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; }

std::string Lower(std::string text) {
  std::ranges::transform(text, text.begin(), ToLower);
  return text;
}

std::string Upper(std::string text) {
  std::ranges::transform(text, text.begin(),
                         [](char c) { return c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c; });
  return text;
}

std::string Quoted(const std::string& text) { return "<|\"|>" + text + "<|\"|>"; }

// `is_schema`: a key "type" names a JSON type, written in capitals.
std::string Format(const json& value, bool is_schema) {
  if (value.is_string()) return Quoted(value.get_ref<const std::string&>());
  if (value.is_array()) {
    std::string text;
    for (const json& element : value) text += (text.empty() ? "" : ",") + Format(element, is_schema);
    return "[" + text + "]";
  }
  if (!value.is_object()) return value.dump();
  std::vector<std::string> keys;
  for (const auto& [key, unused] : value.items()) keys.push_back(key);
  std::ranges::stable_sort(keys, {}, Lower);
  std::string text;
  for (const std::string& key : keys) {
    const json& member = value[key];
    const bool is_type = is_schema && key == "type" && member.is_string();
    text += (text.empty() ? "" : ",") + key + ":" +
            (is_type ? Quoted(Upper(member.get<std::string>())) : Format(member, is_schema));
  }
  return "{" + text + "}";
}

}  // namespace

std::string ToolDeclaration(const JsonObject& tool) {
  const JsonObject function = tool.Object("function");
  json body = json::object();
  body["description"] = function.Optional<std::string>("description", "");
  if (function.Has("parameters")) body["parameters"] = function.Raw("parameters");
  return "<|tool>declaration:" + function.Required<std::string>("name") + Format(body, true) + "<tool|>";
}

std::string ToolCall(const JsonObject& call) {
  const JsonObject function = call.Object("function");
  json arguments = function.Raw("arguments");
  // Some servers hand the arguments over as JSON text.
  if (arguments.is_string()) arguments = ParseJson(arguments.get<std::string>(), function.Where("arguments"));
  if (!arguments.is_object())
    function.FailAt("arguments", fmt::format("expected an object, found {}", arguments.dump()));
  return "<|tool_call>call:" + function.Required<std::string>("name") + Format(arguments, false) + "<tool_call|>";
}

std::string ToolResponse(const JsonObject& message, std::span<const JsonObject> calls) {
  std::optional<std::string> name = message.Optional<std::string>("name");
  const std::string id = message.Optional<std::string>("tool_call_id", "");
  for (const JsonObject& call : calls) {
    if (!name && !id.empty() && call.Optional<std::string>("id", "") == id)
      name = call.Object("function").Required<std::string>("name");
  }
  if (!name) message.FailAt("name", "is missing, and no tool call has the id in tool_call_id; say which tool answers");
  const json& content = message.Raw("content");
  const json body = content.is_object() ? content : json{{"value", content}};
  return "<|tool_response>response:" + *name + Format(body, false) + "<tool_response|>";
}

}  // namespace circlet
