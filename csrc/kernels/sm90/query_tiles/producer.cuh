#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/arch/copy_sm90_tma.hpp>

#include "kernels/common/launch.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/sm90/altered.cuh"
#include "kernels/sm90/query_tiles/pairs.cuh"
#include "kernels/sm90/query_tiles/traits.cuh"
#include "kernels/sm90/tensor_map.h"

// The warps that move data. One announces tiles, one loads keys, one values, one queries; it also stores outputs.

namespace hbsattn::sm90 {

// Keys and values are read by every query tile that needs them; queries once.
inline constexpr uint64_t kKeepInL2 = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);
inline constexpr uint64_t kPassThroughL2 = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST);

// The tile that a slot announces. Every warp that has read it releases the slot: one of kTileReaders arrivals.
template <class Storage, class Position>
__device__ __forceinline__ const TileSlot& wait_tile(Storage& storage, const Position& position) {
  mbarrier_wait(&storage.tile_full[position.index], position.parity);
  return storage.tiles[position.index];
}

template <class Storage, class Position>
__device__ __forceinline__ void release_tile(Storage& storage, Position& position, int lane) {
  mbarrier_arrive_warp(&storage.tile_empty[position.index], lane);
  position.advance();
}

template <class Traits, bool kGeneral, class Arguments>
__device__ __forceinline__ void load_queries(const Arguments& args, typename Traits::Storage& storage,
                                             const WorkItem& item, int buffer, int lane) {
  for (int unit = 0; unit < Traits::kUnits; ++unit) {
    uint64_t* full = &storage.queries_full[buffer][unit];
    if (lane == 0) mbarrier_arrive_expect(full, args.query_bytes);
    __syncwarp();
    // A box holds rows of one head, or, where blocks are small, the block's rows of all heads that share it.
    const int first = lane / Traits::kChunks * args.query_piece, chunk = lane % Traits::kChunks;
    if (first < kUnitRows) {
      const RowPlace place = place_row<kSeveralBlocks<Traits, kGeneral>>(args, item, unit * kUnitRows + first);
      const int tensor_row = item.q_begin + item.sequence * args.q_batch_rows + place.row;
      const bool cut = args.box_heads == 1 && place.count > 0 && place.count < args.box_rows;
      const auto load = [&](const CUtensorMap& map, const CUtensorMap& clipped, int row, int head,
                            typename Traits::Element* to) {
        uint8_t* destination = reinterpret_cast<uint8_t*>(to) + (chunk * kUnitRows + first) * Traits::kChunkBytes;
        const int column = chunk * Traits::kChunkColumns;
        if (!cut) {
          cute::SM90_TMA_LOAD_3D::copy(&map, full, kPassThroughL2, destination, column,
                                       place.count > 0 ? row : int{kOutOfBounds}, head);
          return;
        }
        // Rows behind the end of the block or the sequence arrive as zeros. As what follows in the tensor they would
        // have a say in when the others are rescaled, so that results depended on it.
        for (int begin = 0; begin < args.box_rows; begin += 8) {
          cute::SM90_TMA_LOAD_5D::copy(&clipped, full, kPassThroughL2, destination + begin * Traits::kChunkBytes,
                                       column, kRunEnd - max(place.count - begin, 0), int{kRunEnd}, row + place.count,
                                       head);
        }
      };
      load(args.map_q, args.map_q_clipped, tensor_row, place.head + item.sequence * args.q_batch_heads,
           storage.queries[buffer][unit]);
      if constexpr (Traits::kForGradients) {
        if (chunk >= Traits::kValueChunks) continue;
        load(args.map_grad_out, args.map_grad_out_clipped,
             item.q_begin + item.sequence * args.grad_out_batch_rows + place.row,
             place.head + item.sequence * args.grad_out_batch_heads, storage.grad_out[buffer][unit]);
      }
    }
  }
}

// Of the tensor maps that a launch uses, those that are read first.
__device__ __forceinline__ void prefetch_tensor_maps(const QueryTileArguments& args) {
  cute::prefetch_tma_descriptor(&args.map_q);
  cute::prefetch_tma_descriptor(args.whole_rows ? &args.map_k : &args.map_k_clipped);
  cute::prefetch_tma_descriptor(args.whole_rows ? &args.map_v : &args.map_v_clipped);
}

