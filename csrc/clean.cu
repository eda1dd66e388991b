// The clean estimates at the anchors, which micro_flow_into lifts.
//
//   clean[b, i] = state[b, anchors[b, i]] - level * velocity[b, anchors[b, i]]
//
// Layout: state (B, N, D), velocity (B, N, D), clean (B, M, D) float32, contiguous; level = levels[0] on
// the device. Bytes moved: 4 B M D out; as many elements of both inputs in.
//
// This is a separate pass for two reasons. A move may write the state that these values are computed from, so all of
// them must be computed first. And the blur gathers each value some 20 times; this way it reads one row instead of two
// and follows one index instead of two. Launch: one thread per vector of 4 channels (1 channel if D or an address does
// not allow 4).

#include "lift_tile.cuh"

namespace jitaccel {
namespace {

constexpr int kThreads = 256;

struct CleanEstimate {
  AnyInput state, velocity;
  const int64_t* __restrict__ anchors;
  const float* __restrict__ levels;
  float* __restrict__ clean;
  int num_anchors, num_tokens, channels;
};

template <int V>
__global__ void clean_kernel(CleanEstimate from) {
  const int vectors = from.channels / V, at = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (at >= from.num_anchors * vectors) return;
  const int channel = at % vectors * V;
  const int64_t image = blockIdx.y, row = image * from.num_anchors + at / vectors;
  const int64_t token = image * from.num_tokens + from.anchors[row];
  float y[V], v[V];
  load<V>(from.state, token * from.channels + channel, y);
  load<V>(from.velocity, token * from.channels + channel, v);
  const float level = from.levels[0];
#pragma unroll
  for (int c = 0; c < V; ++c) y[c] -= level * v[c];
  store<V>(from.clean + row * from.channels + channel, y);
}

}  // namespace

Tensor clean_at_anchors(const Tensor& state, const Tensor& velocity, const Tensor& anchors, const Tensor& levels,
                        cudaStream_t stream) {
  const int64_t batch = anchors.size(0), num_anchors = anchors.size(1);
  const int64_t num_tokens = state.size(1), channels = state.size(2);
  Tensor clean = torch::stable::new_empty(state, {batch, num_anchors, channels}, ScalarType::Float);
  const CleanEstimate from{any_input(state),
                           any_input(velocity),
                           anchors.const_data_ptr<int64_t>(),
                           levels.const_data_ptr<float>(),
                           clean.mutable_data_ptr<float>(),
                           static_cast<int>(num_anchors),
                           static_cast<int>(num_tokens),
                           static_cast<int>(channels)};
  const bool is_aligned = takes_vectors(state, channels, 4) && takes_vectors(velocity, channels, 4);
  const int64_t vectors = channels / (is_aligned ? 4 : 1);
  launch(is_aligned ? clean_kernel<4> : clean_kernel<1>, blocks_for(num_anchors * vectors, kThreads, batch), kThreads,
         0, stream, from);
  return clean;
}

}  // namespace jitaccel
