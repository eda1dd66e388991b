// pool and lift_pooled on the CPU: formulas and layout in pooling.h.
//
// Bytes moved by pool: N * D in, M * D out; by lift_pooled: M * D in twice, N * D in, N * D out. Sums are in float32
// and rounded once. Threads divide the work by lines of tokens.

#include "pooling.h"
#include "rows.h"

#include <torch/csrc/stable/library.h>

#include <optional>

namespace jitaccel {
namespace {

constexpr int64_t kGrain = 65536;  // elements for which a thread is worth starting

// Calls f(frame, row) for every line of tokens of every frame, in parallel.
template <typename F>
void for_each_line(int64_t frames, int64_t rows, int64_t elements, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
  torch::stable::parallel_for(0, frames * rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) f(line / rows, static_cast<int>(line % rows));
  });
}

template <typename T>
JITACCEL_INLINE float sum4(const T& a, const T& b, const T& c, const T& d) {
  return static_cast<float>(a) + static_cast<float>(b) + static_cast<float>(c) + static_cast<float>(d);
}

// A token of the smaller picture from four of the larger one. If patch and factor are 2, each of its latents is the
// mean of one of them: out[c + k] = mean of tokens[k][c .. c + 4). If patch is 1: out[c] = mean of tokens[.][c].
template <int PATCH, typename T>
JITACCEL_INLINE void pool_four(const T* const* tokens, float scale, int channels, T* __restrict__ out) {
  const T *first = tokens[0], *second = tokens[1], *third = tokens[2], *fourth = tokens[3];
  if (PATCH == 1) {
    for (int c = 0; c < channels; ++c) out[c] = static_cast<T>(sum4(first[c], second[c], third[c], fourth[c]) * scale);
    return;
  }
  for (int c = 0; c < channels; c += 4) {
    out[c] = static_cast<T>(sum4(first[c], first[c + 1], first[c + 2], first[c + 3]) * scale);
    out[c + 1] = static_cast<T>(sum4(second[c], second[c + 1], second[c + 2], second[c + 3]) * scale);
    out[c + 2] = static_cast<T>(sum4(third[c], third[c + 1], third[c + 2], third[c + 3]) * scale);
    out[c + 3] = static_cast<T>(sum4(fourth[c], fourth[c + 1], fourth[c + 2], fourth[c + 3]) * scale);
  }
}

JITACCEL_CLONES void pool_patches(const float* const* tokens, float scale, int channels, float* out) {
  pool_four<2>(tokens, scale, channels, out);
}
JITACCEL_CLONES void pool_patches(const BFloat16* const* tokens, float scale, int channels, BFloat16* out) {
  pool_four<2>(tokens, scale, channels, out);
}
JITACCEL_CLONES void pool_patches(const Half* const* tokens, float scale, int channels, Half* out) {
  pool_four<2>(tokens, scale, channels, out);
}
JITACCEL_CLONES void pool_latents(const float* const* tokens, float scale, int channels, float* out) {
  pool_four<1>(tokens, scale, channels, out);
}
JITACCEL_CLONES void pool_latents(const BFloat16* const* tokens, float scale, int channels, BFloat16* out) {
  pool_four<1>(tokens, scale, channels, out);
}
JITACCEL_CLONES void pool_latents(const Half* const* tokens, float scale, int channels, Half* out) {
  pool_four<1>(tokens, scale, channels, out);
}

template <int PATCH, int FACTOR, typename T>
void run_pool(const Pooling& pooling, int64_t frames, const T* x, float scale, T* out) {
  const int line_size = pooling.small_columns * pooling.channels;
  for_each_line(frames, pooling.small_rows, line_size, [&](int64_t frame, int row) {
    const T* from = x + frame * pooling.frame_size();
    T* to = out + frame * pooling.small_frame_size() + row * line_size;
    for (int column = 0; column < pooling.small_columns; ++column, to += pooling.channels) {
      const PooledFrom<PATCH, FACTOR> token(pooling, row, column);
      if constexpr (FACTOR == 2 && (PATCH == 1 || PATCH == 2)) {
        const T* tokens[4];
        for (int k = 0; k < 4; ++k) tokens[k] = from + token.lines[k / 2 * PATCH] + token.columns[k % 2 * PATCH];
        if (PATCH == 1) pool_latents(tokens, scale, pooling.channels, to);
        if (PATCH == 2) pool_patches(tokens, scale, pooling.channels, to);
      } else {
        const int patch = token.patch(), step = patch * patch;
        for (int c = 0; c < pooling.channels; c += step)
          for (int k = 0; k < step; ++k)
            to[c + k] = static_cast<T>(token.mean(from + c, k / patch, k % patch, scale));
      }
    }
  });
}

template <int PATCH, int FACTOR, typename V, typename S>
void run_lift(const Pooling& pooling, int64_t frames, const V* values, const S* pooled, const S* state, float level,
              V* out) {
  const int line_size = pooling.columns * pooling.channels;
  const float small_level = pooled_level(level, static_cast<float>(pooling.factor));
  for_each_line(frames, pooling.rows, line_size, [&](int64_t frame, int row) {
    const int64_t small = frame * pooling.small_frame_size(), line = frame * pooling.frame_size() + row * line_size;
    for (int column = 0; column < pooling.columns; ++column) {
      const LiftedFrom<PATCH, FACTOR> token(pooling, row, column);
      const int patch = token.patch(), step = patch * patch;
      for (int c = 0; c < pooling.channels; c += step) {
        const auto clean = token.clean(values + small + c, pooled + small + c, small_level);
        const int64_t at = line + column * pooling.channels + c;
        for (int k = 0; k < step; ++k)
          out[at + k] = static_cast<V>(
              (static_cast<float>(state[at + k]) - token.bilinear(clean, k / patch, k % patch)) / level);
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
  const float scale = pooled_scale(level ? *level->const_data_ptr<float>() : 0.0f, static_cast<float>(factor));
  with_type(x, [&](auto type) {
    with_sizes(pooling, [&](auto p, auto f) {
      using T = decltype(type);
      run_pool<p.value, f.value>(pooling, x.size(0) * pooling.frames, x_.const_data_ptr<T>(), scale,
                                 out.mutable_data_ptr<T>());
    });
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
    with_type(state, [&](auto type) {
      with_sizes(pooling, [&](auto p, auto f) {
        using V = decltype(value);
        using S = decltype(type);
        run_lift<p.value, f.value>(pooling, state.size(0) * pooling.frames, values_.const_data_ptr<V>(),
                                   pooled_.const_data_ptr<S>(), state_.const_data_ptr<S>(),
                                   *level.const_data_ptr<float>(), out.mutable_data_ptr<V>());
      });
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
