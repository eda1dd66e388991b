// Nearest fill and separable Gaussian blur, one line of tokens at a time, reading only anchor values.
//
//   blurred[t, y, x] = sum_k w[k] sum_(i, j) w[i] w[j] values[nearest[r(t + i), r(y + j), r(x + k)]]    (i = 0 in a picture)
//
// r reflects at the ends, repeatedly if the axis is shorter than the kernel. The outer axes are summed first, into one
// line of floats (W * D * 4 bytes: 16 KiB at 64 x 64, in the first-level cache), then along the line. With K = 7 that
// is 14 multiplications per value written, and only the anchors' rows are read. Only requested tokens are blurred, and
// only the columns that they need are summed.
#pragma once

#include "rows.h"

namespace jitaccel {

// The memory of a lift's plan, for all images.
struct Plan {
  Grid grid;
  const int64_t* nearest;  // (B, N)
  const int64_t* anchors;  // (B, M)
  const float* weights;    // (K,)
  int64_t batch, num_anchors, taps;

  // Whether token n of image b is an anchor; a is the index of its nearest one.
  bool is_anchor(int64_t b, int64_t n, int64_t a) const { return anchors[b * num_anchors + a] == n; }
  // The place in (B * N,) of anchor i of (B * M,).
  int64_t place_of(int64_t i) const { return i / num_anchors * grid.size() + anchors[i]; }
  int64_t nearest_of(int64_t b, int64_t n) const { return nearest[b * grid.size() + n]; }
};

// Takes contiguous tensors, which must outlive the plan, and checks them including their values.
inline Plan make_plan(const char* op, const Grid& grid, const Tensor& nearest, const Tensor& anchors,
                      const Tensor& weights) {
  Plan plan{grid,           nearest.const_data_ptr<int64_t>(), anchors.const_data_ptr<int64_t>(),
            weights.const_data_ptr<float>(), anchors.size(0), anchors.size(1), weights.size(0)};
  check_rising(op, "anchors", plan.anchors, plan.batch, plan.num_anchors, grid.size());
  for (int64_t i = 0; i < plan.batch * grid.size(); ++i)
    if (plan.nearest[i] < 0 || plan.nearest[i] >= plan.num_anchors)
      fail(op, "nearest", text("lie in 0..", plan.num_anchors - 1), text(plan.nearest[i]), "use nearest_anchor");
  return plan;
}

// Blurs tokens of one image's values (M, D), line by line. Use one object per thread, because it owns the scratch.
template <typename T>
class LineBlur {
 public:
  LineBlur(const Plan& plan, int64_t channels)
      : plan_(plan),
        channels_(channels),
        filled_(plan.grid.width * channels),
        is_filled_(plan.grid.width),
        lines_(num_outer()),
        outer_(num_outer()),
        sources_(num_outer()),
        inner_(plan.taps) {
    const int64_t frame_taps = plan.grid.is_video ? plan.taps : 1;
    for (int64_t i = 0; i < frame_taps; ++i)
      for (int64_t j = 0; j < plan.taps; ++j)
        outer_[i * plan.taps + j] = (plan.grid.is_video ? plan.weights[i] : 1.0f) * plan.weights[j];
  }

  // Selects the line that token() blurs. `values`: (M, D), of image b.
  void begin(int64_t b, int64_t line, const T* values) {
    find_lines(line);
    nearest_ = plan_.nearest + b * plan_.grid.size();
    values_ = values;
    std::fill(is_filled_.begin(), is_filled_.end(), char{0});
  }

  // out (D,) = the blurred token at x of the line.
  void token(int64_t x, float* out) {
    const int64_t radius = plan_.taps / 2;
    for (int64_t k = 0; k < plan_.taps; ++k) inner_[k] = column(reflect(x + k - radius, plan_.grid.width));
    blend(inner_.data(), plan_.weights, plan_.taps, channels_, out);
  }

 private:
  size_t num_outer() const { return plan_.taps * (plan_.grid.is_video ? plan_.taps : 1); }

  // The sum over the outer axes at x, computed when a token first needs it.
  const float* column(int64_t x) {
    float* out = filled_.data() + x * channels_;
    if (is_filled_[x]) return out;
    for (size_t k = 0; k < lines_.size(); ++k) sources_[k] = values_ + nearest_[lines_[k] + x] * channels_;
    blend(sources_.data(), outer_.data(), static_cast<int64_t>(sources_.size()), channels_, out);
    is_filled_[x] = 1;
    return out;
  }

  // The first token of each line that the outer axes reach from `line`.
  void find_lines(int64_t line) {
    const Grid& grid = plan_.grid;
    const int64_t radius = plan_.taps / 2, t = line / grid.height, y = line % grid.height;
    size_t k = 0;
    for (int64_t i = grid.is_video ? -radius : 0; i <= (grid.is_video ? radius : 0); ++i)
      for (int64_t j = -radius; j <= radius; ++j)
        lines_[k++] = (reflect(t + i, grid.frames) * grid.height + reflect(y + j, grid.height)) * grid.width;
  }

  const Plan& plan_;
  const int64_t channels_;
  const int64_t* nearest_ = nullptr;
  const T* values_ = nullptr;
  std::vector<float> filled_;
  std::vector<char> is_filled_;
  std::vector<int64_t> lines_;
  std::vector<float> outer_;
  std::vector<const T*> sources_;
  std::vector<const float*> inner_;
};

// Calls f(b, line, scratch) for every line of every image, in parallel; `make` creates the scratch of each thread.
template <typename Make, typename F>
void for_each_line(const Plan& plan, int64_t channels, const Make& make, const F& f) {
  const int64_t cost = std::max<int64_t>(1, 2 * plan.taps * plan.grid.width * channels);
  const int64_t grain = std::max<int64_t>(1, 65536 / cost);
  torch::stable::parallel_for(0, plan.batch * plan.grid.lines(), grain, [&](int64_t begin, int64_t end) {
    auto scratch = make();
    for (int64_t i = begin; i < end; ++i) f(i / plan.grid.lines(), i % plan.grid.lines(), scratch);
  });
}

}  // namespace jitaccel
