#pragma once

#include <cutlass/fast_math.h>

#include <climits>
#include <cmath>

#include "hbsattn/params.h"
#include "kernels/common/bit_row.cuh"
#include "kernels/common/gaps.cuh"
#include "kernels/common/partial_blocks.cuh"
#include "kernels/common/sinks.cuh"
#include "plan/dropout.h"
#include "plan/layout.h"
#include "plan/rule.h"
#include "plan/score_scale.h"
#include "plan/tiles.h"

// Tiles of query rows that stream keys and values, as the kernels of every family see them: what a launch tells them,
// where rows lie, and what items say.

namespace hbsattn {

// What a stage tells of a granule: its first key, or, where a block ends inside it, the complement of
// 16 * first key + last key - first key. kNoKey: it holds none.
inline constexpr int kNoKey = 0x3fffffff;  // above every limit
static_assert(int64_t{kGranule} * kRaggedKeyLimit <= int64_t{1} << 31, "room for the second form");

__device__ __forceinline__ int encode_granule(int first_key, int end) {
  if (end <= first_key) return kNoKey;
  return end - first_key < kGranule ? ~(kGranule * first_key + end - first_key - 1) : first_key;
}
__device__ __forceinline__ int granule_first_key(int code) { return code < 0 ? ~code / kGranule : code; }
__device__ __forceinline__ int granule_last_key(int code) {
  return code < 0 ? ~code / kGranule + ~code % kGranule : INT_MAX;
}

// What masks need of the rule of a tile's head, as read_rule() has it, and the end of its sequence's keys.
struct alignas(16) TileRule {
  int left, right, sink, key_end;
};

// What a kernel gets of a call, whichever way it loads and stores.
struct QueryTiles {
  MaskShape mask;
  const Sequence* sequences;  // null: rows are not packed, and tiles write all of them
  const uint32_t* bits;
  const HeadRule* rules;  // null: no head has one
  const WorkItem* items;
  int num_items;
  unsigned long long* cycles;  // optional, cycle_rows x 2
  int cycle_rows;

  void* out;
  int64_t out_batch_stride, out_row_stride, out_head_stride;  // elements
  int out_columns;
  float* lse;

