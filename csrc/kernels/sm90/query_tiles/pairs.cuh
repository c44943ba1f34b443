#pragma once

#include "kernels/common/ptx.cuh"
#include "kernels/sm90/query_tiles/traits.cuh"
#include "plan/layout.h"
#include "plan/pairs.h"
#include "plan/rule.h"

// The lists of a tile that has a pair of query blocks, as its tile warp makes them.

namespace hbsattn::sm90 {

// Finds how a pair's stages are filled, and lists their segments. All lanes of the tile warp call everything.
template <class Traits>
class PairLists {
 public:
  // `item` is clamped. Reads the bits that tell of its largest columns.
  __device__ __forceinline__ PairLists(const QueryTileArguments& args, const WorkItem& item, int lane)
      : segments_log2(Traits::kTileNLog2 - args.segment_log2) {
    const PairCounts blocks = blocks_of(item);
    first_words[0] = first_words[1] = 0;
    if (item.bit_row >= 0 && item.blocks > 0) {
      const int chunk = Blocks::first_chunk(item.col_end);
      const PairRows rows = rows_of(args, item, kOfBoth);
      first_words[0] = Blocks::load({rows.first, rows.first, 0, 0}, 0, item.col_end, chunk, lane);
      first_words[1] = Blocks::load({rows.second, rows.second, 0, 0}, 0, item.col_end, chunk, lane);
    }

    // Columns before these need no element masks, which a block's first query decides.
    const auto clean_end = [&](int block) {
      const int first_query = item.block_row + block * args.q_block_size.divisor;
      return mask::whole_blocks(args.mask, rule_of(args.mask, item).clean_end(first_query, item.k_len));
    };
    const int clean_ends[2] = {clean_end(0), clean_end(1)};
#pragma unroll
    for (int owner = 0; owner < 3; ++owner) {
      const int count = owner == kOfBoth ? blocks.both : blocks.alone[owner - 1];
      const int segments = count * args.segments_per_block.divisor;
      const int all = (segments + (1 << segments_log2) - 1) >> segments_log2;
      padding[owner] = (all << segments_log2) - segments;
      if (owner == kOfBoth) {
        stages.order.both = all;
      } else {
        stages.order.alone[owner - 1] = all;
      }
      const int masked = min(count, count_masked(item, owner, clean_ends[owner == kOfSecond ? 1 : 0], lane));
      const int with_padding = padding[owner] + masked * args.segments_per_block.divisor;
      stages.masked[owner] = min(all, max(1, (with_padding + (1 << segments_log2) - 1) >> segments_log2));
    }
  }

  PairStages stages;

  // Hands a slot of segments after another to the key and the value warp: hand_over(key, with) gets this lane's, as
  // Storage::segment_keys and segment_with have them. A slot has stages that both attend to or others, never both
  // kinds.
  template <class HandOver>
  __device__ __forceinline__ void list(const QueryTileArguments& args, typename Traits::Storage& storage,
                                       const WorkItem& item, int lane, HandOver&& hand_over) const {
    const PairOrder& order = stages.order;
    const int stage_of_lane = lane >> segments_log2, in_slot = slot_stages<Traits>(args);
    Blocks both(rows_of(args, item, kOfBoth), 0, item.col_end, storage.columns, first_words[0] & first_words[1], lane);
    for (int listed = 0; listed < order.both; listed += in_slot) {
      const int end = min(listed + in_slot, order.both);
      both.expand(count_blocks(args, kOfBoth, end));
      const int stage = listed + stage_of_lane;
      hand_over(find_key(args, both.made, both.ring, kOfBoth, stage, lane), describe(kOfBoth, stage));
    }
    Blocks first(rows_of(args, item, kOfFirst), 0, item.col_end, storage.columns, first_words[0] & ~first_words[1],
                 lane);
    Blocks second(rows_of(args, item, kOfSecond), 0, item.col_end, storage.columns + Traits::kColumnEntries,
                  first_words[1] & ~first_words[0], lane);
    for (int listed = 0; listed < order.count_alone(); listed += in_slot) {
      const int end = min(listed + in_slot, order.count_alone());
      first.expand(count_blocks(args, kOfFirst, order.count_before(end, 0)));
      second.expand(count_blocks(args, kOfSecond, order.count_before(end, 1)));
      const int place = listed + stage_of_lane;
      const int owner = order.owner_at(place);
      const int stage = order.count_before(place, owner - kOfFirst);
      const int made = owner == kOfFirst ? first.made : second.made;
      const int32_t* ring = owner == kOfFirst ? first.ring : second.ring;
      hand_over(find_key(args, made, ring, owner, stage, lane), describe(owner, stage));
    }
  }

