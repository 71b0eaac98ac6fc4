#pragma once

// A graph on its way into a file: the model as far as it is made, and what is known of its tensors beside what the file
// stores. Lowering (lowering.cc) makes it, the passes of this folder finish it one after the other (export.cc has their
// order), each in a file that begins with a drawing of before and after.

#include <string>
#include <vector>

#include "circlet/circle/export.h"

namespace circlet::circle {

struct Origin {
  int producer = -1;      // index of the operator
  bool keeps = false;     // the producer only moves values
  bool clamps = false;    // the producer holds its first input against a constant bound, the second
  std::string name;       // for errors
  bool pointed = false;   // `name` is that of a point
  ValueId constant = -1;  // a float constant or parameter that may still get a grid
};

struct Lowered {
  Model model;
  std::vector<Origin> origins;  // by tensor
  const GridSource& source;
  ExportOptions options;

  int32_t NewTensor(std::string name, const TensorType& type, bool computed);
  int32_t NewInts(const CircleArg& arg);  // a constant int32 vector or scalar
  void Assign(int32_t tensor, const QParams& grid);
  // Gives a tensor its grid; the tensors behind which it only moved share it.
  void AssignBack(int32_t tensor, const QParams& grid);
  // A QUANTIZE of `tensor` onto `grid`, to be placed by the caller; it writes to a new tensor of that name.
  Operator Requantized(int32_t tensor, const std::string& name, const QParams& grid);

 private:
  void Resplit(int32_t tensor, const QParams& grid);
};

// Throws Error naming the point when no file can hold the grid.
void RequireStorable(const std::string& name, const QParams& grid);

// Nodes and points one by one; fused operators have been expanded.
Lowered Lower(const Graph& graph, const GridSource& source, const ExportOptions& options);

// The passes, in the order of export.cc.
void SettleClamps(Lowered& lowered);
void FillHoles(Lowered& lowered);
void QuantizeConstants(Lowered& lowered);
void QuantizeBiases(Lowered& lowered);
void JoinReshapes(Lowered& lowered);
void RemoveUnread(Lowered& lowered);

}  // namespace circlet::circle
