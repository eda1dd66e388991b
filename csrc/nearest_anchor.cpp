// nearest_anchor: the exact nearest anchor of each token; ties go to the lowest raster index.
//
// An exact distance transform, axis by axis. Along a line of tokens, one sweep from each end finds the nearest anchor.
// Along every further axis, a token takes the best result of its neighbours at growing offsets, and stops once the
// offset alone is farther than the best so far (at equal distance it may still win the tie). In a stack, h is the only
// further axis.
//
// Layout: anchors (B, M) in; out (B, N), the index among the M anchors. Scratch: two pairs of arrays (distance, anchor)
// of N, but no N x M matrix. On the grids of this method an anchor is never far: two or three offsets suffice.

#include "check.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <memory>

namespace jitaccel {
namespace {

constexpr int64_t kFar = std::numeric_limits<int64_t>::max() / 4;  // distance in a line without an anchor

struct Found {
  int64_t distance;  // squared
  int64_t anchor;    // raster index

  bool is_better_than(const Found& other) const {
    return distance < other.distance || (distance == other.distance && anchor < other.anchor);
  }
};

// Sweeps one line; `is_anchor` of its tokens, `start` is the raster index of the first.
void sweep(const bool* is_anchor, int64_t start, int64_t width, Found* found) {
  int64_t last = -1;
  for (int64_t x = 0; x < width; ++x) {
    if (is_anchor[x]) last = x;
    found[x] = last < 0 ? Found{kFar, -1} : Found{(x - last) * (x - last), start + last};
  }
  last = -1;
  for (int64_t x = width - 1; x >= 0; --x) {
    if (is_anchor[x]) last = x;
    if (last < 0) continue;
    const Found right{(last - x) * (last - x), start + last};
    if (right.is_better_than(found[x])) found[x] = right;
  }
}

// Improves one line by all others along an axis of `size` places, `stride` tokens apart; this line is at `place`.
void improve(const Found* from, Found* to, int64_t width, int64_t place, int64_t size, int64_t stride) {
  for (int64_t x = 0; x < width; ++x) {
    Found best = from[x];
    for (int64_t offset = 1; offset < size && offset * offset <= best.distance; ++offset) {
      for (const int64_t side : {-offset, offset}) {
        if (place + side < 0 || place + side >= size) continue;
        Found other = from[x + side * stride];
        other.distance += offset * offset;
        if (other.is_better_than(best)) best = other;
      }
    }
    to[x] = best;
  }
}

void run(const Grid& grid, const int64_t* anchors, int64_t num_anchors, int64_t* out) {
  const int64_t size = grid.size(), width = grid.width, grain = std::max<int64_t>(1, 16384 / width);
  std::vector<int64_t> order(size);
  std::vector<Found> found(size), next(size);
  const std::unique_ptr<bool[]> is_anchor(new bool[size]());
  for (int64_t a = 0; a < num_anchors; ++a) {
    is_anchor[anchors[a]] = true;
    order[anchors[a]] = a;
  }
  torch::stable::parallel_for(0, grid.lines(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line)
      sweep(is_anchor.get() + line * width, line * width, width, found.data() + line * width);
  });
  const auto along = [&](int64_t places, int64_t lines_apart) {
    torch::stable::parallel_for(0, grid.lines(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t line = begin; line < end; ++line)
        improve(found.data() + line * width, next.data() + line * width, width, (line / lines_apart) % places, places,
                lines_apart * width);
    });
    found.swap(next);
  };
  along(grid.height, 1);
  if (grid.is_video) along(grid.frames, grid.height);
  for (int64_t n = 0; n < size; ++n) out[n] = order[found[n].anchor];
}

Tensor nearest_anchor(const Tensor& anchors, const std::vector<int64_t>& sizes, bool stack) {
  const Grid grid = make_grid("nearest_anchor", sizes, stack);
  check_anchors("nearest_anchor", anchors, grid.size());
  check_num_anchors("nearest_anchor", anchors, grid);
  const Tensor anchors_ = torch::stable::contiguous(anchors);
  const int64_t batch = anchors.size(0), num_anchors = anchors.size(1);
  const int64_t* rows = anchors_.const_data_ptr<int64_t>();
  check_rising("nearest_anchor", "anchors", rows, batch, num_anchors, grid.size());
  check_frames("nearest_anchor", rows, batch, num_anchors, grid);
  Tensor out = torch::stable::new_empty(anchors, {batch, grid.size()});
  int64_t* result = out.mutable_data_ptr<int64_t>();
  for (int64_t b = 0; b < batch; ++b) run(grid, rows + b * num_anchors, num_anchors, result + b * grid.size());
  return out;
}

}  // namespace
}  // namespace jitaccel

STABLE_TORCH_LIBRARY_IMPL(jitaccel, CPU, m) { m.impl("nearest_anchor", TORCH_BOX(&jitaccel::nearest_anchor)); }
