// Any chat template is an Error or renders a conversation within its limits.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "circlet/base/error.h"
#include "preprocess/jinja/template.h"

namespace {

constexpr std::string_view kMessages = R"([{"role": "system", "content": "Be brief."},
  {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": " What? "}]},
  {"role": "assistant", "content": "<think>hm</think>yes", "tool_calls": [{"id": "1", "function": {"name": "f",
    "arguments": {"x": [1, 2.5, true, null]}}}]}, {"role": "tool", "content": "ü", "name": "f"}])";
constexpr std::string_view kTools =
    R"([{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "array"}}}}}])";

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace circlet::jinja;
  constexpr Limits kLimits{.steps = 20'000, .bytes = 1 << 20, .depth = 300};
  try {
    Meter meter(kLimits);
    Variables variables{{"messages", FromJson(kMessages, meter)},
                        {"tools", FromJson(kTools, meter)},
                        {"documents", {}},
                        {"add_generation_prompt", true},
                        {"bos_token", Value(std::string("<bos>"))}};
    const Template parsed({reinterpret_cast<const char*>(data), size}, "chat_template.jinja");
    if (parsed.Render(std::move(variables), 0, kLimits).text.size() > 1 << 20) std::abort();
  } catch (const circlet::Error&) {
  }
  return 0;
}
