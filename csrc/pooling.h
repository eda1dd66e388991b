// pool and lift_pooled, shared by CPU and CUDA: a picture of tokens, and a picture `factor` times smaller along both
// sides.
//
//   pool:         out = mean over factor x factor latents / (1 - s + s / factor)       without a level, the mean
//   lift_pooled:  clean = pooled - s' * values,  s' = (s / factor) / (1 - s + s / factor)
//                 out = (state - bilinear(clean)) / s
//
// A token holds patch x patch latents, channel by channel: element (c * patch + y) * patch + x. The latents of all
// tokens of a frame form a plane of rows * patch times columns * patch. The smaller picture has ceil(side / factor)
// latents per side; tokens that reach beyond them repeat the last. Frames are independent.
//
// The places of a token's source latents are computed once per token, and are the same for each of its channels. PATCH
// and FACTOR are template arguments for common values, and 0 otherwise.
#pragma once

#include "portable.h"

#include <limits>

namespace jitaccel {

constexpr int kMostPooled = 8;

#ifdef __CUDACC__
#define JITACCEL_UNROLL _Pragma("unroll")  // so that arrays stay in registers
#else
#define JITACCEL_UNROLL
#endif

struct Pooling {
  int frames, rows, columns, small_rows, small_columns, patch, factor, channels;

  JITACCEL_HOST_DEVICE int height() const { return rows * patch; }
  JITACCEL_HOST_DEVICE int width() const { return columns * patch; }
  JITACCEL_HOST_DEVICE int small_height() const { return (height() + factor - 1) / factor; }
  JITACCEL_HOST_DEVICE int small_width() const { return (width() + factor - 1) / factor; }
  JITACCEL_HOST_DEVICE int frame_size() const { return rows * columns * channels; }
  JITACCEL_HOST_DEVICE int small_frame_size() const { return small_rows * small_columns * channels; }
  int64_t num_small() const { return int64_t{1} * frames * small_rows * small_columns; }
};

// The factor for a sum over factor x factor latents of a state at level s; at level 0 the result is the mean.
JITACCEL_HOST_DEVICE float pooled_scale(float s, float factor) {
  return 1.0f / (factor * factor * (1.0f - s + s / factor));
}

JITACCEL_HOST_DEVICE float pooled_level(float s, float factor) { return s / factor / (1.0f - s + s / factor); }

// Calls f(P, F), where ::value of the two types is the template argument.
template <int VALUE>
struct Number {
  static constexpr int value = VALUE;
};
template <typename F>
void with_sizes(const Pooling& pooling, const F& f) {
  if (pooling.patch == 2 && pooling.factor == 2) return f(Number<2>(), Number<2>());
  if (pooling.patch == 1 && pooling.factor == 2) return f(Number<1>(), Number<2>());
  f(Number<0>(), Number<0>());
}

// The place in a frame of element 0 of latent (y, x), in a picture that is `columns` tokens wide.
JITACCEL_HOST_DEVICE int place_of(int y, int x, int columns, int patch, int channels) {
  return (y / patch * columns + x / patch) * channels + y % patch * patch + x % patch;
}

// The latents that a token of the smaller picture averages.
template <int PATCH, int FACTOR>
struct PooledFrom {
  static constexpr int kPatch = PATCH > 0 ? PATCH : kMostPooled, kFactor = FACTOR > 0 ? FACTOR : kMostPooled;
  int any_patch, any_factor;
  int lines[kPatch * kFactor], columns[kPatch * kFactor];  // the place of an element is lines[i] + columns[j]

  JITACCEL_HOST_DEVICE int patch() const { return PATCH > 0 ? PATCH : any_patch; }
  JITACCEL_HOST_DEVICE int factor() const { return FACTOR > 0 ? FACTOR : any_factor; }

  JITACCEL_HOST_DEVICE PooledFrom(const Pooling& pooling, int row, int column)
      : any_patch(pooling.patch), any_factor(pooling.factor) {
    const int patch = this->patch(), factor = this->factor();
    JITACCEL_UNROLL
    for (int k = 0; k < patch; ++k)
      JITACCEL_UNROLL
      for (int a = 0; a < factor; ++a) {
        const int y = smaller(smaller(row * patch + k, pooling.small_height() - 1) * factor + a, pooling.height() - 1);
        const int x = smaller(smaller(column * patch + k, pooling.small_width() - 1) * factor + a, pooling.width() - 1);
        lines[k * factor + a] = y / patch * pooling.columns * pooling.channels + y % patch * patch;
        columns[k * factor + a] = x / patch * pooling.channels + x % patch;
      }
  }

  // The mean for latent (y, x) of the token. `channel`: the frame's elements, starting with those of the channel.
  template <typename T>
  JITACCEL_HOST_DEVICE float mean(const T* channel, int y, int x, float scale) const {
    const int factor = this->factor();
    float sum = 0.0f;
    JITACCEL_UNROLL
    for (int a = 0; a < factor; ++a)
      JITACCEL_UNROLL
      for (int b = 0; b < factor; ++b)
        sum += static_cast<float>(channel[lines[y * factor + a] + columns[x * factor + b]]);
    return sum * scale;
  }

 private:
  JITACCEL_HOST_DEVICE static int smaller(int a, int b) { return a < b ? a : b; }
};

// Along one axis, the latents of the smaller picture around those of a token: half-pixel centres, edges held.
template <int PATCH, int FACTOR>
struct Between {
  static constexpr int kPatch = PATCH > 0 ? PATCH : kMostPooled;
  int latents[kPatch + 1];  // neighbours in the smaller picture
  int below[kPatch];        // for each latent of the token, the one below it; the next is above
  float share[kPatch];      // weight of the one above

