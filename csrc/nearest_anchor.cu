// nearest_anchor: the exact nearest anchor of each token; ties go to the lowest raster index.
//
//   nearest[b, n] = argmin_i |place(n) - place(anchors[b, i])|^2
//
// An exact distance transform, axis by axis, on keys: squared distance * N + raster index of the anchor. The smallest
// key is the nearest anchor, and among equals the one with the lowest index. All arithmetic is in integers.
//
//   mark    order[b, anchors[b, i]] = i, and -1 elsewhere
//   rows    key of the nearest anchor in the token's own line: two sweeps, from the left and from the right
//   axes    h, then in a video t: key[p] = min over offsets of key[p +- offset] + offset^2 * N; the last pass looks `order` up
//
// An axis pass stops once offset^2 * N > key, that is, once the offset alone is farther than the best so far (at equal
// distance it may still win the tie). On this method's grids that is after two or three offsets.
//
// Layout: anchors (B, M) int64 in, nearest (B, N) int64 out; scratch: order (B, N) int32, one or two keys (B, N) int64.
// Bytes moved: 8 M + 8 N; scratch: 4 N out twice and in twice, 8 N per key array out and a few times in; no N x M.
//
// Launch: marks and axes use one thread per index, with neighbours along w, so accesses are coalesced. Rows use one
// warp per line, which reads 32 tokens at once as the bits of a ballot; 4 warps per block spread 64 lines over 16 SMs,
// and a line of 64 takes 2 ballots per sweep. This runs once per stage, and its time is that of the launches.

#include "cuda_common.cuh"