// Lists the segments of a tile's active blocks, largest key first, as its key and value stages need them.
template <class Traits, bool kGeneral>
__device__ __forceinline__ void list_segments(const QueryTileArguments& args, typename Traits::Storage& storage,
                                              RingPosition<Traits::kSegmentSlots>& slot, const WorkItem& item,
                                              uint32_t first_word, int stages, int padding, int key_end, int lane) {
  const int segments_log2 = Traits::kTileNLog2 - args.segment_log2;
  const BitRows rows = rows_of<kGeneral>(args, item);
  typename Traits::Blocks blocks(rows, 0, item.col_end, storage.columns, first_word, lane);
  for (int listed = 0; listed < stages; listed += slot_stages<Traits>(args)) {
    const int first = (listed << segments_log2) - padding;
    const int last = (min(listed + slot_stages<Traits>(args), stages) << segments_log2) - padding;
    blocks.expand(args.segments_per_block.div(last + args.segments_per_block.divisor - 1));
    const Segment segment = find_segment<kGeneral>(args, item, rows, blocks, first + lane, last, key_end);
    mbarrier_wait(&storage.segments_empty[slot.index], slot.parity);
    storage.segment_keys[slot.index][lane] = segment.key;
    if (kGeneral) {
      storage.segment_ends[slot.index][lane] = segment.end;
      uint32_t with = segment.with;
      if (has_partial_blocks<Traits>(args)) with |= partial_with(args, item, segment) << kPartialShift;
      storage.segment_with[slot.index][lane] = with;
    }
    mbarrier_arrive(&storage.segments_full[slot.index]);
    slot.advance();
  }
}

// Announces a tile and lists its segments.
template <class Traits, bool kGeneral>
__device__ __forceinline__ void announce_tile(const QueryTileArguments& args, typename Traits::Storage& storage,
                                              RingPosition<Traits::kTileSlots>& slot,
                                              RingPosition<Traits::kSegmentSlots>& segment_slot, const WorkItem& item,
                                              int lane) {
  const int stage_segments_log2 = Traits::kTileNLog2 - args.segment_log2;
  const bool last = item.bit_row < 0;
  uint32_t first_word = 0;
  if (!last && item.blocks > 0) {
    first_word = Traits::Blocks::load(rows_of<kGeneral>(args, item), 0, item.col_end,
                                      Traits::Blocks::first_chunk(item.col_end), lane);
  }

  const TileStages counted = count_stages<kGeneral>(args, item, stage_segments_log2);
  const int key_end = last ? 0 : key_end_of_tile<kGeneral>(args, item, Traits::kTileM);
  mbarrier_wait(&storage.tile_empty[slot.index], slot.parity);
  if (lane == 0) {
    TileSlot& announced = storage.tiles[slot.index];
    announced.item = item;
    announced.stages = counted.stages;
    announced.masked_stages = counted.masked;
    announced.clean_end = counted.clean_end;
    if (args.mask.ruled && !last) {
      const HeadRule rule = rule_of_head(args, item);
      announced.rule = {rule.left, rule.right, rule.sink, item.k_len};
    }
    announced.key_end = key_end;
    mbarrier_arrive(&storage.tile_full[slot.index]);
  }
  slot.advance();
  if (last) return;
  list_segments<Traits, kGeneral>(args, storage, segment_slot, item, first_word, counted.stages, counted.padding,
                                  key_end, lane);
}

// The same for a tile of a pair.
template <class Traits>
__device__ __forceinline__ void announce_pair(const QueryTileArguments& args, typename Traits::Storage& storage,
                                              RingPosition<Traits::kTileSlots>& slot,
                                              RingPosition<Traits::kSegmentSlots>& segment_slot, const WorkItem& item,
                                              int lane) {
  const PairLists<Traits> lists(args, item, lane);
  const int key_end = key_end_of_tile<true>(args, item, Traits::kTileM);
  WorkItem first = item;
  first.united = 1;
  const int first_end = key_end_of_tile<true>(args, first, kUnitRows);
  mbarrier_wait(&storage.tile_empty[slot.index], slot.parity);
  if (lane == 0) {
    TileSlot& announced = storage.tiles[slot.index];
    announced.item = item;
    announced.stages = lists.stages.order.stages();
    announced.key_end = key_end;
    announced.pair = lists.stages;
    announced.pair.first_end = first_end;
    mbarrier_arrive(&storage.tile_full[slot.index]);
  }
  slot.advance();
  if (item.bit_row < 0) return;
  lists.list(args, storage, item, lane, [&](int key, uint32_t with) {
    mbarrier_wait(&storage.segments_empty[segment_slot.index], segment_slot.parity);
    storage.segment_keys[segment_slot.index][lane] = key;
    storage.segment_with[segment_slot.index][lane] = with;
    mbarrier_arrive(&storage.segments_full[segment_slot.index]);
    segment_slot.advance();
  });
}

