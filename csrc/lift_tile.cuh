// Nearest fill and separable Gaussian blur on the device, shared by lift and micro_flow_into.
//
//   blurred[t, y, x] = sum_k w[k] sum_i w[i] sum_j w[j] values[nearest[r(t + i), r(y + j), r(x + k)]]
//
// r reflects at the ends, repeatedly if the axis is shorter than the kernel; a picture and the frames of a stack have
// no sum over i. Sums are in float32.
//
// Layout: values (B, M, D), all others (B, N, ...), channels innermost, contiguous; a block's tile is in shared memory.
//
// A block takes one segment of one line of tokens (of one image, frame and row) and at most 32 channels. It fills a
// tile of floats, covering the segment and its reach on both sides, with the sums over the outer axes, gathered
// straight from the anchors' rows; then it blurs along the line, from the tile. Only anchor values and indices are read
// from memory. Gathers overlap (K lines for each line written; K * K in a video) and are served by the caches: at 64 x
// 64 tokens, 1310 anchors and 64 channels of bfloat16, all anchor values are 168 KB and fit the cache of one H100 SM.
//
// TAPS: K if it is 7 or 9, the widths for the method's densities, and no axis is shorter than the reach. A thread then
// issues all K index loads at once, then all K row loads. 0: any K.
//
// Launch: threads are (channel vectors) x (columns), at most 256; a vector is 16 bytes of a gathered row. 32 channels
// are 64 or 128 contiguous bytes, whole sectors for gathers and writes, and still divide 64 channels between two
// blocks. A line is cut into equal segments of at most 64 columns, and further until there are 256 blocks, about two
// for each of an H100's 132 SMs: 64 x 64 tokens of 64 channels are 64 lines x 2 segments x 2 chunks. Wider segments
// repeat less of the reach; narrower ones fill the machine.
#pragma once

#include "cuda_common.cuh"

#include <algorithm>

namespace jitaccel {

constexpr int kTileThreads = 256;
constexpr int kTileChannels = 32;
constexpr int kTileSegment = 64, kTileSegmentMin = 16;
constexpr int64_t kTileBlocks = 256;      // enough to fill the machine
constexpr int64_t kTileBytes = 48 << 10;  // of shared memory, available on every device without opting in

// One lift, and how a launch divides it.
struct LiftTile {
  const int64_t* __restrict__ nearest;  // (B, N)
  const int64_t* __restrict__ anchors;  // (B, M)
  const float* __restrict__ weights;    // (K,), on the device, so that a captured lift can get others
  int64_t batch;
  int num_tokens, num_anchors, channels, frames, height, width;
  bool is_video;
  int radius;  // K / 2
  int segment, num_segments, num_chunks;

  int num_lines() const { return frames * height; }
  int widest_tile() const { return std::min(width, segment + 2 * radius); }
};

// Takes contiguous tensors, which must outlive the launch.
inline LiftTile make_lift_tile(const Grid& grid, const Tensor& nearest, const Tensor& anchors, const Tensor& weights,
                               int64_t channels) {
  blocks_for(grid.size(), 1, anchors.size(0));  // places are 32-bit integers
  return {nearest.const_data_ptr<int64_t>(),
          anchors.const_data_ptr<int64_t>(),
          weights.const_data_ptr<float>(),
          anchors.size(0),
          static_cast<int>(grid.size()),
          static_cast<int>(anchors.size(1)),
          static_cast<int>(channels),
          static_cast<int>(grid.frames),
          static_cast<int>(grid.height),
          static_cast<int>(grid.width),
          grid.is_video,
          static_cast<int>(weights.size(0) / 2),
          0,
          0,
          0};
}

// sum += weight * x
template <int V, typename T>
__device__ __forceinline__ void accumulate(float weight, const Pack<T, V>& x, float (&sum)[V]) {
#pragma unroll
  for (int c = 0; c < V; ++c) sum[c] += weight * static_cast<float>(x.x[c]);
}

// Adds to `sum` a frame's sum over the rows around `row` at one column. `nearest`: of that frame. `rows`: the values of
// the image's anchors, at this thread's channel.
template <int V, int TAPS, typename T>
__device__ __forceinline__ void blur_rows(const LiftTile& lift, const int64_t* __restrict__ nearest,
                                          const T* __restrict__ rows, int row, int column, float (&sum)[V]) {
  const auto anchor_row = [&](int64_t anchor) {
    return reinterpret_cast<const Pack<T, V>*>(rows + static_cast<int>(anchor) * static_cast<int64_t>(lift.channels));
  };
  if constexpr (TAPS > 0) {
    int64_t anchors[TAPS];
    Pack<T, V> x[TAPS];
#pragma unroll
    for (int j = 0; j < TAPS; ++j)
      anchors[j] = nearest[reflect_once(row + j - TAPS / 2, lift.height) * lift.width + column];
#pragma unroll
    for (int j = 0; j < TAPS; ++j) x[j] = *anchor_row(anchors[j]);
#pragma unroll
    for (int j = 0; j < TAPS; ++j) accumulate(lift.weights[j], x[j], sum);
  } else {
#pragma unroll 4
    for (int j = -lift.radius; j <= lift.radius; ++j)
      accumulate(lift.weights[lift.radius + j],
                 *anchor_row(nearest[reflect(row + j, lift.height) * lift.width + column]), sum);
  }
}

// Adds to `sum` the sum over the outer axes at one column. Each frame of a video is summed separately, which gives
// fewer terms per sum and the rounding of a separable blur.
template <int V, int TAPS, typename T>
__device__ __forceinline__ void blur_outer(const LiftTile& lift, const int64_t* __restrict__ nearest,
                                           const T* __restrict__ rows, int frame, int row, int column,
                                           float (&sum)[V]) {
  const int frame_size = lift.height * lift.width;
  if (!lift.is_video) return blur_rows<V, TAPS>(lift, nearest + frame * frame_size, rows, row, column, sum);
  for (int i = -lift.radius; i <= lift.radius; ++i) {
    float of_frame[V] = {};
    const int other = reflect(frame + i, lift.frames);
    blur_rows<V, TAPS>(lift, nearest + other * frame_size, rows, row, column, of_frame);
    const float weight = lift.weights[lift.radius + i];
#pragma unroll
    for (int c = 0; c < V; ++c) sum[c] += weight * of_frame[c];
  }
}

// The tile in shared memory: packs of at most 4 floats, with all first packs of a vector before all second ones, so
// that neighbouring threads (vectors, then columns) access neighbouring packs.
template <int V>
struct Tile {
  static constexpr int kCount = V < 4 ? V : 4;
  using Part = Pack<float, kCount>;
  Part* parts;
  int vectors, vector;  // vectors of the block, and this thread's
  int plane;            // packs between a vector's first and second one

