// The operators' schemas, and the mark by which a library that was built from other sources is told.
//
// Here rather than in Python, so that a C++ program needs nothing but this library. jitaccel/ops/schema.py repeats them
// for installations where nothing is compiled; a test compares the two.

#include <torch/csrc/stable/library.h>

namespace jitaccel {
__attribute__((used)) extern const char source_mark[] = "jitaccel-sources:" JITACCEL_SOURCES;
}

STABLE_TORCH_LIBRARY(jitaccel, m) {
  m.def("nearest_anchor(Tensor anchors, int[] grid, bool stack=False) -> Tensor");
  m.def(
      "lift(Tensor values, Tensor nearest, Tensor anchors, int[] grid, Tensor weights, bool stack=False) -> Tensor");
  m.def("importance(Tensor velocity, int[] grid, int window=3, bool stack=False) -> Tensor");
  m.def("activate(Tensor importance, Tensor anchors, int count) -> Tensor");
  m.def(
      "micro_flow_into(Tensor(a!) state, Tensor previous, Tensor velocity, Tensor noise, Tensor tokens, Tensor nearest, "
      "Tensor anchors, int[] grid, Tensor weights, Tensor levels, float weight, "
      "bool stack=False) -> ()");
  m.def("pool(Tensor x, int[] grid, int patch, int factor, Tensor? level=None) -> Tensor");
  m.def(
      "lift_pooled(Tensor values, Tensor pooled, Tensor state, int[] grid, int patch, int factor, Tensor level) "
      "-> Tensor");
}
