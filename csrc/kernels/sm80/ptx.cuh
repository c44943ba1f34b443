#pragma once

#include <cutlass/numeric_types.h>

#include <cstdint>
#include <cute/arch/mma_sm80.hpp>
#include <type_traits>

// Asynchronous copies, fragments out of shared memory, and products: of 16 x 8 x 16 numbers of 16 bits, or 16 x 8 x 8
// of float32.

namespace hbsattn::sm80 {

// Copies 16 bytes from global to shared memory past L1, or clears them there.
__device__ __forceinline__ void copy_async(uint32_t destination, const void* source, bool exists) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination), "l"(source),
               "r"(exists ? 16 : 0)
               : "memory");
}

// Ends a group of this thread's copies; one without copies is complete at once.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's copies, but for those of the last kGroups groups.
template <int kGroups>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Four matrices of 8 x 8 numbers of 16 bits; lane i gives the address of row i % 8 of matrix i / 8. A lane gets the
// columns 2 (i % 4) and 2 (i % 4) + 1 of row i / 4 of each or, transposed, those rows of that column.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t address, uint32_t (&words)[4]) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  }
}

// A float32 number in two parts with the 11 digits that tensor cores take (TF32), as they cut what they read: rounded,
// they leave out 2^-23 of it at most; kCuts: the first is cut, in an instruction less, and they leave out 2^-21. Of an
// infinity or a NaN, the second is NaN.
template <bool kCuts>
__device__ __forceinline__ void split_float(uint32_t word, uint32_t& high, uint32_t& low) {
  high = kCuts ? word : word + 0x1000u;
  low = __float_as_uint(__uint_as_float(word) - __uint_as_float(high & 0xffffe000u));
}

// A float32 number rounded to TF32.
__device__ __forceinline__ uint32_t round_to_tf32(uint32_t word) {
  return fabsf(__uint_as_float(word)) < INFINITY ? word + 0x1000u : word;
}

// A word of shared memory.
__device__ __forceinline__ uint32_t load_word(uint32_t address) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}

// 8 columns from 8 * `group` on of an accumulator of 16 rows += a b; = a b, if kFirst.
template <class Element, bool kFirst = false, class Accumulator>
__device__ __forceinline__ void multiply_add(Accumulator& sum, int group, const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  using Atom = std::conditional_t<std::is_same_v<Element, cutlass::bfloat16_t>, cute::SM80_16x8x16_F32BF16BF16F32_TN,
                                  cute::SM80_16x8x16_F32F16F16F32_TN>;
  float &c0 = sum(4 * group), &c1 = sum(4 * group + 1), &c2 = sum(4 * group + 2), &c3 = sum(4 * group + 3);
  if constexpr (kFirst) {
    Atom::fma(c0, c1, c2, c3, a[0], a[1], a[2], a[3], b0, b1, 0.f, 0.f, 0.f, 0.f);
  } else {
    Atom::fma(c0, c1, c2, c3, a[0], a[1], a[2], a[3], b0, b1, c0, c1, c2, c3);
  }
}

// The same of numbers in TF32.
template <class Accumulator>
__device__ __forceinline__ void multiply_add_tf32(Accumulator& sum, int group, const uint32_t (&a)[4], uint32_t b0,
                                                  uint32_t b1) {
  float &c0 = sum(4 * group), &c1 = sum(4 * group + 1), &c2 = sum(4 * group + 2), &c3 = sum(4 * group + 3);
  cute::SM80_16x8x8_F32TF32TF32F32_TN::fma(c0, c1, c2, c3, a[0], a[1], a[2], a[3], b0, b1, c0, c1, c2, c3);
}

}  // namespace hbsattn::sm80
