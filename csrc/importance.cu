// importance: the local variance of the velocity, mean over channels (ITA, arXiv:2603.10744).
//
//   I[b, n] = mean_c( sum_W v^2 / S - (sum_W v / S)^2 ),  W the window around n, S its full size, zeros beyond the border
//
// Window in portable.h describes the form of the sum. Layout: velocity (B, N, D) in, (B, N) float32 out. Bytes moved:
// N * D elements in, 4 N out; each element is read by the S windows around it, after the first time from the caches.
//
// Launch: a group of lanes per token (a power of two, at most 32: 8 for 64 channels of bfloat16), a vector of 16 bytes
// of channels per lane, 128 threads per block: 256 blocks for 64 x 64 tokens of 64 channels. Lanes add their sums in a
// fixed tree, so the result always has the same bits. A window of 3 issues its nine loads of a frame at once: where the
// border cuts it, the token itself is read, whose difference from itself is zero.

#include "cuda_common.cuh"

#include <algorithm>

namespace jitaccel {
namespace {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Field {
  int num_tokens, channels, frames, height, width;
  int reach, frame_reach;  // window / 2; frame_reach is along t, 0 in a picture
  float size;              // S
};

// The window's tokens that lie on the grid: [begin, end) along each axis.
struct Extent {
  int row, column;
  int frame_begin, frame_end, row_begin, row_end, column_begin, column_end;

  __device__ Extent(const Field& field, int token) {
    const int line = token / field.width, frame = line / field.height;
    row = line % field.height;
    column = token % field.width;
    frame_begin = max(frame - field.frame_reach, 0);
    frame_end = min(frame + field.frame_reach + 1, field.frames);
    row_begin = max(row - field.reach, 0);
    row_end = min(row + field.reach + 1, field.height);
    column_begin = max(column - field.reach, 0);
    column_end = min(column + field.reach + 1, field.width);
  }

  __device__ float count() const {
    return static_cast<float>(frame_end - frame_begin) * static_cast<float>(row_end - row_begin) *
           static_cast<float>(column_end - column_begin);
  }
};

// Sums of the differences from the middle token, of V channels.
template <int V>
struct Differences {
  float middle[V], sum[V] = {}, squares[V] = {};

