#pragma once

#include <cute/tensor.hpp>

#include "kernels/common/convert.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/sm80/ptx.cuh"

// Matrices of 16-bit numbers in shared memory, and products of them.

namespace hbsattn::sm80 {

// Rows lie in chunks of 64 columns, or 32 where their number is no multiple of that: [chunk][row][columns]. In a chunk
// the vectors of 16 bytes of a row are exchanged by the row's place, so that the same vector of 8 rows is in all banks.
template <int kRows_, int kColumns_>
struct SharedRows {
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kChunkVectors = kColumns % 64 == 0 ? 8 : 4;
  static constexpr int kChunks = kColumns / 8 / kChunkVectors;
  static constexpr int kRowBytes = 16 * kChunkVectors;  // of a chunk
  static constexpr int kChunkBytes = kRows * kRowBytes;
  static constexpr int kBytes = kChunks * kChunkBytes;
  static_assert(kColumns % 32 == 0 && kRows % 16 == 0);

  static __device__ __forceinline__ uint32_t offset(int row, int vector) {
    const int exchanged = kChunkVectors == 8 ? row & 7 : row >> 1 & 3;
    return vector / kChunkVectors * kChunkBytes + row * kRowBytes + (vector % kChunkVectors ^ exchanged) * 16;
  }
};

// Reads patches of 16 rows and 16 columns, as operands of products. The words of read(), by halves of rows and of
// columns: (0, 0), (1, 0), (0, 1), (1, 1); if kByRows (0, 0), (0, 1), (1, 0), (1, 1). The former is a first operand or,
// transposed, two second ones, for 8 columns each; the latter two second ones, for 8 rows each.
template <class Rows, bool kByRows = false>
struct PatchReader {
  uint32_t address;  // of this lane's vector of the first patch

  // `matrix` is aligned to 128 bytes.
  __device__ __forceinline__ PatchReader(uint32_t matrix, int lane)
      : address(matrix + (kByRows ? Rows::offset((lane & 7) + lane / 16 * 8, lane >> 3 & 1)
                                  : Rows::offset(lane & 15, lane >> 4))) {}

  // `row`: of the first, a multiple of 16; `step`: of 16 columns.
  template <bool kTransposed = false>
  __device__ __forceinline__ void read(int row, int step, uint32_t (&words)[4]) const {
    constexpr int kSteps = Rows::kChunkVectors / 2;
    load_matrices<kTransposed>(
        (address ^ (step % kSteps * 32)) + row * Rows::kRowBytes + step / kSteps * Rows::kChunkBytes, words);
  }
};

// Accumulators of a warp's 16 rows: a lane's linear index is column pair + 2 * row + 4 * (group of 8 columns), for the
// rows lane / 4 and lane / 4 + 8 and the columns 2 (lane % 4) of a group.
template <int kColumns>
using Accumulator = decltype(cute::make_tensor<float>(cute::Shape<cute::Int<kColumns / 2>>{}));

// Of an accumulator, the 16 columns from 16 * `step` on as a first operand.
template <class Element, class Sum>
__device__ __forceinline__ void to_operand(const Sum& sum, int step, uint32_t (&words)[4]) {
  CUTE_UNROLL
  for (int i = 0; i < 4; ++i) words[i] = pack_pair<Element>(sum(8 * step + 2 * i), sum(8 * step + 2 * i + 1));
}

// sums[strip] = rows of the strips x rows of `b`, over all columns: 16 * kStrips rows from `first_row` on, and all of
// `b`.
template <class Element, int kStrips, class RowsA, class RowsB, class Sum>
__device__ __forceinline__ void multiply_rows(Sum (&sums)[kStrips], const PatchReader<RowsA>& a, int first_row,
                                              const PatchReader<RowsB, true>& b) {
  const auto multiply = [&](auto first, int step) {
    uint32_t of_a[kStrips][4];
    CUTE_UNROLL
    for (int strip = 0; strip < kStrips; ++strip) a.read(first_row + 16 * strip, step, of_a[strip]);
    CUTE_UNROLL
    for (int patch = 0; patch < RowsB::kRows / 16; ++patch) {
      uint32_t of_b[4];
      b.read(16 * patch, step, of_b);
      CUTE_UNROLL
      for (int strip = 0; strip < kStrips; ++strip) {
        multiply_add<Element, first.value>(sums[strip], 2 * patch, of_a[strip], of_b[0], of_b[1]);
        multiply_add<Element, first.value>(sums[strip], 2 * patch + 1, of_a[strip], of_b[2], of_b[3]);
      }
    }
  };
  multiply(std::true_type{}, 0);
  CUTE_UNROLL
  for (int step = 1; step < RowsA::kColumns / 16; ++step) multiply(std::false_type{}, step);
}

// sums[strip] += the strips' operands, which are columns `step`, x the rows of `b` of the same number, for all columns
// of b.
template <class Element, int kStrips, class RowsB, class Sum>
__device__ __forceinline__ void multiply_step(Sum (&sums)[kStrips], const uint32_t (&of_a)[kStrips][4],
                                              const PatchReader<RowsB>& b, int step) {
  CUTE_UNROLL
  for (int patch = 0; patch < RowsB::kColumns / 16; ++patch) {
    uint32_t of_b[4];
    b.template read<true>(16 * step, patch, of_b);
    CUTE_UNROLL
    for (int strip = 0; strip < kStrips; ++strip) {
      multiply_add<Element>(sums[strip], 2 * patch, of_a[strip], of_b[0], of_b[1]);
      multiply_add<Element>(sums[strip], 2 * patch + 1, of_a[strip], of_b[2], of_b[3]);
    }
  }
}

}  // namespace hbsattn::sm80