  __device__ __forceinline__ void put(int column, const float (&x)[V]) const {
#pragma unroll
    for (int p = 0; p < V / kCount; ++p) {
      Part part;
#pragma unroll
      for (int c = 0; c < kCount; ++c) part.x[c] = x[p * kCount + c];
      parts[p * plane + column * vectors + vector] = part;
    }
  }

  // sum += weight * the tile at `column`
  __device__ __forceinline__ void add(int column, float weight, float (&sum)[V]) const {
#pragma unroll
    for (int p = 0; p < V / kCount; ++p) {
      const Part part = parts[p * plane + column * vectors + vector];
#pragma unroll
      for (int c = 0; c < kCount; ++c) sum[p * kCount + c] += weight * part.x[c];
    }
  }
};

// Adds the sum along the line at one column; the tile starts at column `first`.
template <int V, int TAPS>
__device__ __forceinline__ void blur_line(const LiftTile& lift, const Tile<V>& tile, int column, int first,
                                          float (&sum)[V]) {
  if constexpr (TAPS > 0) {
#pragma unroll
    for (int k = 0; k < TAPS; ++k)
      tile.add(reflect_once(column + k - TAPS / 2, lift.width) - first, lift.weights[k], sum);
  } else {
    for (int k = -lift.radius; k <= lift.radius; ++k)
      tile.add(reflect(column + k, lift.width) - first, lift.weights[lift.radius + k], sum);
  }
}

// The part of an image that a block writes.
struct TilePlace {
  int frame, row;
  int begin, end;    // columns of the segment
  int first, last;   // columns of the tile: the segment and its reach, within the line
  int chunk;

