#pragma once

#include <cutlass/fast_math.h>

#include "hbsattn/params.h"

namespace hbsattn {

// The partial blocks of a mask, as kernels of every family ask. Whatever the tables say, no matrix outside of them is
// read.
struct PartialBlocks {
  const PartialWord* words;  // null: no block is partial
  const int32_t* matrices;
  const uint16_t* elements;
  int num_partial, num_matrices;
  int columns, row_words;  // of a bit row
  int granules;            // of 16 keys, in a row of a matrix
  cutlass::FastDivmod q_block_size, k_block_size;

  // Whether the block of a bit row, over all mask heads, and of a column is partial.
  __device__ __forceinline__ bool has(int64_t bit_row, int column) const {
    return __ldg(&words[bit_row * row_words + column / 32].bits) >> (column % 32) & 1;
  }

  // The number of such a block's matrix; kWhole: the block is not partial.
  static constexpr int kWhole = -1;
  __device__ __forceinline__ int find(int64_t bit_row, int column) const {
    const auto [bits, first] = __ldg(reinterpret_cast<const int2*>(words + bit_row * row_words + column / 32));
    const uint32_t bit = 1u << (column % 32);
    if (!(bits & bit)) return kWhole;
    const int place = min(max(first + __popc(bits & (bit - 1)), 0), num_partial - 1);
    return min(max(__ldg(matrices + place), 0), num_matrices - 1);
  }

  // 16 keys of a matrix's row, one bit each. A query outside of the block counts for none.
  __device__ __forceinline__ uint32_t read(int matrix, int query, int granule) const {
    const bool inside = query >= 0 && query < q_block_size.divisor && granule < granules;
    // Not in a branch, which would let one wait for another.
    const int64_t row = inside && matrix >= 0 ? int64_t{matrix} * q_block_size.divisor + query : 0;
    const uint32_t bits = __ldg(elements + row * granules + (inside ? granule : 0));
    return matrix < 0 ? 0xffffu : inside ? bits : 0;
  }
};

inline PartialBlocks partial_blocks_of(const MaskView& mask) {
  PartialBlocks partial{};
  if (!mask.shape.partial || mask.num_partial == 0 || mask.num_matrices == 0) return partial;
  partial.words = mask.partial;
  partial.matrices = mask.matrices;
  partial.elements = mask.elements;
  partial.num_partial = static_cast<int>(mask.num_partial);
  partial.num_matrices = static_cast<int>(mask.num_matrices);
  partial.columns = static_cast<int>(mask.shape.cols);
  partial.row_words = static_cast<int>(mask.shape.words());
  partial.granules = static_cast<int>(mask.shape.granules());
  partial.q_block_size = mask.shape.q_block_size;
  partial.k_block_size = mask.shape.k_block_size;
  return partial;
}

}  // namespace hbsattn
