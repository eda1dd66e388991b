// Shared by the CUDA operators: stream, launches, index checks, vector accesses, values of any dtype.
#pragma once

#include "portable.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <limits>

namespace jitaccel {

using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Blocks along x, each of which does `per_block` of an image's `work`, and images along y. Places within an image are
// 32-bit integers in the kernels, because a 64-bit division is a call; larger work is refused.
inline dim3 blocks_for(int64_t work, int64_t per_block, int64_t images) {
  STD_TORCH_CHECK(work + per_block <= std::numeric_limits<int32_t>::max() && images <= 65535,
                  "jitaccel: at most 2^31 elements of an image and 65535 images go in one launch; split the batch");
  return dim3(static_cast<unsigned>((work + per_block - 1) / per_block), static_cast<unsigned>(images));
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared_bytes, cudaStream_t stream,
            const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

// With JITACCEL_CHECK_INDICES=1 in the environment, these functions wait for the device, read indices from it, and fail
// if a row of (B, L) does not rise strictly within 0..limit - 1, or if an index is not within 0..limit - 1. Otherwise,
// and while a graph is captured, they do nothing. Tensors must be contiguous. Defined in indices.cu.
void check_rising(const char* op, const char* name, const Tensor& rows, int64_t limit, cudaStream_t stream);
void check_within(const char* op, const char* name, const Tensor& rows, int64_t limit, cudaStream_t stream);

// The same for rising anchors (B, M): each frame must contain one.
void check_frames(const char* op, const Tensor& anchors, int64_t frames, int64_t frame_size, cudaStream_t stream);

// nearest (B, N) and anchors (B, M) of one lift.
inline void check_plan_indices(const char* op, const Tensor& nearest, const Tensor& anchors, cudaStream_t stream) {
  check_rising(op, "anchors", anchors, nearest.size(1), stream);
  check_within(op, "nearest", nearest, anchors.size(1), stream);
}

// COUNT values that one access moves, at most 16 bytes.
template <typename T, int COUNT>
struct alignas(sizeof(T) * COUNT) Pack {
  T x[COUNT];
};

// The number of values of T per access, out of V.
template <typename T, int V>
constexpr int kPerAccess = V * sizeof(T) > 16 ? 16 / static_cast<int>(sizeof(T)) : V;

// Whether accesses of V channels are possible: rows of `channels` keep the alignment of the first one.
inline bool takes_vectors(const Tensor& x, int64_t channels, int64_t vector) {
  const int64_t bytes = vector * (x.scalar_type() == ScalarType::Float ? 4 : 2);
  const auto address = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  return channels % vector == 0 && address % static_cast<uintptr_t>(bytes < 16 ? bytes : 16) == 0;
}

// Returns x, or a copy if its address does not allow accesses of 16 bytes.
inline Tensor aligned(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 ? x : torch::stable::clone(x);
}

template <int V, typename T>
__device__ __forceinline__ void load(const T* from, float (&x)[V]) {
  constexpr int kCount = kPerAccess<T, V>;
#pragma unroll
  for (int first = 0; first < V; first += kCount) {
    const auto pack = *reinterpret_cast<const Pack<T, kCount>*>(from + first);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[first + i] = static_cast<float>(pack.x[i]);
  }
}

template <int V, typename T>
__device__ __forceinline__ void store(T* to, const float (&x)[V]) {
  constexpr int kCount = kPerAccess<T, V>;
#pragma unroll
  for (int first = 0; first < V; first += kCount) {
    Pack<T, kCount> pack;
#pragma unroll
    for (int i = 0; i < kCount; ++i) pack.x[i] = static_cast<T>(x[first + i]);
    *reinterpret_cast<Pack<T, kCount>*>(to + first) = pack;
  }
}

// Copies bit for bit, which a conversion through float would not do for a NaN.
template <int V, typename T>
__device__ __forceinline__ void copy(const T* from, T* to) {
  constexpr int kCount = kPerAccess<T, V>;
#pragma unroll
  for (int first = 0; first < V; first += kCount)
    *reinterpret_cast<Pack<T, kCount>*>(to + first) = *reinterpret_cast<const Pack<T, kCount>*>(from + first);
}

// Values whose dtype is checked at run time. Every thread takes the same branch, so this costs next to nothing for a
// value that is used once, and avoids compiling a kernel for each combination of dtypes. Values that are read many
// times have their dtype as a template argument.
template <typename Void>
struct AnyValues {
  Void* data;
  ScalarType type;
};
using AnyInput = AnyValues<const void>;
using AnyState = AnyValues<void>;

inline AnyInput any_input(const Tensor& x) { return {x.const_data_ptr(), x.scalar_type()}; }
inline AnyState any_state(const Tensor& x) { return {x.mutable_data_ptr(), x.scalar_type()}; }

template <int V, typename Void>
__device__ __forceinline__ void load(const AnyValues<Void>& from, int64_t offset, float (&x)[V]) {
  if (from.type == ScalarType::Float) {
    load<V>(static_cast<const float*>(from.data) + offset, x);
  } else if (from.type == ScalarType::Half) {
    load<V>(static_cast<const Half*>(from.data) + offset, x);
  } else {
    load<V>(static_cast<const BFloat16*>(from.data) + offset, x);
  }
}

template <int V>
__device__ __forceinline__ void store(const AnyState& to, int64_t offset, const float (&x)[V]) {
  if (to.type == ScalarType::Float) {
    store<V>(static_cast<float*>(to.data) + offset, x);
  } else if (to.type == ScalarType::Half) {
    store<V>(static_cast<Half*>(to.data) + offset, x);
  } else {
    store<V>(static_cast<BFloat16*>(to.data) + offset, x);
  }
}

}  // namespace jitaccel
