// A stand-in for CUDA's header of this name. With it, g++ compiles the .cu files, and their kernels run on the CPU.
//
// Blocks run one after the other. The threads of a block are fibers of one thread, which switch at barriers and warp
// operations. JITACCEL_EMULATOR_REVERSED=1 runs blocks and threads from last to first, which changes the result of a
// kernel that lacks a barrier. Dynamic shared memory is filled with NaNs. It is an error if some threads do not reach a
// barrier, or if a thread named in the mask of a warp operation does not take part in it.
//
// It contains only what csrc/ uses. Operators are registered for the CPU, in the namespace jitaccel_emulated.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ thread_local  // one copy for all fibers
#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(EXPR) static_cast<void>(EXPR)
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) _STABLE_TORCH_LIBRARY_IMPL(jitaccel_emulated, CPU, m, C10_UID)
#define DeviceGuard EmulatedDeviceGuard
#define aoti_torch_get_current_cuda_stream jitaccel::emulator::no_stream

using std::isnan;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline dim3 blockIdx, threadIdx, blockDim;

using cudaStream_t = void*;
using cudaError_t = int;
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace torch::stable::accelerator {
struct EmulatedDeviceGuard {
  explicit EmulatedDeviceGuard(int32_t) {}
};
}  // namespace torch::stable::accelerator

namespace jitaccel {

constexpr size_t kEmulatedBytes = 48 << 10;
inline thread_local float4 shared_tile[kEmulatedBytes / sizeof(float4)];

namespace emulator {

constexpr size_t kStackBytes = 128 << 10;
constexpr unsigned kWarpSize = 32;

inline AOTITorchError no_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool is_done = false;
};

// Where threads wait for each other, over and over; each time every one leaves a word that all may read until the time
// after the next.
struct Meeting {
  unsigned arrived = 0;
  uint64_t times = 0;
  std::array<std::vector<uint32_t>, 2> words;
};

// The block that runs.
class Block {
 public:
  Block(unsigned size, const std::function<void()>& kernel) : kernel_(kernel), fibers_(size), all_(size) {
    block() = this;
    warps_.reserve((size + kWarpSize - 1) / kWarpSize);
    for (unsigned first = 0; first < size; first += kWarpSize)
      warps_.push_back(make(std::min(kWarpSize, size - first)));
    everyone_ = make(size);
  }

  static Block*& block() {
    static Block* running = nullptr;
    return running;
  }

  void run(bool is_reversed) {
    for (unsigned i = 0; i < fibers_.size(); ++i) start(fibers_[i]);
    while (all_ > 0) {
      progress_ = false;
      for (unsigned i = 0; i < fibers_.size(); ++i) {
        current_ = is_reversed ? static_cast<unsigned>(fibers_.size()) - 1 - i : i;
        if (fibers_[current_].is_done) continue;
        threadIdx = dim3(current_ % blockDim.x, current_ / blockDim.x);
        swapcontext(&scheduler_, &fibers_[current_].context);
      }
      if (!progress_) throw std::runtime_error("emulator: threads of a block wait for others that never come");
    }
  }

  // Leaves `word`, waits for all that take part, and returns the words of all, by place.
  const std::vector<uint32_t>& meet_all(uint32_t word) {
    return meet(everyone_, current_, static_cast<unsigned>(fibers_.size()), word);
  }
  const std::vector<uint32_t>& meet_warp(uint32_t word) {
    const unsigned warp = current_ / kWarpSize;
    return meet(warps_[warp], current_ % kWarpSize, static_cast<unsigned>(warps_[warp].words[0].size()), word);
  }
  unsigned lane() const { return current_ % kWarpSize; }

 private:
  static Meeting make(unsigned size) {
    Meeting meeting;
    for (auto& words : meeting.words) words.resize(size);
    return meeting;
  }

  static void enter() {
    Block& here = *block();
    here.kernel_();
    here.fibers_[here.current_].is_done = here.progress_ = true;
    --here.all_;
    swapcontext(&here.fibers_[here.current_].context, &here.scheduler_);
  }

