#include "preprocess/jinja/template.h"

#include "circlet/base/error.h"
#include "preprocess/jinja/evaluator.h"

namespace circlet::jinja {

Template::Template(std::string_view text, std::string_view file) : file_(file), syntax_(Parse(text, file)) {}

Rendering Template::Render(Variables variables, int64_t now, const Limits& limits) const {
  Evaluator evaluator(syntax_, limits, now);
  try {
    std::string text = evaluator.Run(std::move(variables));
    return {std::move(text), evaluator.DateLine()};
  } catch (const Error& error) {
    throw error.Within(fmt::format("{}:{}", file_, evaluator.Line()));
  }
}

}  // namespace circlet::jinja
