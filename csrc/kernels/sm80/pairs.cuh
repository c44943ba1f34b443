#pragma once

#include "kernels/sm80/shared_rows.cuh"

// Pairs of warps that share 16 rows. Either has other first operands of them, which registers hold, and what it makes
// of its products goes to the other one.

namespace hbsattn::sm80 {

// Waits for the other warp of a pair. `barrier`: from 1 on, as 0 is that of all warps.
__device__ __forceinline__ void meet_partner(int barrier) {
  asm volatile("bar.sync %0, 64;" ::"r"(barrier) : "memory");
}

// Tells the other warp, which waits, that this one is here.
__device__ __forceinline__ void reach_partner(int barrier) {
  asm volatile("bar.arrive %0, 64;" ::"r"(barrier) : "memory");
}

// Half the columns: half of each chunk. Which half is one bit of addresses.
template <class Rows>
struct HalfColumns : Rows {
  static constexpr int kColumns = Rows::kColumns / 2;
  static constexpr int kChunkVectors = Rows::kChunkVectors / 2;
  static constexpr int kHalfBytes = 16 * kChunkVectors;
  static_assert(Rows::kChunkVectors == 8);

  static __device__ __forceinline__ uint32_t offset(int row, int vector) {
    return Rows::offset(row, vector / kChunkVectors * Rows::kChunkVectors + vector % kChunkVectors);
  }
};

// First operands of 16 rows of a matrix, of all its columns.
template <class Rows, int kSteps>
__device__ __forceinline__ void hold_rows(const PatchReader<Rows>& matrix, int first_row, uint32_t (&held)[kSteps][4]) {
  static_assert(kSteps == Rows::kColumns / 16);
  CUTE_UNROLL
  for (int step = 0; step < kSteps; ++step) matrix.read(first_row, step, held[step]);
}

// sum = 16 rows x rows of `b`, over all columns. read(step, words): the rows' operands behind those that are held.
template <class Element, int kHeldSteps, class RowsB, class Sum, class Read>
__device__ __forceinline__ void multiply_held(Sum& sum, const uint32_t (&held)[kHeldSteps][4],
                                              const PatchReader<RowsB, Operand::kByRows>& b, Read&& read) {
  const auto multiply = [&](auto first, int step, const uint32_t (&of_rows)[4]) {
    CUTE_UNROLL
    for (int patch = 0; patch < RowsB::kRows / 16; ++patch) {
      uint32_t of_b[4];
      b.read(16 * patch, step, of_b);
      multiply_add<Element, first.value>(sum, 2 * patch, of_rows, of_b[0], of_b[1]);
      multiply_add<Element, first.value>(sum, 2 * patch + 1, of_rows, of_b[2], of_b[3]);
    }
  };
  multiply(std::true_type{}, 0, held[0]);
  CUTE_UNROLL
  for (int step = 1; step < kHeldSteps; ++step) multiply(std::false_type{}, step, held[step]);
  CUTE_UNROLL
  for (int step = kHeldSteps; step < RowsB::kColumns / 16; ++step) {
    uint32_t of_rows[4];
    read(step - kHeldSteps, of_rows);
    multiply(std::false_type{}, step, of_rows);
  }
}

// The columns of one granule of an accumulator.
template <class Sum>
__device__ __forceinline__ auto granule_of(Sum& sum, int granule) {
  return cute::make_tensor(&sum(8 * granule), cute::Shape<cute::Int<8>>{});
}

// Leaves the columns of a granule for the other warp of a pair, and gets them there.
template <class Sum>
__device__ __forceinline__ void leave_granule(float4 (&place)[2][32], const Sum& sum, int lane) {
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    place[i][lane] = make_float4(sum(4 * i), sum(4 * i + 1), sum(4 * i + 2), sum(4 * i + 3));
  }
}

template <class Sum>
__device__ __forceinline__ void get_granule(const float4 (&place)[2][32], Sum&& sum, int lane) {
  CUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const float4 four = place[i][lane];
    sum(4 * i) = four.x;
    sum(4 * i + 1) = four.y;
    sum(4 * i + 2) = four.z;
    sum(4 * i + 3) = four.w;
  }
}

}  // namespace hbsattn::sm80
