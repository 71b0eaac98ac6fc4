#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "circlet/preprocess/chat.h"
#include "preprocess/jinja/template.h"

namespace circlet {

struct ChatTemplate::State {
  struct Source {
    std::string text, file;
  };

  // The template called `name`. It is read when it is first used: a checkpoint whose template is of no use still takes
  // texts.
  const jinja::Template& Get(const std::string& name);

  std::map<std::string, Source> sources;  // by name: "default", "tool_use", ...
  std::vector<std::pair<std::string, std::string>> special_tokens;
  int64_t now = 0;  // what strftime_now writes

 private:
  std::mutex mutex_;
  std::map<std::string, jinja::Template> read_;
};

}  // namespace circlet
