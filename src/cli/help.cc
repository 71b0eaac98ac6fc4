#include "cli/help.h"

#include <fmt/core.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <string_view>
#include <vector>

#include "cli/commands.h"
#include "cli/print.h"

namespace circlet {
namespace {

struct Entry {
  std::string name, value, text;  // "--recipe", "NAME|FILE", what it does
};
struct Section {
  std::string title;
  std::vector<Entry> entries;
};

// "TEXT:{auto,all}" has the kind of a value in front of what a check says of it, which says more.
std::string ValueOf(const CLI::Option& option) {
  if (option.get_type_size() == 0) return "";
  const std::string type = option.get_type_name();
  return type.substr(type.rfind(':') + 1);
}

Entry EntryOf(const CLI::Option& option) {
  const bool positional = option.get_positional();
  std::string name, text = option.get_description();
  for (const char c : option.get_name(positional, !positional))
    name += c == ',' ? std::string(", ") : std::string(1, c);
  if (!option.get_default_str().empty()) text += fmt::format(" (default {})", option.get_default_str());
  if (option.get_required() && !positional) text += " (required)";
  return {name, positional ? "" : ValueOf(option), text};
}

// Of a command: its arguments, its options by group, its own commands.
std::vector<Section> SectionsOf(const CLI::App& app) {
  std::vector<Section> sections;
  const auto add = [&](const std::string& title, Entry entry) {
    auto section = std::ranges::find(sections, title, &Section::title);
    if (section == sections.end()) section = sections.insert(sections.end(), {title, {}});
    section->entries.push_back(std::move(entry));
  };
  for (const CLI::App* command : app.get_subcommands({}))
    add("Commands", {command->get_name(), "", command->get_description()});
  for (const CLI::Option* option : app.get_options())
    if (option->get_positional()) add("Arguments", EntryOf(*option));
  for (const bool general : {false, true})
    for (const CLI::Option* option : app.get_options())
      if (!option->get_positional() && (option->get_group() == kGeneralGroup) == general)
        add(option->get_group(), EntryOf(*option));
  return sections;
}

std::string UsageOf(const CLI::App& app) {
  std::string usage = app.get_parent() == nullptr ? app.get_name() : "circlet " + app.get_name();
  if (!app.get_subcommands({}).empty()) return usage + " COMMAND [OPTIONS]";
  for (const CLI::Option* option : app.get_options())
    if (option->get_positional())
      usage += fmt::format(fmt::runtime(option->get_required() ? " {}" : " [{}]"), option->get_name(true, false));
  return usage + " [OPTIONS]";
}

// What is no terminal may be read anywhere.
int HelpColumns() {
  constexpr int kLeast = 40, kMost = 100;
  const int columns = Columns();
  return columns == 0 ? kMost : std::clamp(columns, kLeast, kMost);
}

// Breaks between words; lines behind the first begin with `indent` blanks.
std::string Wrapped(std::string_view text, int first, int indent, int columns) {
  std::string wrapped;
  int at = first;
  while (!text.empty()) {
    const size_t end = std::min(text.find(' '), text.size());
    const auto width = static_cast<int>(end);
    if (at + width > columns && at > indent) {
      wrapped.erase(wrapped.find_last_not_of(' ') + 1);
      wrapped += "\n" + std::string(indent, ' ');
      at = indent;
    }
    wrapped += std::string(text.substr(0, end)) + " ";
    at += width + 1;
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return wrapped.substr(0, wrapped.find_last_not_of(' ') + 1);
}

std::string Escaped(std::string_view text) {
  std::string roff = text.starts_with('.') || text.starts_with('\'') ? "\\&" : "";
  for (const char c : text) roff += c == '-' ? std::string("\\-") : c == '\\' ? std::string("\\e") : std::string(1, c);
  return roff;
}

std::string RoffSections(const CLI::App& app) {
  std::string text;
  for (const Section& section : SectionsOf(app)) {
    if (section.title == kGeneralGroup && app.get_parent() != nullptr) continue;  // said once, of the program
    for (const Entry& entry : section.entries)
      text += fmt::format(".TP\n\\fB{}\\fR \\fI{}\\fR\n{}\n", Escaped(entry.name), Escaped(entry.value),
                          Escaped(entry.text));
  }
  return text;
}

// The words of a choice, "{auto,all}"; else none.
std::vector<std::string> ChoicesOf(const CLI::Option& option) {
  const std::string value = ValueOf(option);
  if (!value.starts_with('{')) return {};
  return CLI::detail::split(value.substr(1, value.size() - 2), ',');
}

// A page for man(1), in roff.
std::string ManPage(const CLI::App& app) {
  std::string text =
      fmt::format(".TH CIRCLET 1 \"\" \"circlet {}\"\n.SH NAME\n{}\n.SH SYNOPSIS\n{}\n.SH COMMANDS AND OPTIONS\n",
                  CIRCLET_VERSION, "circlet \\- " + Escaped(app.get_description()), Escaped(UsageOf(app)));
  text += RoffSections(app);
  for (const CLI::App* command : app.get_subcommands({}))
    text += fmt::format(".SH {}\n{}\n.PP\n{}\n{}.PP\n.nf\n{}\n.fi\n", Escaped(command->get_name()),
                        Escaped(UsageOf(*command)), Escaped(command->get_description()), RoffSections(*command),
                        Escaped(command->get_footer()));
  return text +
         ".SH EXIT STATUS\n0 done; 1 a result below the wanted bound; 2 an error that you can put right; 3 a bug.\n";
}

// A script that bash sources; it completes commands, options and words of a choice, else file names.
std::string BashCompletion(const CLI::App& app) {
  std::vector<std::string> verbs;
  std::string options, choices;
  const auto add = [&](const CLI::App& command, const std::string& name, std::vector<std::string> words) {
    for (const CLI::Option* option : command.get_options())
      for (const std::string& flag : option->get_lnames()) {
        words.push_back("--" + flag);
        if (const std::vector<std::string> known = ChoicesOf(*option); !known.empty())
          choices += fmt::format("    {}:--{}) words='{}' ;;\n", name, flag, fmt::join(known, " "));
      }
    options += fmt::format("    {}) words='{}' ;;\n", name, fmt::join(words, " "));
  };
  for (const CLI::App* command : app.get_subcommands({})) {
    verbs.push_back(command->get_name());
    add(*command, command->get_name(), {});
  }
  add(app, "\"\"", verbs);
  return fmt::format(R"(# bash completion of circlet, made by `circlet completion`
_circlet() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}} verb= words= word
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD - 1}}"; do
    case $word in {}) verb=$word && break ;; esac
  done
  case $verb in
{}  esac
  [[ -n $verb && $current != -* ]] && words=
  case $verb:$before in
{}  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _circlet circlet
)",
                     fmt::join(verbs, "|"), options, choices);
}

}  // namespace

