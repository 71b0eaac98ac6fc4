#include "circlet/graph/graph.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

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
bool OfOneName(const Point& a, const Point& b) { return a.name == b.name; }

// Points of the heads' tensors have names of their own in files; here those of one attention share them.
TEST(GraphTest, AnExpandedAttentionFoldsBack) {
  struct Kind {
    int64_t heads, kv_heads, past;
    bool transpose;
  };
  for (const Kind& kind : {Kind{8, 1, 0, false}, {4, 2, 7, false}, {1, 1, 7, true}, {6, 3, 0, true}}) {
    Graph graph;
    const Builder b(graph);
    const auto cache = [&](const char* name, int64_t keys) { return b.Input(name, {1, kind.kv_heads, keys, 8}); };
    std::vector<ValueId> in{b.Input("q", {1, kind.heads, 2, 8}), cache("k", 3), cache("v", 3),
                            b.Input("mask", {1, 2, 3 + kind.past})};
    if (kind.past > 0) in.insert(in.end(), {cache("past_k", kind.past), cache("past_v", kind.past)});
    std::vector<Builder::NamedPoint> points(Attention::kPoints);
    points[Attention::kLogits] = {"logits"};
    points[Attention::kSoftmax] = {"softmax"};
    points[Attention::kAttnOut] = {"attn_out"};
    const Attention op{.skip_masked = false, .explicit_transpose = kind.transpose};
    b.Output("out", b.Point("behind", b.AddFused(op, in, points)));
    EXPECT_EQ(Dump(Folded(Expanded(graph), OfOneName)), Dump(graph));
    const Graph unlike = Folded(Expanded(graph), [](const Point&, const Point&) { return false; });
    EXPECT_EQ(Dump(unlike), Dump(Expanded(graph))) << "points that round differently";
  }
}

TEST(GraphTest, AnExpandedGatedLinearFoldsBack) {
  Graph graph;
  const Builder b(graph);
  const ValueId x = b.Input("x", {1, 4, 16}), gate = b.Input("gate", {1, 4, 8});
  std::vector<Builder::NamedPoint> points{{"product"}};
  b.Output("y", b.Point("behind",
                        b.AddFused(GatedLinear{}, {gate, x, b.Weight("w", {8, 16}, WeightKind::kLinear)}, points)));
  const Graph expanded = Expanded(graph);
  EXPECT_EQ(Dump(Folded(expanded, OfOneName)), Dump(graph));
  Graph read = expanded;
  read.AddOutput("also", read.Nodes()[0].out[0]);
  EXPECT_EQ(Dump(Folded(read, OfOneName)), Dump(read)) << "the product is read elsewhere";
}

TEST(GraphTest, WhatIsReadElsewhereIsNotFoldedAway) {
  const auto attention_of = [](std::string_view read) {
    Graph graph;
    const Builder b(graph);
    const ValueId q = b.Input("q", {1, 2, 1, 8}), k = b.Input("k", {1, 1, 1, 8}), v = b.Input("v", {1, 1, 1, 8}),
                  mask = b.Input("mask", {1, 1, 4}), past_k = b.Input("past_k", {1, 1, 3, 8}),
                  past_v = b.Input("past_v", {1, 1, 3, 8});
    b.Output("out", b.AddFused(Attention{.skip_masked = false}, {q, k, v, mask, past_k, past_v}, {}));
    Graph expanded = Expanded(graph);
    const auto node = std::ranges::find(expanded.Nodes(), read, [](const Node& n) { return n.op.Name(); });
    expanded.AddOutput("also", node->out[0]);
    const Graph folded = Folded(expanded, OfOneName);
    size_t operands = 0;
    for (const Node& node : folded.Nodes())
      if (node.op.Name() == Attention::kName) operands = node.in.size();
    EXPECT_EQ(folded.Outputs().size(), 2u);
    return operands;
  };
  EXPECT_EQ(attention_of("concat"), 4u) << "the keys are joined ahead of it";
  EXPECT_EQ(attention_of("softmax"), 0u);
}

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
