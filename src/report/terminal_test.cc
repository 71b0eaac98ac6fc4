#include "circlet/report/terminal.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <set>
#include <sstream>

#include "circlet/base/error.h"

namespace circlet {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

std::vector<std::string> Lines(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) lines.push_back(line);
  return lines;
}

ErrorMetrics Figures(double mean, double max, double interval) {
  return {.count = 1, .sum_abs = mean, .max_abs = max, .reference_min = 0, .reference_max = interval};
}

TEST(DisplayWidthTest, CountsColumnsAndNotBytes) {
  EXPECT_EQ(DisplayWidth(""), 0);
  EXPECT_EQ(DisplayWidth("abc"), 3);
  EXPECT_EQ(DisplayWidth("é─•"), 3);
  EXPECT_EQ(DisplayWidth("e\u0301"), 1);
  EXPECT_EQ(DisplayWidth("日本"), 4);
  EXPECT_EQ(DisplayWidth("🙂"), 2);
  EXPECT_EQ(DisplayWidth("\xff\x80"), 1);  // no UTF-8, no crash
}

TEST(TupleTextTest, LooksLikeTheReferencesTuples) {
  EXPECT_EQ(TupleText({1, 16, 64}), "(1, 16, 64)");
  EXPECT_EQ(TupleText({16}), "(16,)");
  EXPECT_EQ(TupleText({}), "()");
}

TEST(ErrorSummaryTest, IsTheRecordedBox) {
  EXPECT_EQ(ErrorSummary("Quantization Error Summary", {1, 16, 64}, {1, 16, 64}, Figures(0.000218, 1, 1 / 0.0004094)),
            "┌───────────── Quantization Error Summary ─────────────\n"
            "│ FP output shape    : (1, 16, 64)\n"
            "│ Quant output shape : (1, 16, 64)\n"
            "│ Mean |diff|        : 0.000218\n"
            "│ PEIR               : 0.040940 %\n"
            "└──────────────────────────────────────────────────────\n");
}

TEST(ErrorSummaryTest, ShowsTheMaximumWhenAskedAndNanAsNan) {
  const std::string text = ErrorSummary("Image-Text Quantization Error", {2}, {2}, ErrorMetrics{}, true);
  EXPECT_THAT(text,
              HasSubstr("│ Mean |diff|        : nan\n│ Max |diff|         : nan\n│ PEIR               : nan %\n"));
}

TEST(SmokeSummaryTest, IsTheRecordedBox) {
  const SmokeSummary summary{.case_name = "gemma4_model",
                             .metrics = Figures(0.000733, 0.01396, 0.01396 / 0.002436),
                             .shape_match = true,
                             .quant_finite = true,
                             .artifacts = {{"circle", "out/wrapper_smoke/gemma4_model.q.circle"}}};
  EXPECT_EQ(SmokeSummaryText(summary),
            "┌───────────── Wrapper Smoke Summary ─────────────\n"
            "│ Case             : gemma4_model\n"
            "│ Status           : PASS\n"
            "│ Mean |diff|      : 0.000733\n"
            "│ Max  |diff|      : 0.013960\n"
            "│ PEIR             : 0.243600 %\n"
            "│ Shape match      : True\n"
            "│ Quant finite     : True\n"
            "└─────────────────────────────────────────────────\n"
            "Artifacts:\n"
            "  - circle: out/wrapper_smoke/gemma4_model.q.circle\n");
}

TEST(SmokeSummaryTest, AFailureNamesItsKindsAndWhatIsUnknownIsNotAvailable) {
  const SmokeSummary summary{.case_name = "x",
                             .failures = {"SHAPE", "ACCURACY"},
                             .shape_match = false,
                             .messages = {"float output (1,), quantized (2,)"}};
  const std::string text = SmokeSummaryText(summary);
  EXPECT_THAT(text, HasSubstr("│ Status           : FAIL (SHAPE, ACCURACY)\n│ Mean |diff|      : n/a\n"));
  EXPECT_THAT(text, HasSubstr("│ Shape match      : False\n│ Quant finite     : n/a\n"));
  EXPECT_THAT(text, HasSubstr("Messages:\n  - float output (1,), quantized (2,)\n"));
  EXPECT_THAT(text, Not(HasSubstr("Artifacts")));
}

// --- ScatterPlot ---

// Every value a little off its neighbour, from `low` to `high`.
std::vector<float> Ramp(float low, float high, int count) {
  std::vector<float> values;
  for (int i = 0; i < count; ++i)
    values.push_back(low + (high - low) * static_cast<float>(i) / static_cast<float>(count - 1));
  return values;
}