// Takes tiles off the work list, announces them, and lists their segments.
template <class Traits, bool kGeneral>
__device__ __forceinline__ void run_tile_warp(const QueryTileArguments& args, typename Traits::Storage& storage,
                                              int lane) {
  RingPosition<Traits::kTileSlots> slot(1);
  RingPosition<Traits::kSegmentSlots> segment_slot(1);
  RingPosition<1> wanted(0);
  int work = blockIdx.x;
  while (true) {
    WorkItem item{};
    item.bit_row = -1;
    if (work < args.num_items) item = args.items[work * args.item_step];
    // A list that has pairs also has other tiles: either kernel ends where the records of the other begin.
    if (Traits::kPairs ? item.united < 2 : args.item_step < 0 && item.united > 1) item.bit_row = -1;
    clamp_item<kSeveralBlocks<Traits, kGeneral>, Traits::kPairs>(args, item);
    if constexpr (Traits::kPairs) {
      announce_pair<Traits>(args, storage, slot, segment_slot, item, lane);
    } else {
      announce_tile<Traits, kGeneral>(args, storage, slot, segment_slot, item, lane);
    }
    if (item.bit_row < 0) {
      let_next_kernel_start();
      break;
    }
    mbarrier_wait(&storage.tile_wanted, wanted.parity);
    wanted.advance();
    work = args.num_items;
    if (work > static_cast<int>(gridDim.x)) {
      const int ticket = lane == 0 ? atomicAdd(args.ticket, 1) : 0;
      work = uniform(ticket) + static_cast<int>(gridDim.x);
    }
  }
  // The consumers still compute the last tile.
  if (args.sequences != nullptr) write_gaps<!Traits::kForGradients>(args, lane);
}

// What goes into the next stages, one segment a lane, so that a stage costs few instructions: those of these warps take
// issue slots from the consumers.
template <class Traits, bool kGeneral>
struct StagePlan {
  int segment_log2, segments_log2;  // keys of a segment, segments of a stage
  int key;                          // first key of this lane's segment; -1: none
  int end;  // keys of the segment end here: at the last visible key or, where blocks are ragged, their own end
  // United blocks that are active with it, one bit each, and those that are partial, from kPartialShift on; of pairs,
  // the owner of its stage, and kMaskedStage.
  uint32_t with;
  uint32_t clipped;      // lanes whose segment ends before its rows do, at the latest at key `whole_end`
  uint32_t partial = 0;  // lanes whose segment is of partial blocks

  __device__ __forceinline__ StagePlan(const QueryTileArguments& args, const typename Traits::Storage& storage,
                                       const TileSlot& tile, int whole_end, int slot, int lane)
      : segment_log2(args.segment_log2),
        segments_log2(Traits::kTileNLog2 - args.segment_log2),
        key(storage.segment_keys[slot][lane]),
        end(kGeneral ? storage.segment_ends[slot][lane] : tile.key_end),
        with(kSeveralBlocks<Traits, kGeneral> ? storage.segment_with[slot][lane] : 1) {
    if constexpr (Traits::kPairs) {
      if ((with & ~kMaskedStage) == kOfFirst) end = tile.pair.first_end;
    }
    const bool clips = key >= 0 && key + (1 << segment_log2) > min(end, whole_end);
    clipped = args.whole_rows ? __ballot_sync(0xffffffffu, clips) : 0xffffffffu;
    if (has_partial_blocks<Traits>(args)) partial = __ballot_sync(0xffffffffu, with >> kPartialShift != 0);
  }