 private:
  using Blocks = typename Traits::Blocks;

  // Key blocks that the pair of a clamped item attends to.
  static __device__ __forceinline__ PairCounts blocks_of(const WorkItem& item) {
    PairCounts blocks;
    blocks.alone[0] = item.alone[0];
    blocks.alone[1] = item.alone[1];
    blocks.both = (item.blocks - item.alone[0] - item.alone[1]) / 2;
    return blocks;
  }

  static __device__ __forceinline__ PairRows rows_of(const QueryTileArguments& args, const WorkItem& item, int owner) {
    const uint32_t* first = args.bits + static_cast<int64_t>(max(item.bit_row, 0)) * args.row_words;
    return {first, first + args.row_words, owner == kOfSecond ? ~0u : 0u, owner == kOfFirst ? ~0u : 0u};
  }

  // An owner's columns from `clean_end` on, or more.
  __device__ __forceinline__ int count_masked(const WorkItem& item, int owner, int clean_end, int lane) const {
    const uint32_t word = owner == kOfBoth    ? first_words[0] & first_words[1]
                          : owner == kOfFirst ? first_words[0] & ~first_words[1]
                                              : first_words[1] & ~first_words[0];
    const int chunk_begin = Blocks::first_chunk(item.col_end) * Blocks::kColumns;
    const int in_chunk = __popc(word & ~mask::bits_before(clean_end - chunk_begin, lane));
    // Bits of further columns are not here yet.
    return __reduce_add_sync(0xffffffffu, in_chunk) + max(chunk_begin - clean_end, 0);
  }

  // Blocks of an owner that its first `count` stages have.
  __device__ __forceinline__ int count_blocks(const QueryTileArguments& args, int owner, int count) const {
    const int segments = max((count << segments_log2) - padding_of(owner), 0);
    return args.segments_per_block.div(segments + args.segments_per_block.divisor - 1);
  }

  // First key of this lane's segment of a stage of an owner; -1: none. Blocks come in descending order, and so do the
  // segments in them; padding comes first. Bits that were changed since they were counted may be fewer.
  __device__ __forceinline__ int find_key(const QueryTileArguments& args, int made, const int32_t* ring, int owner,
                                          int stage, int lane) const {
    const int position = (stage << segments_log2) + (lane & ((1 << segments_log2) - 1)) - padding_of(owner);
    if (position < 0 || stage >= stages.order.stages_of(owner)) return -1;
    int entry, from_end;
    args.segments_per_block(entry, from_end, position);
    if (entry >= made) return -1;
    const int segment = args.segments_per_block.divisor - 1 - from_end;
    return ring[entry & (Traits::kColumnEntries - 1)] * args.k_block_size + (segment << args.segment_log2);
  }

  __device__ __forceinline__ uint32_t describe(int owner, int stage) const {
    return owner | (stage < stages.masked_of(owner) ? kMaskedStage : 0);
  }

  __device__ __forceinline__ int padding_of(int owner) const { return pick(owner, padding[0], padding[1], padding[2]); }

  const int segments_log2;  // of a stage
  uint32_t first_words[2];  // of each row, the largest columns, 32 a lane
  int padding[3];           // segments without keys, by owner: they come first
};

}  // namespace hbsattn::sm90
