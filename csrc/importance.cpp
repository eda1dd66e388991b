// importance: the local variance of the velocity, mean over channels (ITA, arXiv:2603.10744).
//
//   I[b, n] = mean_c( sum_W v^2 / S - (sum_W v / S)^2 ),  W the window around n, S its full size, zeros beyond the border
//
// Window in portable.h describes the form of the sum. Layout: velocity (B, N, D) in, (B, N) float32 out. Bytes moved:
// N * D in (neighbours come from cache), N out.

#include "rows.h"

#include <torch/csrc/stable/library.h>

#include <limits>

namespace jitaccel {
namespace {

template <typename T>
JITACCEL_INLINE float mean_variance(const T* middle, const T* const* others, int64_t count, int64_t channels,
                                    const Window& window) {
  double total = 0.0;
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    const Floats center = load(middle + c);
    Floats sum = {}, squares = {};
    for (int64_t k = 0; k < count; ++k) {
      const Floats difference = load(others[k] + c) - center;
      sum += difference;
      squares += difference * difference;
    }
    const Floats variances = window.variance(center, sum, squares);
    for (int64_t j = 0; j < kLanes; ++j) total += static_cast<double>(variances[j]);
  }
  for (; c < channels; ++c) {
    const float center = static_cast<float>(middle[c]);
    float sum = 0.0f, squares = 0.0f;
    for (int64_t k = 0; k < count; ++k) {
      const float difference = static_cast<float>(others[k][c]) - center;
      sum += difference;
      squares += difference * difference;
    }
    total += static_cast<double>(window.variance(center, sum, squares));
  }
  const double mean = total / static_cast<double>(channels);
  return static_cast<float>(mean < 0.0 ? 0.0 : mean);  // keeps a NaN
}

JITACCEL_CLONES float variance(const float* middle, const float* const* others, int64_t count, int64_t channels,
                               const Window& window) {
  return mean_variance(middle, others, count, channels, window);
}
JITACCEL_CLONES float variance(const BFloat16* middle, const BFloat16* const* others, int64_t count, int64_t channels,
                               const Window& window) {
  return mean_variance(middle, others, count, channels, window);
}
JITACCEL_CLONES float variance(const Half* middle, const Half* const* others, int64_t count, int64_t channels,
                               const Window& window) {
  return mean_variance(middle, others, count, channels, window);
}

template <typename T>
void run(const Grid& grid, const T* velocity, int64_t batch, int64_t channels, int64_t window, float* out) {
  const int64_t reach = window / 2, deep = grid.is_video ? reach : 0;
  const int64_t full = window * window * (grid.is_video ? window : 1);
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, full * grid.width * channels));
  torch::stable::parallel_for(0, batch * grid.lines(), grain, [&](int64_t begin, int64_t end) {
    std::vector<const T*> others;
    others.reserve(full);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / grid.lines(), t = i % grid.lines() / grid.height, y = i % grid.height;
      const T* image = velocity + b * grid.size() * channels;
      for (int64_t x = 0; x < grid.width; ++x) {
        others.clear();
        for (int64_t f = std::max<int64_t>(0, t - deep); f <= std::min(grid.frames - 1, t + deep); ++f)
          for (int64_t r = std::max<int64_t>(0, y - reach); r <= std::min(grid.height - 1, y + reach); ++r)
            for (int64_t s = std::max<int64_t>(0, x - reach); s <= std::min(grid.width - 1, x + reach); ++s)
              others.push_back(image + ((f * grid.height + r) * grid.width + s) * channels);
        const Window weights(static_cast<float>(others.size()), static_cast<float>(full));
        const T* middle = image + ((t * grid.height + y) * grid.width + x) * channels;
        out[i * grid.width + x] =
            variance(middle, others.data(), static_cast<int64_t>(others.size()), channels, weights);
      }
    }
  });
}

Tensor importance(const Tensor& velocity, const std::vector<int64_t>& sizes, int64_t window, bool stack) {
  const Grid grid = make_grid("importance", sizes, stack);
  check_velocity("importance", velocity, grid, window);
  const Tensor velocity_ = torch::stable::contiguous(velocity);
  const int64_t batch = velocity.size(0), channels = velocity.size(2);
  Tensor out = torch::stable::new_empty(velocity, {batch, grid.size()}, ScalarType::Float);
  if (channels == 0) torch::stable::fill_(out, std::numeric_limits<double>::quiet_NaN());  // the mean of nothing
  if (velocity.numel() == 0) return out;
  with_type(velocity, [&](auto type) {
    using T = decltype(type);
    run(grid, velocity_.const_data_ptr<T>(), batch, channels, window, out.mutable_data_ptr<float>());
  });
  return out;
}

}  // namespace
}  // namespace jitaccel

STABLE_TORCH_LIBRARY_IMPL(jitaccel, CPU, m) { m.impl("importance", TORCH_BOX(&jitaccel::importance)); }
