#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/arch/copy_sm90_tma.hpp>

#include "kernels/common/key_tiles.cuh"
#include "kernels/common/launch.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/common/seen_keys.cuh"
#include "kernels/sm90/backward_keys/traits.cuh"
#include "kernels/sm90/tensor_map.h"
#include "plan/layout.h"
#include "plan/mask_heads.h"
#include "plan/rule.h"

// The warps that move data: one takes tiles off the work list and announces them, one loads their keys and values, and
// one the queries that attend to them, with output gradients and statistics.

namespace hbsattn::sm90 {

inline constexpr uint64_t kGradKeepInL2 = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);
inline constexpr uint64_t kGradPassThroughL2 = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST);

// Of the tensor maps that a launch uses, those that are read first.
__device__ __forceinline__ void prefetch_tensor_maps(const BackwardKeysArguments& args) {
  cute::prefetch_tma_descriptor(args.whole_queries ? &args.map_q : &args.map_q_clipped);
  cute::prefetch_tma_descriptor(args.whole_queries ? &args.map_grad_out : &args.map_grad_out_clipped);
  cute::prefetch_tma_descriptor(args.whole_rows ? &args.map_k : &args.map_k_clipped);
  cute::prefetch_tma_descriptor(args.whole_rows ? &args.map_v : &args.map_v_clipped);
}

template <class Traits>
__device__ __forceinline__ int count_blocks(const ColumnBits& bits, int lane) {
  const auto [begin, end] = bits.blocks;
  if (begin >= end) return 0;
  int count = 0;
  for (int chunk = begin / Traits::Blocks::kColumns; chunk <= Traits::Blocks::first_chunk(end); ++chunk) {
    count += __popc(bits.load<typename Traits::Blocks>(chunk, lane));
  }
  return __reduce_add_sync(0xffffffffu, count);
}

// Keys or values of a tile. Lane i knows how many are seen up to the end of united block i; `whole`: all are.
template <class Traits, int kChunks>
__device__ __forceinline__ void load_keys(const BackwardKeysArguments& args, const KeyItem& item, int seen, bool whole,
                                          const CUtensorMap& map, const CUtensorMap& map_clipped, int batch_rows,
                                          int batch_heads, typename Traits::Element* keys, uint64_t* full, int lane) {
  if (lane == 0) mbarrier_arrive_expect(full, Traits::kTileN * kChunks * Traits::kChunkBytes);
  __syncwarp();
  const int head = item.query_set / args.sets_per_key_head + item.sequence * batch_heads;
  const int begin = item.k_begin + item.first_key + item.sequence * batch_rows;
  if (whole) {
    if (lane == 0) cute::SM90_TMA_LOAD_5D::copy(&map, full, kGradPassThroughL2, keys, 0, begin, 0, 0, head);
    return;
  }
  constexpr int kBoxes = Traits::kTileN / 8 * kChunks;  // of 8 rows and one chunk
  for (int first_box = 0; first_box < kBoxes; first_box += 32) {
    const int box = first_box + lane;
    const int row = box / kChunks * 8, column = box % kChunks * Traits::kChunkColumns;
    const int block = item.united > 1 ? min(row / args.mask.k_block_size, item.united - 1) : 0;
    const int end = __shfl_sync(0xffffffffu, seen, block);
    if (box < kBoxes) {
      cute::SM90_TMA_LOAD_5D::copy(&map_clipped, full, kGradPassThroughL2,
                                   reinterpret_cast<uint8_t*>(keys) + box * Traits::kAtomBytes, column,
                                   kRunEnd - max(end - row, 0), int{kRunEnd}, begin + end, head);
    }
  }
}

