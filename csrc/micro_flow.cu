// micro_flow_into: moves newly activated tokens towards their target (DMF, arXiv:2603.10744).
//
//   target[n] = (1 - level) * lift(previous - level_p * velocity)[n] + level * noise[n]
//   state[n] <- (1 - weight) * state[n] + weight * target[n]          for n in tokens; no other token is written
//
// Layout: state, previous, velocity, noise (B, N, D), contiguous, each of any of the three dtypes; tokens (B, count);
// nearest, anchors: of the lift before activation; levels (2,) = (level_p, level), read on the device. Bytes moved: 2 M
// * D elements in for the clean estimates, 4 M * D bytes out and in, count * D elements in twice and out once.
//
// Three launches: clean estimates at the anchors (clean.cu explains why separately); a mark for each chosen token; and
// the lift (launch shape in lift_tile.cuh), whose blocks exit at once if no token of their segment is marked, and
// finish only marked ones. The estimates are computed before the state is written, so `previous` may be the state
// itself. Marks instead of a search in `tokens`, so that each token is found by one load whatever their order.

#include "lift_tile.cuh"

namespace jitaccel {
namespace {

constexpr int kThreads = 256;

// A token off the grid is skipped.
__global__ void mark_kernel(const int64_t* __restrict__ tokens, int count, int64_t num_tokens,
                            uint8_t* __restrict__ is_chosen) {
  const int at = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (at >= count) return;
  const int64_t image = blockIdx.y, token = tokens[image * count + at];
  if (token >= 0 && token < num_tokens) is_chosen[image * num_tokens + token] = 1;
}

struct MoveChosen {
  AnyState state;
  AnyInput noise;
  const float* __restrict__ clean;        // (B, M, D)
  const uint8_t* __restrict__ is_chosen;  // (B, N)
  const float* __restrict__ levels;
  float weight;

  static constexpr bool kWantsAll = false;
  __device__ bool wants(int64_t token) const { return is_chosen[token] != 0; }

  template <int V>
  __device__ void at_anchor(int64_t anchor_offset, int64_t offset) const {
    float own[V];
    load<V>(clean + anchor_offset, own);
    elsewhere<V>(offset, own);
  }

  template <int V>
  __device__ void elsewhere(int64_t offset, const float (&prior)[V]) const {
    float e[V], y[V];
    load<V>(noise, offset, e);
    load<V>(state, offset, y);
    const Move move{levels[1], weight};
#pragma unroll
    for (int c = 0; c < V; ++c) e[c] = move(prior[c], e[c], y[c]);
    store<V>(state, offset, e);
  }
};

Tensor mark(const Tensor& tokens, int64_t num_tokens, cudaStream_t stream) {
  Tensor marks = torch::stable::new_empty(tokens, {tokens.size(0), num_tokens}, ScalarType::Byte);
  auto* const is_chosen = marks.mutable_data_ptr<uint8_t>();
  STD_CUDA_CHECK(cudaMemsetAsync(is_chosen, 0, static_cast<size_t>(marks.numel()), stream));
  launch(mark_kernel, blocks_for(tokens.size(1), kThreads, tokens.size(0)), kThreads, 0, stream,
         tokens.const_data_ptr<int64_t>(), tokens.size(1), num_tokens, is_chosen);
  return marks;
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
  if (state.numel() == 0 || tokens.numel() == 0) return;
  const DeviceGuard guard(state.get_device_index());
  const cudaStream_t stream = current_stream(state);
  const Tensor previous_ = torch::stable::contiguous(previous), velocity_ = torch::stable::contiguous(velocity);
  const Tensor noise_ = torch::stable::contiguous(noise), tokens_ = torch::stable::contiguous(tokens);
  const Tensor nearest_ = torch::stable::contiguous(nearest), anchors_ = torch::stable::contiguous(anchors);
  const Tensor weights_ = torch::stable::contiguous(weights), levels_ = torch::stable::contiguous(levels);
  check_plan_indices(op, nearest_, anchors_, stream);
  check_rising(op, "tokens", tokens_, grid.size(), stream);
  const Tensor clean = clean_at_anchors(previous_, velocity_, anchors_, levels_, stream);
  const Tensor marks = mark(tokens_, grid.size(), stream);
  const MoveChosen move{any_state(state),
                        any_input(noise_),
                        clean.const_data_ptr<float>(),
                        marks.const_data_ptr<uint8_t>(),
                        levels_.const_data_ptr<float>(),
                        static_cast<float>(weight)};
  const bool is_aligned = takes_vectors(clean, channels, 4) && takes_vectors(state, channels, 4) &&
                          takes_vectors(noise_, channels, 4);
  const LiftTile tile = make_lift_tile(grid, nearest_, anchors_, weights_, channels);
  run_lift_tile(op, tile, clean.const_data_ptr<float>(), move, is_aligned, stream);
}

}  // namespace
}  // namespace jitaccel

STABLE_TORCH_LIBRARY_IMPL(jitaccel, CUDA, m) { m.impl("micro_flow_into", TORCH_BOX(&jitaccel::micro_flow_into)); }
