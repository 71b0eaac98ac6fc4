#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "preprocess/jinja/syntax.h"

namespace circlet::jinja {

using Variables = std::vector<std::pair<std::string, Value>>;

struct Rendering {
  std::string text;
  std::optional<int> date_line;  // where the template asked for the date
};

// A template of the language that transformers runs chat templates in: jinja2's, with trim_blocks, lstrip_blocks, the
// tags break, continue and generation, and the functions raise_exception and strftime_now; without tags that read
// another file. It runs without any access to the outside, within Limits. Every failure is an Error "FILE:LINE: ...".
class Template {
 public:
  // `file` stands for the text in errors.
  Template(std::string_view text, std::string_view file);

  // `now`: seconds since 1970 that strftime_now writes, in UTC.
  Rendering Render(Variables variables, int64_t now, const Limits& limits = {}) const;

  const std::string& File() const { return file_; }

 private:
  std::string file_;
  Syntax syntax_;
};

}  // namespace circlet::jinja
