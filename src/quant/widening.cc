#include "circlet/quant/widening.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <iterator>
#include <nlohmann/json.hpp>
#include <optional>

#include "circlet/base/error.h"
#include "circlet/io/json.h"

namespace circlet {
namespace {

// What products of 8-bit and of 16-bit operands are cut into: a width between two multiples costs as much as the next.
constexpr int64_t kWidthMultiple = 16;

std::optional<int64_t> WholeNumberOf(std::string_view text) {
  int64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size() || number < 0) return std::nullopt;
  return number;
}

// A point's largest channel, as its copies share it, against the median of the point.
class Outlier {
 public:
  explicit Outlier(const StreamPoint& point) : maxima_(point.maxima) {
    std::vector<float> sorted;
    std::ranges::copy_if(maxima_, std::back_inserter(sorted), [](float maximum) { return maximum > 0; });
    if (sorted.empty()) return;
    const auto middle = sorted.begin() + static_cast<int64_t>(sorted.size() / 2);
    std::ranges::nth_element(sorted, middle);
    median_ = *middle;
  }
  void Find(const std::vector<int64_t>& copies) {
    ratio_ = 0;
    if (median_ == 0) return;
    for (size_t c = 0; c < maxima_.size(); ++c) {
      const double ratio = maxima_[c] / (median_ * std::sqrt(static_cast<double>(copies[c])));
      if (ratio <= ratio_) continue;
      ratio_ = ratio;
      channel_ = c;
    }
  }
  double Ratio() const { return ratio_; }
  size_t Channel() const { return channel_; }

 private:
  std::span<const float> maxima_;
  double median_ = 0, ratio_ = 0;
  size_t channel_ = 0;
};

}  // namespace

int64_t Widening::Width() const {
  int64_t width = model_width;
  for (const Channel& channel : channels) width += channel.copies - 1;
  return width;
}

std::string ToText(const Widening& widening) {
  if (widening.Empty()) return fmt::format("{} channels, none of them an outlier", widening.model_width);
  std::string text = fmt::format("{} channels instead of {}:", widening.Width(), widening.model_width);
  for (const auto& [channel, copies] : widening.channels)
    text +=
        fmt::format("{} {} stands {} times", channel == widening.channels.front().channel ? "" : ",", channel, copies);
  return text;
}

nlohmann::json ToJson(const Widening& widening) {
  nlohmann::json copies = nlohmann::json::object();
  for (const auto& [channel, count] : widening.channels) copies[fmt::format("{}", channel)] = count;
  return {{"model_width", widening.model_width}, {"width", widening.Width()}, {"copies", std::move(copies)}};
}

Widening WideningFromJson(const nlohmann::json& json, const std::string& where) {
  const JsonObject object(json, where);
  Widening widening{.model_width = object.Required<int64_t>("model_width")};
  constexpr int64_t kMostChannels = int64_t{1} << 24;
  if (widening.model_width < 1 || widening.model_width > kMostChannels)
    object.FailAt("model_width", fmt::format("expected 1 .. {}", kMostChannels));
  const JsonObject copies = object.Object("copies");
  for (const std::string& key : copies.Keys()) {
    const std::optional<int64_t> channel = WholeNumberOf(key);
    if (!channel || *channel >= widening.model_width)
      copies.FailAt(key, fmt::format("expected a channel from 0 to {}", widening.model_width - 1));
    const auto count = copies.Required<int64_t>(key);
    if (count < 2 || count > widening.model_width + 1)
      copies.FailAt(key, fmt::format("expected 2 .. {} copies", widening.model_width + 1));
    widening.channels.push_back({*channel, count});
  }
  std::ranges::sort(widening.channels, {}, &Widening::Channel::channel);
  if (std::ranges::adjacent_find(widening.channels, {}, &Widening::Channel::channel) != widening.channels.end())
    object.FailAt("copies", "names a channel twice");
  if (const auto width = object.Required<int64_t>("width"); width != widening.Width())
    object.FailAt("width", fmt::format("is {}, the copies make it {}", width, widening.Width()));
  return widening;
}

WideningOption WideningOption::Parse(std::string_view text, std::string_view where) {
  if (text == "auto") return {.automatic = true};
  if (text == "off") return {};
  const std::optional<int64_t> channels = WholeNumberOf(text);
  if (!channels) Fail("{}: \"{}\": expected auto, off, or how many channels the residual stream gets", where, text);
  return {.channels = *channels};
}

std::string WideningOption::ToString() const {
  if (automatic) return "auto";
  return channels == 0 ? "off" : fmt::format("{}", channels);
}

int64_t WideningOption::MostAdded(int64_t width) const {
  if (automatic) {
    const int64_t wide = (width + width / 10 + kWidthMultiple / 2) / kWidthMultiple * kWidthMultiple;
    return std::max<int64_t>(0, wide - width);
  }
  if (channels == 0) return 0;
  if (channels > width) Fail("widen: {} channels beside {}: expected at most as many again", channels, width);
  if ((width + channels) % kWidthMultiple != 0) {
    const int64_t fewer = (width + channels) / kWidthMultiple * kWidthMultiple - width;
    Fail("widen: {} channels make the stream of {} one of {}, which is no multiple of {}; give {}{}", channels, width,
         width + channels, kWidthMultiple, fewer > 0 ? fmt::format("{} or ", fewer) : "", fewer + kWidthMultiple);
  }
  return channels;
}

Widening ChooseCopies(std::span<const StreamPoint> points, int64_t width, const WideningOption& option) {
  std::vector<int64_t> copies(static_cast<size_t>(width), 1);
  std::vector<Outlier> outliers;
  for (const StreamPoint& point : points) {
    CIRCLET_CHECK(std::ssize(point.maxima) == width, "{} has {} channels of {}", point.name, point.maxima.size(),
                  width);
    outliers.emplace_back(point).Find(copies);
  }
  CIRCLET_CHECK(!outliers.empty(), "a stream without points");
  const int64_t most = option.MostAdded(width);
  for (int64_t added = 0; added < most; ++added) {
    const auto worst = std::ranges::max_element(outliers, {}, &Outlier::Ratio);
    const bool full = added == 0 || (width + added) % kWidthMultiple == 0;
    if (option.automatic && full && worst->Ratio() <= kStreamOutlier) break;
    const size_t channel = worst->Channel();
    ++copies[channel];
    for (Outlier& outlier : outliers)
      if (outlier.Channel() == channel) outlier.Find(copies);
  }
  Widening widening{.model_width = width};
  for (int64_t c = 0; c < width; ++c)
    if (copies[static_cast<size_t>(c)] > 1) widening.channels.push_back({c, copies[static_cast<size_t>(c)]});
  return widening;
}

}  // namespace circlet