  template <typename T>
  __device__ __forceinline__ void add(const Pack<T, V>& v) {
#pragma unroll
    for (int c = 0; c < V; ++c) {
      const float d = static_cast<float>(v.x[c]) - middle[c];
      sum[c] += d;
      squares[c] += d * d;
    }
  }
};

// Returns the sum of I_c over V channels, starting at `velocity`, which points to the image's first token. IS_3: the
// window is 3.
template <int V, bool IS_3, typename T>
__device__ float variance(const Field& field, const Extent& extent, const T* velocity, int token) {
  const auto at = [&](int other) {
    return reinterpret_cast<const Pack<T, V>*>(velocity + static_cast<int64_t>(other) * field.channels);
  };
  Differences<V> differences;
  load<V>(at(token)->x, differences.middle);
  for (int t = extent.frame_begin; t < extent.frame_end; ++t) {
    const int frame = t * field.height;
    if constexpr (IS_3) {
      Pack<T, V> v[9];
#pragma unroll
      for (int k = 0; k < 9; ++k) {
        const int y = extent.row + k / 3 - 1, x = extent.column + k % 3 - 1;
        const bool is_inside = y >= 0 && y < field.height && x >= 0 && x < field.width;
        v[k] = *at(is_inside ? (frame + y) * field.width + x : token);
      }
#pragma unroll
      for (int k = 0; k < 9; ++k) differences.add(v[k]);
    } else {
      for (int y = extent.row_begin; y < extent.row_end; ++y)
        for (int x = extent.column_begin; x < extent.column_end; ++x)
          differences.add(*at((frame + y) * field.width + x));
    }
  }
  const Window window(extent.count(), field.size);
  float total = 0.0f;
#pragma unroll
  for (int c = 0; c < V; ++c)
    total += window.variance(differences.middle[c], differences.sum[c], differences.squares[c]);
  return total;
}

// Threads are (lanes of a token, tokens); lanes is a power of two, so that a token's lanes are in one warp.
template <int V, bool IS_3, typename T>
__global__ void __launch_bounds__(kThreads, 4)
    importance_kernel(const T* __restrict__ velocity, float* __restrict__ importance, Field field) {
  const int token = static_cast<int>(blockIdx.x * blockDim.y + threadIdx.y);
  const int lanes = static_cast<int>(blockDim.x), lane = static_cast<int>(threadIdx.x);
  const int64_t first = static_cast<int64_t>(blockIdx.y) * field.num_tokens;  // of the image
  float sum = 0.0f;
  if (token < field.num_tokens) {
    const Extent extent(field, token);
    const T* image = velocity + first * field.channels;
    for (int channel = lane * V; channel < field.channels; channel += lanes * V)
      sum += variance<V, IS_3>(field, extent, image + channel, token);
  }
  for (int apart = lanes / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(kAllLanes, sum, apart);
  const float mean = sum / static_cast<float>(field.channels);
  if (lane == 0 && token < field.num_tokens) importance[first + token] = mean < 0.0f ? 0.0f : mean;  // keeps a NaN
}

template <int V, typename T>
void run(const Tensor& velocity, const Tensor& importance, const Field& field, cudaStream_t stream) {
  unsigned lanes = 1;
  while (lanes < kWarp && static_cast<int>(lanes) * V < field.channels) lanes *= 2;
  const dim3 threads(lanes, kThreads / lanes), blocks = blocks_for(field.num_tokens, threads.y, velocity.size(0));
  const auto kernel = field.reach == 1 ? importance_kernel<V, true, T> : importance_kernel<V, false, T>;
  launch(kernel, blocks, threads, 0, stream, velocity.const_data_ptr<T>(), importance.mutable_data_ptr<float>(), field);
}

Field make_field(const Tensor& velocity, const Grid& grid, int64_t window) {
  // A window beyond the grid is as wide as the grid, except for its size, which is the divisor.
  const int64_t reach = std::min(window / 2, std::max({grid.frames, grid.height, grid.width}));
  const float wide = static_cast<float>(window);
  return {static_cast<int>(grid.size()),
          static_cast<int>(velocity.size(2)),
          static_cast<int>(grid.frames),
          static_cast<int>(grid.height),
          static_cast<int>(grid.width),
          static_cast<int>(reach),
          grid.is_video ? static_cast<int>(reach) : 0,
          grid.is_video ? wide * wide * wide : wide * wide};
}

Tensor importance(const Tensor& velocity, const std::vector<int64_t>& sizes, int64_t window, bool stack) {
  const Grid grid = make_grid("importance", sizes, stack);
  check_velocity("importance", velocity, grid, window);
  Tensor out = torch::stable::new_empty(velocity, {velocity.size(0), grid.size()}, ScalarType::Float);
  if (velocity.size(2) == 0) torch::stable::fill_(out, std::numeric_limits<double>::quiet_NaN());  // mean of nothing
  if (velocity.numel() == 0) return out;
  const DeviceGuard guard(velocity.get_device_index());
  const cudaStream_t stream = current_stream(velocity);
  const Tensor velocity_ = torch::stable::contiguous(velocity);
  const Field field = make_field(velocity_, grid, window);
  with_type(velocity, [&](auto type) {
    using T = decltype(type);
    constexpr int kVector = 16 / sizeof(T);
    takes_vectors(velocity_, field.channels, kVector) ? run<kVector, T>(velocity_, out, field, stream)
                                                      : run<1, T>(velocity_, out, field, stream);
  });
  return out;
}

}  // namespace
}  // namespace jitaccel

STABLE_TORCH_LIBRARY_IMPL(jitaccel, CUDA, m) { m.impl("importance", TORCH_BOX(&jitaccel::importance)); }
