// Code that both CPU and CUDA kernels compile: dispatch by element type, reflection, and the operators' formulas.
//
// A single source, so that CPU tests also cover the formulas used on a GPU.
#pragma once

#include "check.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#ifdef __CUDACC__
#define JITACCEL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define JITACCEL_HOST_DEVICE __attribute__((always_inline)) inline
#endif

namespace jitaccel {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Calls f with a value of the element type of x, which check.h has checked to be one of three.
template <typename F>
void with_type(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Half: return f(Half());
    case ScalarType::BFloat16: return f(BFloat16());
    default: return f(float());
  }
}

// Returns `position` on an axis after reflection at its ends, repeated if the axis is shorter than that.
template <typename Int>
JITACCEL_HOST_DEVICE Int reflect(Int position, Int size) {
  if (position >= 0 && position < size) return position;
  const Int period = size > 1 ? 2 * (size - 1) : 1;
  const Int folded = (position % period + period) % period;
  return folded < period - folded ? folded : period - folded;
}

// The same for a position at most size - 1 beyond an end.
JITACCEL_HOST_DEVICE int reflect_once(int position, int size) {
  const int inside = position < 0 ? -position : position;
  const int mirrored = 2 * (size - 1) - inside;
  return inside < mirrored ? inside : mirrored;
}

// The variance in a window of size S, of which m tokens lie on the grid, around the middle value c, with d = v - c:
//
//   sum d^2 / S - (sum d / S)^2 + c^2 (m / S - m^2 / S^2) + 2 c sum d (1 / S - m / S^2)
//
// The two moments of v nearly cancel if its mean is large, so they are not computed. The last two terms are zero away
// from the border; at the border they are not small differences of large numbers.
struct Window {
  float share;   // 1 / S
  float square;  // m / S - m^2 / S^2
  float cross;   // 2 (1 / S - m / S^2)

  JITACCEL_HOST_DEVICE Window(float inside, float size)
      : share(1.0f / size),
        square(inside * (size - inside) / (size * size)),
        cross(2.0f * (size - inside) / (size * size)) {}

  // V: float, or a vector of floats.
  template <typename V>
  JITACCEL_HOST_DEVICE V variance(const V& c, const V& sum, const V& squares) const {
    const V mean = sum * share;
    return squares * share - mean * mean + c * (c * square + sum * cross);
  }
};

// The move of micro_flow_into: level of the next step, weight of the target.
struct Move {
  float level, weight;

  // prior: the lifted clean estimate. If the target replaces the state, a state that overflowed has no effect.
  JITACCEL_HOST_DEVICE float operator()(float prior, float noise, float state) const {
    const float target = (1.0f - level) * prior + level * noise;
    return weight == 1.0f ? target : (1.0f - weight) * state + weight * target;
  }
};

}  // namespace jitaccel
