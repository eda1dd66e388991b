// nearest_anchor: which anchor is nearest to each token, exactly; ties to the lowest raster index.
//
//   nearest[b, n] = argmin_i |place(n) - place(anchors[b, i])|^2
//
// An exact distance transform, axis by axis, on keys: squared distance * N + raster index of the anchor. The smallest
// key is the nearest anchor, and among equals the one with the lowest index. All arithmetic is in integers.
//
//   mark    order[b, anchors[b, i]] = i, and -1 elsewhere
//   rows    key of the nearest anchor in the token's own line: two sweeps, from the left and from the right
//   axes    h, then t (in a video alone): key[p] = min over offsets of key[p +- offset] + offset^2 * N; the last one looks `order` up
//
// An axis pass stops once offset^2 * N > key, that is once the offset alone is farther than the best so far: an equal
// one may still win its tie. On this method's grids that is after two or three offsets.
//
// Layout: anchors (B, M) int64 in, nearest (B, N) int64 out; scratch: order (B, N) int32, one or two keys (B, N) int64.
// Bytes moved: 8 M + 8 N, scratch 4 N out twice and in twice, 8 N a key array out and some times in; no N x M.
//
// Launch: marks and axes have a thread for each index, neighbours along w, so that accesses are coalesced. Rows have a
// warp for each line, which sees 32 tokens at once as the bits of a ballot; 4 warps a block spread 64 lines over 16
// SMs, and a line of 64 takes 2 ballots a sweep. This runs once a stage; its time is that of the launches.

#include "cuda_common.cuh"

namespace jitaccel {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32, kWarps = 4;
constexpr unsigned kAllLanes = 0xffffffffu;

__global__ void mark_kernel(const int64_t* anchors, int64_t total, int64_t num_anchors, int64_t num_tokens,
                            int32_t* order) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at < total) order[at / num_anchors * num_tokens + anchors[at]] = static_cast<int32_t>(at % num_anchors);
}

// `beyond`: the key of a line without an anchor, above those of all anchors on the grid.
__global__ void row_kernel(const int32_t* order, int64_t* keys, int64_t all_lines, int64_t lines, int width,
                           int64_t num_tokens, int64_t beyond) {
  const int64_t line = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (line >= all_lines) return;  // the whole warp
  const int lane = threadIdx.x % kWarp;
  order += line * width;
  keys += line * width;
  const int64_t line_start = line % lines * width;
  const auto key_of = [&](int column, int anchor) {
    const int64_t distance = column - anchor;
    return distance * distance * num_tokens + line_start + anchor;
  };

  int last = -1;  // the nearest anchor left of what this sweep sees
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

// Returns the best key at `at`, place `place` on an axis of `size` places that lie `stride` tokens apart.
__device__ int64_t best_along(const int64_t* keys, int64_t at, int64_t place, int64_t size, int64_t stride,
                              int64_t num_tokens) {
  int64_t best = keys[at];
  for (int64_t offset = 1; offset < size && offset * offset * num_tokens <= best; ++offset) {
    const int64_t farther = offset * offset * num_tokens;
    if (place >= offset) best = min(best, keys[at - offset * stride] + farther);
    if (place + offset < size) best = min(best, keys[at + offset * stride] + farther);
  }
  return best;
}

// Writes keys to `out`, or, on the last axis, `out` is nearest and gets the anchors' order.
template <bool IS_LAST>
__global__ void axis_kernel(const int64_t* keys, const int32_t* order, int64_t* out, int64_t total, int64_t size,
                            int64_t stride, int64_t num_tokens) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= total) return;
  const int64_t token = at % num_tokens;
  const int64_t best = best_along(keys, at, token / stride % size, size, stride, num_tokens);
  // A frame of a stack without an anchor, which nobody has looked for, must not lead later operators out of memory.
  out[at] = IS_LAST ? max(order[at - token + best % num_tokens], 0) : best;
}

template <bool IS_LAST>
void launch_axis(const Tensor& keys, const Tensor& order, const Tensor& out, int64_t size, int64_t stride,
                 cudaStream_t stream) {
  const int64_t total = keys.numel();
  axis_kernel<IS_LAST><<<num_blocks(total, kThreads), kThreads, 0, stream>>>(
      keys.const_data_ptr<int64_t>(), order.const_data_ptr<int32_t>(), out.mutable_data_ptr<int64_t>(), total, size,
      stride, keys.size(1));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Returns for each token its place in the anchors' row, -1 where it is none: (B, N) int32.
Tensor mark(const Tensor& anchors, int64_t num_tokens, cudaStream_t stream) {
  Tensor order = torch::stable::new_empty(anchors, {anchors.size(0), num_tokens}, ScalarType::Int);
  auto* const places = order.mutable_data_ptr<int32_t>();
  STD_CUDA_CHECK(cudaMemsetAsync(places, 0xff, static_cast<size_t>(order.numel()) * sizeof(int32_t), stream));
  mark_kernel<<<num_blocks(anchors.numel(), kThreads), kThreads, 0, stream>>>(
      anchors.const_data_ptr<int64_t>(), anchors.numel(), anchors.size(1), num_tokens, places);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return order;
}

void run(const Tensor& anchors, const Grid& grid, int64_t beyond, const Tensor& nearest, cudaStream_t stream) {
  const Tensor order = mark(anchors, grid.size(), stream);
  Tensor keys = torch::stable::new_empty(nearest, {nearest.size(0), nearest.size(1)});
  const int64_t all_lines = nearest.size(0) * grid.lines();
  row_kernel<<<num_blocks(all_lines, kWarps), kWarps * kWarp, 0, stream>>>(
      order.const_data_ptr<int32_t>(), keys.mutable_data_ptr<int64_t>(), all_lines, grid.lines(),
      static_cast<int>(grid.width), grid.size(), beyond);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (grid.is_video) {
    const Tensor further = torch::stable::new_empty(nearest, {nearest.size(0), nearest.size(1)});
    launch_axis<false>(keys, order, further, grid.height, grid.width, stream);
    launch_axis<true>(further, order, nearest, grid.frames, grid.height * grid.width, stream);
  } else {
    launch_axis<true>(keys, order, nearest, grid.height, grid.width, stream);
  }
}

// Farther than every anchor on the grid, squared.
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