  // Key in row `row` of stage `stage` of the plan, and the end of its segment; a negative key: none.
  __device__ __forceinline__ int key_of_row(int stage, int row) const {
    const int first = __shfl_sync(0xffffffffu, key, (stage << segments_log2) + (row >> segment_log2));
    return first < 0 ? -1 : first + (row & ((1 << segment_log2) - 1));
  }
  __device__ __forceinline__ int end_of_row(int stage, int row) const {
    return kSeveralBlocks<Traits, kGeneral>
               ? __shfl_sync(0xffffffffu, end, (stage << segments_log2) + (row >> segment_log2))
               : end;
  }
  __device__ __forceinline__ uint32_t with_row(int stage, int row) const {
    return kSeveralBlocks<Traits, kGeneral>
               ? __shfl_sync(0xffffffffu, with, (stage << segments_log2) + (row >> segment_log2))
               : 1;
  }
  __device__ __forceinline__ bool clips(int stage) const { return has(clipped, stage); }
  __device__ __forceinline__ bool has_partial(int stage) const { return has(partial, stage); }

 private:
  // Whether a stage has any of some lanes' segments.
  __device__ __forceinline__ bool has(uint32_t lanes, int stage) const {
    return lanes >> (stage << segments_log2) & ((1u << (1 << segments_log2)) - 1);
  }
};

// Tells the consumers where the granules of a stage lie: encode_granule of each, or just its first key. Who writes
// arrives at keys_full, so that the consumers may read: here lane 0 alone, in the general kernel all lanes.
template <class Traits, bool kGeneral>
__device__ __forceinline__ void write_granules(const QueryTileArguments& args, const StagePlan<Traits, kGeneral>& plan,
                                               int stage, int32_t* granules, int lane) {
  const int row = lane % Traits::kGranules * kGranule;
  const int key = plan.key_of_row(stage, row), end = plan.end_of_row(stage, row);
  if constexpr (kGeneral) {
    // Each united block has granules of its own.
    const uint32_t with = plan.with_row(stage, row) >> (lane / Traits::kGranules) & 1;
    granules[lane] = key < 0 || !with ? int{kNoKey} : args.ragged_blocks ? encode_granule(key, end) : key;
  } else {
    const int granule = key < 0 ? int{kNoKey} : key;
#pragma unroll
    for (int i = 0; i < Traits::kGranules; i += 4) {
      int4 four;
      four.x = __shfl_sync(0xffffffffu, granule, i);
      four.y = __shfl_sync(0xffffffffu, granule, i + 1);
      four.z = __shfl_sync(0xffffffffu, granule, i + 2);
      four.w = __shfl_sync(0xffffffffu, granule, i + 3);
      if (lane == 0) *reinterpret_cast<int4*>(granules + i) = four;
    }
  }
}

// Tells them which of the granules, of each united block, are of blocks that are partial.
template <class Traits, bool kGeneral>
__device__ __forceinline__ void write_partial(const StagePlan<Traits, kGeneral>& plan, int stage, uint32_t& partial,
                                              int lane) {
  const uint32_t with = plan.with_row(stage, lane % Traits::kGranules * kGranule);
  const uint32_t lanes = __ballot_sync(0xffffffffu, with >> (kPartialShift + lane / Traits::kGranules) & 1);
  if (lane == 0) partial = lanes;
}

// Clears the columns of a stage past its tensor's: products would let a NaN or infinity there pass.
template <class Traits, int kChunks>
__device__ __forceinline__ void clear_tail(uint8_t* stage, RowTail tail, int lane) {
  constexpr int kVectors = Traits::kChunkBytes / 16;
#pragma unroll 1
  for (int vector = tail.first; vector < tail.first + tail.count; ++vector) {
    // The swizzle exchanges the vectors of a row by the row's place in the pattern of 1 KB.
    const int swizzled = (vector ^ (lane % 8 * static_cast<int>(Traits::kChunkBytes) / 128)) % kVectors;
    uint8_t* first = stage + (lane / 8 * kChunks + vector / kVectors) * Traits::kAtomBytes +
                     lane % 8 * Traits::kChunkBytes + swizzled * 16;
#pragma unroll
    for (int row = 0; row < Traits::kTileN; row += 32) {
      *reinterpret_cast<uint4*>(first + row / 8 * kChunks * Traits::kAtomBytes) = make_uint4(0, 0, 0, 0);
    }
  }
  cutlass::arch::fence_view_async_shared();
  __syncwarp();
}

