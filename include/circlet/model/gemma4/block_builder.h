#pragma once

#include "circlet/graph/builder.h"
#include "circlet/quant/dialect.h"

namespace circlet {

// A Builder whose blocks follow a dialect: what a block adds depends on its arguments and on the switches of the
// builder (docs/dialects.md), never on what the graph is for.
class BlockBuilder : public Builder {
 public:
  BlockBuilder(Graph& graph, const Dialect& dialect) : BlockBuilder(Builder(graph), dialect) {}

  BlockBuilder At(std::string_view name) const { return {Builder::At(name), dialect_}; }
  const Dialect& GetDialect() const { return dialect_; }

  // A point on a value that its producer's point has rounded: where the dialect has requantizing_points; otherwise
  // the value as it is.
  ValueId RequantizingPoint(std::string_view name, ValueId value, WeightKind kind = WeightKind::kNone) const {
    return dialect_.requantizing_points ? Point(name, value, PointUse::kNormal, kind) : value;
  }

  // Whether the checkpoint gives a linear's input a grid that is not its producer's; its clipped output one.
  bool GivenInput() const { return dialect_.given != nullptr && dialect_.given->inputs.contains(Path("act_in")); }
  bool GivenOutput() const { return dialect_.given != nullptr && dialect_.given->outputs.contains(Path("act_out")); }

 private:
  BlockBuilder(Builder builder, const Dialect& dialect) : Builder(std::move(builder)), dialect_(dialect) {}

  Dialect dialect_;
};

}  // namespace circlet
