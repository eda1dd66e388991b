// What pool and lift_pooled share: a picture of tokens, and the one that is `factor` times smaller along both sides.
//
// A token holds patch x patch latents, channel by channel: element (c * patch + y) * patch + x. Latents of all tokens of a
// frame form a plane of rows * patch times columns * patch. The smaller picture's latents are ceil(side / factor); tokens
// that reach beyond them repeat the last. Frames keep to themselves.
#pragma once

#include "check.h"

#ifdef __CUDACC__
#define JITACCEL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define JITACCEL_HOST_DEVICE inline
#endif

namespace jitaccel {

struct Pooling {
  int64_t frames, rows, columns, small_rows, small_columns, patch, factor, channels;

  JITACCEL_HOST_DEVICE int64_t height() const { return rows * patch; }
  JITACCEL_HOST_DEVICE int64_t width() const { return columns * patch; }
  JITACCEL_HOST_DEVICE int64_t small_height() const { return (height() + factor - 1) / factor; }
  JITACCEL_HOST_DEVICE int64_t small_width() const { return (width() + factor - 1) / factor; }
  JITACCEL_HOST_DEVICE int64_t num_tokens() const { return frames * rows * columns; }
  JITACCEL_HOST_DEVICE int64_t num_small() const { return frames * small_rows * small_columns; }

  // Where latent (y, x) of a frame's plane stands, channel 0, counted from the frame's first element.
  JITACCEL_HOST_DEVICE int64_t place(int64_t y, int64_t x) const { return place_in(columns, y, x); }
  JITACCEL_HOST_DEVICE int64_t small_place(int64_t y, int64_t x) const { return place_in(small_columns, y, x); }

 private:
  JITACCEL_HOST_DEVICE int64_t place_in(int64_t width, int64_t y, int64_t x) const {
    return (y / patch * width + x / patch) * channels + (y % patch) * patch + x % patch;
  }
};

// The weights of the two latents of the smaller picture between which `at` of the larger one lies, half-pixel centres.
struct Between {
  int64_t first, second;
  float share;  // of the second

  JITACCEL_HOST_DEVICE static Between of(int64_t at, int64_t factor, int64_t size) {
    const float position = (static_cast<float>(at) + 0.5f) / static_cast<float>(factor) - 0.5f;
    const float held = position > 0.0f ? position : 0.0f;
    const auto first = static_cast<int64_t>(held);
    return {first, first + 1 < size ? first + 1 : size - 1, held - static_cast<float>(first)};
  }
};

constexpr int64_t kMostPooled = 8;

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
  return {grid.frames, grid.height, grid.width, (grid.height + factor - 1) / factor, (grid.width + factor - 1) / factor,
          patch, factor, x.size(2)};
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