  JITACCEL_HOST_DEVICE Between(int token, int patch, int factor, int size) {
    const int first = below_of(token * patch, factor);
    JITACCEL_UNROLL
    for (int k = 0; k <= patch; ++k) {
      const int latent = first + k;
      latents[k] = latent < 0 ? 0 : latent < size ? latent : size - 1;
    }
    JITACCEL_UNROLL
    for (int k = 0; k < patch; ++k) {
      const int at = token * patch + k;
      below[k] = below_of(at, factor) - first;  // k for the sizes that are template arguments
      share[k] = (static_cast<float>(at) + 0.5f) / static_cast<float>(factor) - 0.5f -
                 static_cast<float>(below_of(at, factor));
    }
  }

 private:
  // floor((at + 1/2) / factor - 1/2)
  JITACCEL_HOST_DEVICE static int below_of(int at, int factor) { return (2 * at + 1 + factor) / (2 * factor) - 1; }
};

// The latents of the smaller picture around those of a token, and their clean estimates.
template <int PATCH, int FACTOR>
struct LiftedFrom {
  static constexpr int kSide = Between<PATCH, FACTOR>::kPatch + 1;
  int any_patch;
  Between<PATCH, FACTOR> y, x;
  int places[kSide][kSide];

  JITACCEL_HOST_DEVICE int patch() const { return PATCH > 0 ? PATCH : any_patch; }

  JITACCEL_HOST_DEVICE LiftedFrom(const Pooling& pooling, int row, int column)
      : any_patch(pooling.patch),
        y(row, patch(), FACTOR > 0 ? FACTOR : pooling.factor, pooling.small_height()),
        x(column, patch(), FACTOR > 0 ? FACTOR : pooling.factor, pooling.small_width()) {
    const int patch = this->patch();
    JITACCEL_UNROLL
    for (int i = 0; i <= patch; ++i)
      JITACCEL_UNROLL
      for (int j = 0; j <= patch; ++j)
        places[i][j] = place_of(y.latents[i], x.latents[j], pooling.small_columns, patch, pooling.channels);
  }

  struct Clean {
    float at[kSide][kSide];
  };

  // For one channel, whose elements start at `pooled` and `values`.
  template <typename V, typename S>
  JITACCEL_HOST_DEVICE Clean clean(const V* values, const S* pooled, float level) const {
    Clean clean;
    const int patch = this->patch();
    JITACCEL_UNROLL
    for (int i = 0; i <= patch; ++i)
      JITACCEL_UNROLL
      for (int j = 0; j <= patch; ++j)
        clean.at[i][j] = static_cast<float>(pooled[places[i][j]]) - level * static_cast<float>(values[places[i][j]]);
    return clean;
  }

  JITACCEL_HOST_DEVICE float bilinear(const Clean& clean, int k, int j) const {
    const int top = PATCH > 0 && FACTOR > 0 ? k : y.below[k], left = PATCH > 0 && FACTOR > 0 ? j : x.below[j];
    const float right = x.share[j], lower = y.share[k];
    const float above = clean.at[top][left] * (1.0f - right) + clean.at[top][left + 1] * right;
    const float under = clean.at[top + 1][left] * (1.0f - right) + clean.at[top + 1][left + 1] * right;
    return above * (1.0f - lower) + under * lower;
  }
};

inline Pooling make_pooling(const char* op, const char* name, const Tensor& x, const std::vector<int64_t>& sizes,
                            int64_t patch, int64_t factor) {
  const Grid grid = make_grid(op, sizes, true);
  for (const auto& [what, value] : {std::pair{"patch", patch}, std::pair{"factor", factor}})
    if (value < 1 || value > kMostPooled)
      fail(op, what, text("be in 1..", kMostPooled), text(value), "give the latents along a token's side, and 2 or 4");
  if (x.dim() != 3 || !is_value_type(x) || x.size(1) != grid.size() || x.size(2) % (patch * patch) != 0)
    fail(op, name,
         text("be float32, float16 or bfloat16 (B, ", grid.size(), ", D), D a multiple of ", patch * patch), kind(x),
         "pass every token of the grid, its latents channel by channel");
  if (grid.height * grid.width * x.size(2) > std::numeric_limits<int>::max() / 2)
    fail(op, name, "have fewer than 2^30 elements a frame", kind(x), "split the picture");
  const auto small = [&](int64_t side) { return static_cast<int>((side + factor - 1) / factor); };
  return {static_cast<int>(grid.frames), static_cast<int>(grid.height), static_cast<int>(grid.width),
          small(grid.height),            small(grid.width),             static_cast<int>(patch),
          static_cast<int>(factor),      static_cast<int>(x.size(2))};
}

inline void check_level(const char* op, const Tensor& level, const Tensor& like) {
  if (level.dim() != 0 || level.scalar_type() != ScalarType::Float)
    fail(op, "level", "be a float32 tensor ()", kind(level), "give the state's noise level");
  check_device(op, "level", level, like);
}

inline void check_lifted(const char* op, const Pooling& pooling, const Tensor& values, const Tensor& pooled,
                         const Tensor& state, const Tensor& level) {
  check_tokens(op, "values", values, state.size(0), pooling.num_small(), pooling.channels);
  check_tokens(op, "pooled", pooled, state.size(0), pooling.num_small(), pooling.channels);
  if (pooled.scalar_type() != state.scalar_type())
    fail(op, "pooled", "have the state's dtype", kind(pooled), "take it from pool");
  check_device(op, "values", values, state);
  check_device(op, "pooled", pooled, state);
  check_level(op, level, state);
}

}  // namespace jitaccel