  __device__ explicit TilePlace(const LiftTile& lift) {
    int rest = static_cast<int>(blockIdx.x);
    chunk = rest % lift.num_chunks;
    rest /= lift.num_chunks;
    begin = rest % lift.num_segments * lift.segment;
    rest /= lift.num_segments;
    frame = rest / lift.height;
    row = rest % lift.height;
    end = min(begin + lift.segment, lift.width);
    first = max(begin - lift.radius, 0);
    last = min(end + lift.radius, lift.width);
  }
};

// Sink receives the blurred values, one vector of V channels at a time:
//   kWantsAll, wants(token)               whether this token (of B * N) is written at all
//   at_anchor<V>(anchor_offset, offset)   the token is an anchor: its value is at anchor_offset in (B, M, D)
//   elsewhere<V>(offset, blurred)         it is not; its place is at offset in (B, N, D)
template <int V, int TAPS, typename T, typename Sink>
__global__ void __launch_bounds__(kTileThreads, 2)
    lift_tile_kernel(const T* __restrict__ values, LiftTile lift, Sink sink) {
  extern __shared__ float4 shared_tile[];
  const TilePlace place(lift);
  const int vectors = static_cast<int>(blockDim.x), vector = static_cast<int>(threadIdx.x);
  const int step = static_cast<int>(blockDim.y), lane = static_cast<int>(threadIdx.y);
  const int64_t first_token = static_cast<int64_t>(blockIdx.y) * lift.num_tokens;  // of the image
  const int line = (place.frame * lift.height + place.row) * lift.width;
  if constexpr (!Sink::kWantsAll) {
    bool wants = false;
    for (int column = place.begin + lane; column < place.end; column += step)
      wants = wants || sink.wants(first_token + line + column);
    if (!__syncthreads_or(wants)) return;
  }
  const int channel = (place.chunk * vectors + vector) * V;
  const bool has_channel = channel < lift.channels;
  const Tile<V> tile{reinterpret_cast<typename Tile<V>::Part*>(shared_tile), vectors, vector,
                     (place.last - place.first) * vectors};
  const int64_t* __restrict__ nearest = lift.nearest + first_token;
  const int64_t first_anchor = static_cast<int64_t>(blockIdx.y) * lift.num_anchors;
  const T* __restrict__ rows = values + first_anchor * lift.channels + channel;

  for (int column = place.first + lane; has_channel && column < place.last; column += step) {
    float sum[V] = {};
    blur_outer<V, TAPS>(lift, nearest, rows, place.frame, place.row, column, sum);
    tile.put(column - place.first, sum);
  }
  __syncthreads();
  if (!has_channel) return;

  for (int column = place.begin + lane; column < place.end; column += step) {
    const int own = line + column;
    if (!sink.wants(first_token + own)) continue;
    const int64_t anchor = first_anchor + nearest[own], offset = (first_token + own) * lift.channels + channel;
    if (lift.anchors[anchor] == own) {
      sink.template at_anchor<V>(anchor * lift.channels + channel, offset);
      continue;
    }
    float sum[V] = {};
    blur_line<V, TAPS>(lift, tile, column, place.first, sum);
    sink.template elsewhere<V>(offset, sum);
  }
}

// Whether one vector of V channels of the widest tile fits shared memory.
inline bool tile_fits(LiftTile lift, int64_t vector) {
  lift.segment = kTileSegmentMin;
  return lift.widest_tile() * vector * static_cast<int64_t>(sizeof(float)) <= kTileBytes;
}

// Divides the work; see the launch paragraph at the top. Returns the number of channel vectors of a block.
inline int divide_tile(LiftTile& lift, int vector) {
  const auto count = [](int size, int part) { return (size + part - 1) / part; };
  const int all_vectors = count(lift.channels, vector);
  int vectors = std::min(kTileChannels / vector, all_vectors);
  const auto fits = [&] { return lift.widest_tile() * int64_t{4} * vector * vectors <= kTileBytes; };
  const auto cut = [&](int segments) {
    lift.segment = count(lift.width, segments);
    lift.num_segments = count(lift.width, lift.segment);
  };
  cut(count(lift.width, kTileSegment));
  while (vectors > 1 && !fits()) vectors /= 2;
  lift.num_chunks = count(all_vectors, vectors);
  const auto is_filling = [&] {
    return lift.batch * lift.num_lines() * lift.num_chunks * lift.num_segments >= kTileBlocks;
  };
  while (lift.segment > kTileSegmentMin && !(fits() && is_filling())) cut(2 * lift.num_segments);
  return vectors;
}

template <int V, int TAPS, typename T, typename Sink>
void launch_lift_tile(LiftTile lift, const T* values, const Sink& sink, cudaStream_t stream) {
  const int vectors = divide_tile(lift, V);
  const int columns = std::min(kTileThreads / vectors, lift.widest_tile());
  const dim3 threads(static_cast<unsigned>(vectors), static_cast<unsigned>(columns));
  const dim3 blocks = blocks_for(int64_t{1} * lift.num_lines() * lift.num_chunks * lift.num_segments, 1, lift.batch);
  const size_t bytes = static_cast<size_t>(lift.widest_tile()) * vectors * V * sizeof(float);
  launch(lift_tile_kernel<V, TAPS, T, Sink>, blocks, threads, bytes, stream, values, lift, sink);
}

// Lifts `values` (B, M, D) into `sink`. `is_aligned`: every tensor it accesses allows vectors of 16 bytes of T.
template <typename T, typename Sink>
void run_lift_tile(const char* op, const LiftTile& lift, const T* values, const Sink& sink, bool is_aligned,
                   cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const bool reflects_once = lift.radius < lift.height && lift.radius < lift.width;
  if (is_aligned && tile_fits(lift, kVector)) {
    if (lift.radius == 3 && reflects_once) return launch_lift_tile<kVector, 7>(lift, values, sink, stream);
    if (lift.radius == 4 && reflects_once) return launch_lift_tile<kVector, 9>(lift, values, sink, stream);
    launch_lift_tile<kVector, 0>(lift, values, sink, stream);
  } else if (tile_fits(lift, 1)) {
    launch_lift_tile<1, 0>(lift, values, sink, stream);
  } else {
    fail(op, "weights", text("reach over at most ", kTileBytes / 4, " columns"), text(2 * lift.radius + 1, " taps"),
         "use a narrower blur");
  }
}

// Returns the clean estimates `state - level * velocity` (B, M, D) float32 at the anchors (B, M), level = levels[0].
// state, velocity: (B, N, D). Contiguous. Defined in clean.cu.
Tensor clean_at_anchors(const Tensor& state, const Tensor& velocity, const Tensor& anchors, const Tensor& levels,
                        cudaStream_t stream);

}  // namespace jitaccel
