#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/io/json.h"
#include "preprocess/jinja/value.h"

namespace circlet::jinja {
namespace {

using nlohmann::json;

// The trees of the JSON library either sort the keys or look for each of them one by one.
class Builder : public nlohmann::json_sax<json> {
 public:
  explicit Builder(Meter& meter) : meter_(meter) {}

  Value Take() { return std::move(root_); }

  bool null() override { return Put({}); }
  bool boolean(bool value) override { return Put(value); }
  bool number_integer(number_integer_t value) override { return Put(value); }
  bool number_unsigned(number_unsigned_t value) override {
    if (value > INT64_MAX) Fail("{} does not fit in 64 bits", value);
    return Put(static_cast<int64_t>(value));
  }
  bool number_float(number_float_t value, const string_t& text) override {
    if (text.find_first_of(".eE") == text.npos) Fail("{} does not fit in 64 bits", text);
    return Put(value);
  }
  bool string(string_t& value) override { return Put(MakeText(std::move(value), meter_)); }
  bool binary(binary_t&) override { return false; }
  bool start_object(size_t) override { return Open(true); }
  bool start_array(size_t) override { return Open(false); }
  bool key(string_t& key) override {
    if (open_.back().dict.Find(key) != nullptr) Fail("the key \"{}\" stands twice in one object; remove one", key);
    open_.back().key = std::move(key);
    return true;
  }
  bool end_object() override {
    Value dict = MakeDict(std::move(open_.back().dict), meter_);
    open_.pop_back();
    return Put(std::move(dict));
  }
  bool end_array() override {
    Value list = MakeList(std::move(open_.back().items), meter_);
    open_.pop_back();
    return Put(std::move(list));
  }
  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception& error) override {
    Fail("byte {}: no JSON ({})", position, error.what());
  }

 private:
  struct Container {
    bool is_dict;
    std::vector<Value> items;
    Dict dict;
    std::string key;
  };

  bool Open(bool is_dict) {
    if (open_.size() == static_cast<size_t>(kJsonDepthLimit)) Fail("nested more than {} deep", kJsonDepthLimit);
    open_.push_back({.is_dict = is_dict});
    return true;
  }
  bool Put(Value value) {
    meter_.Bytes(sizeof(Value));
    if (open_.empty())
      root_ = std::move(value);
    else if (open_.back().is_dict)
      open_.back().dict.Set(open_.back().key, std::move(value));
    else
      open_.back().items.push_back(std::move(value));
    return true;
  }

  Meter& meter_;
  Value root_;
  std::vector<Container> open_;
};

}  // namespace

Value FromJson(std::string_view text, Meter& meter) {
  Builder builder(meter);
  json::sax_parse(text, &builder);
  return builder.Take();
}

}  // namespace circlet::jinja
