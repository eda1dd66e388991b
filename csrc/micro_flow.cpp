// micro_flow_into: newly activated tokens move towards where they belong (DMF, arXiv:2603.10744).
//
//   target[n] = (1 - level) * lift(previous - level_p * velocity)[n] + level * noise[n]
//   state[n] <- (1 - weight) * state[n] + weight * target[n]          for n in tokens; no other token is written
//
// Layout: state, previous, velocity, noise (B, N, D), contiguous; tokens (B, count); nearest, anchors: of the lift before
// activation. Bytes moved: 2 * M * D in, count * D in twice and out once. Only the lines that hold a chosen token are blurred.

#include "blur.h"

#include <torch/csrc/stable/library.h>

namespace jitaccel {
namespace {

// A (B, N, D) tensor of any of the three element types, as floats.
class Field {
 public:
  explicit Field(const Tensor& x) : x_(torch::stable::contiguous(x)), channels_(x.size(2)), row_(x.size(2)) {}

  // Row i of (B * N, D); valid until the next call.
  const float* row(int64_t i) {
    with_type(x_, [&](auto type) {
      using T = decltype(type);
      const T* from = x_.const_data_ptr<T>() + i * channels_;
      for (int64_t c = 0; c < channels_; ++c) row_[c] = static_cast<float>(from[c]);
    });
    return row_.data();
  }

 private:
  const Tensor x_;
  const int64_t channels_;
  std::vector<float> row_;
};

std::vector<float> clean_estimates(const Plan& plan, const Tensor& previous, const Tensor& velocity, float level) {
  const int64_t channels = previous.size(2);
  std::vector<float> clean(plan.batch * plan.num_anchors * channels);
  Field states(previous), velocities(velocity);
  for (int64_t i = 0; i < plan.batch * plan.num_anchors; ++i) {
    const int64_t token = (i / plan.num_anchors) * plan.grid.size() + plan.anchors[i];
    const float *y = states.row(token), *v = velocities.row(token);
    for (int64_t c = 0; c < channels; ++c) clean[i * channels + c] = y[c] - level * v[c];
  }
  return clean;
}

template <typename S>
void move_token(const float* prior, const float* noise, int64_t channels, const Move& move, S* y) {
  for (int64_t c = 0; c < channels; ++c)
    y[c] = static_cast<S>(move(prior[c], noise[c], static_cast<float>(y[c])));
}

template <typename S>
void run(const Plan& plan, const std::vector<float>& clean, const Tensor& noise, const int64_t* tokens, int64_t count,
         int64_t channels, const Move& move, S* state) {
  struct Scratch {
    LineBlur<float> blur;
    std::vector<float> line;
    Field noise;
  };
  const int64_t width = plan.grid.width;
  const auto make = [&] {
    return Scratch{LineBlur<float>(plan, channels), std::vector<float>(width * channels), Field(noise)};
  };
  for_each_line(plan, channels, make, [&](int64_t b, int64_t line, Scratch& scratch) {
    const int64_t *first = tokens + b * count, *end = first + count;
    const int64_t* token = std::lower_bound(first, end, line * width);
    if (token == end || *token >= (line + 1) * width) return;
    scratch.blur.line(b, line, clean.data() + b * plan.num_anchors * channels, scratch.line.data());
    for (; token != end && *token < (line + 1) * width; ++token) {
      const int64_t place = b * plan.grid.size() + *token, a = plan.nearest_of(b, *token);
      // A token that was an anchor already keeps its own clean estimate, as in every lift.
      const float* prior = plan.is_anchor(b, *token, a) ? clean.data() + (b * plan.num_anchors + a) * channels
                                                        : scratch.line.data() + (*token - line * width) * channels;
      move_token(prior, scratch.noise.row(place), channels, move, state + place * channels);
    }
  });
}

void micro_flow_into(Tensor state, const Tensor& previous, const Tensor& velocity, const Tensor& noise,
                     const Tensor& tokens, const Tensor& nearest, const Tensor& anchors,
                     const std::vector<int64_t>& sizes, const Tensor& weights, const Tensor& levels, double weight,
                     bool stack) {
  const char* op = "micro_flow_into";
  const Grid grid = make_grid(op, sizes, stack);
  check_plan(op, nearest, anchors, grid, weights, state);
  const int64_t batch = anchors.size(0), channels = state.dim() == 3 ? state.size(2) : 0;
  check_tokens(op, "state", state, batch, grid.size(), channels);
  check_tokens(op, "previous", previous, batch, grid.size(), channels);
  check_tokens(op, "velocity", velocity, batch, grid.size(), channels);
  check_tokens(op, "noise", noise, batch, grid.size(), channels);
  check_device(op, "previous", previous, state);
  check_device(op, "velocity", velocity, state);
  check_device(op, "noise", noise, state);
  check_written(op, "state", state);
  check_chosen(op, tokens, batch, state);
  check_levels(op, levels, state);
  check_weight(op, weight);
  const Tensor nearest_ = torch::stable::contiguous(nearest), anchors_ = torch::stable::contiguous(anchors);
  const Tensor weights_ = torch::stable::contiguous(weights), levels_ = torch::stable::contiguous(levels);
  const Tensor tokens_ = torch::stable::contiguous(tokens);
  const Plan plan = make_plan(op, grid, nearest_, anchors_, weights_);
  const int64_t* chosen = tokens_.const_data_ptr<int64_t>();
  check_rising(op, "tokens", chosen, batch, tokens.size(1), grid.size());
  if (state.numel() == 0 || tokens.numel() == 0) return;
  const float* level = levels_.const_data_ptr<float>();
  const Move move{level[1], static_cast<float>(weight)};
  const std::vector<float> clean = clean_estimates(plan, previous, velocity, level[0]);
  with_type(state, [&](auto type) {
    using S = decltype(type);
    run(plan, clean, noise, chosen, tokens.size(1), channels, move, state.mutable_data_ptr<S>());
  });
}

}  // namespace
}  // namespace jitaccel

STABLE_TORCH_LIBRARY_IMPL(jitaccel, CPU, m) { m.impl("micro_flow_into", TORCH_BOX(&jitaccel::micro_flow_into)); }
