#pragma once

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "circlet/preprocess/samples.h"
#include "circlet/runtime/session.h"

namespace circlet::runtime {

// A text that the model goes on with, <bos> in front.
Sample TextPrompt(std::string_view text, const Processor& processor, const ModelFacts& facts, std::string source);

// A conversation (RenderChat) up to where the model's answer begins. Pictures are relative to `directory`.
Sample ChatPromptSample(std::string_view conversation, const Processor& processor, const ModelFacts& facts,
                        const std::filesystem::path& directory, std::string source);

// JSON lines: {"prompt": text}, or the lines of calibration data (docs/data.md), {"type": "text", "text"} and {"type":
// "chat", "messages": [...], ...}, which get add_generation_prompt unless they say otherwise. Throws Error
// "FILE:LINE: ...".
std::vector<Sample> LoadPrompts(const std::filesystem::path& path, const Processor& processor, const ModelFacts& facts);

}  // namespace circlet::runtime