// Streams the keys or the values of every tile through their ring of stages.
template <class Traits, bool kKeys, bool kGeneral>
__device__ __forceinline__ void run_stream_warp(const QueryTileArguments& args, typename Traits::Storage& storage,
                                                int lane) {
  constexpr int kChunks = kKeys ? Traits::kChunks : Traits::kValueChunks;
  constexpr uint32_t kStageBytes = kKeys ? Traits::kKeyBytes : Traits::kValueBytes;
  const int segments_log2 = Traits::kTileNLog2 - args.segment_log2;
  const CUtensorMap* whole = kKeys ? &args.map_k : &args.map_v;
  const CUtensorMap* clipped = kKeys ? &args.map_k_clipped : &args.map_v_clipped;
  const int batch_rows = kKeys ? args.k_batch_rows : args.v_batch_rows;
  const int batch_heads = kKeys ? args.k_batch_heads : args.v_batch_heads;
  uint8_t* stages = kKeys ? reinterpret_cast<uint8_t*>(storage.keys) : reinterpret_cast<uint8_t*>(storage.values);
  uint64_t* full = kKeys ? storage.keys_full : storage.values_full;
  uint64_t* empty = kKeys ? storage.keys_empty : storage.values_empty;
  // Columns past the tensor's are multiplied with zeros, except that those of values become columns of an output, which
  // nobody stores.
  constexpr bool kClears = kKeys || Traits::kForGradients;
  const RowTail tail = kKeys ? args.k_tail : args.v_tail;
  const bool clears = kClears && tail.count > 0;
  uint64_t* landed = !clears ? full : kKeys ? storage.keys_landed : storage.values_landed;
  constexpr int kStages = kKeys ? Traits::kKeyStages : Traits::kValueStages;
  // A short stage is consumed sooner than the next one comes: that one is under way before this one is cleared. Of two
  // stages, consumers would wait for what is done only when the next one may come.
  constexpr bool kClearsLate = kStages > 2;
  // Where in a plan this lane's segment lies.
  const int stage_of_lane = lane >> segments_log2, segment_of_lane = lane & ((1 << segments_log2) - 1);
  const int offset_of_lane = (segment_of_lane << args.segment_log2) * (kChunks * Traits::kChunkBytes);

  RingPosition<Traits::kTileSlots> slot(0);
  RingPosition<Traits::kSegmentSlots> segment_slot(0);
  RingPosition<kStages> ring(1), to_clear(0);
  uint64_t* full_when_cleared = nullptr;
  const auto clear_stage = [&] {
    mbarrier_wait(&landed[to_clear.index], to_clear.parity);
    clear_tail<Traits, kChunks>(stages + to_clear.index * kStageBytes, tail, lane);
    if (lane == 0) mbarrier_arrive(Traits::kPairs ? full_when_cleared : &full[to_clear.index]);
    to_clear.advance();
  };
  while (true) {
    const TileSlot tile = wait_tile(storage, slot);
    release_tile(storage, slot, lane);
    if (tile.item.bit_row < 0) break;
    if (kKeys && tile.stages <= Traits::kTileLead && lane == 0) mbarrier_arrive(&storage.tile_wanted);

    const int key_head = args.heads_per_key_head.div(tile.item.head) + tile.item.sequence * batch_heads;
    const int run_begin = tile.item.k_begin + tile.item.sequence * batch_rows;
    int count;  // stages of the slot
    for (int planned = 0; planned < tile.stages; planned += Traits::kPairs ? count : slot_stages<Traits>(args)) {
      mbarrier_wait(&storage.segments_full[segment_slot.index], segment_slot.parity);
      const int whole_end = (kKeys ? args.whole_k_rows : args.whole_v_rows) - run_begin;
      const StagePlan<Traits, kGeneral> plan(args, storage, tile, whole_end, segment_slot.index, lane);
      // Every lane has read, so every lane arrives.
      mbarrier_arrive(&storage.segments_empty[segment_slot.index]);
      segment_slot.advance();
      const int first_row = plan.key < 0 ? int{kOutOfBounds} : run_begin + plan.key;

      count = min(slot_stages<Traits>(args), tile.stages - planned);
      if constexpr (Traits::kPairs) {
        // A slot does not go on from what both attend to into the rest.
        if (planned < tile.pair.order.both) count = min(count, tile.pair.order.both - planned);
      }
#pragma unroll 1
      for (int stage = 0; stage < count; ++stage) {
        mbarrier_wait(&empty[ring.index], ring.parity);
        uint8_t* destination = stages + ring.index * kStageBytes;
        bool masked = planned + stage < tile.masked_stages;
        if constexpr (!Traits::kPairs) masked = masked || planned + stage >= tile.clean_end;
        uint64_t* arrived = &landed[ring.index];
        [[maybe_unused]] uint64_t* filled = nullptr;
        if constexpr (Traits::kPairs) {
          const uint32_t described = plan.with_row(stage, 0), owner = described & ~kMaskedStage;
          masked = described & kMaskedStage;
          filled = &full[owner * kStages + ring.index];
          if (!clears) arrived = filled;
          // The block that does not attend to it never reads it.
          if (lane == 0 && owner != kOfBoth) mbarrier_arrive(&empty[ring.index], Traits::kConsumerWarps / 2);
        }
        const bool drops = drops_weights<CappingTraits<Traits>>(args);  // by where keys lie
        if (kKeys && (Traits::kAddsKeys || masked || drops || plan.has_partial(stage))) {
          write_granules(args, plan, stage, storage.granules[ring.index], lane);
        }
        if (kKeys && has_partial_blocks<Traits>(args)) {
          write_partial(plan, stage, storage.partial[ring.index], lane);
        }
        if (lane == 0) {
          mbarrier_arrive_expect(arrived, kStageBytes);
        } else if (kKeys && kGeneral) {
          mbarrier_arrive(&full[ring.index]);
        }
        if (!plan.clips(stage)) {
          if (stage_of_lane == stage) {
            cute::SM90_TMA_LOAD_5D::copy(whole, arrived, kKeepInL2, destination + offset_of_lane, 0, first_row, 0, 0,
                                         key_head);
          }
        } else {
          constexpr int kBoxes = Traits::kTileN / 8 * kChunks;  // of 8 rows and one chunk
          for (int first_box = 0; first_box < kBoxes; first_box += 32) {
            const int box = first_box + lane;
            const int row = box / kChunks * 8 % Traits::kTileN;
            const int key = plan.key_of_row(stage, row), end = plan.end_of_row(stage, row);
            const int from_end = key < 0 || key > end ? 0 : end - key;
            if (box < kBoxes) {
              cute::SM90_TMA_LOAD_5D::copy(clipped, arrived, kKeepInL2, destination + box * Traits::kAtomBytes,
                                           box % kChunks * Traits::kChunkColumns, kRunEnd - from_end, int{kRunEnd},
                                           run_begin + end, key_head);
            }
          }
        }
        if (kKeys && planned + stage == tile.stages - Traits::kTileLead - 1 && lane == 0) {
          mbarrier_arrive(&storage.tile_wanted);
        }
        if (!kClearsLate) full_when_cleared = filled;
        if (clears && (!kClearsLate || planned + stage > 0)) clear_stage();
        full_when_cleared = filled;
        ring.advance();
      }
    }
    if (kClearsLate && clears && tile.stages > 0) clear_stage();
  }
}

