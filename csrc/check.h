// Shared by the operators on the host: rules for arguments (the same as in jitaccel/ops/schema.py), and the token grid.
//
// An error names operator, argument, rule, the value given, and what to do. Nothing throws inside a parallel loop:
// everything is checked before it starts.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace jitaccel {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] inline void fail(const char* op, const std::string& what, const std::string& rule, const std::string& got,
                              const char* advice) {
  throw std::runtime_error(std::string(op) + ": " + what + " must " + rule + ", got " + got + "; " + advice);
}

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  ((out << parts), ...);
  return out.str();
}

inline std::string kind(const Tensor& x) {
  static const char* const names[] = {"uint8",   "int8",    "int16", "int32", "int64",    "float16",
                                      "float32", "float64", "",      "",      "complex64", "",
                                      "bool",    "",        "",      "bfloat16"};
  const auto type = static_cast<size_t>(x.scalar_type());
  std::ostringstream out;
  out << (type < sizeof(names) / sizeof(names[0]) ? names[type] : "a dtype") << " (";
  for (int64_t axis = 0; axis < x.dim(); ++axis) out << (axis ? ", " : "") << x.size(axis);
  out << (x.dim() == 1 ? ",)" : ")");
  return out.str();
}

// A token grid (t, h, w); t = 1 for a picture. Raster index = (t * height + h) * width + w. In a video, distances, blur
// and windows also run along t; the frames of a stack are separate pictures.
struct Grid {
  int64_t frames, height, width;
  bool is_video;
  int64_t size() const { return frames * height * width; }
  int64_t lines() const { return frames * height; }  // rows of tokens
};

constexpr int64_t kMaxWindow = 1023;  // wider than pictures are, and its cube fits in 32 bits
constexpr int64_t kMostTokens = int64_t{1} << 40;  // far beyond memory, and no product of it with channels overflows

inline Grid make_grid(const char* op, const std::vector<int64_t>& sizes, bool stack) {
  bool fits = sizes.size() == 2 || sizes.size() == 3;
  int64_t tokens = 1;
  for (const int64_t size : sizes) {
    fits = fits && size >= 1 && size <= kMostTokens / tokens;
    if (fits) tokens *= size;
  }
  if (!fits) {
    std::ostringstream got;
    for (size_t axis = 0; axis < sizes.size(); ++axis) got << (axis ? ", " : "(") << sizes[axis];
    fail(op, "grid", "be (h, w) or (t, h, w) of sizes above 0, 2^40 tokens at most", got.str() + ")",
         "give the token grid");
  }
  const bool has_frames = sizes.size() == 3;
  return {has_frames ? sizes[0] : 1, sizes[sizes.size() - 2], sizes[sizes.size() - 1], has_frames && !stack};
}

