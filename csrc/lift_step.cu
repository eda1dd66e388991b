// lift_step_into: one Euler step of the whole state, from the velocity at the anchors.
//
//   state[b, n] += (next - level) * v[b, n]
//   v = values at anchors; elsewhere lift(values), or, in clean mode, (state - lift(state - level * values)) / level
//
// The velocity is rounded to the dtype of values, as if it had been returned. The step is one product and one sum, each
// rounded, as in a sampler in plain torch: an anchor moves as it does without this library, bit for bit.
//
// Layout: state (B, N, D), values (B, M, D), contiguous, each of any of the three dtypes; levels (2,) = (level, next),
// read on the device, so that a captured graph replays with other levels. Bytes moved: M * D elements of values in, N *
// D of the state in and out, 8 (N + M) of indices; clean: besides 4 M * D out and in. Launch shape: lift_tile.cuh.
//
// Clean mode first takes the clean estimates of all anchors (clean.cu); after that a thread reads and writes the state
// at its own places alone.

#include "lift_tile.cuh"

namespace jitaccel {
namespace {

struct Step {
  AnyState state;
  AnyInput values;  // rounded as these
  const float* levels;
  bool is_clean;

  __device__ bool wants(int64_t token) const { return true; }

  template <int V>
  __device__ void at_anchor(int64_t anchor_offset, int64_t offset) const {
    float y[V], velocity[V];
    load<V>(state, offset, y);
    load<V>(values, anchor_offset, velocity);
    advance(offset, y, velocity);
  }

  template <int V>
  __device__ void elsewhere(int64_t offset, const float (&blurred)[V]) const {
    float y[V], velocity[V];
    load<V>(state, offset, y);
    const float level = levels[0];
#pragma unroll
    for (int c = 0; c < V; ++c)
      velocity[c] = rounded_to(values.type, is_clean ? (y[c] - blurred[c]) / level : blurred[c]);
    advance(offset, y, velocity);
  }

  template <int V>
  __device__ void advance(int64_t offset, float (&y)[V], const float (&velocity)[V]) const {
    const float change = levels[1] - levels[0];
#pragma unroll
    for (int c = 0; c < V; ++c) y[c] = __fadd_rn(y[c], __fmul_rn(change, velocity[c]));  // not one fma
    store<V>(state, offset, y);
  }
};

// `sources` (B, M, D): what is blurred, values or clean estimates.
template <typename T>
void run(const char* op, const LiftTile& tile, const Tensor& sources, const Tensor& state, const Tensor& values,
         const Step& step, cudaStream_t stream) {
  constexpr int64_t kVector = 16 / sizeof(T);
  bool is_aligned = true;
  for (const Tensor* x : {&sources, &state, &values}) is_aligned &= takes_vectors(*x, tile.channels, kVector);
  run_lift_tile(op, tile, sources.const_data_ptr<T>(), step, is_aligned, stream);
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
  if (state.numel() == 0) return;
  const DeviceGuard guard(values.get_device_index());
  const cudaStream_t stream = current_stream(values);
  const Tensor values_ = torch::stable::contiguous(values), nearest_ = torch::stable::contiguous(nearest);
  const Tensor anchors_ = torch::stable::contiguous(anchors), weights_ = torch::stable::contiguous(weights);
  const Tensor levels_ = torch::stable::contiguous(levels);
  check_plan_indices(op, nearest_, anchors_, stream);
  const LiftTile tile = make_lift_tile(grid, nearest_, anchors_, weights_, values.size(2));
  const Tensor sources = clean ? clean_at_anchors(state, values_, anchors_, levels_, stream) : values_;
  const Step step{any_state(state), any_input(values_), levels_.const_data_ptr<float>(), clean};
  THO_DISPATCH_V2(sources.scalar_type(), "lift_step_into",
                  AT_WRAP([&] { run<scalar_t>(op, tile, sources, state, values_, step, stream); }), ScalarType::Float,
                  ScalarType::Half, ScalarType::BFloat16);
}

}  // namespace
}  // namespace jitaccel

STABLE_TORCH_LIBRARY_IMPL(jitaccel, CUDA, m) { m.impl("lift_step_into", TORCH_BOX(&jitaccel::lift_step_into)); }
