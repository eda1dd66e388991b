// pool and lift_pooled on the device: formulas and layout in pooling.h.
//
// Bytes moved by pool: N * D in, M * D out; by lift_pooled: M * D in twice, N * D in, N * D out. The smaller picture is
// a quarter or less, and its neighbours come from cache. At 64 x 64 tokens of 64 channels in bfloat16: 0.7 and 1.3 MB.
// Launch: one thread per channel of each output token, which writes the channel at once: 8 bytes of bfloat16 if patch
// is 2. The level is read on the device, so it may change between replays of a captured graph.

#include "cuda_common.cuh"
#include "pooling.h"

#include <optional>

namespace jitaccel {
namespace {

constexpr int kThreads = 256;

// The channel and the token of a frame that a thread writes.
struct Place {
  int token, channel;  // the channel's first element
  __device__ Place(int channels, int step) {
    const int at = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), all = channels / step;
    token = at / all;
    channel = at % all * step;
  }
};

template <int PATCH, typename T>
__device__ __forceinline__ void write(T* to, const float* latents, int count) {
  if constexpr (PATCH > 0) {
    Pack<T, PATCH * PATCH> pack;
#pragma unroll
    for (int i = 0; i < PATCH * PATCH; ++i) pack.x[i] = static_cast<T>(latents[i]);
    *reinterpret_cast<Pack<T, PATCH * PATCH>*>(to) = pack;
  } else {
    for (int i = 0; i < count; ++i) to[i] = static_cast<T>(latents[i]);
  }
}

template <int PATCH, int FACTOR, typename T>
__global__ void __launch_bounds__(kThreads) pool_kernel(Pooling pooling, const T* __restrict__ x,
                                                        const float* __restrict__ level, T* __restrict__ out) {
  const int patch = PATCH > 0 ? PATCH : pooling.patch, factor = FACTOR > 0 ? FACTOR : pooling.factor;
  const Place place(pooling.channels, patch * patch);
  if (place.token >= pooling.small_rows * pooling.small_columns) return;
  const PooledFrom<PATCH, FACTOR> from(pooling, place.token / pooling.small_columns,
                                       place.token % pooling.small_columns);
  const T* channel = x + int64_t{blockIdx.y} * pooling.frame_size() + place.channel;
  const float scale = pooled_scale(level == nullptr ? 0.0f : *level, static_cast<float>(factor));
  float latents[from.kPatch * from.kPatch];
  JITACCEL_UNROLL
  for (int k = 0; k < patch * patch; ++k) latents[k] = from.mean(channel, k / patch, k % patch, scale);
  T* to = out + int64_t{blockIdx.y} * pooling.small_frame_size() + place.token * pooling.channels + place.channel;
  write<PATCH>(to, latents, patch * patch);
}

template <int PATCH, int FACTOR, typename V, typename S>
__global__ void __launch_bounds__(kThreads)
    lift_kernel(Pooling pooling, const V* __restrict__ values, const S* __restrict__ pooled,
                const S* __restrict__ state, const float* __restrict__ level, V* __restrict__ out) {
  const int patch = PATCH > 0 ? PATCH : pooling.patch, factor = FACTOR > 0 ? FACTOR : pooling.factor;
  const Place place(pooling.channels, patch * patch);
  if (place.token >= pooling.rows * pooling.columns) return;
  const LiftedFrom<PATCH, FACTOR> from(pooling, place.token / pooling.columns, place.token % pooling.columns);
  const int64_t small = int64_t{blockIdx.y} * pooling.small_frame_size() + place.channel;
  const int64_t at = int64_t{blockIdx.y} * pooling.frame_size() + place.token * pooling.channels + place.channel;
  const float s = *level;
  const auto clean = from.clean(values + small, pooled + small, pooled_level(s, static_cast<float>(factor)));
  float latents[from.y.kPatch * from.y.kPatch];
  if constexpr (PATCH > 0) {
    const auto own = *reinterpret_cast<const Pack<S, PATCH * PATCH>*>(state + at);
#pragma unroll
    for (int k = 0; k < PATCH * PATCH; ++k)
      latents[k] = (static_cast<float>(own.x[k]) - from.bilinear(clean, k / PATCH, k % PATCH)) / s;
  } else {
    for (int k = 0; k < patch * patch; ++k)
      latents[k] = (static_cast<float>(state[at + k]) - from.bilinear(clean, k / patch, k % patch)) / s;
  }
  write<PATCH>(out + at, latents, patch * patch);
}

// One thread per channel of each token of a frame.
dim3 blocks_of(const Pooling& pooling, int64_t tokens, int64_t batch) {
  return blocks_for(tokens * (pooling.channels / (pooling.patch * pooling.patch)), kThreads, batch * pooling.frames);
}

Tensor pool(const Tensor& x, const std::vector<int64_t>& sizes, int64_t patch, int64_t factor,
            const std::optional<Tensor>& level) {
  const Pooling pooling = make_pooling("pool", "x", x, sizes, patch, factor);
  if (level) check_level("pool", *level, x);
  const Tensor out = torch::stable::new_empty(x, {x.size(0), pooling.num_small(), x.size(2)});
  if (out.numel() == 0) return out;
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  const Tensor x_ = aligned(torch::stable::contiguous(x));
  const float* s = level ? level->const_data_ptr<float>() : nullptr;
  const dim3 blocks = blocks_of(pooling, int64_t{1} * pooling.small_rows * pooling.small_columns, x.size(0));
  with_type(x, [&](auto type) {
    with_sizes(pooling, [&](auto p, auto f) {
      using T = decltype(type);
      launch(pool_kernel<p.value, f.value, T>, blocks, kThreads, 0, stream, pooling, x_.const_data_ptr<T>(), s,
             out.mutable_data_ptr<T>());
    });
  });
  return out;
}

Tensor lift_pooled(const Tensor& values, const Tensor& pooled, const Tensor& state, const std::vector<int64_t>& sizes,
                   int64_t patch, int64_t factor, const Tensor& level) {
  const Pooling pooling = make_pooling("lift_pooled", "state", state, sizes, patch, factor);
  check_lifted("lift_pooled", pooling, values, pooled, state, level);
  const Tensor out = torch::stable::new_empty(values, {state.size(0), state.size(1), state.size(2)});
  if (out.numel() == 0) return out;
  const DeviceGuard guard(state.get_device_index());
  const cudaStream_t stream = current_stream(state);
  const Tensor values_ = torch::stable::contiguous(values), pooled_ = torch::stable::contiguous(pooled);
  const Tensor state_ = aligned(torch::stable::contiguous(state));
  const dim3 blocks = blocks_of(pooling, int64_t{1} * pooling.rows * pooling.columns, state.size(0));
  with_type(values, [&](auto value) {
    with_type(state, [&](auto type) {
      with_sizes(pooling, [&](auto p, auto f) {
        using V = decltype(value);
        using S = decltype(type);
        launch(lift_kernel<p.value, f.value, V, S>, blocks, kThreads, 0, stream, pooling, values_.const_data_ptr<V>(),
               pooled_.const_data_ptr<S>(), state_.const_data_ptr<S>(), level.const_data_ptr<float>(),
               out.mutable_data_ptr<V>());
      });
    });
  });
  return out;
}

}  // namespace
}  // namespace jitaccel

STABLE_TORCH_LIBRARY_IMPL(jitaccel, CUDA, m) {
  m.impl("pool", TORCH_BOX(&jitaccel::pool));
  m.impl("lift_pooled", TORCH_BOX(&jitaccel::lift_pooled));
}