// What goes into the next stages, one segment of queries a lane.
template <class Traits, bool kStacked, bool kRuled>
__device__ __forceinline__ void load_stage(const BackwardKeysArguments& args, typename Traits::Storage& storage,
                                           const KeyItem& item, const QueryPlan& plan, int stack, int stage_of_plan,
                                           int stage, int lane) {
  const int segments_log2 = Traits::kTileMLog2 - args.segment_log2;
  const int first_lane = stage_of_plan << segments_log2;
  const uint32_t lanes = ((1u << (1 << segments_log2)) - 1) << first_lane;
  const uint32_t whole = __ballot_sync(0xffffffffu, plan.whole), clean = __ballot_sync(0xffffffffu, plan.clean);
  const auto row_in_segment = [&](int row) { return row & ((1 << args.segment_log2) - 1); };

  {
    const int row = lane % Traits::kGranules * kGranule, source = first_lane + (row >> args.segment_log2);
    const int query = __shfl_sync(0xffffffffu, plan.query, source);
    const int chunk = __shfl_sync(0xffffffffu, plan.chunk, source);
    const int with = __shfl_sync(0xffffffffu, plan.with, source);
    StageInfo<Traits::kGranules>& info = storage.infos[stage];
    if (lane < Traits::kGranules) {
      info.queries[lane] = query + row_in_segment(row);
      info.with[lane] = with;
      info.chunks[lane] = query < 0 ? -1 : chunk + row_in_segment(row) / kGranule;
    }
    const bool masked = (clean & lanes) != lanes;
    if (lane == 0) info.masked = masked;
    if (Traits::kAltered && lane == 0) info.stack = stack;
    if (kRuled && masked && lane == 0) {
      info.rule = rule_of_stack<kStacked>(args, stack);
      info.rule.sink -= item.diagonal;
    }
  }
  uint64_t* full = &storage.full[stage];
  if (lane == 0) {
    mbarrier_arrive_expect(full, Traits::kStageBytes + 2 * Traits::kStatisticBytes);
  } else {
    mbarrier_arrive(full);
  }
  __syncwarp();

  uint8_t* queries = reinterpret_cast<uint8_t*>(storage.queries[stage]);
  uint8_t* grad_out = reinterpret_cast<uint8_t*>(storage.grad_out[stage]);
  const int q_begin = item.q_begin + item.sequence * args.q_batch_rows;
  const int grad_out_begin = item.q_begin + item.sequence * args.grad_out_batch_rows;
  const bool mine = lanes >> lane & 1;
  const int row = (lane - first_lane) << args.segment_log2;
  if (mine) {
    // Statistics of rows that do not exist make their weights 0.
    const int64_t chunk = plan.query < 0 ? args.padding_chunk : plan.chunk;
    const int bytes = static_cast<int>(sizeof(float)) << args.segment_log2;
    cute::SM90_BULK_COPY_G2S::copy(args.lse + chunk * kGranule, full, &storage.lse[stage][row], bytes);
    cute::SM90_BULK_COPY_G2S::copy(args.delta + chunk * kGranule, full, &storage.delta[stage][row], bytes);
  }
  if ((whole & lanes) == lanes && args.whole_queries) {
    if (mine) {
      const int offset = row * (Traits::kChunks * Traits::kChunkBytes);
      const int grad_out_offset = row * (Traits::kValueChunks * Traits::kChunkBytes);
      const int query = kStacked ? plan.query >> args.chunks.stack.rows_log2 : plan.query;
      const int q_row = plan.query < 0 ? 1 << 30 : q_begin + query;
      const int grad_out_row = plan.query < 0 ? 1 << 30 : grad_out_begin + query;
      if constexpr (kStacked) {
        const int first_head = stack * args.chunks.stack.heads + args.chunks.head_of_row(plan.query);
        cute::SM90_TMA_LOAD_5D::copy(&args.map_q, full, kGradKeepInL2, queries + offset, 0, first_head, 0, 0, q_row);
        cute::SM90_TMA_LOAD_5D::copy(&args.map_grad_out, full, kGradKeepInL2, grad_out + grad_out_offset, 0, first_head,
                                     0, 0, grad_out_row);
      } else {
        cute::SM90_TMA_LOAD_5D::copy(&args.map_q, full, kGradKeepInL2, queries + offset, 0, q_row, 0, 0, stack);
        cute::SM90_TMA_LOAD_5D::copy(&args.map_grad_out, full, kGradKeepInL2, grad_out + grad_out_offset, 0,
                                     grad_out_row, 0, 0, stack);
      }
    }
  } else {
    constexpr int kBoxes = Traits::kTileM / 8 * Traits::kChunks;  // of 8 rows and one chunk
    for (int first_box = 0; first_box < kBoxes; first_box += 32) {
      const int box = first_box + lane;
      const int box_row = box / Traits::kChunks * 8 % Traits::kTileM;
      const int source = first_lane + (box_row >> args.segment_log2);
      const int first = __shfl_sync(0xffffffffu, plan.query, source), end = __shfl_sync(0xffffffffu, plan.end, source);
      const int from_end = first < 0 ? 0 : max(end - first - row_in_segment(box_row), 0);
      const int chunk = box % Traits::kChunks, column = chunk * Traits::kChunkColumns;
      const bool has_grad_out = chunk < Traits::kValueChunks;
      uint8_t* grad_out_box = grad_out + (box / Traits::kChunks * Traits::kValueChunks + chunk) * Traits::kAtomBytes;
      if constexpr (kStacked) {
        // Heads of one query, as all of these 8 rows are.
        const int stack_row = first + row_in_segment(box_row), query = stack_row >> args.chunks.stack.rows_log2;
        const int first_head = args.chunks.head_of_row(stack_row);
        if (box < kBoxes) {
          cute::SM90_TMA_LOAD_5D::copy(&args.map_q_clipped, full, kGradKeepInL2, queries + box * Traits::kAtomBytes,
                                       column, first_head, stack, 0, from_end == 0 ? 1 << 30 : q_begin + query);
          if (!has_grad_out) continue;
          cute::SM90_TMA_LOAD_5D::copy(&args.map_grad_out_clipped, full, kGradKeepInL2, grad_out_box, column,
                                       first_head, stack, 0, from_end == 0 ? 1 << 30 : grad_out_begin + query);
        }
      } else if (box < kBoxes) {
        cute::SM90_TMA_LOAD_5D::copy(&args.map_q_clipped, full, kGradKeepInL2, queries + box * Traits::kAtomBytes,
                                     column, kRunEnd - from_end, int{kRunEnd}, q_begin + end, stack);
        if (!has_grad_out) continue;
        cute::SM90_TMA_LOAD_5D::copy(&args.map_grad_out_clipped, full, kGradKeepInL2, grad_out_box, column,
                                     kRunEnd - from_end, int{kRunEnd}, grad_out_begin + end, stack);
      }
    }
  }
}