  int rows_q, rows_k;         // per batch entry; all, when packed
  int lse_batch_stride_rows;  // 0 when packed
  int heads_q;
  cutlass::FastDivmod heads_per_key_head;
  int row_words;  // of a bit row
  cutlass::FastDivmod q_block_size;
  int packed_heads;                // query heads that share a tile's block list
  int united;                      // query blocks that a tile may unite
  cutlass::FastDivmod block_rows;  // packed_heads * q_block_size
  int k_block_size;
  int segment_log2;  // a segment is the largest power of two rows, up to kTileN, that divides k_block_size
  cutlass::FastDivmod segments_per_block;
  bool ragged_blocks;  // k_block_size is no multiple of a granule: the last segment of a block is short
  const float* sinks;  // (heads_q), natural; null: there are none
  Dropout dropout;     // of kernels that alter weights, as is `cap`
  ScoreCap cap;
  PartialBlocks partial;
  float scale, scale_log2;  // of scores; of gradients of queries, `scale` is theirs
};

// Where a virtual row of a tile lies.
struct RowPlace {
  int head;   // query head
  int row;    // in the sequence
  int count;  // rows of the block and the sequence from here on; 0 or less: none
};

// kSeveral: a tile may have rows of several query blocks.
template <bool kSeveral>
__device__ __forceinline__ RowPlace place_row(const QueryTiles& args, const WorkItem& item, int row_in_tile) {
  int in_block = item.first_row + row_in_tile, block_row = item.block_row;
  bool exists = true;
  if (kSeveral) {
    int block;
    args.block_rows(block, in_block, in_block);
    exists = block < item.united;
    block_row += block * args.q_block_size.divisor;
  }
  int head_in_pack, query;
  args.q_block_size(head_in_pack, query, in_block);
  const int row = block_row + query;
  const int end = min(item.q_len, block_row + args.q_block_size.divisor);
  return {item.head + head_in_pack, row, exists && head_in_pack < args.packed_heads ? end - row : 0};
}

// A natural score; -inf: the head has none.
__device__ __forceinline__ float sink_of_head(const QueryTiles& args, int head) {
  return args.sinks == nullptr ? -INFINITY : read_sink(args.sinks, head);
}

template <class Element>
__device__ __forceinline__ Element* out_of_row(const QueryTiles& args, const WorkItem& item, const RowPlace& place) {
  return static_cast<Element*>(args.out) + item.sequence * args.out_batch_stride +
         (static_cast<int64_t>(item.q_begin) + place.row) * args.out_row_stride + place.head * args.out_head_stride;
}

template <bool kGeneral>
__device__ __forceinline__ BitRows rows_of(const QueryTiles& args, const WorkItem& item) {
  return {args.bits + static_cast<int64_t>(item.bit_row) * args.row_words, kGeneral ? max(item.united, 1) : 1,
          args.row_words};
}

__device__ __forceinline__ float* lse_of_row(const QueryTiles& args, const WorkItem& item, const RowPlace& place) {
  return args.lse + static_cast<int64_t>(item.sequence) * args.lse_batch_stride_rows * args.heads_q +
         static_cast<int64_t>(place.head) * args.rows_q + item.q_begin + place.row;
}

// An item as warps get it: whatever it says, and be it another mask's, nothing that is addressed by it lies
// outside its buffer. Lengths that lie are cut to the tensors, so that no coordinate leaves them; the diagonal stays.
template <bool kSeveral, bool kPairs>
__device__ __forceinline__ void clamp_item(const QueryTiles& args, WorkItem& item) {
  if (item.bit_row < 0) return;
  const auto rows = static_cast<int>(args.mask.rows);  // of a mask head
  const auto clamp = [](int value, int low, int high) { return max(min(value, high), low); };
  item.bit_row = min(item.bit_row, args.mask.heads * rows - 1);
  item.sequence = clamp(item.sequence, 0, args.mask.batch - 1);
  item.head = clamp(item.head, 0, args.heads_q - args.packed_heads);
  item.q_begin = clamp(item.q_begin, 0, args.rows_q);
  item.k_begin = clamp(item.k_begin, 0, args.rows_k);
  item.q_len = clamp(item.q_len, 0, args.rows_q - item.q_begin);
  [[maybe_unused]] const bool cut = item.k_len > args.rows_k - item.k_begin;
  item.k_len = clamp(item.k_len, 0, args.rows_k - item.k_begin);
  item.diagonal = clamp_diagonal(args.mask, item.diagonal, args.rows_q, args.rows_k);
  item.block_row = clamp(item.block_row, 0, args.rows_q);
  item.first_row = clamp(item.first_row, 0, args.block_rows.divisor);
  const auto cols = static_cast<int>(args.mask.cols);
  item.col_end = clamp(item.col_end, 0, cols);
  if constexpr (kPairs) {
    // Both rows are of one mask head.
    if (item.bit_row % rows == rows - 1) --item.bit_row;
    // Key blocks that one or the other is active with are no more than the mask has; `blocks` counts some twice.
    item.alone[0] = clamp(item.alone[0], 0, cols);
    item.alone[1] = clamp(item.alone[1], 0, cols - item.alone[0]);
    const int alone = item.alone[0] + item.alone[1];
    item.blocks = clamp(item.blocks, alone, alone + 2 * (cols - alone));
  } else {
    item.blocks = clamp(item.blocks, 0, cols);
    // Which blocks need masks was planned for the length that the item claims.
    item.masked = cut ? item.blocks : clamp(item.masked, 0, item.blocks);
    item.alone[0] = clamp(item.tail(), 0, item.blocks);
  }
  if (kSeveral) item.united = clamp(min(item.united, rows - item.bit_row % rows), 1, args.united);
}

// Of a clamped item.
__device__ __forceinline__ HeadRule rule_of_head(const QueryTiles& args, const WorkItem& item) {
  return read_rule(args.rules, args.rules == nullptr ? 0 : item.bit_row / static_cast<int>(args.mask.rows));
}

template <bool kSeveral>
__device__ __forceinline__ int key_end_of_tile(const QueryTiles& args, const WorkItem& item, int tile_rows) {
  if (!args.mask.causal && !args.mask.ruled) return item.k_len;
  // The last row of a tile that spans several heads is the block's last row.
  const int last_virtual = item.first_row + tile_rows - 1;
  int last_head, last_in_block;
  args.q_block_size(last_head, last_in_block, last_virtual);
  if (last_head != args.q_block_size.div(item.first_row)) last_in_block = args.q_block_size.divisor - 1;
  if (kSeveral && item.united > 1) last_in_block = item.united * args.q_block_size.divisor - 1;
  const int last_row = min(item.block_row + last_in_block, item.q_len - 1);
  if (args.mask.ruled) return rule_of(args.mask, item, rule_of_head(args, item)).visible_end(last_row, item.k_len);
  return rule_of(args.mask, item).visible_end(last_row, item.k_len);
}

// A warp writes the rows that belong to no tile. kWithLse: their log-sum-exp, too.
template <bool kWithLse>
__device__ __forceinline__ void write_gaps(const QueryTiles& args, int lane, int element_bytes = 2) {
  visit_gaps(
      args.mask.batch, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x), lane,
      [&](int index) { return find_query_gap(args.mask, args.sequences, index, args.rows_q); },
      [&](int row) {
        clear_row(args.out, row, args.out_row_stride, args.out_head_stride, args.heads_q, args.out_columns,
                  element_bytes, lane);
        if constexpr (kWithLse) {
          for (int head = lane; head < args.heads_q; head += 32) {
            args.lse[static_cast<int64_t>(head) * args.rows_q + row] = -INFINITY;
          }
        }
      });
}

