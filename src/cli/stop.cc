#include "cli/stop.h"

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <deque>
#include <fstream>
#include <set>
#include <vector>

namespace circlet {
namespace {

std::atomic<const std::string*> told{nullptr};

void Stop(int signal) {
  const std::string& text = *told.load();
  if (write(STDERR_FILENO, text.data(), text.size()) < 0) _exit(128 + signal);
  _exit(128 + signal);
}

std::atomic<bool> asked{false};

void Ask(int) { asked = true; }

void HandleUnlessIgnored(int signal, void (*handler)(int), int flags = 0) {
  struct sigaction action {};
  if (sigaction(signal, nullptr, &action) != 0 || action.sa_handler == SIG_IGN) return;
  action.sa_handler = handler;
  action.sa_flags = flags;
  sigaction(signal, &action, nullptr);
}

std::vector<std::string> Words() {
  std::ifstream file("/proc/self/cmdline", std::ios::binary);
  std::vector<std::string> words;
  for (std::string word; std::getline(file, word, '\0');) words.push_back(word);
  return words;
}

std::string Quoted(const std::string& word) {
  constexpr char kPlain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_@%+=:,./-";
  if (!word.empty() && word.find_first_not_of(kPlain) == std::string::npos) return word;
  std::string quoted = "'";
  for (const char c : word) quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return quoted + "'";
}

}  // namespace

void TellWhenStopped(std::string text) {
  static std::deque<std::string> texts;  // the handler may be reading any of them
  if (!text.empty()) text = (isatty(STDERR_FILENO) ? "\ncirclet: " : "circlet: ") + text + "\n";
  texts.push_back(std::move(text));
  if (told.exchange(&texts.back()) != nullptr) return;
  HandleUnlessIgnored(SIGINT, Stop);
  HandleUnlessIgnored(SIGTERM, Stop);
}

bool StopAsked() {
  static const bool handled = [] {
    HandleUnlessIgnored(SIGINT, Ask, SA_RESETHAND);
    HandleUnlessIgnored(SIGTERM, Ask, SA_RESETHAND);
    return true;
  }();
  return handled && asked;
}

std::string CommandLine(const std::string& dropped, const std::string& added) {
  std::string line;
  bool there = added.empty();
  for (const std::string& word : Words()) {
    if (word == dropped) continue;
    there |= word == added;
    line += (line.empty() ? "" : " ") + Quoted(word);
  }
  return there ? line : line + " " + added;
}

std::string RepeatableCommand() {
  static const std::set<std::string> flags{"--force", "--resume", "--quiet", "--timings"};
  static const std::set<std::string> valued{"--output", "-o", "--threads", "--memory-limit", "--save-every"};
  std::string line = "circlet";
  const std::vector<std::string> words = Words();
  for (size_t i = 1; i < words.size(); ++i) {
    const std::string name = words[i].substr(0, words[i].find('='));
    if (flags.contains(name)) continue;
    if (valued.contains(name)) {
      i += name == words[i];  // its value is the next word
      continue;
    }
    line += ' ';
    line += Quoted(words[i]);
  }
  return line;
}

}  // namespace circlet