// How segments of queries, which are a power of two rows and never reach into the next block, fill stages.
template <class Traits>
struct Segments {
  const BackwardKeysArguments& args;
  const int per_stage_log2;

  __device__ __forceinline__ explicit Segments(const BackwardKeysArguments& args)
      : args(args), per_stage_log2(Traits::kTileMLog2 - args.segment_log2) {}

  __device__ __forceinline__ int count(const ColumnBits& bits, int lane) const {
    return count_blocks<Traits>(bits, lane) * args.segments_per_block.divisor;
  }
  __device__ __forceinline__ int count_stages(int segments) const {
    return (segments + (1 << per_stage_log2) - 1) >> per_stage_log2;
  }
};

// By causality no query before the place of a tile's first key sees any of its keys. The block that has this query
// comes last in the list of a head that is active with it, and the segments before that of the query last of all.
struct HiddenSegments {
  int row;    // of the block, in the mask; negative: it is not looked for
  int count;  // of the segments

  __device__ __forceinline__ HiddenSegments(const BackwardKeysArguments& args, const KeyItem& item)
      : row(-1), count(0) {
    const int query = item.first_key - item.diagonal, per_block = args.segments_per_block.divisor;
    const bool known = args.mask.causal && query >= 0 && args.chunks.stack.heads == 1 && args.sets.tile_heads <= 32 &&
                       args.mask.q_block_size == per_block << args.segment_log2;
    if (!known) return;
    args.segments_per_block(row, count, query >> args.segment_log2);
    row += item.row_begin;
  }
  __device__ __forceinline__ bool found(const ColumnBits& bits) const {
    return row >= bits.blocks.begin && row < bits.blocks.end && bits.rows.word(row / 32) >> (row % 32) & 1;
  }
};