  void start(Fiber& fiber) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler_;
    makecontext(&fiber.context, &Block::enter, 0);
  }

  const std::vector<uint32_t>& meet(Meeting& meeting, unsigned place, unsigned expected, uint32_t word) {
    const uint64_t time = meeting.times;
    auto& words = meeting.words[time % 2];
    words[place] = word;
    progress_ = true;
    if (++meeting.arrived == expected) {
      meeting.arrived = 0;
      ++meeting.times;
    }
    while (meeting.times == time) {
      const unsigned own = current_;
      swapcontext(&fibers_[own].context, &scheduler_);
    }
    progress_ = true;
    return words;
  }

  const std::function<void()>& kernel_;
  std::vector<Fiber> fibers_;
  std::vector<Meeting> warps_;
  Meeting everyone_;
  ucontext_t scheduler_{};
  unsigned all_, current_ = 0;
  bool progress_ = false;
};

template <typename T>
T of_bits(uint32_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
template <typename T>
uint32_t bits_of(T value) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

}  // namespace emulator
}  // namespace jitaccel

inline void __syncthreads() { jitaccel::emulator::Block::block()->meet_all(0); }
inline int __syncthreads_or(int value) {
  const auto& words = jitaccel::emulator::Block::block()->meet_all(value != 0);
  return std::any_of(words.begin(), words.end(), [](uint32_t word) { return word != 0; });
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  auto& block = *jitaccel::emulator::Block::block();
  return jitaccel::emulator::of_bits<T>(block.meet_warp(jitaccel::emulator::bits_of(value))[block.lane() ^ mask]);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned delta) {
  auto& block = *jitaccel::emulator::Block::block();
  const auto& words = block.meet_warp(jitaccel::emulator::bits_of(value));
  return block.lane() < delta ? value : jitaccel::emulator::of_bits<T>(words[block.lane() - delta]);
}
inline unsigned __ballot_sync(unsigned, int value) {
  const auto& words = jitaccel::emulator::Block::block()->meet_warp(value != 0);
  unsigned bits = 0;
  for (size_t lane = 0; lane < words.size(); ++lane) bits |= words[lane] << lane;
  return bits;
}
inline int __clz(unsigned x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline uint32_t __float_as_uint(float x) { return jitaccel::emulator::bits_of(x); }
template <typename T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}
template <typename T>
T atomicMin(T* at, T value) {
  const T before = *at;
  *at = std::min(before, value);
  return before;
}
template <typename A, typename B>
auto min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}
template <typename A, typename B>
auto max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) > static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t count, cudaStream_t) {
  std::memset(to, value, count);
  return 0;
}
inline cudaError_t cudaMemset2DAsync(void* to, size_t pitch, int value, size_t width, size_t height, cudaStream_t) {
  for (size_t row = 0; row < height; ++row) std::memset(static_cast<char*>(to) + row * pitch, value, width);
  return 0;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t count, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, count);
  return 0;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return 0; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return 0;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const unsigned size = config->blockDim.x * config->blockDim.y, blocks = config->gridDim.x * config->gridDim.y;
  if (size > 1024 || config->blockDim.z != 1 || config->gridDim.z != 1 ||
      config->dynamicSmemBytes > jitaccel::kEmulatedBytes)
    throw std::runtime_error("emulator: a launch beyond what it knows");
  const char* order = std::getenv("JITACCEL_EMULATOR_REVERSED");
  const bool is_reversed = order != nullptr && *order == '1';
  const std::function<void()> call = [&] { kernel(static_cast<Parameters>(arguments)...); };
  blockDim = config->blockDim;
  for (unsigned i = 0; i < blocks; ++i) {
    const unsigned at = is_reversed ? blocks - 1 - i : i;
    blockIdx = dim3(at % config->gridDim.x, at / config->gridDim.x);
    std::memset(jitaccel::shared_tile, 0xff, config->dynamicSmemBytes);
    jitaccel::emulator::Block(size, call).run(is_reversed);
  }
  return 0;
}
