#include "pipeline/activations.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <random>

#include "temp_directory.h"

namespace circlet {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kSmall = 64;

Tensor Filled(int64_t elements, float value) {
  Tensor tensor(TensorType{DType::kF32, {elements}});
  std::ranges::fill(tensor.F32(), value);
  return tensor;
}

// The descriptors that this process holds of files in `directory`, and the sizes of those.
std::vector<int64_t> OpenFiles(const fs::path& directory) {
  std::vector<int64_t> sizes;
  std::error_code gone;
  for (const auto& entry : fs::directory_iterator("/proc/self/fd", gone)) {
    struct stat status;
    if (fs::read_symlink(entry.path(), gone).string().starts_with(directory.string()) &&
        stat(entry.path().c_str(), &status) == 0)
      sizes.push_back(status.st_size);
  }
  return sizes;
}

// Another's part of the budget is given up at once, by late readers' values first, and is there again behind it.
TEST(ActivationStoreTest, WhatIsSetAsideGoesToFilesUntilItIsGivenBack) {
  const TempDirectory directory;
  ActivationStore store;
  constexpr int64_t kBytes = kSmall * 4;
  store.UseFiles(directory.Path(), /*memory_bytes=*/3 * kBytes, ActivationStore::Files::kNameless);
  store.Put(0, Chain::kFloat, "soon", Filled(kSmall, 1));
  store.Put(0, Chain::kFloat, "late", Filled(kSmall, 2), ActivationStore::Read::kLate);
  EXPECT_EQ(store.SpilledBytes(), 0);
  store.SetAside(2 * kBytes);
  EXPECT_EQ(store.SpilledBytes(), kBytes);
  store.Put(0, Chain::kFloat, "more", Filled(kSmall, 3));
  EXPECT_EQ(store.SpilledBytes(), 2 * kBytes) << "no more fits beside what is set aside";
  store.SetAside(9 * kBytes);
  EXPECT_EQ(store.SpilledBytes(), 3 * kBytes) << "more than there is: nothing stays";
  store.SetAside(0);
  store.Put(0, Chain::kFloat, "behind", Filled(kSmall, 4));
  EXPECT_EQ(store.SpilledBytes(), 3 * kBytes);
  for (const auto& [key, value] : std::map<std::string, float>{{"soon", 1}, {"late", 2}, {"more", 3}, {"behind", 4}})
    EXPECT_EQ(store.Get(0, Chain::kFloat, key).F32()[kSmall - 1], value) << key;
}

TEST(NamelessFilesTest, OneDescriptorServesAllKeysAndItsRoomIsUsedAgain) {
  const TempDirectory directory;
  ActivationStore store;
  store.UseFiles(directory.Path(), /*memory_bytes=*/0, ActivationStore::Files::kNameless);
  for (int round = 0; round < 5; ++round) {
    for (int key = 0; key < 200; ++key) store.Put(0, Chain::kFloat, std::to_string(key), Filled(kSmall, key));
    for (int key = 0; key < 200; ++key)
      EXPECT_EQ(store.Get(0, Chain::kFloat, std::to_string(key)).F32()[kSmall - 1], static_cast<float>(key));
    EXPECT_EQ(OpenFiles(directory.Path()), std::vector<int64_t>{200 * kSmall * 4}) << round;
    for (int key = 199; key >= 0; --key) store.Drop(std::to_string(key));
  }
  store.Put(0, Chain::kFloat, "as large as all of them", Filled(200 * kSmall, 1));
  EXPECT_EQ(OpenFiles(directory.Path()), std::vector<int64_t>{200 * kSmall * 4});
  EXPECT_TRUE(fs::is_empty(directory.Path()));
}

// Whatever comes and goes in whatever order, no value lies on another.
TEST(NamelessFilesTest, ValuesStayWhatTheyWere) {
  const TempDirectory directory;
  ActivationStore store;
  store.UseFiles(directory.Path(), 10 * kSmall, ActivationStore::Files::kNameless);
  std::mt19937 engine(7);
  std::map<int, std::pair<int64_t, float>> there;  // by key: elements, value
  for (int step = 0; step < 3000; ++step) {
    const int key = static_cast<int>(engine() % 40);
    if (const auto it = there.find(key); it != there.end()) {
      for (int item = 0; item < 2; ++item) {
        const Tensor found = store.Get(item, Chain::kQuant, std::to_string(key));
        ASSERT_EQ(found.Elements(), it->second.first);
        ASSERT_TRUE(std::ranges::all_of(found.F32(), [&](float value) { return value == it->second.second + item; }));
      }
      store.Drop(std::to_string(key), engine() % 3 == 0 ? std::set<int>{1} : std::set<int>{});
      store.Drop(std::to_string(key));
      there.erase(it);
      continue;
    }
    const int64_t elements = 1 + static_cast<int64_t>(engine() % 100);
    there[key] = {elements, static_cast<float>(step)};
    for (int item = 0; item < 2; ++item)
      store.Put(item, Chain::kQuant, std::to_string(key), Filled(elements, static_cast<float>(step + item)),
                engine() % 2 == 0 ? ActivationStore::Read::kSoon : ActivationStore::Read::kLate);
  }
}

}  // namespace
}  // namespace circlet