// Takes tiles off the work list and announces them, with the stages that each has.
template <class Traits>
__device__ __forceinline__ void run_tile_warp(const BackwardKeysArguments& args, typename Traits::Storage& storage,
                                              int lane) {
  const Segments<Traits> segments(args);
  RingPosition<Traits::kTileSlots> slot(1);
  RingPosition<1> wanted(0);
  int work = blockIdx.x;
  while (true) {
    const KeyItem item = read_key_item<Traits::kTileN>(args, work);
    const bool last = item.column < 0;
    int stages = 0;  // over all heads
    const HiddenSegments hidden(args, item);
    uint32_t hiding_heads = 0;
    bool skips = false;
    const int first_head = args.sets.first_head(item.query_set), end_head = first_head + args.sets.tile_heads;
    for (int head = first_head; !last && head < end_head; head += args.chunks.stack.heads) {
      const ColumnBits bits(args, item, head);
      const bool found = hidden.found(bits);
      hiding_heads |= uint32_t{found} << (head & 31);
      stages += segments.count_stages(segments.count(bits, lane) - (found ? hidden.count : 0));
      // The last stage, if it is one segment, begins no later than with the query at the first key's place, so it ends
      // before that at the place of the second warpgroup's.
      skips = found && segments.per_stage_log2 == 0;
    }
    mbarrier_wait(&storage.tile_empty[slot.index], slot.parity);
    if (lane == 0) {
      KeyTileSlot& tile = storage.tiles[slot.index];
      // Read again, as counting leaves no registers for all of it.
      const KeyItem announced = read_key_item<Traits::kTileN>(args, work);
      tile.item = announced;
      const int64_t part = announced.part, parts = announced.parts;
      tile.first_stage = parts > 1 ? static_cast<int>(stages * part / parts) : 0;
      const int end = parts > 1 ? static_cast<int>(stages * (part + 1) / parts) : stages;
      tile.stages = end - tile.first_stage;
      tile.hidden_segments = hidden.count;
      tile.hiding_heads = hiding_heads;
      tile.skips = Traits::kSkips && skips && part == parts - 1 && tile.stages > 1;
      mbarrier_arrive(&storage.tile_full[slot.index]);
    }
    slot.advance();
    if (last) {
      let_next_kernel_start();
      break;
    }
    mbarrier_wait(&storage.tile_wanted, wanted.parity);
    wanted.advance();
    const int ticket = lane == 0 ? atomicAdd(args.ticket, 1) : 0;
    work = uniform(ticket) + static_cast<int>(gridDim.x);
  }
}

