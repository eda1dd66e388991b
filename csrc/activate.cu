// activate: the most important tokens that are not anchors, in raster order (ITA, arXiv:2603.10744).
//
//   out[b] = the `count` inactive tokens of highest importance, ties to the lowest raster index, rising
//
// A token's key is the bits of its importance, changed so that they order as the numbers do (+0 equals -0, a NaN is the
// largest); an anchor's key is 0, below every number's. A radix select finds the count-th largest key. Three times,
// from the highest bits down, it makes a histogram of a digit among the keys that still match, and selects the digit
// that contains the count-th key. Then it takes the tokens above that key, and of those equal to it the first ones, as
// many as are left. Their places in the result are running sums over the tokens in order, so no sorting is needed.
//
// Layout: importance (B, N) float32, anchors (B, M) int64 in; (B, count) int64 out. Scratch: keys uint32, N per image
// rounded up to whole blocks; 3 histograms of 8 KiB; two counts per block. Bytes moved: 4 N + 8 M in, 4 N out, and 4
// times 4 N in from the caches, 8 count out. Atomics only count integers, so the result does not depend on their order.
//
// Launch: blocks of 256 threads with 8 keys each, so 37 blocks for 21 x 45 x 80 tokens; one launch per digit, one that
// counts what each block takes, and one that writes it. Every step needs all results of the one before, and blocks
// synchronise by launches: each block derives the result of a step from its histogram. Indices are not trusted: an
// anchor off the grid is found by no block, and nothing is written beyond `count`.

#include "cuda_common.cuh"

namespace jitaccel {
namespace {

constexpr int kWarp = 32, kWarps = 8, kThreads = kWarp * kWarps;
constexpr int kKeys = 8;  // per thread
constexpr int kBlockKeys = kThreads * kKeys;
constexpr int kDigits = 3, kBits = 11, kBins = 1 << kBits, kThreadBins = kBins / kThreads;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ uint32_t rising_bits(float importance) {
  if (isnan(importance)) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(importance == 0.0f ? 0.0f : importance);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Digits are bits 31..21, 20..10 and 10..0: bit 10 is used twice.
__device__ int shift_of(int digit) { return digit == 0 ? 21 : digit == 1 ? 10 : 0; }

// Returns the sum of `value` over the threads before this one, and in `total` over all. Every thread must call it.
__device__ uint32_t sum_before(uint32_t value, uint32_t& total) {
  __shared__ uint32_t warp_sums[kWarps];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  uint32_t sum = value;
  for (int apart = 1; apart < kWarp; apart *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, sum, apart);
    if (lane >= apart) sum += other;
  }
  if (lane == kWarp - 1) warp_sums[warp] = sum;
  __syncthreads();
  uint32_t before = 0;
  total = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i == warp) before = total;
    total += warp_sums[i];
  }
  __syncthreads();  // the sums may be overwritten
  return before + sum - value;
}

// The known part of the count-th largest key: its bits under `mask`, and how many of the keys that match them are still
// to be taken.
struct Selection {
  uint32_t bits, mask, wanted;
};

// One image's part of the scratch.
struct Scratch {
  uint32_t* keys;        // (chunks, kBlockKeys)
  uint32_t* histograms;  // (kDigits, kBins), zero at first
  Selection* found;      // (kDigits + 1,), the selection after each digit
  uint2* taken;          // (chunks,): keys above the found one, and equal to it; 4 words each, so that rows stay aligned
};

struct Task {
  const float* __restrict__ importance;  // (B, N)
  const int64_t* __restrict__ anchors;   // (B, M)
  int64_t* __restrict__ out;             // (B, count)
  uint32_t* scratch;                     // (B, words)
  int num_tokens, num_anchors, count, chunks;

  __host__ __device__ int64_t words() const {
    return int64_t{chunks} * (kBlockKeys + 4) + kDigits * kBins + (kDigits + 1) * 4;
  }
  __device__ Scratch of_image() const {
    uint32_t* const keys = scratch + blockIdx.y * words();
    uint32_t* const histograms = keys + int64_t{chunks} * kBlockKeys;
    uint32_t* const found = histograms + kDigits * kBins;
    return {keys, histograms, reinterpret_cast<Selection*>(found),
            reinterpret_cast<uint2*>(found + (kDigits + 1) * 4)};
  }
};

