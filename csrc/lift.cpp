// lift: from the anchors to every token (SAG-ODE, arXiv:2603.10744).
//
//   out[b, n] = values[b, nearest[b, n]]      if n is an anchor: its own value, bit for bit
//             = blurred[b, n] (blur.h)        otherwise, summed in float32 and rounded once
//
// Layout: values (B, M, D), out (B, N, D), contiguous. Bytes moved: M * D in, N * D out, once each, plus indices.
// Threads divide the work by lines of tokens: neighbouring lines gather the same anchors, and a line of floats stays in
// the first-level cache between its two passes.

#include "blur.h"

#include <torch/csrc/stable/library.h>

namespace jitaccel {
namespace {

template <typename T>
void run(const Plan& plan, const T* values, int64_t channels, T* out) {
  const int64_t width = plan.grid.width, image = plan.num_anchors * channels;
  struct Scratch {
    LineBlur<T> blur;
    std::vector<float> blurred;
  };
  const auto make = [&] { return Scratch{LineBlur<T>(plan, channels), std::vector<float>(channels)}; };
  for_each_line(plan, channels, make, [&](int64_t b, int64_t line, Scratch& scratch) {
    scratch.blur.begin(b, line, values + b * image);
    T* row = out + (b * plan.grid.size() + line * width) * channels;
    for (int64_t x = 0; x < width; ++x, row += channels) {
      const int64_t n = line * width + x, a = plan.nearest_of(b, n);
      if (plan.is_anchor(b, n, a)) {
        std::memcpy(row, values + b * image + a * channels, channels * sizeof(T));
      } else {
        scratch.blur.token(x, scratch.blurred.data());
        store(scratch.blurred.data(), channels, row);
      }
    }
  });
}

Tensor lift(const Tensor& values, const Tensor& nearest, const Tensor& anchors, const std::vector<int64_t>& sizes,
            const Tensor& weights, bool stack) {
  const Grid grid = make_grid("lift", sizes, stack);
  check_values("lift", values, anchors);
  check_plan("lift", nearest, anchors, grid, weights, values);
  Tensor out = torch::stable::new_empty(values, {values.size(0), grid.size(), values.size(2)});
  const Tensor values_ = torch::stable::contiguous(values), nearest_ = torch::stable::contiguous(nearest);
  const Tensor anchors_ = torch::stable::contiguous(anchors), weights_ = torch::stable::contiguous(weights);
  const Plan plan = make_plan("lift", grid, nearest_, anchors_, weights_);
  if (out.numel() == 0) return out;
  with_type(values, [&](auto type) {
    using T = decltype(type);
    run(plan, values_.const_data_ptr<T>(), values.size(2), out.mutable_data_ptr<T>());
  });
  return out;
}

}  // namespace
}  // namespace jitaccel

STABLE_TORCH_LIBRARY_IMPL(jitaccel, CPU, m) { m.impl("lift", TORCH_BOX(&jitaccel::lift)); }
