#include "circlet/graph/graph.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "circlet/graph/builder.h"

namespace circlet {
namespace {

Graph Attended() {
  Graph graph;
  const Builder b = Builder(graph).At("layers.0");
  const ValueId q = b.Input("q", {1, 2, 4, 8}), k = b.Input("k", {1, 1, 4, 8}), v = b.Input("v", {1, 1, 4, 8});
  const ValueId mask = b.Input("mask", {1, 1, 4, 4});
  b.Output("out", b.AddFused(Attention{}, {q, k, v, mask},
                             {{""}, {"logits"}, {"mask_add"}, {"softmax"}, {"attn_out"}, {""}, {""}}));
  return graph;
}

TEST(GraphTest, DumpShowsOneNodeALineWithTypesAndPoints) {
  Graph graph;
  const Builder b = Builder(graph).At("mlp");
  const ValueId x = b.Input("x", {1, 4, 16});
  b.Output("y", b.Point("act_out", b.Add(FullyConnected{}, {x, b.Weight("weight", {8, 16}, WeightKind::kLinear)})));
  EXPECT_EQ(Dump(graph),
            "%0 = input float32[1,4,16] \"x\"\n"
            "%1 = weight float32[8,16] \"mlp.weight\"\n"
            "%2 = fully_connected(%0, %1) float32[1,4,8]\n"
            "%3 = point(%2) float32[1,4,8] \"mlp.act_out\"\n"
            "output %3 \"y\"\n");
}

TEST(GraphTest, AWeightMentionedTwiceIsOneValue) {
  Graph graph;
  const Builder b(graph);
  EXPECT_EQ(b.Weight("w", {4}, WeightKind::kNorm), b.Weight("w", {4}, WeightKind::kNorm));
  EXPECT_THROW(b.Weight("w", {5}, WeightKind::kNorm), Bug);
}

TEST(GraphTest, AShapeThatDoesNotFitIsAnErrorWithTheRule) {
  Graph graph;
  const Builder b(graph);
  const ValueId x = b.Input("x", {1, 4, 16});
  try {
    b.Add(FullyConnected{}, {x, b.Weight("w", {8, 15}, WeightKind::kLinear)});
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), testing::AllOf(testing::HasSubstr("fully_connected"), testing::HasSubstr("[1,4,16]"),
                                             testing::HasSubstr("[8,15]")));
  }
}

TEST(GraphTest, ExpansionKeepsInputsOutputsAndPoints) {
  const Graph graph = Attended();
  const Graph expanded = Expanded(graph);
  ASSERT_EQ(expanded.Inputs().size(), 4u);
  ASSERT_EQ(expanded.Outputs().size(), 1u);
  EXPECT_EQ(expanded.TypeOf(expanded.Outputs()[0].value), graph.TypeOf(graph.Outputs()[0].value));
  std::vector<std::string> names;
  for (const Point& point : PointsOf(expanded)) names.push_back(point.name);
  EXPECT_THAT(names, testing::UnorderedElementsAre("layers.0.logits", "layers.0.mask_add", "layers.0.softmax",
                                                   "layers.0.attn_out"));
  for (const Node& node : expanded.Nodes()) EXPECT_FALSE(node.op.Fused()) << node.op.Name();
}

// input -> linear -> point -> gelu -> out, beside a second input that only the end reads.
TEST(GraphTest, APartComputesWhatLiesBetween) {
  Graph graph;
  const Builder b(graph);
  const ValueId x = b.Input("x", {1, 4, 16}), other = b.Input("other", {1, 4, 8});
  const ValueId linear = b.Add(FullyConnected{}, {x, b.Weight("weight", {8, 16}, WeightKind::kLinear)});
  const ValueId point = b.Point("act_out", linear);
  const ValueId shaped = b.Reshape(point, {4, 8});
  b.Output("y", b.Add(Add{}, {b.Reshape(b.Add(Gelu{}, {shaped}), {1, 4, 8}), other}));
  EXPECT_EQ(Dump(PartOf(graph, {}, std::vector{linear})),
            "%0 = input float32[1,4,16] \"x\"\n"
            "%1 = weight float32[8,16] \"weight\"\n"
            "%2 = fully_connected(%0, %1) float32[1,4,8]\n"
            "output %2 \"wanted.0\"\n");
  // A value whose grid a point has set passes it again, also behind a view; what is wanted as it is given passes through.
  const Graph rest = PartOf(graph, std::vector{shaped}, std::vector{graph.Outputs()[0].value, shaped});
  ASSERT_EQ(rest.Inputs().size(), 2u);
  EXPECT_EQ(rest.At(rest.Inputs()[0]).name, "given.0");
  EXPECT_EQ(rest.At(rest.Inputs()[1]).name, "other");
  ASSERT_EQ(PointsOf(rest).size(), 1u);
  EXPECT_EQ(PointsOf(rest)[0].name, "act_out");
  EXPECT_EQ(PointsOf(rest)[0].use, PointUse::kBoundary);
  EXPECT_EQ(rest.Outputs().size(), 2u);
}

TEST(GraphTest, OutputsCanBeDropped) {
  Graph graph;
  const Builder b(graph);
  const ValueId x = b.Input("x", {2});
  b.Output("a", x);
  b.Output("b", x);
  const Graph one = WithOutputs(graph, {"b"});
  ASSERT_EQ(one.Outputs().size(), 1u);
  EXPECT_EQ(one.Outputs()[0].name, "b");
}

}  // namespace
}  // namespace circlet