// Writes the rows of one piece that exist, from row `first` of a unit's buffer on.
template <class Traits, bool kGeneral>
__device__ __forceinline__ void copy_rows(const QueryTileArguments& args, const WorkItem& item, int row_in_tile,
                                          const uint8_t* source, int first, int lane) {
  const int vectors = args.out_columns / 8;  // of 16 bytes
  for (int i = lane; i < args.query_piece * vectors; i += 32) {
    const int row = i / vectors, vector = i - row * vectors, in_unit = first + row;
    const RowPlace place = place_row<kSeveralBlocks<Traits, kGeneral>>(args, item, row_in_tile + row);
    if (place.count <= 0) continue;
    // The swizzle exchanges the 16-byte vectors of a row by the row's place in the pattern of 1 KB.
    constexpr int kVectors = Traits::kChunkBytes / 16;
    const int swizzled = (vector ^ (in_unit * static_cast<int>(Traits::kChunkBytes) / 128)) % kVectors;
    const uint8_t* from = source + (vector / kVectors * kUnitRows + in_unit) * Traits::kChunkBytes + swizzled * 16;
    *reinterpret_cast<uint4*>(out_of_row<typename Traits::Element>(args, item, place) + vector * 8) =
        *reinterpret_cast<const uint4*>(from);
  }
}

