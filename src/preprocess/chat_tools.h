#pragma once

// How tool declarations, calls and answers are written in a prompt (gemma4.md 7.4, example 4): one line each, keys
// sorted without regard to case, strings between <|"|>, no blanks.

#include <span>
#include <string>

#include "circlet/io/json.h"

namespace circlet {

std::string ToolDeclaration(const JsonObject& tool);  // {"function": {"name", "description", "parameters"}}
std::string ToolCall(const JsonObject& call);         // {"function": {"name", "arguments"}}
// A message of role "tool"; its name is "name", or that of the call with the id "tool_call_id".
std::string ToolResponse(const JsonObject& message, std::span<const JsonObject> calls);

}  // namespace circlet