// How a tile's active blocks fill its stages: with segments, of which the first ones are padding.
struct TileStages {
  int stages;
  int padding;    // segments
  int masked;     // of the stages, the first ones that need element masks, the first stage always among them
  int clean_end;  // stages from here on need them, too
};

// Of a clamped item. kGeneral: ragged blocks are masked everywhere.
template <bool kGeneral>
__device__ __forceinline__ TileStages count_stages(const QueryTiles& args, const WorkItem& item,
                                                   int stage_segments_log2) {
  const int segments = 1 << stage_segments_log2, per_block = args.segments_per_block.divisor;
  const int item_segments = item.blocks * per_block;
  TileStages tile;
  tile.stages = (item_segments + segments - 1) >> stage_segments_log2;
  tile.padding = tile.stages * segments - item_segments;
  const int masked = (tile.padding + item.masked * per_block + segments - 1) >> stage_segments_log2;
  tile.masked = kGeneral && args.ragged_blocks ? tile.stages : min(tile.stages, max(1, masked));
  // Padding comes first, so the list's end is that of a stage.
  const int tail = (item.tail() * per_block + segments - 1) >> stage_segments_log2;
  tile.clean_end = max(tile.stages - tail, tile.masked);
  return tile;
}

// Keys of a block that follow one another.
struct Segment {
  int key;        // the first; -1: none
  int end;        // keys of the segment end here: at the last visible key or, where blocks are ragged, their own end
  uint32_t with;  // united blocks that are active with it, one bit each
};

// The segment at a position of a tile's list, which has the largest keys first; positions before 0 and from `last` on
// are padding. `blocks` has expanded what is before `last`.
template <bool kGeneral, class Blocks>
__device__ __forceinline__ Segment find_segment(const QueryTiles& args, const WorkItem& item, const BitRows& rows,
                                                const Blocks& blocks, int position, int last, int key_end) {
  Segment segment{-1, key_end, 0};
  // Bits that were changed since they were counted may be fewer: a column that was never made is padding, too.
  if (position < 0 || position >= last) return segment;
  if (!kGeneral && args.segments_per_block.divisor == 1) {
    if (position < blocks.made) segment.key = blocks.column(position) * args.k_block_size;
    return segment;
  }
  // Blocks come in descending order, and so do the segments in them.
  int entry, from_end;
  args.segments_per_block(entry, from_end, position);
  if (entry >= blocks.made) return segment;
  const int in_block = args.segments_per_block.divisor - 1 - from_end;
  const int column = blocks.column(entry), block_key = column * args.k_block_size;
  segment.key = block_key + (in_block << args.segment_log2);
  if (kGeneral) {
    segment.end = min(block_key + args.k_block_size, key_end);
    segment.with = item.united > 1 ? rows.with(column) : 1;
  }
  return segment;
}

// The united blocks that are partial with a segment, one bit each.
__device__ __forceinline__ uint32_t partial_with(const QueryTiles& args, const WorkItem& item, const Segment& segment) {
  if (segment.key < 0) return 0;
  const int column = args.partial.k_block_size.div(segment.key);
  uint32_t partial = 0;
  for (int block = 0; block < item.united; ++block) {
    const bool has = segment.with >> block & 1 && args.partial.has(item.bit_row + block, column);
    partial |= static_cast<uint32_t>(has) << block;
  }
  return partial;
}

// Records the clock of this multiprocessor, where its first CTA begins or its last one ends. Numbers of multiprocessors
// may have gaps.
__device__ __forceinline__ void record_cycles(const QueryTiles& args, bool end) {
  int number;
  asm volatile("mov.u32 %0, %smid;" : "=r"(number));
  if (number >= args.cycle_rows) return;
  unsigned long long* row = args.cycles + 2 * number;
  const auto now = static_cast<unsigned long long>(clock64());
  if (end) {
    atomicMax(row + 1, now);
  } else {
    atomicCAS(row, 0ull, now);
  }
}

}  // namespace hbsattn
