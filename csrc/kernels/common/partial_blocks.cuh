#pragma once

#include <cutlass/fast_math.h>

#include <cute/tensor.hpp>

#include "kernels/common/key_limits.cuh"
#include "kernels/common/query_limits.cuh"

// Blocks of which a matrix says which pairs of a query and a key count.

namespace hbsattn {

// The partial blocks of a mask, as kernels of every family ask. Whatever the tables say, no matrix outside of them is
// read.
struct PartialBlocks {
  const PartialWord* words;  // null: no block is partial
  const int32_t* matrices;
  const uint16_t* elements;
  int num_partial, num_matrices;
  int columns;    // of a bit row
  int row_words;  // of a bit row
  int granules;   // of 16 keys, in a row of a matrix
  cutlass::FastDivmod q_block_size, k_block_size;

  // Whether the block of a bit row, over all mask heads, and of a column is partial.
  __device__ __forceinline__ bool has(int64_t bit_row, int column) const {
    return __ldg(&words[bit_row * row_words + column / 32].bits) >> (column % 32) & 1;
  }

  // The matrix of such a block; null: the block is whole.
  __device__ __forceinline__ const uint16_t* find(int64_t bit_row, int column) const {
    const auto [bits, first] = __ldg(reinterpret_cast<const int2*>(words + bit_row * row_words + column / 32));
    const uint32_t bit = 1u << (column % 32);
    if (!(bits & bit)) return nullptr;
    const int place = min(max(first + __popc(bits & (bit - 1)), 0), num_partial - 1);
    const int number = min(max(__ldg(matrices + place), 0), num_matrices - 1);
    return elements + int64_t{number} * q_block_size.divisor * granules;
  }

  // 16 keys of a matrix's row. A query outside of the block counts for none.
  __device__ __forceinline__ uint32_t read(const uint16_t* matrix, int query, int granule) const {
    const bool inside = query >= 0 && query < q_block_size.divisor && granule < granules;
    return inside ? __ldg(matrix + query * granules + granule) : 0;
  }
};

// Hides the keys of a granule, the scores from number `first` on of a strip of 16 rows of queries, that a matrix says
// do not count. `queries`: the thread's two, in their block; `granule`: of the block's keys.
template <class Scores>
__device__ __forceinline__ void hide_keys(const PartialBlocks& partial, const uint16_t* matrix, const int (&queries)[2],
                                          int granule, int first, int lane, Scores& scores) {
  CUTE_UNROLL
  for (int row = 0; row < 2; ++row) {
    const uint32_t counts = partial.read(matrix, queries[row], granule) >> (2 * (lane & 3));
    CUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      float& score = scores(first + (j >> 1) * 4 + 2 * row + (j & 1));
      score = counts >> ((j >> 1) * 8 + (j & 1)) & 1 ? score : -INFINITY;
    }
  }
}

// The same of scores of keys by queries, those of granules of a stage from some one on. `info` is as in mask_queries;
// `stack`: of the stage's heads; `warp_key`: the first of the warp's 16 keys, in the tile. What mask_queries hides may
// have any place here.
template <class Scores, class Info>
__device__ __forceinline__ void hide_queries(const KeyTiles& args, const PartialBlocks& partial, const KeyItem& item,
                                             const Info& info, int first_granule, int warp_key, int lane,
                                             Scores& scores) {
  const int mask_head = mask_of_head(info.stack() * args.chunks.stack.heads, args.heads_of_mask);
  int column, in_block;
  partial.k_block_size(column, in_block, item.first_key + warp_key);
  column = min(column, partial.columns - 1);  // of keys that do not exist
  CUTE_UNROLL
  for (int granule = 0; granule < cute::size(scores) / 8; ++granule) {
    const int first = info.query(first_granule + granule);
    if (first < 0) continue;
    const int block = partial.q_block_size.div(first >> args.chunks.stack.rows_log2);
    const int row = min(item.row_begin + block, static_cast<int>(args.mask.rows) - 1);
    const uint16_t* matrix = partial.find(mask_head * args.mask.rows + row, column);
    if (matrix == nullptr) continue;
    CUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int query = (first + (j >> 1) * 8 + 2 * (lane & 3) + (j & 1)) >> args.chunks.stack.rows_log2;
      const uint32_t counts =
          partial.read(matrix, query - block * partial.q_block_size.divisor, in_block / kGranule) >> (lane / 4);
      CUTE_UNROLL
      for (int key = 0; key < 2; ++key) {
        float& score = scores(8 * granule + (j >> 1) * 4 + 2 * key + (j & 1));
        score = counts >> (8 * key) & 1 ? score : -INFINITY;
      }
    }
  }
}

}  // namespace hbsattn