TEST(ScatterPlotTest, FrameTicksAndLabelsAreThoseOfTheRecordedPlot) {
  // The recorded axes, -3.4 to 2.9, without their 5% margins; the recorded plot had 22 rows for lack of terminal.
  const float low = -3.4f + 6.3f / 22, high = 2.9f - 6.3f / 22;
  const std::vector<float> values = Ramp(low + 0.004f, high, 2000);
  const std::vector<std::string> lines = Lines(ScatterPlot(values, values, "", {50, 22}));
  ASSERT_EQ(lines.size(), 22);
  EXPECT_EQ(lines[0], "    ┌────────────────────────────────────────────┐");
  EXPECT_EQ(lines[1], " 2.9┤                                            │");
  EXPECT_THAT(lines[6], HasSubstr(" 1.3┤"));
  EXPECT_THAT(lines[10], HasSubstr("-0.2┤"));
  EXPECT_THAT(lines[14], HasSubstr("-1.8┤"));
  EXPECT_EQ(lines[19], "-3.4┤                                            │");
  EXPECT_EQ(lines[20], "    └┬──────┬──────┬───────┬──────┬──────┬──────┬┘");
  EXPECT_EQ(lines[21], "     -3.4  -2.3   -1.3    -0.2   0.8    1.9   2.9 ");
  for (const std::string& line : lines) EXPECT_EQ(DisplayWidth(line), 50) << line;
}

TEST(ScatterPlotTest, IsFiftyByTwentyFive) {
  const std::vector<float> values = Ramp(0, 1, 100);
  const std::vector<std::string> lines = Lines(ScatterPlot(values, values));
  ASSERT_EQ(lines.size(), 25);
  for (const std::string& line : lines) EXPECT_EQ(DisplayWidth(line), 50) << line;
}

TEST(ScatterPlotTest, XIsTheReferenceAndYTheQuantizedValue) {
  // One dot at high x and low y: lower right.
  const std::vector<float> reference = {10, 0}, quantized = {0, 0};
  const std::vector<std::string> lines = Lines(ScatterPlot(reference, quantized, "", {50, 25}));
  for (int row = 1; row < 20; ++row) EXPECT_THAT(lines[row], Not(HasSubstr("•"))) << row;
  int rows_with_dots = 0;
  for (int row = 1; row <= 22; ++row) {
    if (lines[row].find("•") == std::string::npos) continue;
    ++rows_with_dots;
    EXPECT_EQ(DisplayWidth(lines[row].substr(0, lines[row].find("•"))), 7);
    EXPECT_EQ(DisplayWidth(lines[row].substr(0, lines[row].rfind("•"))), 46);
  }
  EXPECT_EQ(rows_with_dots, 1);
}

TEST(ScatterPlotTest, ATitleSaysWhatTheAxesAre) {
  const std::vector<float> values = Ramp(0, 1, 10);
  const std::vector<std::string> lines = Lines(ScatterPlot(values, values, "logits"));
  ASSERT_EQ(lines.size(), 26);
  EXPECT_THAT(lines[0], testing::EndsWith(" logits: x float, y quantized"));
}

// Wide labels have a digit fewer rather than a gap.
TEST(ScatterPlotTest, EveryTickHasALabel) {
  const std::vector<float> values = Ramp(-17.8f, 8.7f, 100);
  const std::vector<std::string> lines = Lines(ScatterPlot(values, values));
  std::istringstream labels(lines.back());
  int count = 0;
  for (std::string label; labels >> label;) ++count;
  EXPECT_EQ(count, 7) << lines.back();
}

TEST(ScatterPlotTest, ATickHasALabelOfItsOwnOrNone) {
  const std::vector<float> values = Ramp(1000, 1001, 100);
  std::istringstream labels(Lines(ScatterPlot(values, values)).back());
  std::set<std::string> different;
  int count = 0;
  for (std::string label; labels >> label; ++count) different.insert(label);
  EXPECT_GT(count, 2);
  EXPECT_EQ(std::ssize(different), count);
}

TEST(ScatterPlotTest, EqualOrNoFiniteValuesStillMakeAPlot) {
  const std::vector<float> same = {2, 2}, bad = {NAN, INFINITY};
  EXPECT_THAT(ScatterPlot(same, same), HasSubstr("•"));
  EXPECT_THAT(ScatterPlot(bad, same), Not(HasSubstr("•")));
  EXPECT_EQ(Lines(ScatterPlot(bad, bad)).size(), 25);
  EXPECT_EQ(Lines(ScatterPlot({}, {})).size(), 25);
}

TEST(ScatterPlotTest, ExtremeRangesKeepTheirSize) {
  for (const float scale : {1e-30f, 1e-6f, 1e-3f, 1e4f, 1e7f, 1e38f}) {
    const std::vector<float> values = {-scale, scale};
    const std::vector<std::string> lines = Lines(ScatterPlot(values, values));
    ASSERT_EQ(lines.size(), 25);
    for (const std::string& line : lines) EXPECT_EQ(DisplayWidth(line), 50) << line;
  }
}

// --- Tables and bars ---

TEST(TextTableTest, AlignsWordsLeftNumbersRightAndKnowsWideLetters) {
  TextTable table({"stage", "PEIR", "dtype"});
  table.Row({"embed", "0.5", "int16"});
  table.Row({"層", "12.25", "uint8"});
  table.Row({"vision", "n/a", ""});
  EXPECT_EQ(table.ToString(),
            "stage    PEIR  dtype\n"
            "──────  ─────  ─────\n"
            "embed     0.5  int16\n"
            "層      12.25  uint8\n"
            "vision    n/a\n");
}

