#pragma once

// The text side of a model as stages and units.

#include <memory>
#include <string>
#include <vector>

#include "circlet/model/gemma4/config.h"
#include "circlet/model/gemma4/text.h"
#include "circlet/model/gemma4/weights.h"
#include "circlet/preprocess/samples.h"
#include "pipeline/stage.h"
#include "pipeline/units.h"

namespace circlet::gemma4 {

// A picture as the vision stages read it.
struct ImageItem {
  Item item;
  Tensor pixel_values;             // [1,P,3 ps^2], as in the sample
  std::vector<int64_t> positions;  // [P,2]
  int64_t budget = 0;              // soft tokens that the sample's padding holds
};

// A sequence as the text stages read it.
struct TextItem {
  Item item;
  std::vector<int64_t> ids;     // placeholders replaced by the pad id
  std::vector<int64_t> keep;    // 1 = a real position
  std::vector<int> images;      // ids of its pictures' items
  std::vector<int64_t> places;  // where their features go
  int64_t answer = 0;           // kCaption: index of the answer's first token

  // Index of the last real position.
  int64_t Last() const;
  // Index of the first position whose logits are read: of a caption those that predict its answer.
  int64_t FirstRead() const;
};

// What every part of a run shares.
struct RunContext {
  const Gemma4Config& config;
  const ModelWeights& weights;
  Calibration& calibration;
  ActivationStore& store;
  Communicator& world;
  std::vector<TextItem> texts;    // items 0, 1, ...
  std::vector<Item> items;        // of `texts`
  std::vector<ImageItem> images;  // items kFirstImage, kFirstImage + 1, ...
  std::vector<Item> image_items;
  int64_t max_seq_len = 0;
  int64_t head_slice_bytes = int64_t{64} << 20;  // most of the head's weight in float32 at a time, and of logits

  const Dialect& GetDialect() const { return calibration.GetDialect(); }
  const TextItem& TextOf(const Item& item) const { return texts[item.id]; }
  const ImageItem& ImageOf(int id) const { return images[id - kFirstImage]; }
  static constexpr int kFirstImage = 1 << 24;
  const TextItem* VerifyText() const;
  WeightSource Stored() const;
};

class TextRun {
 public:
  explicit TextRun(RunContext& context);
  ~TextRun();

  Stage Tables();
  Stage Embeddings();
  Stage PerLayerInputs();
  Stage Layer(int index);
  // Forgets what no later stage reads.
  void DropAfterLayer(int index);
  Stage Norm();
  void DropAfterNorm();

  // Units, each behind its stage.
  void WriteEmbeddingUnits(UnitWriter& writer);
  void WritePleUnits(UnitWriter& writer);
  void WriteLayerUnits(UnitWriter& writer, int index);
  void WriteHeadUnit(UnitWriter& writer);
  void WriteModelUnit(UnitWriter& writer);

  // Every point and parameter of the text side, from graphs of a short length (checks before the run).
  std::vector<Point> Points();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace circlet::gemma4
