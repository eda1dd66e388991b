// lift_step_into: one Euler step of the whole state, from the velocity at the anchors.
//
//   state[b, n] += (next - level) * v[b, n]
//   v = values at anchors; elsewhere lift(values), or, in clean mode, (state - lift(state - level * values)) / level
//
// Layout: state (B, N, D), values (B, M, D), contiguous; levels (2,) = (level, next). Bytes moved: M * D in, N * D in and
// out. The velocity is rounded to the element type of values, as if it had been returned. In clean mode the clean
// estimates of all anchors are taken (M * D floats beside) before any token moves.

#include "blur.h"

#include <torch/csrc/stable/library.h>

namespace jitaccel {
namespace {

struct Step {
  float level, next;
  bool clean;
};

// The clean estimates (B, M, D) of the anchors.
template <typename S, typename T>
std::vector<float> clean_estimates(const Plan& plan, const S* state, const T* values, int64_t channels, float level) {
  std::vector<float> clean(plan.batch * plan.num_anchors * channels);
  torch::stable::parallel_for(0, plan.batch * plan.num_anchors, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / plan.num_anchors;
      const S* y = state + (b * plan.grid.size() + plan.anchors[i]) * channels;
      const T* v = values + i * channels;
      for (int64_t c = 0; c < channels; ++c)
        clean[i * channels + c] = static_cast<float>(y[c]) - level * static_cast<float>(v[c]);
    }
  });
  return clean;
}

template <typename S>
JITACCEL_INLINE void advance(S* y, float v, float dt) {
  *y = static_cast<S>(static_cast<float>(*y) + dt * v);
}

// Moves one line of tokens. `blurred`: the lifted velocities, or in clean mode the lifted clean estimates, (W, D).
template <typename S, typename T>
void move_line(const Plan& plan, int64_t b, int64_t line, const float* blurred, const T* values, int64_t channels,
               const Step& step, S* state) {
  const float dt = step.next - step.level;
  for (int64_t x = 0; x < plan.grid.width; ++x) {
    const int64_t n = line * plan.grid.width + x, a = plan.nearest_of(b, n);
    S* y = state + (b * plan.grid.size() + n) * channels;
    const T* own = values + (b * plan.num_anchors + a) * channels;
    const float* row = blurred + x * channels;
    if (plan.is_anchor(b, n, a))
      for (int64_t c = 0; c < channels; ++c) advance(y + c, static_cast<float>(own[c]), dt);
    else if (step.clean)
      for (int64_t c = 0; c < channels; ++c)
        advance(y + c, static_cast<float>(static_cast<T>((static_cast<float>(y[c]) - row[c]) / step.level)), dt);
    else
      for (int64_t c = 0; c < channels; ++c) advance(y + c, static_cast<float>(static_cast<T>(row[c])), dt);
  }
}

// `sources` (B, M, D): what is blurred.
template <typename S, typename T, typename U>
void run(const Plan& plan, const U* sources, const T* values, int64_t channels, const Step& step, S* state) {
  struct Scratch {
    LineBlur<U> blur;
    std::vector<float> line;
  };
  const int64_t width = plan.grid.width;
  const auto make = [&] { return Scratch{LineBlur<U>(plan, channels), std::vector<float>(width * channels)}; };
  for_each_line(plan, channels, make, [&](int64_t b, int64_t line, Scratch& scratch) {
    scratch.blur.line(b, line, sources + b * plan.num_anchors * channels, scratch.line.data());
    move_line(plan, b, line, scratch.line.data(), values, channels, step, state);
  });
}

void lift_step_into(Tensor state, const Tensor& values, const Tensor& nearest, const Tensor& anchors,
                    const std::vector<int64_t>& sizes, const Tensor& weights, const Tensor& levels, bool clean) {
  const char* op = "lift_step_into";
  const Grid grid = make_grid(op, sizes);
  check_values(op, values, anchors);
  check_plan(op, nearest, anchors, grid, weights, values);
  check_tokens(op, "state", state, values.size(0), grid.size(), values.size(2));
  check_device(op, "state", state, values);
  check_written(op, "state", state);
  check_levels(op, levels, values);
  const Tensor values_ = torch::stable::contiguous(values), nearest_ = torch::stable::contiguous(nearest);
  const Tensor anchors_ = torch::stable::contiguous(anchors), weights_ = torch::stable::contiguous(weights);
  const Tensor levels_ = torch::stable::contiguous(levels);
  const Plan plan = make_plan(op, grid, nearest_, anchors_, weights_);
  if (state.numel() == 0) return;
  const float* level = levels_.const_data_ptr<float>();
  const Step step{level[0], level[1], clean};
  with_type(state, [&](auto state_type) {
    using S = decltype(state_type);
    with_type(values, [&](auto type) {
      using T = decltype(type);
      S* y = state.mutable_data_ptr<S>();
      const T* v = values_.const_data_ptr<T>();
      if (clean) {
        const std::vector<float> estimates = clean_estimates(plan, y, v, values.size(2), step.level);
        run(plan, estimates.data(), v, values.size(2), step, y);
      } else {
        run(plan, v, v, values.size(2), step, y);
      }
    });
  });
}

}  // namespace
}  // namespace jitaccel

STABLE_TORCH_LIBRARY_IMPL(jitaccel, CPU, m) { m.impl("lift_step_into", TORCH_BOX(&jitaccel::lift_step_into)); }
