// activate: the most important tokens that are not anchors, in raster order (ITA, arXiv:2603.10744).
//
// A token's key is its importance, flipped so that more important is smaller, followed by its raster index. All keys
// differ, so the `count` smallest are well defined, and ties in importance go to the lowest index. They are found by
// partial selection, O(N), and then sorted by index.
//
// Layout: importance (B, N) float32, anchors (B, M) in; (B, count) out, rising. Images are independent.

#include "check.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

namespace jitaccel {
namespace {

// Bits that rise as the importance falls; +0 and -0 give the same bits.
uint32_t falling_bits(float importance) {
  const float value = importance + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return ~rising;
}

void run(const float* importance, int64_t num_tokens, const int64_t* anchors, int64_t num_anchors, int64_t count,
         int64_t* out) {
  std::vector<uint64_t> keys;
  keys.reserve(num_tokens - num_anchors);
  const int64_t* anchor = anchors;
  for (int64_t n = 0; n < num_tokens; ++n) {
    if (anchor != anchors + num_anchors && *anchor == n)
      ++anchor;
    else
      keys.push_back(static_cast<uint64_t>(falling_bits(importance[n])) << 32 | static_cast<uint64_t>(n));
  }
  if (count < static_cast<int64_t>(keys.size())) std::nth_element(keys.begin(), keys.begin() + count, keys.end());
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<int64_t>(keys[i] & 0xffffffffu);
  std::sort(out, out + count);
}

Tensor activate(const Tensor& importance, const Tensor& anchors, int64_t count) {
  check_activation("activate", importance, anchors, count);
  const Tensor importance_ = torch::stable::contiguous(importance), anchors_ = torch::stable::contiguous(anchors);
  const int64_t batch = importance.size(0), num_tokens = importance.size(1), num_anchors = anchors.size(1);
  if (num_tokens > INT64_C(0xffffffff))
    fail("activate", "importance", "have fewer than 2^32 tokens", kind(importance), "split the picture");
  const int64_t* rows = anchors_.const_data_ptr<int64_t>();
  check_rising("activate", "anchors", rows, batch, num_anchors, num_tokens);
  Tensor out = torch::stable::new_empty(anchors, {batch, count});
  if (out.numel() == 0) return out;
  const float* scores = importance_.const_data_ptr<float>();
  int64_t* result = out.mutable_data_ptr<int64_t>();
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      run(scores + b * num_tokens, num_tokens, rows + b * num_anchors, num_anchors, count, result + b * count);
  });
  return out;
}

}  // namespace
}  // namespace jitaccel

STABLE_TORCH_LIBRARY_IMPL(jitaccel, CPU, m) { m.impl("activate", TORCH_BOX(&jitaccel::activate)); }
