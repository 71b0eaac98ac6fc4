// What two models made of the same prompts, as text, JSON and a page.

#include <algorithm>
#include <nlohmann/json.hpp>

#include "circlet/io/json.h"
#include "circlet/runtime/measure.h"
#include "pipeline/report.h"

namespace circlet::runtime {
namespace {

using nlohmann::json;

double Mean(const Compared& one) { return one.divergence / std::max<double>(1, static_cast<double>(one.tokens)); }

int64_t Parting(const Comparison& comparison) { return std::ranges::count_if(comparison.prompts, &Compared::diverges); }

// All of them, and by kind where there are both.
struct Part {
  const char* name;
  Agreement agreement;
};
std::vector<Part> PartsOf(const Comparison& comparison) {
  std::vector<Compared> text, pictures;
  for (const Compared& one : comparison.prompts) (one.pictures > 0 ? pictures : text).push_back(one);
  std::vector<Part> parts{{"all", AgreementOf(comparison.prompts)}};
  if (!text.empty() && !pictures.empty()) {
    parts.push_back({"text", AgreementOf(text)});
    parts.push_back({"pictures", AgreementOf(pictures)});
  }
  return parts;
}

std::string Differs(const Compared& one) {
  return fmt::format("KL {:.4g} nats a token, same top-1 at {} of {} tokens, {}", Mean(one), one.same_top, one.tokens,
                     one.diverges ? fmt::format("the texts part after {} tokens", one.same_tokens) : "one text");
}

std::string Indented(const std::string& text) {
  std::string indented = "    ";
  for (const char c : text) indented += c == '\n' ? std::string("\n    ") : std::string(1, c);
  return indented;
}

json ToJson(const Compared& one) {
  const auto tokens = static_cast<double>(one.tokens);
  return {{"source", one.source},
          {"pictures", one.pictures},
          {"ids", one.first.ids},
          {"text", one.first.text},
          {"beside_ids", one.second.ids},
          {"beside_text", one.second.text},
          {"same_tokens", one.same_tokens},
          {"diverges", one.diverges},
          {"tokens", one.tokens},
          {"kl", one.tokens == 0 ? json(nullptr) : json(one.divergence / tokens)},
          {"same_top", one.tokens == 0 ? json(nullptr) : json(static_cast<double>(one.same_top) / tokens)}};
}

// Text between tags.
std::string Escaped(std::string_view text) {
  std::string escaped;
  for (const char c : text) {
    switch (c) {
      case '&':
        escaped += "&amp;";
        break;
      case '<':
        escaped += "&lt;";
        break;
      case '>':
        escaped += "&gt;";
        break;
      case '"':
        escaped += "&quot;";
        break;
      case '\'':
        escaped += "&#39;";
        break;
      default:
        // Other control characters are no text of a page.
        escaped += static_cast<unsigned char>(c) < 0x20 && c != '\n' && c != '\t' ? std::string("\xef\xbf\xbd")
                                                                                  : std::string(1, c);
    }
  }
  return escaped;
}

// Bytes that both begin with, whole characters of UTF-8.
size_t CommonBytes(std::string_view a, std::string_view b) {
  size_t common = std::ranges::mismatch(a, b).in1 - a.begin();
  const auto inside = [](std::string_view text, size_t at) {
    return at < text.size() && (static_cast<unsigned char>(text[at]) & 0xc0) == 0x80;
  };
  while (common > 0 && (inside(a, common) || inside(b, common))) --common;
  return common;
}

std::string Cell(std::string_view text, size_t common) {
  std::string cell = "<td>" + Escaped(text.substr(0, common));
  if (common < text.size()) cell += "<mark>" + Escaped(text.substr(common)) + "</mark>";
  return cell + "</td>";
}

constexpr char kStyle[] =
    "body{font-family:sans-serif;max-width:75em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;width:100%;table-layout:fixed}"
    "th,td{border:1px solid #bbb;padding:.4em;text-align:left;vertical-align:top;white-space:pre-wrap;"
    "overflow-wrap:anywhere}"
    "mark{background:#fd8}.prompt{color:#555;white-space:pre-wrap;overflow-wrap:anywhere}";

}  // namespace

Comparison ComparisonOf(std::string first, std::string second, std::vector<Compared> prompts) {
  std::ranges::stable_sort(prompts, std::greater(), Mean);
  return {std::move(first), std::move(second), std::move(prompts)};
}

std::string ComparisonText(const Comparison& comparison) {
  std::string text;
  for (const Compared& one : comparison.prompts) {
    text += fmt::format("== {}: {}\n  {}:\n{}\n", one.source, Differs(one), comparison.first, Indented(one.first.text));
    if (one.diverges) text += fmt::format("  {}:\n{}\n", comparison.second, Indented(one.second.text));
  }
  text += fmt::format("{} of {} texts part\n", Parting(comparison), comparison.prompts.size());
  for (const auto& [name, agreement] : PartsOf(comparison))
    text += fmt::format("{}: {}\n", name, AgreementText(agreement, comparison.second, comparison.first));
  return text;
}

std::string ComparisonJson(const Comparison& comparison) {
  json prompts = json::array();
  for (const Compared& one : comparison.prompts) prompts.push_back(ToJson(one));
  json made{{"schema_version", 1}, {"model", comparison.first}, {"beside", comparison.second}, {"prompts", prompts}};
  for (const auto& [name, agreement] : PartsOf(comparison))
    if (name == std::string("all"))
      made.update(ToJson(agreement));
    else
      made[name] = ToJson(agreement);
  return DumpJson(made);
}

std::string ComparisonHtml(const Comparison& comparison) {
  const std::string first = Escaped(comparison.first), second = Escaped(comparison.second);
  std::string page = fmt::format(
      "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{0} beside {1}</title>\n"
      "<style>{2}</style></head><body>\n<h1>{0} beside {1}</h1>\n<p>{3} of {4} texts part. Prompts that differ most "
      "come "
      "first; what follows the common beginning is marked.</p>\n<ul>\n",
      first, second, kStyle, Parting(comparison), comparison.prompts.size());
  for (const auto& [name, agreement] : PartsOf(comparison))
    page +=
        fmt::format("<li>{}: {}</li>\n", name, Escaped(AgreementText(agreement, comparison.second, comparison.first)));
  page += "</ul>\n";
  for (const Compared& one : comparison.prompts) {
    const size_t common = CommonBytes(one.first.text, one.second.text);
    page += fmt::format(
        "<h2>{}</h2>\n<p>{}</p>\n<div class=\"prompt\">{}</div>\n<table><tr><th>{}</th><th>{}</th></tr>\n"
        "<tr>{}{}</tr></table>\n",
        Escaped(one.source), Escaped(Differs(one)), Escaped(one.prompt), first, second, Cell(one.first.text, common),
        Cell(one.second.text, common));
  }
  return page + "</body></html>\n";
}

}  // namespace circlet::runtime
