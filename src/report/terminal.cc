#include "circlet/report/terminal.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>

#include "circlet/base/error.h"
#include "report/text.h"

namespace circlet {
namespace {

struct CodeRangeWidth {
  uint32_t first, last;
  int width;
};
// Blocks whose letters do not take one column (Unicode, East Asian Width; combining marks).
constexpr CodeRangeWidth kWidths[] = {
    {0x0300, 0x036f, 0},   {0x200b, 0x200f, 0},   {0xfe00, 0xfe0f, 0},  {0x1100, 0x115f, 2}, {0x2e80, 0xa4cf, 2},
    {0xac00, 0xd7a3, 2},   {0xf900, 0xfaff, 2},   {0xfe30, 0xfe6f, 2},  {0xff00, 0xff60, 2}, {0xffe0, 0xffe6, 2},
    {0x1f300, 0x1f64f, 2}, {0x1f900, 0x1f9ff, 2}, {0x20000, 0x3fffd, 2}};

}  // namespace

int DisplayWidth(std::string_view text) {
  int width = 0;
  for (size_t i = 0; i < text.size();) {
    const auto lead = static_cast<unsigned char>(text[i++]);
    uint32_t code = lead < 0x80 ? lead : lead < 0xe0 ? lead & 0x1fu : lead < 0xf0 ? lead & 0x0fu : lead & 0x07u;
    for (; i < text.size() && (static_cast<unsigned char>(text[i]) & 0xc0) == 0x80; ++i) {
      code = code << 6 | (static_cast<unsigned char>(text[i]) & 0x3fu);
    }
    const auto found = std::ranges::find_if(
        kWidths, [code](const CodeRangeWidth& range) { return range.first <= code && code <= range.last; });
    width += found == std::end(kWidths) ? 1 : found->width;
  }
  return width;
}

// --- TextTable ---

TextTable::TextTable(std::vector<std::string> header) { rows_.push_back(std::move(header)); }

void TextTable::Row(std::vector<std::string> cells) {
  CIRCLET_CHECK(cells.size() == rows_[0].size(), "{} cells under {} headings", cells.size(), rows_[0].size());
  rows_.push_back(std::move(cells));
}

std::string TextTable::ToString(int width) const {
  size_t columns = rows_[0].size();
  std::vector<int> widths(columns);
  std::vector<Align> aligns(columns, Align::kRight);
  const auto is_number = [](const std::string& cell) {
    return cell.empty() || cell == "n/a" || cell == "nan" ||
           std::string_view("0123456789-+.").find(cell[0]) != std::string_view::npos;
  };
  for (size_t column = 0; column < columns; ++column) {
    for (size_t row = 0; row < rows_.size(); ++row) {
      widths[column] = std::max(widths[column], DisplayWidth(rows_[row][column]));
      if (column == 0 || (row > 0 && !is_number(rows_[row][column]))) aligns[column] = Align::kLeft;
    }
  }
  constexpr int kBetween = 2;
  int total = -kBetween;
  for (const int each : widths) total += each + kBetween;
  for (; width > 0 && total > width && columns > 1; --columns) total -= widths[columns - 1] + kBetween;
  std::string text;
  for (size_t row = 0; row < rows_.size(); ++row) {
    std::string line;
    for (size_t column = 0; column < columns; ++column) {
      line += (column > 0 ? "  " : "") + Padded(rows_[row][column], widths[column], aligns[column]);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
    if (row > 0) continue;
    for (size_t column = 0; column < columns; ++column) {
      text += (column > 0 ? "  " : "") + Repeated("─", widths[column]);
    }
    text += "\n";
  }
  if (columns == rows_[0].size()) return text;
  std::string names;
  for (size_t column = columns; column < rows_[0].size(); ++column) names += (names.empty() ? "" : ", ") + rows_[0][column];
  return text + "(no room for: " + names + ")\n";
}

std::string HistogramBars(std::span<const std::pair<std::string, int64_t>> bins, int width) {
  constexpr std::array<std::string_view, 8> kEighths = {"", "▏", "▎", "▍", "▌", "▋", "▊", "▉"};
  int64_t largest = 1;
  int label_width = 0, count_width = 0;
  for (const auto& [label, count] : bins) {
    largest = std::max(largest, count);
    label_width = std::max(label_width, DisplayWidth(label));
    count_width = std::max(count_width, static_cast<int>(fmt::formatted_size("{}", count)));
  }
  std::string text;
  for (const auto& [label, count] : bins) {
    // Rounded up, so that no filled bin looks empty.
    const auto share = static_cast<double>(std::max<int64_t>(count, 0)) / static_cast<double>(largest);
    const int eighths = static_cast<int>(std::ceil(share * 8 * width));
    const std::string bar = Repeated("█", eighths / 8) + std::string(kEighths[eighths % 8]);
    text += fmt::format("{}  {}  {:>{}}\n", Padded(label, label_width, Align::kRight), Padded(bar, width), count,
                        count_width);
  }
  return text;
}

// --- Progress ---

namespace {

std::string Clock(double seconds) {
  const auto whole = static_cast<int64_t>(std::max(0.0, std::round(seconds)));
  const int64_t hours = whole / 3600, minutes = whole / 60 % 60;
  return hours > 0 ? fmt::format("{}:{:02}:{:02}", hours, minutes, whole % 60)
                   : fmt::format("{}:{:02}", minutes, whole % 60);
}

double Monotonic() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Progress::Progress(std::FILE* out, std::function<double()> seconds)
    : out_(out),
      seconds_(seconds ? std::move(seconds) : Monotonic),
      terminal_(out != nullptr && isatty(fileno(out)) == 1) {}

Progress::~Progress() { End(); }

void Progress::Plan(std::vector<double> costs, int done) {
  costs_ = std::move(costs);
  number_ = first_ = done;
  plan_begun_ = seconds_();
}

void Progress::Begin(std::string stage, int64_t total) {
  End();
  stage_ = std::move(stage);
  total_ = total;
  done_ = 0;
  ++number_;
  begun_ = shown_ = seconds_();
  open_ = true;
  if (terminal_) Show(false);
}

void Progress::Advance(int64_t count) {
  constexpr double kTerminalPause = 0.1, kPlainPause = 60;  // seconds
  done_ += count;
  if (seconds_() - shown_ >= (terminal_ ? kTerminalPause : kPlainPause)) Show(false);
}

void Progress::Say(std::string_view what) {
  if (open_ && terminal_) Show(false, what);
}

void Progress::End() {
  if (!open_) return;
  Show(true);
  open_ = false;
}

double Progress::Share() const {
  return !open_ || total_ <= 0 ? 1 : std::min(1.0, static_cast<double>(done_) / static_cast<double>(total_));
}

double Progress::Done() const {
  double all = 0, done = 0;
  for (int i = 0; i < static_cast<int>(costs_.size()); ++i) {
    all += costs_[i];
    done += costs_[i] * (i + 1 < number_ ? 1 : i + 1 == number_ ? Share() : 0);
  }
  return all > 0 ? done / all : 1;
}

double Progress::SecondsLeft() const {
  double all = 0, before = 0;
  for (int i = 0; i < static_cast<int>(costs_.size()); ++i) (i < first_ ? before : all) += costs_[i];
  const double made = Done() * (all + before) - before;
  return made > 0 ? (seconds_() - plan_begun_) / made * (all - made) : 0;
}

void Progress::Show(bool last, std::string_view said) {
  if (out_ == nullptr) return;
  shown_ = seconds_();
  const double elapsed = shown_ - begun_;
  std::string text;
  if (!costs_.empty()) {
    text = fmt::format("[{}/{}] {}  {:.0f} %", number_, costs_.size(), stage_, 100 * Done());
    if (last) {
      text += fmt::format("  {}", Clock(elapsed));
    } else if (!said.empty()) {
      text += fmt::format("  {}", said);
    } else if (const double left = SecondsLeft(); left > 0) {
      text += fmt::format("  {} left", Clock(left));
    }
  } else {
    text = fmt::format("{}: {}/{}", stage_, done_, total_);
    if (last) {
      text += fmt::format(", {}", Clock(elapsed));
    } else if (done_ > 0 && total_ > done_) {
      text +=
          fmt::format(", {} left", Clock(elapsed / static_cast<double>(done_) * static_cast<double>(total_ - done_)));
    }
  }
  const std::string line = terminal_ ? "\r" + Padded(text, shown_width_) + (last ? "\n" : "") : text + "\n";
  shown_width_ = last ? 0 : DisplayWidth(text);
  std::fwrite(line.data(), 1, line.size(), out_);
  std::fflush(out_);
}

}  // namespace circlet
