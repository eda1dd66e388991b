// activate: the most important tokens that are no anchors, in raster order (ITA, arXiv:2603.10744).
//
//   out[b] = the `count` inactive tokens of highest importance, equal importance to the lowest raster index, rising
//
// A token's key is its importance's bits, changed so that they order as the numbers do (the two zeros are one, a NaN is
// the largest); an anchor's key is 0, below every number's. A radix select finds the count-th largest key: four times,
// from the highest byte down, a histogram of that byte among the keys that still match, and the byte that the count-th
// falls in. Then tokens above that key are taken, and of those equal to it the first ones, as many as are left; their
// places in the result are running sums over the tokens in order, so that it needs no sorting.
//
// Layout: importance (B, N) float32, anchors (B, M) int64 in; (B, count) int64 out; scratch: keys (B, N) uint32. Bytes
// moved: 4 N + 8 M in, 4 N out, and 5 times 4 N in from the caches, 8 count out. Atomics only count integers in shared
// memory, so the result does not depend on their order.
//
// Launch: one block of 1024 threads for each image, because every step waits for the one before; at 64 x 64 tokens a
// pass is 4 keys a thread. More blocks for an image would have to meet between the passes, in launches of their own.

#include "cuda_common.cuh"

namespace jitaccel {
namespace {

constexpr int kWarp = 32, kWarps = 32, kThreads = kWarp * kWarps;
constexpr int kBins = 256;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ uint32_t rising_bits(float importance) {
  if (isnan(importance)) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(importance == 0.0f ? 0.0f : importance);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Returns the sum of `value` over the threads before this one, and over all of them in `total`. Every thread must call.
__device__ uint32_t sum_before(uint32_t value, uint32_t* warp_sums, uint32_t& total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  uint32_t sum = value;
  for (int apart = 1; apart < kWarp; apart *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, sum, apart);
    if (lane >= apart) sum += other;
  }
  if (lane == kWarp - 1) warp_sums[warp] = sum;
  __syncthreads();
  uint32_t before = 0;
  total = 0;
  for (int i = 0; i < kWarps; ++i) {
    if (i == warp) before = total;
    total += warp_sums[i];
  }
  __syncthreads();  // the sums may be overwritten
  return before + sum - value;
}

// What is known of the count-th largest key: its bits under `mask`, and how many keys are still to be taken from those
// that agree with them.
struct Selection {
  uint32_t bits, mask, wanted;
};

// Finds the next byte of the count-th largest key, at `shift`.
__device__ Selection next_byte(Selection found, int shift, const uint32_t* keys, int64_t num_tokens,
                               uint32_t* histogram, uint32_t* warp_sums, Selection* shared) {
  if (threadIdx.x < kBins) histogram[threadIdx.x] = 0;
  __syncthreads();
  for (int64_t n = threadIdx.x; n < num_tokens; n += kThreads) {
    const uint32_t key = keys[n];
    if ((key & found.mask) == found.bits) atomicAdd(&histogram[key >> shift & (kBins - 1)], 1u);
  }
  __syncthreads();
  // Threads take the bytes from the highest down: the one whose keys reach past `wanted` has found it.
  const uint32_t byte = kBins - 1 - threadIdx.x;
  const uint32_t here = threadIdx.x < kBins ? histogram[byte] : 0;
  uint32_t total;
  const uint32_t above = sum_before(here, warp_sums, total);
  if (above < found.wanted && found.wanted <= above + here)
    *shared = {found.bits | byte << shift, found.mask | uint32_t{kBins - 1} << shift, found.wanted - above};
  __syncthreads();
  return *shared;
}

// Writes, rising, the tokens whose key is above the found one, and the first `wanted` of those whose key equals it.
__device__ void compact(const Selection& found, const uint32_t* keys, int64_t num_tokens, uint32_t* warp_sums,
                        int64_t* out) {
  int64_t all_above = 0, all_equal = 0;
  for (int64_t start = 0; start < num_tokens; start += kThreads) {
    const int64_t n = start + threadIdx.x;
    const uint32_t key = n < num_tokens ? keys[n] : 0;  // 0 is no inactive token's
    const bool is_above = key > found.bits, is_equal = key == found.bits;
    // Two sums in one: neither passes 1024.
    uint32_t total;
    const uint32_t before = sum_before((is_above ? 1u : 0u) | (is_equal ? 1u << 16 : 0u), warp_sums, total);
    const int64_t above = all_above + (before & 0xffffu), equal = all_equal + (before >> 16);
    const int64_t taken = min(equal, static_cast<int64_t>(found.wanted));
    if (is_above || (is_equal && equal < found.wanted)) out[above + taken] = n;
    all_above += total & 0xffffu;
    all_equal += total >> 16;
  }
}

__global__ void __launch_bounds__(kThreads) activate_kernel(const float* importance, const int64_t* anchors,
                                                            uint32_t* keys, int64_t* out, int64_t num_tokens,
                                                            int64_t num_anchors, int64_t count) {
  __shared__ uint32_t histogram[kBins];
  __shared__ uint32_t warp_sums[kWarps];
  __shared__ Selection shared;
  const int64_t image = blockIdx.x;
  importance += image * num_tokens;
  anchors += image * num_anchors;
  keys += image * num_tokens;
  for (int64_t n = threadIdx.x; n < num_tokens; n += kThreads) keys[n] = rising_bits(importance[n]);
  __syncthreads();
  for (int64_t i = threadIdx.x; i < num_anchors; i += kThreads) keys[anchors[i]] = 0;
  __syncthreads();
  Selection found{0, 0, static_cast<uint32_t>(count)};
  for (int shift = 24; shift >= 0; shift -= 8)
    found = next_byte(found, shift, keys, num_tokens, histogram, warp_sums, &shared);
  compact(found, keys, num_tokens, warp_sums, out + image * count);
}

Tensor activate(const Tensor& importance, const Tensor& anchors, int64_t count) {
  const char* op = "activate";
  check_activation(op, importance, anchors, count);
  const int64_t batch = importance.size(0), num_tokens = importance.size(1), num_anchors = anchors.size(1);
  if (num_tokens > INT64_C(0xffffffff))
    fail(op, "importance", "have fewer than 2^32 tokens", kind(importance), "split the picture");
  const Tensor out = torch::stable::new_empty(anchors, {batch, count});
  if (batch == 0) return out;
  const DeviceGuard guard(importance.get_device_index());
  const cudaStream_t stream = current_stream(importance);
  const Tensor importance_ = torch::stable::contiguous(importance), anchors_ = torch::stable::contiguous(anchors);
  check_rising(op, "anchors", anchors_, num_tokens, stream);
  if (count == 0) return out;
  const Tensor keys = torch::stable::new_empty(anchors, {batch, num_tokens}, ScalarType::Int);
  activate_kernel<<<num_blocks(batch, 1), kThreads, 0, stream>>>(
      importance_.const_data_ptr<float>(), anchors_.const_data_ptr<int64_t>(),
      reinterpret_cast<uint32_t*>(keys.mutable_data_ptr<int32_t>()), out.mutable_data_ptr<int64_t>(), num_tokens,
      num_anchors, count);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace
}  // namespace jitaccel

STABLE_TORCH_LIBRARY_IMPL(jitaccel, CUDA, m) { m.impl("activate", TORCH_BOX(&jitaccel::activate)); }
