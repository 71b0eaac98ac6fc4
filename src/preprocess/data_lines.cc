#include "preprocess/data_lines.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "io/json_line.h"
#include "preprocess/utf8.h"

namespace circlet {
namespace {

constexpr std::string_view kBlank = " \t\r\n";

size_t SkipBlank(std::string_view text, size_t at) { return std::min(text.find_first_not_of(kBlank, at), text.size()); }

// The beginning of a line, fit for a terminal.
std::string Shown(std::string_view line) {
  constexpr size_t kMost = 40;
  std::string shown;
  while (!line.empty() && shown.size() < kMost) {
    const size_t length = Utf8Length(line);
    if (length == 0 || static_cast<uint8_t>(line[0]) < 0x20 || line[0] == 0x7f) {
      shown += '?';
      line.remove_prefix(1);
    } else {
      shown += line.substr(0, length);
      line.remove_prefix(length);
    }
  }
  return line.empty() ? shown : shown + "...";
}

// How a file of text becomes JSON lines.
std::string Conversion(const DataFile& data, std::string_view key) {
  if (key.empty()) return "";
  for (const std::string_view table : {".csv", ".tsv"}) {
    if (!data.name.ends_with(table)) continue;
    return fmt::format(
        "; a table with a column \"{0}\" becomes one with `python3 -c \"import csv, json, sys; [print(json.dumps("
        "{{'{0}': row['{0}']}})) for row in csv.DictReader(sys.stdin{1})]\" < {2} > {2}.jsonl`",
        key, table == ".tsv" ? ", delimiter='\\t'" : "", data.name);
  }
  return fmt::format("; plain text becomes one a line with `jq -Rc '{{{0}: .}}' {1} > {1}.jsonl`", key, data.name);
}

DataLine LineAt(const DataFile& data, int64_t number) {
  return {fmt::format("{}:{}", data.place, number), fmt::format("{}:{}", data.name, number), {}};
}

using Body = std::function<void(const JsonObject& object, const DataLine& line)>;

void Take(const DataFile& data, std::string_view text, int64_t number, const Body& body) {
  DataLine line = LineAt(data, number);
  line.text = text;
  const nlohmann::json value = ParseJsonLine(text, data.place, number);
  body(JsonObject(value, line.place), line);
}

int64_t ForEachTextLine(const DataFile& data, std::string_view text, const LineForm& form, const Body& body) {
  int64_t number = 0, lines = 0;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view line = text.substr(begin, end - begin);
    begin = end + 1;
    ++number;
    const size_t first = SkipBlank(line, 0);
    if (first == line.size()) continue;
    if (line[first] != '{') {
      Fail("{}: expected a JSON object on each line, as {}, found {}{}", LineAt(data, number).place, form.example,
           Shown(line.substr(first)), lines == 0 ? Conversion(data, form.text_key) : "");
    }
    ++lines;
    // An object over several lines, as editors and `jq .` lay it out.
    if (line.find_last_not_of(kBlank) == first)
      Fail("{}: expected a whole JSON object on each line, as {}; `jq -c . {} > {}.jsonl` puts them there",
           LineAt(data, number).place, form.example, data.name, data.name);
    Take(data, line, number, body);
  }
  return lines;
}

// The end of the JSON value at `begin`, which a comma, a bracket or the end of the text follows; its inside is not
// checked.
size_t EndOfValue(std::string_view text, size_t begin) {
  int64_t depth = 0;
  for (size_t at = begin; at < text.size(); ++at) {
    const char c = text[at];
    if (c == '"') {
      for (++at; at < text.size() && text[at] != '"'; ++at) at += text[at] == '\\';
    } else if (c == '{' || c == '[') {
      ++depth;
    } else if (depth == 0 && (c == ',' || c == ']' || c == '}')) {
      return at;
    } else if ((c == '}' || c == ']') && --depth == 0) {
      return at + 1;
    }
  }
  return text.size();
}

// One element after another, since the tree of a whole file is many times as large as the file.
int64_t ForEachElement(const DataFile& data, std::string_view text, const LineForm& form, const Body& body) {
  int64_t number = 1, elements = 0;
  size_t counted = 0;
  const auto line_of = [&](size_t at) {
    number += std::count(text.begin() + counted, text.begin() + at, '\n');
    counted = at;
    return number;
  };
  const auto expect = [&](size_t at, std::string_view what) {
    Fail("{}: expected {} in the JSON array, found {}", LineAt(data, line_of(std::min(at, text.size()))).place, what,
         at < text.size() ? Shown(text.substr(at, 40)) : "the end of the file");
  };
  size_t at = SkipBlank(text, SkipBlank(text, 0) + 1);
  if (at < text.size() && text[at] == ']') return 0;
  for (;;) {
    if (at == text.size() || text[at] != '{') expect(at, fmt::format("an object, as {},", form.example));
    const size_t end = EndOfValue(text, at);
    Take(data, text.substr(at, end - at), line_of(at), body);
    ++elements;
    at = SkipBlank(text, end);
    if (at < text.size() && text[at] == ']') break;
    if (at == text.size() || text[at] != ',') expect(at, "a comma or ]");
    at = SkipBlank(text, at + 1);
  }
  at = SkipBlank(text, at + 1);
  if (at < text.size()) expect(at, "nothing after the last ]");
  return elements;
}

}  // namespace

void ForEachLine(const DataFile& data, const Body& body, const LineForm& form) {
  std::string_view text = data.text;
  if (text.starts_with("\xef\xbb\xbf")) text.remove_prefix(3);
  const size_t first = SkipBlank(text, 0);
  const bool is_array = first < text.size() && text[first] == '[';
  const int64_t lines = is_array ? ForEachElement(data, text, form, body) : ForEachTextLine(data, text, form, body);
  if (lines == 0) Fail("{}: has no samples; it needs a JSON object on each line, as {}", data.place, form.example);
}

}  // namespace circlet
