#pragma once

// What all parts of a Gemma 4 run share: the model, its items, and what they are made of.

#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "circlet/model/gemma4/config.h"
#include "circlet/model/gemma4/text.h"
#include "circlet/model/gemma4/weights.h"
#include "circlet/quant/calibration.h"
#include "circlet/settings/settings.h"
#include "pipeline/item.h"
#include "pipeline/phase.h"

namespace circlet::gemma4 {

// What the vision stages know of a picture besides its item.
struct Picture {
  Tensor pixel_values;             // [1,P,3 ps^2], as in the sample; empty once nobody reads it
  std::vector<int64_t> positions;  // [P,2]
  int64_t budget = 0;              // soft tokens that the sample's padding holds
};

// What the text stages know of a sequence besides its item.
struct Sequence {
  std::vector<int64_t> ids;     // placeholders replaced by the pad id
  std::vector<int64_t> keep;    // 1 = a real position
  std::vector<int> pictures;    // ids of its pictures' items
  std::vector<int64_t> places;  // where their features go
  int64_t answer = 0;           // of a caption: index of the answer's first token

  // Index of the last real position.
  int64_t Last() const;
  // Index of the first position whose logits are read: of a caption those that predict its answer.
  int64_t FirstRead() const;
};

struct Context {
  const Gemma4Config& config;
  const Settings& settings;
  const ModelWeights& weights;
  Calibration& calibration;
  int world_rank = 0, world_size = 1;

  ItemSet texts;                    // items 0, 1, ...
  std::vector<Sequence> sequences;  // of `texts`
  static constexpr int kFirstPicture = 1 << 24;
  ItemSet images;                 // items kFirstPicture, kFirstPicture + 1, ...
  std::vector<Picture> pictures;  // of `images`
  int64_t max_seq_len = 0;

  const Dialect& GetDialect() const { return calibration.GetDialect(); }
  // A graph of the run's dialect.
  Graph Build(const std::function<void(const BlockBuilder&)>& body) const;
  const Sequence& SequenceOf(const Item& item) const { return sequences[item.id]; }
  const Picture& PictureOf(int id) const { return pictures[id - kFirstPicture]; }
  const Item& ImageItem(int id) const { return images[id - kFirstPicture]; }

  // The item that the files are verified with; null: there is none.
  const Item* Verify() const;
  // Its picture's item; null: it has none, or several.
  const Item* VerifyPicture() const;
};

// Tables that all layers and many items share, as the two chains read them: rounded once. The tables must outlive it.
class ChainTables {
 public:
  explicit ChainTables(const Calibration& calibration) : calibration_(calibration) {}
  Tensor For(Chain chain, const std::string& point, const Tensor& table);

 private:
  const Calibration& calibration_;
  std::map<const std::byte*, Tensor> rounded_;  // by the table's bytes
  std::mutex mutex_;
};

// A value of the store as it is, for an input or an output of a unit.
inline UnitValue Stored(std::string key) { return {.reads = {{.key = std::move(key)}}}; }
// One position of it.
UnitValue StoredAt(std::string key, int64_t position);
// A value that no stage makes.
UnitValue Given(std::function<Tensor()> make);

}  // namespace circlet::gemma4
