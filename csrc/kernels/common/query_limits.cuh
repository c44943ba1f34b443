#pragma once

#include <climits>
#include <cute/tensor.hpp>

#include "kernels/common/key_tiles.cuh"

// Which queries each key of a tile is seen by, and the scores of the others.

namespace hbsattn {

// What each of a thread's two keys asks of a query that sees it.
struct QueryLimits {
  // The first such query, less the thread's column offset; where heads have rules, the query at whose place the key
  // lies. INT_MAX: none.
  int value[2];
  int block;  // of the united blocks, that of the warp's keys

  QueryLimits() = default;
  __device__ __forceinline__ QueryLimits(const KeyTiles& args, const KeyItem& item, int warp_key, int lane)
      : block(item.united > 1 ? warp_key / args.mask.k_block_size : 0) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int in_tile = warp_key + lane / 4 + 8 * row, key = item.first_key + in_tile;
      const int place = min(key - item.diagonal, kUnboundedWindow);
      const int first = args.mask.ruled ? place : row_of(args, rule_of(args.mask, item).first_query(key), lane);
      value[row] = in_tile >= item.keys ? INT_MAX : first;
    }
  }

  // In rows of the stack, as stages tell them, less the thread's column offset. From 0 on, where no shift overflows.
  static __device__ __forceinline__ int row_of(const KeyTiles& args, int query, int lane) {
    return (max(query, 0) << args.chunks.stack.rows_log2) - 2 * (lane & 3);
  }

  // The rows of a stage that see a thread's key: from `first` on, and before `end`.
  struct Rows {
    int first, end;
  };
  // By the rule that `info` tells of the stage.
  template <class Info>
  __device__ __forceinline__ Rows find_rows(const KeyTiles& args, int row, const Info& info, int lane) const {
    const int place = value[row], most = kUnboundedWindow >> args.chunks.stack.rows_log2;
    const bool of_sink = place < info.sink();
    int first = args.mask.causal ? place : INT_MIN, end = most;
    const int left = info.left(), right = info.right();
    if (!of_sink) {
      if (!args.mask.causal && right < kUnboundedWindow) first = place - right;
      if (left < most - place) end = place + left + 1;
    }
    return {place == INT_MAX ? INT_MAX : row_of(args, min(first, most), lane), row_of(args, end, lane)};
  }
};

// By the rule of the stage's heads.
template <class Scores, class Info>
__device__ __forceinline__ void mask_queries_by_rule(const KeyTiles& args, Scores& scores, const Info& info,
                                                     int first_granule, const QueryLimits& limits, int lane) {
  CUTE_UNROLL
  for (int row = 0; row < 2; ++row) {
    // One row after the other: there are registers for the limits of one.
    const QueryLimits::Rows rows = limits.find_rows(args, row, info, lane);
    CUTE_UNROLL
    for (int granule = 0; granule < cute::size(scores) / 8; ++granule) {
      const bool active = info.with(first_granule + granule) >> limits.block & 1;
      const int query = active ? info.query(first_granule + granule) : -1 - kUnboundedWindow;
      CUTE_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int in_stage = query + (j >> 1) * 8 + (j & 1);
        float& score = scores(8 * granule + (j >> 1) * 4 + 2 * row + (j & 1));
        score = in_stage >= rows.first && in_stage < rows.end ? score : -INFINITY;
      }
    }
  }
}

// One rule for causality, united blocks and keys that do not exist, for scores of granules from some one of a stage on.
// `info` tells of the stage: query(granule), the granule's first, in the sequence or, of stacked heads, row of the
// stack; with(granule), the united key blocks that are active with it, one bit each; and sink(), less the diagonal,
// left() and right() of its heads' rule.
template <class Scores, class Info>
__device__ __forceinline__ void mask_queries(const KeyTiles& args, Scores& scores, const Info& info, int first_granule,
                                             const QueryLimits& limits, int lane) {
  if (args.mask.ruled) {
    mask_queries_by_rule(args, scores, info, first_granule, limits, lane);
    return;
  }
  CUTE_UNROLL
  for (int granule = 0; granule < cute::size(scores) / 8; ++granule) {
    const int query = info.query(first_granule + granule);
    const bool active = info.with(first_granule + granule) >> limits.block & 1;
    const int limit[2] = {active ? limits.value[0] : INT_MAX, active ? limits.value[1] : INT_MAX};
    CUTE_UNROLL
    for (int j = 0; j < 8; ++j) {
      float& score = scores(8 * granule + j);
      score = query + (j >> 2) * 8 + (j & 1) < limit[(j >> 1) & 1] ? -INFINITY : score;
    }
  }
}

// What partial blocks ask of a warp's 16 keys.
struct PartialKeys {
  int first_key;  // in the sequence
  int row_begin;  // of the sequence

  PartialKeys() = default;
  __device__ __forceinline__ PartialKeys(const KeyItem& item, int warp_key)
      : first_key(uniform(item.first_key + warp_key)), row_begin(uniform(item.row_begin)) {}
};

// Hides what the matrices of partial blocks say, besides what mask_queries does, with `info` as there and stack(), the
// stage's.
template <class Scores, class Info>
__device__ __forceinline__ void mask_partial(const KeyTiles& args, const PartialKeys& keys, Scores& scores,
                                             const Info& info, int first_granule, int lane) {
  const PartialBlocks& partial = args.partial;
  const int rows_log2 = args.chunks.stack.rows_log2;
  const int mask_head = mask_of_head(info.stack() * args.chunks.stack.heads, args.heads_of_mask);
  int column, in_block;
  // Opaque, or all that follows from it would be kept in registers over all stages.
  partial.k_block_size(column, in_block, static_cast<int>(opaque(static_cast<uint32_t>(keys.first_key))));
  column = min(column, partial.columns - 1);  // of keys that do not exist
  constexpr int kGranules = decltype(cute::size(scores))::value / 8;
  // A lane for each granule looks up its matrix, and all of their rows are read before any is used.
  int of_lane = 0;
  CUTE_UNROLL
  for (int granule = 0; granule < kGranules; ++granule) {
    const int first = info.query(first_granule + granule);
    if (lane == granule) of_lane = first;
  }
  const int block = partial.q_block_size.div(max(of_lane, 0) >> rows_log2);
  const int row = min(keys.row_begin + block, static_cast<int>(args.mask.rows) - 1);
  const int found = lane < kGranules ? partial.find(mask_head * args.mask.rows + row, column) : PartialBlocks::kWhole;
  uint32_t counts[kGranules];  // for the thread's four queries, its two keys, one bit each
  CUTE_UNROLL
  for (int granule = 0; granule < kGranules; ++granule) {
    const int matrix = __shfl_sync(0xffffffffu, found, granule);
    const int first_query = __shfl_sync(0xffffffffu, block, granule) * partial.q_block_size.divisor;
    const int first = __shfl_sync(0xffffffffu, of_lane, granule);
    counts[granule] = 0;
    CUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int query = (first + (j >> 1) * 8 + 2 * (lane & 3) + (j & 1)) >> rows_log2;
      const uint32_t of_query = partial.read(matrix, query - first_query, in_block / kGranule) >> (lane / 4);
      counts[granule] |= (of_query & 0x101) << j;
    }
  }
  CUTE_UNROLL
  for (int granule = 0; granule < kGranules; ++granule) {
    CUTE_UNROLL
    for (int j = 0; j < 8; ++j) {
      float& score = scores(8 * granule + j);
      score = counts[granule] >> ((j >> 1 & 1) * 8 + (j >> 2) * 2 + (j & 1)) & 1 ? score : -INFINITY;
    }
  }
}

}  // namespace hbsattn