inline bool is_value_type(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

inline void check_device(const char* op, const char* name, const Tensor& x, const Tensor& like) {
  if (x.is_cuda() != like.is_cuda() || x.get_device_index() != like.get_device_index())
    fail(op, name, "be on the device of the other arguments", x.is_cuda() ? "another CUDA device or CUDA" : "the CPU",
         "move it there");
}

inline void check_tokens(const char* op, const char* name, const Tensor& x, int64_t batch, int64_t tokens,
                         int64_t channels) {
  if (x.dim() != 3 || !is_value_type(x) || x.size(0) != batch || x.size(1) != tokens || x.size(2) != channels)
    fail(op, name, text("be float32, float16 or bfloat16 (", batch, ", ", tokens, ", ", channels, ")"), kind(x),
         "pass every token of the grid");
}

inline void check_anchors(const char* op, const Tensor& anchors, int64_t num_tokens) {
  if (anchors.dim() != 2 || anchors.scalar_type() != ScalarType::Long || anchors.size(1) < 1 ||
      anchors.size(1) > num_tokens)
    fail(op, "anchors", text("be int64 (B, M), M in 1..", num_tokens), kind(anchors), "give each image its own row");
}

[[noreturn]] inline void fail_empty_frame(const char* op, const std::string& got) {
  fail(op, "anchors", "hold at least one token of every frame", got, "take them from first_anchors");
}

// For a stack, checks only that there are enough anchors for all frames.
inline void check_num_anchors(const char* op, const Tensor& anchors, const Grid& grid) {
  if (!grid.is_video && anchors.size(1) < grid.frames)
    fail_empty_frame(op, text(anchors.size(1), " anchors for ", grid.frames, " frames"));
}

inline void check_levels(const char* op, const Tensor& levels, const Tensor& like) {
  if (levels.dim() != 1 || levels.size(0) != 2 || levels.scalar_type() != ScalarType::Float)
    fail(op, "levels", "be float32 (2,)", kind(levels), "give two noise levels");
  check_device(op, "levels", levels, like);
}

inline void check_written(const char* op, const char* name, const Tensor& x) {
  if (!x.is_contiguous()) fail(op, name, "be contiguous", "other strides", "pass a fresh buffer");
}

// values (B, M, D), nearest (B, N), anchors (B, M), weights (K,) of one lift.
inline void check_plan(const char* op, const Tensor& nearest, const Tensor& anchors, const Grid& grid,
                       const Tensor& weights, const Tensor& like) {
  check_anchors(op, anchors, grid.size());
  if (nearest.dim() != 2 || nearest.scalar_type() != ScalarType::Long || nearest.size(0) != anchors.size(0) ||
      nearest.size(1) != grid.size())
    fail(op, "nearest", text("be int64 (", anchors.size(0), ", ", grid.size(), ")"), kind(nearest),
         "use nearest_anchor");
  if (weights.dim() != 1 || weights.scalar_type() != ScalarType::Float || weights.size(0) % 2 != 1)
    fail(op, "weights", "be float32 (K,), K odd", kind(weights), "use blur_weights");
  check_device(op, "nearest", nearest, like);
  check_device(op, "anchors", anchors, like);
  check_device(op, "weights", weights, like);
}

inline void check_values(const char* op, const Tensor& values, const Tensor& anchors) {
  if (values.dim() != 3 || !is_value_type(values) || anchors.dim() != 2 || values.size(0) != anchors.size(0) ||
      values.size(1) != anchors.size(1))
    fail(op, "values", "be float32, float16 or bfloat16 (B, M, D) at the (B, M) anchors", kind(values),
         "pass the values at the plan's anchors");
}

inline void check_chosen(const char* op, const Tensor& tokens, int64_t batch, const Tensor& like) {
  if (tokens.dim() != 2 || tokens.scalar_type() != ScalarType::Long || tokens.size(0) != batch)
    fail(op, "tokens", text("be int64 (", batch, ", count)"), kind(tokens), "use activate");
  check_device(op, "tokens", tokens, like);
}

inline void check_velocity(const char* op, const Tensor& velocity, const Grid& grid, int64_t window) {
  if (velocity.dim() != 3 || !is_value_type(velocity) || velocity.size(1) != grid.size())
    fail(op, "velocity", text("be float32, float16 or bfloat16 (B, ", grid.size(), ", D)"), kind(velocity),
         "lift it to every token first");
  if (window < 1 || window > kMaxWindow || window % 2 == 0)
    fail(op, "window", text("be odd and in 1..", kMaxWindow), text(window), "the paper's is 3");
}

// Returns the number of inactive tokens of each image.
inline int64_t check_activation(const char* op, const Tensor& importance, const Tensor& anchors, int64_t count) {
  if (importance.dim() != 2 || anchors.dim() != 2 || importance.size(0) != anchors.size(0) ||
      importance.scalar_type() != ScalarType::Float)
    fail(op, "importance and anchors", "be float32 (B, N) and int64 (B, M)", kind(importance) + " and " + kind(anchors),
         "give each image its own row");
  check_anchors(op, anchors, importance.size(1));
  check_device(op, "anchors", anchors, importance);
  const int64_t inactive = importance.size(1) - anchors.size(1);
  if (count < 0 || count > inactive)
    fail(op, "count", text("be in 0..", inactive, ", the inactive tokens"), text(count),
         "take it from JiTConfig.token_counts");
  return inactive;
}

// Checks the values of rows (B, count), a contiguous tensor on the CPU.
inline void check_rising(const char* op, const char* name, const int64_t* rows, int64_t batch, int64_t count,
                         int64_t size) {
  for (int64_t b = 0; b < batch; ++b) {
    int64_t last = -1;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = rows[b * count + i];
      if (token <= last || token >= size)
        fail(op, name, text("rise strictly within 0..", size - 1), text(token, " after ", last, " in image ", b),
             "sort them and check the grid");
      last = token;
    }
  }
}

// Rising rows of anchors as above: each frame of a stack must contain one.
inline void check_frames(const char* op, const int64_t* rows, int64_t batch, int64_t count, const Grid& grid) {
  if (grid.is_video || grid.frames == 1) return;
  const int64_t frame_size = grid.height * grid.width;
  for (int64_t b = 0; b < batch; ++b) {
    int64_t next = 0;  // the first frame without an anchor so far
    for (int64_t i = 0; i < count && rows[b * count + i] / frame_size <= next; ++i)
      next = rows[b * count + i] / frame_size + 1;
    if (next < grid.frames) fail_empty_frame(op, text("none in frame ", next, " of image ", b));
  }
}

inline void check_weight(const char* op, double weight) {
  if (!(weight >= 0.0 && weight <= 1.0))
    fail(op, "weight", "be in [0, 1]", text(weight), "take it from JiTConfig.move_weight");
}

}  // namespace jitaccel
