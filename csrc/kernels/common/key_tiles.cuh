#pragma once

#include <cutlass/fast_math.h>

#include "hbsattn/params.h"
#include "kernels/common/bit_row.cuh"
#include "kernels/common/gaps.cuh"
#include "kernels/common/partial_blocks.cuh"
#include "plan/dropout.h"
#include "plan/layout.h"
#include "plan/mask_heads.h"
#include "plan/rows.h"
#include "plan/rule.h"
#include "plan/score_scale.h"
#include "plan/tiles.h"

// Tiles of keys that stream queries and output gradients, as the kernels of every family see them: what a launch tells
// them, what items say, and which queries attend to a tile.

namespace hbsattn {

// What a kernel gets of a call, whichever way it loads and stores.
struct KeyTiles {
  MaskShape mask;
  const Sequence* sequences;  // null: rows are not packed, and tiles write all of them
  const uint32_t* columns;
  const HeadRule* rules;  // null: no head has one
  const KeyItem* items;
  int num_items;
  int slots;      // of the workspace, for parts of tiles
  int row_words;  // of a column

  void *grad_k, *grad_v;                                               // null: not needed
  int64_t grad_k_batch_stride, grad_k_row_stride, grad_k_head_stride;  // elements
  int64_t grad_v_batch_stride, grad_v_row_stride, grad_v_head_stride;
  int grad_k_columns, grad_v_columns;

  float* lse;    // (stacks, chunks, 16), and rows for padding
  float* delta;  // the same
  QueryChunks chunks;
  int padding_chunk;  // in lse and delta

  int rows_q, rows_k;  // per batch entry; all, when packed
  int heads_q, heads_k;
  int united;      // key blocks that a tile may unite
  QuerySets sets;  // a tile streams the queries of one
  int sets_per_key_head;
  int heads_of_mask;  // query heads that share a mask
  int segment_log2;   // a segment is the largest power of two rows, up to a stage's, that divides a block's, over a
                      // stack
  cutlass::FastDivmod segments_per_block;
  float scale, scale_log2;  // of gradients of keys, and of scores
  // Of kernels that alter weights.
  Dropout dropout;
  ScoreCap cap;
  float inverse_scale_log2;  // 1 / scale_log2
  PartialBlocks partial;
};

// An item as warps get it: whatever it says, and be it another mask's, nothing that is addressed by it lies outside its
// buffer. Lengths that lie are cut to the tensors, so that no coordinate leaves them; the diagonal stays.
template <int kTileN>
__device__ __forceinline__ void clamp_key_item(const KeyTiles& args, KeyItem& item) {
  const auto clamp = [](int value, int low, int high) { return max(min(value, high), low); };
  const auto cols = static_cast<int>(args.mask.cols);
  item.column = min(item.column, cols - 1);
  item.sequence = clamp(item.sequence, 0, args.mask.batch - 1);
  item.query_set = clamp(item.query_set, 0, args.heads_k * args.sets_per_key_head - 1);
  item.united = clamp(item.united, 1, min(args.united, cols - item.column));
  item.row_begin = clamp(item.row_begin, 0, static_cast<int>(args.mask.rows));
  item.q_begin = clamp(item.q_begin, 0, args.rows_q);
  item.k_begin = clamp(item.k_begin, 0, args.rows_k);
  item.q_len = clamp(item.q_len, 0, args.rows_q - item.q_begin);
  item.diagonal = clamp_diagonal(args.mask, item.diagonal, args.rows_q, args.rows_k);
  item.first_key = clamp(item.first_key, 0, args.rows_k - item.k_begin);
  item.keys = clamp(item.keys, 0, min(args.rows_k - item.k_begin - item.first_key, kTileN));
  item.parts = clamp(item.parts, 1, max(args.slots, 1));
  item.part = clamp(item.part, 0, item.parts - 1);
  item.slot = clamp(item.slot, 0, max(args.slots - item.parts, 0));
}

// The item at a place of the work list; column < 0: there is none.
template <int kTileN>
__device__ __forceinline__ KeyItem read_key_item(const KeyTiles& args, int work) {
  KeyItem item{};
  item.column = -1;
  if (work >= args.num_items) return item;
  item = args.items[work];
  if (item.column >= 0) clamp_key_item<kTileN>(args, item);
  return item;
}

// The bits of the query blocks that attend to a tile from one query head.
struct ColumnBits {
  BitRows rows;
  mask::RowRange blocks;  // the sequence's query blocks that the item's set has

  __device__ __forceinline__ ColumnBits(const KeyTiles& args, const KeyItem& item, int head)
      : rows{args.columns +
                 (static_cast<int64_t>(mask_of_head(head, args.heads_of_mask)) * args.mask.cols + item.column) *
                     args.row_words,
             item.united, args.row_words},
        blocks(mask::find_rows(args.mask, item.row_begin, item.q_len)) {
    if (args.sets.windows > 1) blocks = mask::cut_rows(blocks, args.sets, item.query_set);
  }

