// pool and lift_pooled: to a smaller picture and back (a variant of ours).
//
//   pool:         out = mean over factor x factor latents / (1 - s + s / factor)       without a level, the mean
//   lift_pooled:  clean = pooled - s' * values,  s' = (s / factor) / (1 - s + s / factor)
//                 out = (state - bilinear(clean)) / s
//
// Layout: pooling.h. Bytes moved: N * D in and M * D out; back M * D twice and N * D in, N * D out; the smaller picture is
// a quarter or less, and its neighbours come from cache. At 64 x 64 tokens of 64 channels in bfloat16 0.7 and 1.3 MB.
// Launch: a thread for each element of the output; the level is read on the device, so a captured graph may change it.

#include "cuda_common.cuh"
#include "pooling.h"

#include <optional>

namespace jitaccel {
namespace {

constexpr int kThreads = 256;

struct Latent {
  int64_t frame, y, x, channel;
};

// Which latent an element of a (B, tokens, D) tensor is; `frame` counts those of all images.
__device__ __forceinline__ Latent latent_of(int64_t at, int64_t rows, int64_t columns, int64_t channels, int64_t patch) {
  const int64_t element = at % channels, token = at / channels, step = patch * patch;
  const int64_t within = element % step, column = token % columns, line = token / columns;
  return {line / rows, line % rows * patch + within / patch, column * patch + within % patch, element - within};
}

template <typename T>
__global__ void pool_kernel(Pooling pooling, int64_t count, const T* __restrict__ x, const float* __restrict__ level,
                            T* __restrict__ out) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= count) return;
  const Latent to = latent_of(at, pooling.small_rows, pooling.small_columns, pooling.channels, pooling.patch);
  const T* frame = x + to.frame * pooling.rows * pooling.columns * pooling.channels + to.channel;
  const int64_t top = min(to.y, pooling.small_height() - 1) * pooling.factor;
  const int64_t left = min(to.x, pooling.small_width() - 1) * pooling.factor;
  float sum = 0.0f;
  for (int64_t a = 0; a < pooling.factor; ++a)
    for (int64_t b = 0; b < pooling.factor; ++b)
      sum += static_cast<float>(frame[pooling.place(min(top + a, pooling.height() - 1), min(left + b, pooling.width() - 1))]);
  const float s = level == nullptr ? 0.0f : *level, f = static_cast<float>(pooling.factor);
  out[at] = static_cast<T>(sum / (f * f * (1.0f - s + s / f)));
}

template <typename V, typename S>
__global__ void lift_kernel(Pooling pooling, int64_t count, const V* __restrict__ values, const S* __restrict__ pooled,
                            const S* __restrict__ state, const float* __restrict__ level, V* __restrict__ out) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= count) return;
  const Latent to = latent_of(at, pooling.rows, pooling.columns, pooling.channels, pooling.patch);
  const float s = *level, f = static_cast<float>(pooling.factor), small_level = s / f / (1.0f - s + s / f);
  const int64_t frame = to.frame * pooling.small_rows * pooling.small_columns * pooling.channels + to.channel;
  const Between y = Between::of(to.y, pooling.factor, pooling.small_height());
  const Between x = Between::of(to.x, pooling.factor, pooling.small_width());
  const auto clean = [&](int64_t row, int64_t column) {
    const int64_t place = frame + pooling.small_place(row, column);
    return static_cast<float>(pooled[place]) - small_level * static_cast<float>(values[place]);
  };
  const float upper = clean(y.first, x.first) * (1.0f - x.share) + clean(y.first, x.second) * x.share;
  const float lower = clean(y.second, x.first) * (1.0f - x.share) + clean(y.second, x.second) * x.share;
  const float lifted = upper * (1.0f - y.share) + lower * y.share;
  out[at] = static_cast<V>((static_cast<float>(state[at]) - lifted) / s);
}

// Calls f with a value of the element type of x, which check.h has found to be one of three.
template <typename F>
void with_type(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Half: return f(Half());
    case ScalarType::BFloat16: return f(BFloat16());
    default: return f(float());
  }
}

Tensor pool(const Tensor& x, const std::vector<int64_t>& sizes, int64_t patch, int64_t factor,
            const std::optional<Tensor>& level) {
  const Pooling pooling = make_pooling("pool", "x", x, sizes, patch, factor);
  if (level) check_level("pool", *level, x);
  const Tensor out = torch::stable::new_empty(x, {x.size(0), pooling.num_small(), x.size(2)});
  if (out.numel() == 0) return out;
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  const Tensor x_ = torch::stable::contiguous(x);
  const float* s = level ? level->const_data_ptr<float>() : nullptr;
  with_type(x, [&](auto type) {
    using T = decltype(type);
    pool_kernel<T><<<num_blocks(out.numel(), kThreads), kThreads, 0, stream>>>(
        pooling, out.numel(), x_.const_data_ptr<T>(), s, out.mutable_data_ptr<T>());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
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
  const Tensor state_ = torch::stable::contiguous(state);
  with_type(values, [&](auto value) {
    using V = decltype(value);
    with_type(state, [&](auto type) {
      using S = decltype(type);
      lift_kernel<V, S><<<num_blocks(out.numel(), kThreads), kThreads, 0, stream>>>(
          pooling, out.numel(), values_.const_data_ptr<V>(), pooled_.const_data_ptr<S>(), state_.const_data_ptr<S>(),
          level.const_data_ptr<float>(), out.mutable_data_ptr<V>());
      STD_CUDA_KERNEL_LAUNCH_CHECK();
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