template <class Traits, bool kGeneral>
__device__ __forceinline__ void store_output(const QueryTileArguments& args, typename Traits::Storage& storage,
                                             const WorkItem& item, int buffer, uint32_t parity, int lane) {
  for (int unit = 0; unit < Traits::kUnits; ++unit) {
    mbarrier_wait(&storage.output_full[buffer][unit], parity);
    const uint8_t* source = reinterpret_cast<const uint8_t*>(storage.queries[buffer][unit]);
    for (int first = 0; first < kUnitRows; first += args.query_piece) {
      const RowPlace place = place_row<kSeveralBlocks<Traits, kGeneral>>(args, item, unit * kUnitRows + first);
      if (place.count <= 0) continue;
      if (place.count >= args.box_rows) {
        const int row = item.q_begin + item.sequence * args.out_batch_rows + place.row;
        if (lane < Traits::kChunks && lane * Traits::kChunkColumns < args.out_columns) {
          cute::SM90_TMA_STORE_3D::copy(&args.map_out, source + (lane * kUnitRows + first) * Traits::kChunkBytes,
                                        lane * Traits::kChunkColumns, row,
                                        place.head + item.sequence * args.out_batch_heads);
        }
      } else {
        // The sequence or the block cuts this piece: the copy engine would overwrite the rows that follow.
        copy_rows<Traits, kGeneral>(args, item, unit * kUnitRows + first, source, first, lane);
        cutlass::arch::fence_view_async_shared();
      }
    }
    if (lane < Traits::kChunks) cute::tma_store_arrive();
  }
  if (lane < Traits::kChunks) cute::tma_store_wait<0>();  // until the buffer has been read
  __syncwarp();
}

// Fills the query buffers, and stores the outputs that come to lie in them.
template <class Traits, bool kGeneral, class Arguments>
__device__ __forceinline__ void run_buffer_warp(const Arguments& args, typename Traits::Storage& storage, int lane) {
  RingPosition<Traits::kTileSlots> slot(0);
  RingPosition<Traits::kQueryBuffers> filled(0), stored(0);
  int held = 0;  // buffers in use
  bool more = true;
  while (true) {
    // A tile is announced while the one before it is computed, so this wait does not hold back its output.
    while (more && held < Traits::kQueryBuffers) {
      const WorkItem item = wait_tile(storage, slot).item;
      const int stages = storage.tiles[slot.index].stages;
      // Before the queries, whose arrival tells the consumers that it is there.
      if (args.mask.ruled && lane == 0) storage.rules[filled.index] = storage.tiles[slot.index].rule;
      release_tile(storage, slot, lane);
      more = item.bit_row >= 0;
      if (!more || stages == 0) continue;
      load_queries<Traits, kGeneral>(args, storage, item, filled.index, lane);
      if (lane == 0) storage.held_items[filled.index] = item;
      __syncwarp();
      filled.advance();
      ++held;
    }
    if (held == 0) break;
    store_output<Traits, kGeneral>(args, storage, storage.held_items[stored.index], stored.index, stored.parity, lane);
    stored.advance();
    --held;
  }
}

// One of the warps of the producer warpgroup.
template <class Traits, bool kGeneral, class Arguments>
__device__ __forceinline__ void run_producer(const Arguments& args, typename Traits::Storage& storage, int warp,
                                             int lane) {
  if (warp == kKeyWarp) {
    run_stream_warp<Traits, true, kGeneral>(args, storage, lane);
  } else if (warp == kTileWarp) {
    run_tile_warp<Traits, kGeneral>(args, storage, lane);
  } else if (warp == kValueWarp) {
    run_stream_warp<Traits, false, kGeneral>(args, storage, lane);
  } else {
    run_buffer_warp<Traits, kGeneral>(args, storage, lane);
  }
}

}  // namespace hbsattn::sm90