TEST(TextTableTest, ColumnsThatDoNotFitAreLeftOutAndNamed) {
  TextTable table({"stage", "PEIR", "dtype"});
  table.Row({"embed", "0.5", "int16"});
  EXPECT_EQ(table.ToString(18), table.ToString());
  EXPECT_EQ(table.ToString(17),
            "stage  PEIR\n"
            "─────  ────\n"
            "embed   0.5\n"
            "(no room for: dtype)\n");
  EXPECT_EQ(table.ToString(1),
            "stage\n"
            "─────\n"
            "embed\n"
            "(no room for: PEIR, dtype)\n");
}

TEST(TextTableTest, ARowOfAnotherLengthIsABug) {
  TextTable table({"a", "b"});
  EXPECT_THROW(table.Row({"1"}), Bug);
}

TEST(HistogramBarsTest, AreInProportionAndShowEveryFilledBin) {
  const std::pair<std::string, int64_t> bins[] = {{"-1", 1000}, {"0", 500}, {"1.5", 1}, {"2", 0}};
  EXPECT_EQ(HistogramBars(bins, 4),
            " -1  ████  1000\n"
            "  0  ██     500\n"
            "1.5  ▏        1\n"
            "  2           0\n");
}

// --- Progress ---

class ProgressTest : public ::testing::Test {
 protected:
  ~ProgressTest() override {
    std::fclose(file_);
    std::free(text_);
  }
  std::string Text() {
    std::fflush(file_);
    return std::string(text_, size_);
  }

  char* text_ = nullptr;
  size_t size_ = 0;
  std::FILE* file_ = open_memstream(&text_, &size_);
  double now_ = 100;
};

TEST_F(ProgressTest, OffATerminalLinesComeOnceAMinuteAndAtTheEnd) {
  Progress progress(file_, [this] { return now_; });
  progress.Begin("calibrate layers.3", 40);
  for (int i = 0; i < 40; ++i) {
    now_ += 4;
    progress.Advance();
  }
  progress.Say("writing lm_head");
  progress.End();
  EXPECT_EQ(Text(),
            "calibrate layers.3: 15/40, 1:40 left\ncalibrate layers.3: 30/40, 0:40 left\n"
            "calibrate layers.3: 40/40, 2:40\n");
}

TEST_F(ProgressTest, APlanCountsTheWholeAndItsTime) {
  Progress progress(file_, [this] { return now_; });
  progress.Plan({10, 10, 60, 20}, /*done=*/1);
  progress.Begin("a", 2);
  now_ += 10;
  progress.Advance(2);
  EXPECT_DOUBLE_EQ(progress.Done(), 0.2);
  EXPECT_DOUBLE_EQ(progress.SecondsLeft(), 80) << "10 of 90 took 10 seconds";
  progress.Begin("b", 4);
  now_ += 60;
  progress.Advance(3);
  progress.End();
  EXPECT_EQ(Text(), "[2/4] a  20 %  0:10\n[3/4] b  65 %  0:45 left\n[3/4] b  65 %  1:00\n");
}

TEST_F(ProgressTest, TheNextStageEndsTheOneBefore) {
  Progress progress(file_, [this] { return now_; });
  progress.Begin("embed", 2);
  progress.Advance(2);
  progress.Begin("head", 1);
  now_ += 3725;
  progress.End();
  EXPECT_EQ(Text(), "embed: 2/2, 0:00\nhead: 0/1, 1:02:05\n");
}

TEST_F(ProgressTest, AnOpenLineIsEndedWithTheObject) {
  {
    Progress(file_, [this] { return now_; }).Begin("embed", 2);
  }
  EXPECT_EQ(Text(), "embed: 0/2, 0:00\n");
}

TEST(ProgressTerminalTest, RewritesOneLineAndCoversTheOldText) {
  const int terminal = posix_openpt(O_RDWR | O_NOCTTY);
  ASSERT_GE(terminal, 0);
  ASSERT_EQ(grantpt(terminal), 0);
  ASSERT_EQ(unlockpt(terminal), 0);
  std::FILE* out = std::fopen(ptsname(terminal), "w");
  ASSERT_NE(out, nullptr);
  double now = 0;
  {
    Progress progress(out, [&] { return now; });
    progress.Begin("s", 10);
    now = 1;
    progress.Advance(1);
    now = 1.05;  // too soon
    progress.Advance(1);
    now = 2;
    progress.Advance(8);
  }
  std::string text;  // comes in pieces
  char byte = 0;
  while (byte != '\n' && read(terminal, &byte, 1) == 1) text += byte;
  std::fclose(out);
  close(terminal);
  EXPECT_EQ(text, "\rs: 0/10\rs: 1/10, 0:09 left\rs: 10/10          \rs: 10/10, 0:02\r\n");
}

TEST(ProgressNowhereTest, WithoutAFileNothingHappens) {
  Progress progress(nullptr);
  progress.Begin("s", 1);
  progress.Advance();
  progress.End();
}

}  // namespace
}  // namespace circlet
