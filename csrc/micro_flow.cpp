// micro_flow_into: moves newly activated tokens towards their target (DMF, arXiv:2603.10744).
//
//   target[n] = (1 - level) * lift(previous - level_p * velocity)[n] + level * noise[n]
//   state[n] <- (1 - weight) * state[n] + weight * target[n]          for n in tokens; no other token is written
//
// Layout: state, previous, velocity, noise (B, N, D), contiguous; tokens (B, count); nearest, anchors: of the lift
// before activation. Bytes moved: 2 * M * D in, count * D in twice and out once. Only the chosen tokens are blurred.

#include "blur.h"

#include <torch/csrc/stable/library.h>

namespace jitaccel {
namespace {

constexpr int64_t kAhead = 4;  // rows are too far apart for the hardware prefetcher

inline const float* floats(const float* from, std::vector<float>&) { return from; }
template <typename T>
const float* floats(const T* from, std::vector<float>& row) {
  widen(from, static_cast<int64_t>(row.size()), row.data());
  return row.data();
}

// The rows of a contiguous (B, N, D) tensor of any of the three element types, as floats, for reads far apart from each
// other. Use one object per thread, because it owns the scratch.
class Field {
 public:
  Field(const Tensor& x, int64_t channels) : row_bytes_(channels * x.element_size()), row_(channels) {
    with_type(x, [&](auto type) {
      using T = decltype(type);
      data_ = reinterpret_cast<const char*>(x.const_data_ptr<T>());
      widen_ = [](const char* from, std::vector<float>& row) { return floats(reinterpret_cast<const T*>(from), row); };
    });
  }

  // Row i of (B * N, D); valid until the next call.
  const float* row(int64_t i) { return widen_(data_ + i * row_bytes_, row_); }
  void prefetch(int64_t i) const { jitaccel::prefetch(data_ + i * row_bytes_, row_bytes_); }

 private:
  const char* data_ = nullptr;
  const float* (*widen_)(const char*, std::vector<float>&) = nullptr;
  const int64_t row_bytes_;
  std::vector<float> row_;
};

// (B, M, D): the clean estimates at the anchors, previous - level * velocity.
std::vector<float> clean_estimates(const Plan& plan, const Tensor& previous, const Tensor& velocity, int64_t channels,
                                   float level) {
  std::vector<float> clean(plan.batch * plan.num_anchors * channels);
  const int64_t grain = std::max<int64_t>(1, 65536 / channels);
  torch::stable::parallel_for(0, plan.batch * plan.num_anchors, grain, [&](int64_t begin, int64_t end) {
    Field states(previous, channels), velocities(velocity, channels);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = plan.place_of(i), ahead = plan.place_of(std::min(i + kAhead, end - 1));
      states.prefetch(ahead);
      velocities.prefetch(ahead);
      const float *y = states.row(token), *v = velocities.row(token);
      for (int64_t c = 0; c < channels; ++c) clean[i * channels + c] = y[c] - level * v[c];
    }
  });
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
    std::vector<float> blurred;
    Field noise;
  };
  const int64_t width = plan.grid.width;
  const auto make = [&] {
    return Scratch{LineBlur<float>(plan, channels), std::vector<float>(channels), Field(noise, channels)};
  };
  for_each_line(plan, channels, make, [&](int64_t b, int64_t line, Scratch& scratch) {
    const int64_t *first = tokens + b * count, *end = first + count;
    const int64_t* token = std::lower_bound(first, end, line * width);
    if (token == end || *token >= (line + 1) * width) return;
    const float* values = clean.data() + b * plan.num_anchors * channels;
    scratch.blur.begin(b, line, values);
    for (; token != end && *token < (line + 1) * width; ++token) {
      const int64_t ahead = b * plan.grid.size() + token[std::min<int64_t>(kAhead, end - 1 - token)];
      scratch.noise.prefetch(ahead);
      prefetch(state + ahead * channels, channels * sizeof(S));
      const int64_t place = b * plan.grid.size() + *token, a = plan.nearest_of(b, *token);
      // A token that was already an anchor keeps its own clean estimate, as in every lift.
      const float* prior = values + a * channels;
      if (!plan.is_anchor(b, *token, a)) {
        scratch.blur.token(*token - line * width, scratch.blurred.data());
        prior = scratch.blurred.data();
      }
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
  const Tensor tokens_ = torch::stable::contiguous(tokens), previous_ = torch::stable::contiguous(previous);
  const Tensor velocity_ = torch::stable::contiguous(velocity), noise_ = torch::stable::contiguous(noise);
  const Plan plan = make_plan(op, grid, nearest_, anchors_, weights_);
  const int64_t* chosen = tokens_.const_data_ptr<int64_t>();
  check_rising(op, "tokens", chosen, batch, tokens.size(1), grid.size());
  if (state.numel() == 0 || tokens.numel() == 0) return;
  const float* level = levels_.const_data_ptr<float>();
  const Move move{level[1], static_cast<float>(weight)};
  const std::vector<float> clean = clean_estimates(plan, previous_, velocity_, channels, level[0]);
  with_type(state, [&](auto type) {
    using S = decltype(type);
    run(plan, clean, noise_, chosen, tokens.size(1), channels, move, state.mutable_data_ptr<S>());
  });
}

}  // namespace
}  // namespace jitaccel

STABLE_TORCH_LIBRARY_IMPL(jitaccel, CPU, m) { m.impl("micro_flow_into", TORCH_BOX(&jitaccel::micro_flow_into)); }