namespace jitaccel {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32, kWarps = 4;
constexpr unsigned kAllLanes = 0xffffffffu;

// An anchor off the grid is skipped.
__global__ void mark_kernel(const int64_t* __restrict__ anchors, int num_anchors, int64_t num_tokens,
                            int32_t* __restrict__ order) {
  const int at = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (at >= num_anchors) return;
  const int64_t image = blockIdx.y, token = anchors[image * num_anchors + at];
  if (token >= 0 && token < num_tokens) order[image * num_tokens + token] = at;
}

// `beyond`: the key in a line without an anchor, larger than those of all anchors on the grid.
__global__ void row_kernel(const int32_t* __restrict__ order, int64_t* __restrict__ keys, int lines, int width,
                           int64_t num_tokens, int64_t beyond) {
  const int line = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarp;
  if (line >= lines) return;  // the whole warp
  const int lane = static_cast<int>(threadIdx.x) % kWarp, line_start = line * width;
  order += blockIdx.y * num_tokens + line_start;
  keys += blockIdx.y * num_tokens + line_start;
  const auto key_of = [&](int column, int anchor) {
    const int64_t distance = column - anchor;
    return distance * distance * num_tokens + line_start + anchor;
  };

  int last = -1;  // the nearest anchor to the left of this sweep's tokens
  for (int start = 0; start < width; start += kWarp) {
    const int column = start + lane;
    const unsigned seen = __ballot_sync(kAllLanes, column < width && order[column] >= 0);
    const unsigned left = seen & (kAllLanes >> (kWarp - 1 - lane));
    const int anchor = left != 0 ? start + kWarp - 1 - __clz(left) : last;
    if (column < width) keys[column] = anchor < 0 ? beyond : key_of(column, anchor);
    if (seen != 0) last = start + kWarp - 1 - __clz(seen);
  }
  last = -1;
  for (int start = (width - 1) / kWarp * kWarp; start >= 0; start -= kWarp) {
    const int column = start + lane;
    const unsigned seen = __ballot_sync(kAllLanes, column < width && order[column] >= 0);
    const unsigned right = seen & (kAllLanes << lane);
    const int anchor = right != 0 ? start + __ffs(right) - 1 : last;
    if (column < width && anchor >= 0) keys[column] = min(keys[column], key_of(column, anchor));
    if (seen != 0) last = start + __ffs(seen) - 1;
  }
}

// Returns the best key at `at`, which is place `place` on an axis of `size` places, `stride` tokens apart.
__device__ int64_t best_along(const int64_t* __restrict__ keys, int at, int place, int size, int stride,
                              int64_t num_tokens) {
  int64_t best = keys[at];
  for (int64_t offset = 1; offset < size && offset * offset * num_tokens <= best; ++offset) {
    const int64_t farther = offset * offset * num_tokens;
    if (place >= offset) best = min(best, keys[at - offset * stride] + farther);
    if (place + offset < size) best = min(best, keys[at + offset * stride] + farther);
  }
  return best;
}

// Writes keys to `out`; on the last axis, `out` is `nearest` and gets the order of the anchors instead.
template <bool IS_LAST>
__global__ void axis_kernel(const int64_t* __restrict__ keys, const int32_t* __restrict__ order,
                            int64_t* __restrict__ out, int num_tokens, int size, int stride) {
  const int token = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (token >= num_tokens) return;
  const int64_t image = static_cast<int64_t>(blockIdx.y) * num_tokens;
  const int64_t best = best_along(keys + image, token, token / stride % size, size, stride, num_tokens);
  // Later operators must not read out of bounds if a frame of a stack has no anchor, which is not checked here.
  out[image + token] = IS_LAST ? max(order[image + best % num_tokens], 0) : best;
}

template <bool IS_LAST>
void launch_axis(const Tensor& keys, const Tensor& order, const Tensor& out, int64_t size, int64_t stride,
                 cudaStream_t stream) {
  launch(axis_kernel<IS_LAST>, blocks_for(keys.size(1), kThreads, keys.size(0)), kThreads, 0, stream,
         keys.const_data_ptr<int64_t>(), order.const_data_ptr<int32_t>(), out.mutable_data_ptr<int64_t>(),
         keys.size(1), size, stride);
}

// Returns for each token its place in the anchors' row, or -1 if it is not an anchor: (B, N) int32.
Tensor mark(const Tensor& anchors, int64_t num_tokens, cudaStream_t stream) {
  Tensor order = torch::stable::new_empty(anchors, {anchors.size(0), num_tokens}, ScalarType::Int);
  auto* const places = order.mutable_data_ptr<int32_t>();
  STD_CUDA_CHECK(cudaMemsetAsync(places, 0xff, static_cast<size_t>(order.numel()) * sizeof(int32_t), stream));
  launch(mark_kernel, blocks_for(anchors.size(1), kThreads, anchors.size(0)), kThreads, 0, stream,
         anchors.const_data_ptr<int64_t>(), anchors.size(1), num_tokens, places);
  return order;
}

void run(const Tensor& anchors, const Grid& grid, int64_t beyond, const Tensor& nearest, cudaStream_t stream) {
  const Tensor order = mark(anchors, grid.size(), stream);
  Tensor keys = torch::stable::new_empty(nearest, {nearest.size(0), nearest.size(1)});
  launch(row_kernel, blocks_for(grid.lines(), kWarps, nearest.size(0)), kWarps * kWarp, 0, stream,
         order.const_data_ptr<int32_t>(), keys.mutable_data_ptr<int64_t>(), grid.lines(), grid.width, grid.size(),
         beyond);
  if (grid.is_video) {
    const Tensor further = torch::stable::new_empty(nearest, {nearest.size(0), nearest.size(1)});
    launch_axis<false>(keys, order, further, grid.height, grid.width, stream);
    launch_axis<true>(further, order, nearest, grid.frames, grid.height * grid.width, stream);
  } else {
    launch_axis<true>(keys, order, nearest, grid.height, grid.width, stream);
  }
}

// A squared distance larger than that of every anchor on the grid.
int64_t beyond_grid(const char* op, const Grid& grid) {
  const int64_t diameter = grid.frames + grid.height + grid.width;
  const double largest_key = 2.0 * static_cast<double>(diameter) * static_cast<double>(diameter) * grid.size();
  if (largest_key > 9e18)
    fail(op, "grid", "keep N * (t + h + w)^2 below 2^62", text(grid.size(), " tokens"), "split the picture");
  return diameter * diameter;
}

Tensor nearest_anchor(const Tensor& anchors, const std::vector<int64_t>& sizes, bool stack) {
  const char* op = "nearest_anchor";
  const Grid grid = make_grid(op, sizes, stack);
  check_anchors(op, anchors, grid.size());
  check_num_anchors(op, anchors, grid);
  const int64_t beyond = beyond_grid(op, grid) * grid.size();
  const Tensor nearest = torch::stable::new_empty(anchors, {anchors.size(0), grid.size()});
  if (nearest.numel() == 0) return nearest;
  const DeviceGuard guard(anchors.get_device_index());
  const cudaStream_t stream = current_stream(anchors);
  const Tensor anchors_ = torch::stable::contiguous(anchors);
  check_rising(op, "anchors", anchors_, grid.size(), stream);
  if (!grid.is_video) check_frames(op, anchors_, grid.frames, grid.height * grid.width, stream);
  run(anchors_, grid, beyond, nearest, stream);
  return nearest;
}

}  // namespace
}  // namespace jitaccel

STABLE_TORCH_LIBRARY_IMPL(jitaccel, CUDA, m) { m.impl("nearest_anchor", TORCH_BOX(&jitaccel::nearest_anchor)); }