std::string HelpFormatter::make_help(const CLI::App* app, std::string, CLI::AppFormatMode) const {
  const int columns = HelpColumns(), indent = columns < 70 ? 8 : 28;
  std::string text = Wrapped(app->get_description(), 0, 0, columns) + "\n\nUsage: " + UsageOf(*app) + "\n";
  for (const Section& section : SectionsOf(*app)) {
    text += "\n" + section.title + ":\n";
    for (const Entry& entry : section.entries) {
      std::string name = "  " + entry.name + (entry.value.empty() ? "" : " " + entry.value);
      const bool fits = static_cast<int>(name.size()) + 2 <= indent;
      name += fits ? std::string(indent - name.size(), ' ') : "\n" + std::string(indent, ' ');
      text += name + Wrapped(entry.text, indent, indent, columns) + "\n";
    }
  }
  if (!app->get_footer().empty()) text += "\n" + app->get_footer() + "\n";
  return text;
}

void AddMadeOfParser(CLI::App& app, std::function<int()>& command) {
  const auto add = [&](const char* name, const char* text, const char* example, std::string (*made)(const CLI::App&)) {
    CLI::App* verb = app.add_subcommand(name, text);
    verb->footer(fmt::format("Example:\n  circlet {}", example));
    verb->callback([&app, &command, made] {
      command = [&app, made] {
        fmt::print("{}", made(app));
        return 0;
      };
    });
  };
  add("man", "Print the man page", "man | man -l -", ManPage);
  add("completion", "Print the completion of bash", "completion > ~/.local/share/bash-completion/completions/circlet",
      BashCompletion);
}

}  // namespace circlet