// Returns the selection after `digits` digits, from the selection before the last of them and its histogram. The first
// block stores it for the next launch.
__device__ Selection selection_after(int digits, const Scratch& scratch, uint32_t count) {
  if (digits == 0) return {0, 0, count};
  __shared__ Selection shared;
  const Selection before = digits == 1 ? Selection{0, 0, count} : scratch.found[digits - 1];
  const int shift = shift_of(digits - 1), highest = kBins - 1 - static_cast<int>(threadIdx.x) * kThreadBins;
  const uint32_t* histogram = scratch.histograms + (digits - 1) * kBins;
  uint32_t bins[kThreadBins], own = 0, total;
#pragma unroll
  for (int i = 0; i < kThreadBins; ++i) bins[i] = histogram[highest - i];
#pragma unroll
  for (int i = 0; i < kThreadBins; ++i) own += bins[i];
  uint32_t above = sum_before(own, total);
  // Threads take the digits from the highest down; the one whose keys reach past `wanted` has found it.
  for (int i = 0; i < kThreadBins; ++i) {
    if (above < before.wanted && before.wanted <= above + bins[i])
      shared = {before.bits | static_cast<uint32_t>(highest - i) << shift,
                before.mask | uint32_t{kBins - 1} << shift, before.wanted - above};
    above += bins[i];
  }
  __syncthreads();
  if (blockIdx.x == 0 && threadIdx.x == 0) scratch.found[digits] = shared;
  return shared;
}

// Makes this block's keys, first in shared memory; its anchors are found by a search, because they rise.
__device__ void make_keys(const Task& task, uint32_t* keys) {
  __shared__ uint32_t own[kBlockKeys];
  const int64_t image = blockIdx.y;
  const int begin = static_cast<int>(blockIdx.x) * kBlockKeys, end = begin + kBlockKeys;
  const float* importance = task.importance + image * task.num_tokens;
  const int64_t* anchors = task.anchors + image * task.num_anchors;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const int at = static_cast<int>(threadIdx.x) + i * kThreads;
    own[at] = begin + at < task.num_tokens ? rising_bits(importance[begin + at]) : 0;
  }
  __syncthreads();
  int low = 0, high = task.num_anchors;  // the first anchor from `begin` on lies in [low, high]
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (anchors[middle] < begin)
      low = middle + 1;
    else
      high = middle;
  }
  for (int i = low + static_cast<int>(threadIdx.x); i < task.num_anchors && i < low + kBlockKeys; i += kThreads) {
    const int64_t anchor = anchors[i];
    if (anchor >= begin && anchor < end) own[anchor - begin] = 0;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kKeys; ++i) keys[threadIdx.x + i * kThreads] = own[threadIdx.x + i * kThreads];
  __syncthreads();
}

// Reads this thread's keys, which are neighbours in the image.
__device__ __forceinline__ void read_keys(const Scratch& scratch, uint32_t (&keys)[kKeys]) {
  const auto* from = reinterpret_cast<const uint4*>(scratch.keys + int64_t{blockIdx.x} * kBlockKeys) +
                     threadIdx.x * (kKeys / 4);
  uint4 parts[kKeys / 4];
#pragma unroll
  for (int i = 0; i < kKeys / 4; ++i) parts[i] = from[i];
#pragma unroll
  for (int i = 0; i < kKeys / 4; ++i) {
    keys[4 * i] = parts[i].x;
    keys[4 * i + 1] = parts[i].y;
    keys[4 * i + 2] = parts[i].z;
    keys[4 * i + 3] = parts[i].w;
  }
}

// Adds this block's keys that match the selection to the histogram of a digit; makes the keys before the first digit.
__global__ void __launch_bounds__(kThreads) digit_kernel(Task task, int digit) {
  __shared__ uint32_t histogram[kBins];
  const Scratch scratch = task.of_image();
  const Selection found = selection_after(digit, scratch, static_cast<uint32_t>(task.count));
#pragma unroll
  for (int i = 0; i < kThreadBins; ++i) histogram[threadIdx.x + i * kThreads] = 0;
  if (digit == 0) make_keys(task, scratch.keys + int64_t{blockIdx.x} * kBlockKeys);
  uint32_t keys[kKeys];
  read_keys(scratch, keys);
  __syncthreads();
  const int shift = shift_of(digit);
#pragma unroll
  for (int i = 0; i < kKeys; ++i)
    if ((keys[i] & found.mask) == found.bits) atomicAdd(&histogram[keys[i] >> shift & (kBins - 1)], 1u);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kThreadBins; ++i) {
    const int bin = static_cast<int>(threadIdx.x) + i * kThreads;
    if (histogram[bin] != 0) atomicAdd(&scratch.histograms[digit * kBins + bin], histogram[bin]);
  }
}