  template <class Blocks>
  __device__ __forceinline__ uint32_t load(int chunk, int lane) const {
    return Blocks::load(rows, blocks.begin, blocks.end, chunk, lane);
  }
};

// A segment of queries that a tile streams.
struct QueryPlan {
  int query;   // first, in the sequence; of stacked heads, row of the stack; -1: none
  int end;     // those of the segment end here
  int chunk;   // of the workspace, where the segment's rows begin
  int with;    // united key blocks that are active with it, one bit each
  bool whole;  // it ends with its last row
  bool clean;  // every key of the tile sees every query of it
};

// Of the heads of a stack, which share a mask.
template <bool kStacked>
__device__ __forceinline__ HeadRule rule_of_stack(const KeyTiles& args, int stack) {
  const int head = kStacked ? stack * args.chunks.stack.heads : stack;
  return read_rule(args.rules, mask_of_head(head, args.heads_of_mask));
}

// The segment at a position of the list of a stack's blocks, `blocks`, which are expanded up to it. kStacked: stacks
// may have several heads; kSingle: or one; kRuled: heads may have rules.
template <int kTileN, bool kStacked, bool kSingle, bool kRuled, class Blocks>
__device__ __forceinline__ QueryPlan plan_queries(const KeyTiles& args, const KeyItem& item, const ColumnBits& bits,
                                                  const Blocks& blocks, int stack, int position, bool exists) {
  constexpr QueryPlan kNone{-1, 0, -1, 0, true, false};
  int entry, from_end;
  args.segments_per_block(entry, from_end, position);
  if (!exists || entry >= blocks.made) return kNone;
  const int segment = args.segments_per_block.divisor - 1 - from_end;
  const int row = blocks.column(entry), block = row - item.row_begin;
  const int in_block = segment << args.segment_log2, rows = 1 << args.segment_log2;
  QueryPlan plan;
  const int stack_log2 = kStacked ? args.chunks.stack.rows_log2 : 0;
  plan.query = (block * args.mask.q_block_size << stack_log2) + in_block;
  plan.end = min((block + 1) * args.mask.q_block_size, item.q_len) << stack_log2;
  if (plan.query >= plan.end) return kNone;
  plan.chunk = stack * static_cast<int>(args.chunks.count);
  if (kSingle && args.chunks.per_block > 0) {
    plan.chunk += row * args.chunks.per_block + in_block / kGranule;
  } else {
    plan.chunk += args.chunks.first(item.sequence, item.q_begin) + plan.query / kGranule;
  }
  plan.with = item.united > 1 ? bits.rows.with(row) : 1;
  plan.whole = plan.query + rows <= plan.end;
  const int last_key = item.first_key + item.keys - 1;
  plan.clean = item.keys == kTileN && plan.with == (1 << item.united) - 1;
  const int first_query = plan.query >> stack_log2;
  if constexpr (!kRuled) {
    plan.clean = plan.clean && rule_of(args.mask, item).is_clean(first_query, last_key);
  } else {
    const int last_query = (min(plan.query + rows, plan.end) - 1) >> stack_log2;
    plan.clean = plan.clean && rule_of(args.mask, item, rule_of_stack<kStacked>(args, stack))
                                   .is_clean(first_query, last_query, item.first_key, last_key);
  }
  return plan;
}

// Whether the block of a segment is partial with any of the tile's.
__device__ __forceinline__ bool has_partial(const KeyTiles& args, const KeyItem& item, int stack,
                                            const QueryPlan& plan) {
  const int mask_head = mask_of_head(stack * args.chunks.stack.heads, args.heads_of_mask);
  const int block = args.partial.q_block_size.div(plan.query >> args.chunks.stack.rows_log2);
  const int row = min(item.row_begin + block, static_cast<int>(args.mask.rows) - 1);
  for (int column = item.column; column < item.column + item.united; ++column) {
    if (args.partial.has(mask_head * args.mask.rows + row, column)) return true;
  }
  return false;
}

// A warp writes the keys that belong to no tile.
__device__ __forceinline__ void write_key_gaps(const KeyTiles& args, int lane, int element_bytes = 2) {
  if (args.sequences == nullptr) return;
  visit_gaps(
      args.mask.batch, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x), lane,
      [&](int index) { return find_key_gap(args.mask, args.sequences, index, args.rows_k); },
      [&](int row) {
        const auto clear = [&](void* grad, int64_t row_stride, int64_t head_stride, int columns) {
          if (grad == nullptr) return;  // not needed
          clear_row(grad, row, row_stride, head_stride, args.heads_k, columns, element_bytes, lane);
        };
        clear(args.grad_k, args.grad_k_row_stride, args.grad_k_head_stride, args.grad_k_columns);
        clear(args.grad_v, args.grad_v_row_stride, args.grad_v_head_stride, args.grad_v_columns);
      });
}

}  // namespace hbsattn