// Streams the queries of each tile through the ring of stages. kStacked: the rows of several heads are one (HeadStack).
// kRuled: heads have rules. Code for what a call has not would cost this warp, which sets the pace, registers.
template <class Traits, bool kStacked, bool kRuled>
__device__ __forceinline__ void run_query_warp(const BackwardKeysArguments& args, typename Traits::Storage& storage,
                                               int lane) {
  if constexpr (Traits::kSkips) lane = own_lane();  // others have no register for it
  const Segments<Traits> all_segments(args);
  const int segments_log2 = all_segments.per_stage_log2;
  const int plan_stages = min(32 >> segments_log2, Traits::kMaxPlanStages);
  RingPosition<Traits::kTileSlots> slot(0);
  RingPosition<Traits::kStages> ring(1);
  while (true) {
    mbarrier_wait(&storage.tile_full[slot.index], slot.parity);
    const KeyTileSlot& tile = storage.tiles[slot.index];  // out of registers, of which there are few
    const KeyItem& item = tile.item;
    if (item.column < 0) break;
    // Stages of this part of the tile, counted from the head at hand on.
    int begin = tile.first_stage, end = begin + tile.stages;
    if (end - begin <= Traits::kTileLead && lane == 0) mbarrier_arrive(&storage.tile_wanted);
    // Each head is a stack of its own where they are not stacked.
    const int heads = kStacked ? args.chunks.stack.heads : 1;
    const int first_stack = args.sets.first_head(item.query_set) / heads;
    const int last_stack = first_stack + args.sets.tile_heads / heads - 1;
    for (int stack = first_stack; end > 0; ++stack) {
      const ColumnBits bits(args, item, stack * heads);
      int segments = all_segments.count(bits, lane);
      if (!kStacked && tile.hiding_heads >> (stack & 31) & 1) segments = max(segments - tile.hidden_segments, 0);
      int stages = all_segments.count_stages(segments);
      // As many as were announced: what is missing, as bits were changed since, comes as padding behind the last head.
      if (stack == last_stack) stages = max(stages, end);
      const int end_of_head = min(end, stages);
      if (begin < end_of_head) {
        const int chunk = Traits::Blocks::first_chunk(bits.blocks.end);
        typename Traits::Blocks blocks(bits.rows, bits.blocks.begin, bits.blocks.end, storage.columns,
                                       bits.load<typename Traits::Blocks>(chunk, lane), lane);
        for (int planned = begin; planned < end_of_head; planned += plan_stages) {
          const int first_segment = planned << segments_log2;
          const int end_segment = min(min(planned + plan_stages, end_of_head) << segments_log2, segments);
          blocks.expand(args.segments_per_block.div(end_segment + args.segments_per_block.divisor - 1));
          QueryPlan plan = plan_queries<Traits::kTileN, kStacked, !kStacked, kRuled>(
              args, item, bits, blocks, stack, first_segment + lane, first_segment + lane < end_segment);
          if (has_partial_blocks<Traits>(args) && plan.query >= 0) {
            plan.clean = plan.clean && !has_partial(args, item, stack, plan);
          }
          __syncwarp();
#pragma unroll 1
          for (int stage = 0; stage < min(plan_stages, end_of_head - planned); ++stage) {
            mbarrier_wait(&storage.empty[ring.index], ring.parity);
            load_stage<Traits, kStacked, kRuled>(args, storage, item, plan, stack, stage, ring.index, lane);
            if (planned + stage == end - Traits::kTileLead - 1 && lane == 0) mbarrier_arrive(&storage.tile_wanted);
            ring.advance();
          }
        }
      }
      begin = max(begin - stages, 0);
      end -= stages;
    }
    mbarrier_arrive_warp(&storage.tile_empty[slot.index], lane);
    slot.advance();
  }
}

// Loads the keys and values of every tile that has stages.
template <class Traits>
__device__ __forceinline__ void run_key_warp(const BackwardKeysArguments& args, typename Traits::Storage& storage,
                                             int lane) {
  RingPosition<Traits::kTileSlots> slot(0);
  RingPosition<1> keys(1);
  while (true) {
    mbarrier_wait(&storage.tile_full[slot.index], slot.parity);
    const KeyItem item = storage.tiles[slot.index].item;
    const int stages = storage.tiles[slot.index].stages;
    mbarrier_arrive_warp(&storage.tile_empty[slot.index], lane);
    slot.advance();
    if (item.column < 0) break;
    if (stages == 0) continue;
    int seen = 0;
    bool whole = args.whole_rows && item.keys == Traits::kTileN;
    for (int block = 0; block < item.united; ++block) {
      const int of_block = count_seen_keys(args, item, block, lane);
      if (lane == block) seen = of_block;
      whole = whole && of_block >= (item.united > 1 ? (block + 1) * args.mask.k_block_size : Traits::kTileN);
    }
    // Values are free a stage before keys.
    mbarrier_wait(&storage.values_empty, keys.parity);
    load_keys<Traits, Traits::kValueChunks>(args, item, seen, whole, args.map_v, args.map_v_clipped, args.v_batch_rows,
                                            args.v_batch_heads, storage.values, &storage.values_full, lane);
    mbarrier_wait(&storage.keys_empty, keys.parity);
    load_keys<Traits, Traits::kChunks>(args, item, seen, whole, args.map_k, args.map_k_clipped, args.k_batch_rows,
                                       args.k_batch_heads, storage.keys, &storage.keys_full, lane);
    keys.advance();
  }
}

}  // namespace hbsattn::sm90