// Returns two counts in one number, because neither exceeds 2048: of this thread's keys, those above the found one,
// and, from bit 16 on, those equal to it.
__device__ __forceinline__ uint32_t count_keys(const uint32_t (&keys)[kKeys], uint32_t found) {
  uint32_t counts = 0;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) counts += (keys[i] > found ? 1u : 0u) + (keys[i] == found ? 1u << 16 : 0u);
  return counts;
}

__global__ void __launch_bounds__(kThreads) count_kernel(Task task) {
  const Scratch scratch = task.of_image();
  const Selection found = selection_after(kDigits, scratch, static_cast<uint32_t>(task.count));
  uint32_t keys[kKeys], total;
  read_keys(scratch, keys);
  sum_before(count_keys(keys, found.bits), total);
  if (threadIdx.x == 0) scratch.taken[blockIdx.x] = {total & 0xffffu, total >> 16};
}

// Writes, rising, this block's tokens whose key is above the found one, and those with an equal key that are among the
// first `wanted` of the image.
__global__ void __launch_bounds__(kThreads) write_kernel(Task task) {
  const Scratch scratch = task.of_image();
  const Selection found = scratch.found[kDigits];
  uint32_t keys[kKeys], above = 0, equal = 0, total;
  read_keys(scratch, keys);
  for (unsigned i = threadIdx.x; i < blockIdx.x; i += kThreads) {
    above += scratch.taken[i].x;
    equal += scratch.taken[i].y;
  }
  sum_before(above, above);
  sum_before(equal, equal);
  const uint32_t before = sum_before(count_keys(keys, found.bits), total);
  above += before & 0xffffu;
  equal += before >> 16;
  int64_t* out = task.out + int64_t{blockIdx.y} * task.count;
  const int first = static_cast<int>(blockIdx.x) * kBlockKeys + static_cast<int>(threadIdx.x) * kKeys;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const bool is_above = keys[i] > found.bits, is_equal = keys[i] == found.bits;
    const uint32_t place = above + min(equal, found.wanted);
    if ((is_above || (is_equal && equal < found.wanted)) && place < static_cast<uint32_t>(task.count))
      out[place] = first + i;
    above += is_above;
    equal += is_equal;
  }
}

Tensor activate(const Tensor& importance, const Tensor& anchors, int64_t count) {
  const char* op = "activate";
  check_activation(op, importance, anchors, count);
  const int64_t batch = importance.size(0), num_tokens = importance.size(1), num_anchors = anchors.size(1);
  const Tensor out = torch::stable::new_empty(anchors, {batch, count});
  if (batch == 0) return out;
  const DeviceGuard guard(importance.get_device_index());
  const cudaStream_t stream = current_stream(importance);
  const Tensor importance_ = torch::stable::contiguous(importance), anchors_ = torch::stable::contiguous(anchors);
  check_rising(op, "anchors", anchors_, num_tokens, stream);
  if (count == 0) return out;
  const dim3 blocks = blocks_for(num_tokens, kBlockKeys, batch);
  Task task{importance_.const_data_ptr<float>(),
            anchors_.const_data_ptr<int64_t>(),
            out.mutable_data_ptr<int64_t>(),
            nullptr,
            static_cast<int>(num_tokens),
            static_cast<int>(num_anchors),
            static_cast<int>(count),
            static_cast<int>(blocks.x)};
  const Tensor scratch = torch::stable::new_empty(anchors, {batch, task.words()}, ScalarType::Int);
  task.scratch = reinterpret_cast<uint32_t*>(scratch.mutable_data_ptr<int32_t>());
  const size_t row = static_cast<size_t>(task.words()) * 4, keys = static_cast<size_t>(task.chunks) * kBlockKeys * 4;
  STD_CUDA_CHECK(cudaMemset2DAsync(task.scratch + keys / 4, row, 0, kDigits * kBins * 4, batch, stream));
  for (int digit = 0; digit < kDigits; ++digit) launch(digit_kernel, blocks, kThreads, 0, stream, task, digit);
  launch(count_kernel, blocks, kThreads, 0, stream, task);
  launch(write_kernel, blocks, kThreads, 0, stream, task);
  return out;
}

}  // namespace
}  // namespace jitaccel

STABLE_TORCH_LIBRARY_IMPL(jitaccel, CUDA, m) { m.impl("activate", TORCH_BOX(&jitaccel::activate)); }
