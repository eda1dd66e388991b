// importance: the local variance of the velocity, mean over channels (ITA, arXiv:2603.10744).
//
//   I[b, n] = mean_c( sum_W v^2 / S - (sum_W v / S)^2 )
//
// W is the window around n, S its full size, zeros beyond the border.
// The two moments nearly cancel where the mean is large, so they are not formed. With the middle value c, the m tokens
// of W that lie on the grid, and d = v - c:
//
//   I_c = sum d^2 / S - (sum d / S)^2 + c (c m + 2 sum d) (S - m) / S^2
//
// The last term is zero away from the border, and at it it is no small difference.
//
// Layout: velocity (B, N, D) in, (B, N) float32 out. Bytes moved: N * D elements in, 4 N out; each element is read by
// the S windows around it, the repeats from the caches.
//
// Launch: a group of lanes for each token (a power of two, 32 at most: 8 for 64 channels of bfloat16), a vector of 16
// bytes of channels for each lane, 128 threads a block: 256 blocks for 64 x 64 tokens of 64 channels. Lanes add their
// sums in a fixed tree, so that the result has the same bits every time.

#include "cuda_common.cuh"

#include <algorithm>

namespace jitaccel {
namespace {

constexpr int kThreads = 128;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Field {
  int64_t all_tokens, num_tokens;  // of the batch, of an image
  int channels, frames, height, width;
  int reach, frame_reach;  // window / 2; along t, 0 in a picture
  float size;              // S
};

// The window's tokens that lie on the grid: [begin, end) along each axis.
struct Window {
  int frame, frame_end, row_begin, row_end, column_begin, column_end;

  __device__ Window(const Field& field, int64_t token) {
    const int column = static_cast<int>(token % field.width);
    const int64_t line = token / field.width;
    const int row = static_cast<int>(line % field.height), at = static_cast<int>(line / field.height);
    frame = max(at - field.frame_reach, 0);
    frame_end = min(at + field.frame_reach + 1, field.frames);
    row_begin = max(row - field.reach, 0);
    row_end = min(row + field.reach + 1, field.height);
    column_begin = max(column - field.reach, 0);
    column_end = min(column + field.reach + 1, field.width);
  }

  __device__ float count() const {
    return static_cast<float>(frame_end - frame) * static_cast<float>(row_end - row_begin) *
           static_cast<float>(column_end - column_begin);
  }
};

// Returns the sum of I_c over the V channels from `velocity`, which points to those of the image's first token.
template <int V, typename T>
__device__ float variance(const Field& field, const Window& window, const T* velocity, int64_t token) {
  float middle[V], sum[V] = {}, squares[V] = {};
  load<V>(velocity + token * field.channels, middle);
  for (int t = window.frame; t < window.frame_end; ++t) {
    for (int y = window.row_begin; y < window.row_end; ++y) {
      const int64_t line = (static_cast<int64_t>(t) * field.height + y) * field.width;
      for (int x = window.column_begin; x < window.column_end; ++x) {
        float v[V];
        load<V>(velocity + (line + x) * field.channels, v);
#pragma unroll
        for (int c = 0; c < V; ++c) {
          const float d = v[c] - middle[c];
          sum[c] += d;
          squares[c] += d * d;
        }
      }
    }
  }
  const float count = window.count(), share = 1.0f / field.size;
  const float outside = (field.size - count) * share * share;
  float total = 0.0f;
#pragma unroll
  for (int c = 0; c < V; ++c) {
    const float mean = sum[c] * share;
    total += squares[c] * share - mean * mean + middle[c] * (middle[c] * count + 2.0f * sum[c]) * outside;
  }
  return total;
}

// Threads are (lanes of a token, tokens); lanes is a power of two, so that a token's lanes lie in one warp.
template <int V, typename T>
__global__ void __launch_bounds__(kThreads, 4) importance_kernel(const T* velocity, float* importance, Field field) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int lanes = static_cast<int>(blockDim.x), lane = static_cast<int>(threadIdx.x);
  float sum = 0.0f;
  if (at < field.all_tokens) {
    const int64_t token = at % field.num_tokens;
    const T* image = velocity + (at - token) * field.channels;
    const Window window(field, token);
    for (int channel = lane * V; channel < field.channels; channel += lanes * V)
      sum += variance<V>(field, window, image + channel, token);
  }
  for (int apart = lanes / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(kAllLanes, sum, apart);
  const float mean = sum / static_cast<float>(field.channels);
  if (lane == 0 && at < field.all_tokens) importance[at] = mean < 0.0f ? 0.0f : mean;  // a NaN stays one
}

template <int V, typename T>
void launch(const T* velocity, float* importance, const Field& field, cudaStream_t stream) {
  unsigned lanes = 1;
  while (lanes < kWarp && static_cast<int>(lanes) * V < field.channels) lanes *= 2;
  const dim3 threads(lanes, kThreads / lanes);
  const unsigned blocks = num_blocks(field.all_tokens, threads.y);
  importance_kernel<V><<<blocks, threads, 0, stream>>>(velocity, importance, field);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void run(const Tensor& velocity, const Tensor& importance, const Field& field, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const T* from = velocity.const_data_ptr<T>();
  float* to = importance.mutable_data_ptr<float>();
  if (takes_vectors(velocity, field.channels, kVector))
    launch<kVector>(from, to, field, stream);
  else
    launch<1>(from, to, field, stream);
}

Field make_field(const Tensor& velocity, const Grid& grid, int64_t window) {
  // A window beyond the grid is as wide as the grid, but for its size, which divides.
  const int64_t reach = std::min(window / 2, std::max({grid.frames, grid.height, grid.width}));
  const float wide = static_cast<float>(window);
  return {velocity.size(0) * grid.size(),
          grid.size(),
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
  THO_DISPATCH_V2(velocity.scalar_type(), "importance", AT_WRAP([&] { run<scalar_t>(velocity_, out, field, stream); }),
                  ScalarType::Float, ScalarType::Half, ScalarType::BFloat16);
  return out;
}

}  // namespace
}  // namespace jitaccel

STABLE_TORCH_LIBRARY_IMPL(jitaccel, CUDA, m) { m.impl("importance", TORCH_BOX(&jitaccel::importance)); }
