// The CPU kernels' inner loops over channels, compiled for several instruction sets and selected at load time.
//
// Sums stay in registers: all rows of a block of channels are read before the next block.
#pragma once

#include "portable.h"

#include <algorithm>
#include <cstring>

// ifunc resolvers run before the sanitizers are ready, and other compilers and systems do not support them: build one
// version there. GCC knows the x86-64 levels by name from version 12 on; before that, use processors of those levels.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#if __GNUC__ >= 12
#define JITACCEL_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define JITACCEL_CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#endif
#else
#define JITACCEL_CLONES
#endif
#define JITACCEL_INLINE __attribute__((always_inline)) inline

namespace jitaccel {

// Eight floats as a vector extension of GCC and clang, because compilers left to themselves vectorise the wrong loop. A
// target without registers of that size uses two or four smaller ones.
constexpr int64_t kLanes = 8;
typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t HalfWords __attribute__((vector_size(kLanes * sizeof(uint16_t))));

JITACCEL_INLINE Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}
JITACCEL_INLINE Words load_bits(const void* from) {
  HalfWords bits;
  std::memcpy(&bits, from, sizeof(bits));
  return __builtin_convertvector(bits, Words);
}
JITACCEL_INLINE Floats load(const BFloat16* from) { return reinterpret_cast<Floats>(load_bits(from) << 16); }
JITACCEL_INLINE Floats load(const Half* from) {
  const Words bits = load_bits(from), magnitude = bits & 0x7fffu;
  // After shifting to a float's position, exponent and fraction lack only the factor 2^112 between the biases. Infinity
  // and NaN, which have the largest exponent, get it too.
  const Floats value = reinterpret_cast<Floats>(magnitude << 13) * 0x1p112f;
  const Words special = reinterpret_cast<Words>(magnitude >= 0x7c00u) & 0x7f800000u;
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(value) | special | (bits & 0x8000u) << 16);
}

// Sums of `kVectors` vectors of channels, starting at channel c, stay in registers over all rows.
template <int kVectors, typename T>
JITACCEL_INLINE void blend_block(const T* const* rows, const float* weights, int64_t count, int64_t c, float* out) {
  Floats sums[kVectors] = {};
  for (int64_t k = 0; k < count; ++k)
    for (int j = 0; j < kVectors; ++j) sums[j] += load(rows[k] + c + j * kLanes) * weights[k];
  std::memcpy(out + c, sums, sizeof(sums));
}

template <typename T>
JITACCEL_INLINE void blend_rows(const T* const* rows, const float* weights, int64_t count, int64_t channels,
                                float* out) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= channels; c += 4 * kLanes) blend_block<4>(rows, weights, count, c, out);
  for (; c + kLanes <= channels; c += kLanes) blend_block<1>(rows, weights, count, c, out);
  for (; c < channels; ++c) {
    float sum = 0.0f;
    for (int64_t k = 0; k < count; ++k) sum += static_cast<float>(rows[k][c]) * weights[k];
    out[c] = sum;
  }
}

// out[c] = sum over k of weights[k] * rows[k][c]
JITACCEL_CLONES inline void blend(const float* const* rows, const float* weights, int64_t count, int64_t channels,
                                  float* out) {
  blend_rows(rows, weights, count, channels, out);
}
JITACCEL_CLONES inline void blend(const BFloat16* const* rows, const float* weights, int64_t count, int64_t channels,
                                  float* out) {
  blend_rows(rows, weights, count, channels, out);
}
JITACCEL_CLONES inline void blend(const Half* const* rows, const float* weights, int64_t count, int64_t channels,
                                  float* out) {
  blend_rows(rows, weights, count, channels, out);
}

// Prefetches `bytes` starting at `from`, which are read or written soon.
JITACCEL_INLINE void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

// out[c] = from[c], converted to float.
template <typename T>
JITACCEL_INLINE void widen_row(const T* from, int64_t channels, float* out) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    const Floats values = load(from + c);
    std::memcpy(out + c, &values, sizeof(values));
  }
  for (; c < channels; ++c) out[c] = static_cast<float>(from[c]);
}
JITACCEL_CLONES inline void widen(const BFloat16* from, int64_t channels, float* out) {
  widen_row(from, channels, out);
}
JITACCEL_CLONES inline void widen(const Half* from, int64_t channels, float* out) { widen_row(from, channels, out); }

// Rounds a row to its element type.
JITACCEL_CLONES inline void store(const float* row, int64_t channels, float* out) {
  std::memcpy(out, row, channels * sizeof(float));
}
JITACCEL_CLONES inline void store(const float* row, int64_t channels, BFloat16* out) {
  for (int64_t c = 0; c < channels; ++c) out[c] = BFloat16(row[c]);
}
JITACCEL_CLONES inline void store(const float* row, int64_t channels, Half* out) {
  for (int64_t c = 0; c < channels; ++c) out[c] = Half(row[c]);
}

}  // namespace jitaccel
