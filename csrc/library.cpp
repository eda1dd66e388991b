// The operators' schemas, and a mark that identifies the sources a library was built from.
//
// They are here rather than in Python, so that a C++ program needs only this library. jitaccel/ops/schema.py repeats
// them for installations without a compiled library; a test compares the two.

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
