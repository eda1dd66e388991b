// Checks of indices on the device, for debugging an application: off unless JITACCEL_CHECK_INDICES=1.
//
//   rising: 0 <= rows[b, 0] < rows[b, 1] < ... < limit          within: 0 <= rows[b, i] < limit
//   frames: for each f, some i with f * size <= rows[b, i] < (f + 1) * size
//
// Layout: rows (B, L) int64, contiguous. Moves 8 B L bytes, and at most 24 to the host. Launch: one thread per index,
// or per frame. Threads that find a wrong one agree on the first by atomicMin, in whatever order they run.

#include "cuda_common.cuh"

#include <cstdlib>
#include <string>

namespace jitaccel {
namespace {

using Position = unsigned long long;  // the type that atomicMin takes
constexpr Position kNone = ~Position{0};
constexpr int kThreads = 256;

__global__ void find_wrong_kernel(const int64_t* rows, int length, int64_t limit, bool must_rise,
                                  Position* first_wrong) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= length) return;
  const int64_t at = static_cast<int64_t>(blockIdx.y) * length + i, index = rows[at];
  const bool rises = !must_rise || i == 0 || rows[at - 1] < index;
  if (index < 0 || index >= limit || !rises) atomicMin(first_wrong, static_cast<Position>(at));
}

// Rows rise. Marks the first frame, over all images, without an index.
__global__ void find_empty_frame_kernel(const int64_t* rows, int length, int frames, int64_t frame_size,
                                        Position* first_wrong) {
  const int frame = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (frame >= frames) return;
  const int64_t image = blockIdx.y, start = frame * frame_size;
  const int64_t* row = rows + image * length;
  int low = 0, high = length;  // the first index from `start` on lies in [low, high]
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (row[middle] < start)
      low = middle + 1;
    else
      high = middle;
  }
  if (low == length || row[low] >= start + frame_size)
    atomicMin(first_wrong, static_cast<Position>(image * frames + frame));
}

bool checks_indices() {
  static const bool asked = [] {
    const char* value = std::getenv("JITACCEL_CHECK_INDICES");
    return value != nullptr && std::string(value) == "1";
  }();
  return asked;
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

template <typename T>
T read_back(const T* from, cudaStream_t stream) {
  T value;
  STD_CUDA_CHECK(cudaMemcpyAsync(&value, from, sizeof(T), cudaMemcpyDeviceToHost, stream));
  STD_CUDA_CHECK(cudaStreamSynchronize(stream));
  return value;
}

// Returns the position that `search` writes: that of the first wrong one, or kNone.
template <typename Search>
Position find_first(const Tensor& rows, cudaStream_t stream, const Search& search) {
  if (!checks_indices() || rows.numel() == 0 || is_capturing(stream)) return kNone;
  const Tensor scratch = torch::stable::new_empty(rows, {1}, ScalarType::Long);
  auto* const first_wrong = reinterpret_cast<Position*>(scratch.mutable_data_ptr<int64_t>());
  STD_CUDA_CHECK(cudaMemsetAsync(first_wrong, 0xff, sizeof(Position), stream));
  search(first_wrong);
  return read_back(first_wrong, stream);
}

// Returns the flat position of the first wrong index, or kNone.
Position find_wrong(const Tensor& rows, int64_t limit, bool must_rise, cudaStream_t stream) {
  return find_first(rows, stream, [&](Position* first_wrong) {
    launch(find_wrong_kernel, blocks_for(rows.size(1), kThreads, rows.size(0)), kThreads, 0, stream,
           rows.const_data_ptr<int64_t>(), rows.size(1), limit, must_rise, first_wrong);
  });
}

}  // namespace

void check_rising(const char* op, const char* name, const Tensor& rows, int64_t limit, cudaStream_t stream) {
  const Position wrong = find_wrong(rows, limit, true, stream);
  if (wrong == kNone) return;
  const int64_t at = static_cast<int64_t>(wrong), length = rows.size(1);
  const int64_t* indices = rows.const_data_ptr<int64_t>();
  const int64_t before = at % length == 0 ? -1 : read_back(indices + at - 1, stream);
  fail(op, name, text("rise strictly within 0..", limit - 1),
       text(read_back(indices + at, stream), " after ", before, " in image ", at / length),
       "sort them and check the grid");
}

void check_within(const char* op, const char* name, const Tensor& rows, int64_t limit, cudaStream_t stream) {
  const Position wrong = find_wrong(rows, limit, false, stream);
  if (wrong == kNone) return;
  fail(op, name, text("lie in 0..", limit - 1), text(read_back(rows.const_data_ptr<int64_t>() + wrong, stream)),
       "use nearest_anchor");
}

void check_frames(const char* op, const Tensor& anchors, int64_t frames, int64_t frame_size, cudaStream_t stream) {
  const Position wrong = find_first(anchors, stream, [&](Position* first_wrong) {
    launch(find_empty_frame_kernel, blocks_for(frames, kThreads, anchors.size(0)), kThreads, 0, stream,
           anchors.const_data_ptr<int64_t>(), anchors.size(1), frames, frame_size, first_wrong);
  });
  if (wrong == kNone) return;
  const int64_t at = static_cast<int64_t>(wrong);
  fail_empty_frame(op, text("none in frame ", at % frames, " of image ", at / frames));
}

}  // namespace jitaccel
