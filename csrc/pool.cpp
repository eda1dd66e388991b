// pool and lift_pooled: to a smaller picture and back (a variant of ours).
//
//   pool:         out = mean over factor x factor latents / (1 - s + s / factor)       without a level, the mean
//   lift_pooled:  clean = pooled - s' * values,  s' = (s / factor) / (1 - s + s / factor)
//                 out = (state - bilinear(clean)) / s
//
// Layout: pooling.h. Bytes moved: N * D in and M * D out; back M * D twice and N * D in, N * D out. Sums in float32,
// rounded once. Work is shared out by lines of tokens.

#include "pooling.h"
#include "rows.h"

#include <torch/csrc/stable/library.h>

#include <optional>

namespace jitaccel {
namespace {

constexpr int64_t kGrain = 65536;  // elements that pay for a thread

template <typename F>
void for_each_line(int64_t lines, int64_t elements, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
  torch::stable::parallel_for(0, lines, grain, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) f(line);
  });
}

// One output latent of every channel: the mean of `height` x `width` latents whose first is (y, x).
template <typename T>
JITACCEL_INLINE void mean_of(const Pooling& pooling, const T* frame, int64_t y, int64_t x, float scale, T* out) {
  const int64_t factor = pooling.factor, step = pooling.patch * pooling.patch;
  int64_t places[kMostPooled * kMostPooled];
  for (int64_t a = 0; a < factor; ++a)
    for (int64_t b = 0; b < factor; ++b)
      places[a * factor + b] = pooling.place(std::min(y + a, pooling.height() - 1), std::min(x + b, pooling.width() - 1));
  for (int64_t c = 0; c < pooling.channels; c += step) {
    float sum = 0.0f;
    for (int64_t k = 0; k < factor * factor; ++k) sum += static_cast<float>(frame[places[k] + c]);
    out[c] = static_cast<T>(sum * scale);
  }
}

template <typename T>
void run_pool(const Pooling& pooling, int64_t batch, const T* x, float scale, T* out) {
  const int64_t large = pooling.rows * pooling.columns * pooling.channels, patch = pooling.patch;
  for_each_line(batch * pooling.frames * pooling.small_rows, pooling.small_columns * pooling.channels, [&](int64_t line) {
    const T* frame = x + line / pooling.small_rows * large;
    T* row = out + line * pooling.small_columns * pooling.channels;
    const int64_t top = line % pooling.small_rows * patch;
    for (int64_t j = 0; j < pooling.small_columns; ++j)
      for (int64_t k = 0; k < patch * patch; ++k) {
        const int64_t y = std::min(top + k / patch, pooling.small_height() - 1) * pooling.factor;
        const int64_t x0 = std::min(j * patch + k % patch, pooling.small_width() - 1) * pooling.factor;
        mean_of(pooling, frame, y, x0, scale, row + j * pooling.channels + k);
      }
  });
}

template <typename V, typename S>
void run_lift(const Pooling& pooling, int64_t batch, const V* values, const S* pooled, const S* state, float level,
              V* out) {
  const int64_t small = pooling.small_rows * pooling.small_columns * pooling.channels;
  const int64_t line_size = pooling.columns * pooling.channels, patch = pooling.patch, step = patch * patch;
  const float factor = static_cast<float>(pooling.factor);
  const float small_level = level / factor / (1.0f - level + level / factor);
  std::vector<float> clean(batch * pooling.frames * small);
  for_each_line(batch * pooling.frames * pooling.small_rows, small / pooling.small_rows, [&](int64_t line) {
    const int64_t begin = line * (small / pooling.small_rows);
    for (int64_t i = begin; i < begin + small / pooling.small_rows; ++i)
      clean[i] = static_cast<float>(pooled[i]) - small_level * static_cast<float>(values[i]);
  });
  for_each_line(batch * pooling.frames * pooling.rows, line_size, [&](int64_t line) {
    const float* frame = clean.data() + line / pooling.rows * small;
    for (int64_t k = 0; k < patch; ++k) {
      const Between y = Between::of(line % pooling.rows * patch + k, pooling.factor, pooling.small_height());
      for (int64_t at = 0; at < pooling.width(); ++at) {
        const Between x = Between::of(at, pooling.factor, pooling.small_width());
        const float *const a = frame + pooling.small_place(y.first, x.first),
                    *const b = frame + pooling.small_place(y.first, x.second),
                    *const c = frame + pooling.small_place(y.second, x.first),
                    *const d = frame + pooling.small_place(y.second, x.second);
        const int64_t place = line * line_size + at / patch * pooling.channels + k * patch + at % patch;
        for (int64_t i = 0; i < pooling.channels; i += step) {
          const float upper = a[i] * (1.0f - x.share) + b[i] * x.share, lower = c[i] * (1.0f - x.share) + d[i] * x.share;
          const float lifted = upper * (1.0f - y.share) + lower * y.share;
          out[place + i] = static_cast<V>((static_cast<float>(state[place + i]) - lifted) / level);
        }
      }
    }
  });
}

Tensor pool(const Tensor& x, const std::vector<int64_t>& sizes, int64_t patch, int64_t factor,
            const std::optional<Tensor>& level) {
  const Pooling pooling = make_pooling("pool", "x", x, sizes, patch, factor);
  if (level) check_level("pool", *level, x);
  Tensor out = torch::stable::new_empty(x, {x.size(0), pooling.num_small(), x.size(2)});
  if (out.numel() == 0) return out;
  const Tensor x_ = torch::stable::contiguous(x);
  const float s = level ? *level->const_data_ptr<float>() : 0.0f, f = static_cast<float>(factor);
  const float scale = 1.0f / (f * f * (1.0f - s + s / f));
  with_type(x, [&](auto type) {
    using T = decltype(type);
    run_pool(pooling, x.size(0), x_.const_data_ptr<T>(), scale, out.mutable_data_ptr<T>());
  });
  return out;
}

Tensor lift_pooled(const Tensor& values, const Tensor& pooled, const Tensor& state, const std::vector<int64_t>& sizes,
                   int64_t patch, int64_t factor, const Tensor& level) {
  const Pooling pooling = make_pooling("lift_pooled", "state", state, sizes, patch, factor);
  check_lifted("lift_pooled", pooling, values, pooled, state, level);
  Tensor out = torch::stable::new_empty(values, {state.size(0), state.size(1), state.size(2)});
  if (out.numel() == 0) return out;
  const Tensor values_ = torch::stable::contiguous(values), pooled_ = torch::stable::contiguous(pooled);
  const Tensor state_ = torch::stable::contiguous(state);
  with_type(values, [&](auto value) {
    using V = decltype(value);
    with_type(state, [&](auto type) {
      using S = decltype(type);
      run_lift(pooling, state.size(0), values_.const_data_ptr<V>(), pooled_.const_data_ptr<S>(),
               state_.const_data_ptr<S>(), *level.const_data_ptr<float>(), out.mutable_data_ptr<V>());
    });
  });
  return out;
}

}  // namespace
}  // namespace jitaccel

STABLE_TORCH_LIBRARY_IMPL(jitaccel, CPU, m) {
  m.impl("pool", TORCH_BOX(&jitaccel::pool));
  m.impl("lift_pooled", TORCH_BOX(&jitaccel::lift_pooled));
}
