#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "kernels/common/ptx.cuh"
#include "kernels/sm90/forward_traits.cuh"

// The warps that move data. One announces tiles and loads queries, one loads keys, one values, one stores outputs.

namespace hbsattn::sm90 {

// Keys and values are read by every query tile that needs them; queries once.
inline constexpr uint64_t kKeepInL2 = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);
inline constexpr uint64_t kPassThroughL2 = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST);

// Where 16 or more consecutive virtual rows of a tile lie.
struct RowSpan {
  int head;   // query head
  int row;    // first row, in the sequence
  int count;  // rows of the sequence and block from here on; 0 or less: none

  __device__ __forceinline__ RowSpan(const ForwardArguments& args, const WorkItem& item, int row_in_tile) {
    const int virtual_row = item.first_row + row_in_tile;
    const int head_in_pack = virtual_row / args.q_block_size;
    head = item.head + head_in_pack;
    row = item.block_row + virtual_row - head_in_pack * args.q_block_size;
    const int end = min(item.q_len, item.block_row + args.q_block_size);
    count = head_in_pack < args.packed_heads ? end - row : 0;
  }
};

// Reads the tile that a slot announces, and frees the slot: one of kTileReaders arrivals.
template <class Storage>
__device__ __forceinline__ TileSlot const& wait_tile(Storage& storage, RingPosition<kTileSlots> const& position) {
  mbarrier_wait(&storage.tile_full[position.index], position.parity);
  return storage.tiles[position.index];
}

template <class Storage>
__device__ __forceinline__ void release_tile(Storage& storage, RingPosition<kTileSlots>& position, int lane) {
  __syncwarp();
  if (lane == 0) mbarrier_arrive(&storage.tile_empty[position.index]);
  position.advance();
}

// Lengths that lie are cut to the tensors, so that no coordinate leaves them.
__device__ __forceinline__ void clamp_to_tensors(const ForwardArguments& args, WorkItem& item) {
  item.q_begin = min(max(item.q_begin, 0), args.rows_q);
  item.k_begin = min(max(item.k_begin, 0), args.rows_k);
  item.q_len = min(item.q_len, args.rows_q - item.q_begin);
  item.k_len = min(item.k_len, args.rows_k - item.k_begin);
}

__device__ __forceinline__ int key_end_of_tile(const ForwardArguments& args, const WorkItem& item, int tile_rows) {
  if (!args.causal) return item.k_len;
  // The last row of a tile that spans several heads is the block's last row.
  const int last_virtual = item.first_row + tile_rows - 1;
  const bool one_head = item.first_row / args.q_block_size == last_virtual / args.q_block_size;
  const int last_in_block = one_head ? last_virtual % args.q_block_size : args.q_block_size - 1;
  const int last_row = min(item.block_row + last_in_block, item.q_len - 1);
  return min(item.k_len, last_row + item.k_len - item.q_len + 1);
}

template <class Traits>
__device__ __forceinline__ void load_queries(const ForwardArguments& args, typename Traits::Storage& storage,
                                             const WorkItem& item, const RingPosition<Traits::kQueryBuffers>& buffer,
                                             int lane) {
  for (int unit = 0; unit < Traits::kUnits; ++unit) {
    mbarrier_wait(&storage.queries_empty[buffer.index][unit], buffer.parity);
    uint64_t* full = &storage.queries_full[buffer.index][unit];
    if (lane == 0) mbarrier_arrive_expect(full, Traits::kUnitBytes);
    __syncwarp();
    const int pieces = kUnitRows / args.query_piece;
    const int piece = lane / Traits::kChunks, chunk = lane % Traits::kChunks;
    if (piece < pieces) {
      const RowSpan span(args, item, unit * kUnitRows + piece * args.query_piece);
      const int tensor_row = item.q_begin + item.sequence * args.q_batch_rows + span.row;
      const int first_row = span.count > 0 ? tensor_row : int{kOutOfBounds};
      uint8_t* destination = reinterpret_cast<uint8_t*>(storage.queries[buffer.index][unit]) +
                             (chunk * kUnitRows + piece * args.query_piece) * Traits::kChunkBytes;
      cute::SM90_TMA_LOAD_3D::copy(&args.map_q, full, kPassThroughL2, destination, chunk * Traits::kChunkColumns,
                                   first_row, span.head);
    }
  }
}

// Takes tiles off the work list, announces them with the first chunk of their bit row, and loads their queries.
template <class Traits>
__device__ __forceinline__ void run_query_warp(const ForwardArguments& args, typename Traits::Storage& storage,
                                               int lane) {
  const int segments = Traits::kTileN >> args.segment_log2;
  RingPosition<kTileSlots> slot(1);
  RingPosition<Traits::kQueryBuffers> buffer(1);
  RingPosition<1> wanted(0);
  int work = blockIdx.x;
  while (true) {
    WorkItem item{};
    item.bit_row = -1;
    if (work < args.num_items) item = args.items[work];
    clamp_to_tensors(args, item);
    const bool last = item.bit_row < 0;
    const uint8_t* row = args.bits + static_cast<int64_t>(item.bit_row) * args.row_bytes;
    uint32_t first_byte = 0;
    if (!last && item.blocks > 0) {
      first_byte = BitRow::load(row, args.row_bytes, BitRow::first_chunk(item.col_end), lane);
    }

    const int item_segments = item.blocks * args.segments_per_block;
    const int stages = (item_segments + segments - 1) / segments;
    mbarrier_wait(&storage.tile_empty[slot.index], slot.parity);
    TileSlot& announced = storage.tiles[slot.index];
    announced.first_chunk[lane] = static_cast<uint8_t>(first_byte);
    if (lane == 0) {
      const int padding = stages * segments - item_segments;
      announced.item = item;
      announced.stages = stages;
      announced.padding = padding;
      announced.masked_stages =
          min(stages, max(1, (padding + item.masked * args.segments_per_block + segments - 1) / segments));
      announced.key_end = key_end_of_tile(args, item, Traits::kTileM);
    }
    // Every lane has written, so every lane arrives: its arrival orders its own stores for the readers.
    mbarrier_arrive(&storage.tile_full[slot.index]);
    slot.advance();
    if (last) break;

    if (stages > 0) {
      load_queries<Traits>(args, storage, item, buffer, lane);
      buffer.advance();
    }
    mbarrier_wait(&storage.tile_wanted, wanted.parity);
    wanted.advance();
    const int ticket = lane == 0 ? atomicAdd(args.ticket, 1) : 0;
    work = uniform(ticket) + static_cast<int>(gridDim.x);
  }
}

// First key of segment `position` of a tile, counted from the front of its first stage; -1: padding.
__device__ __forceinline__ int segment_key(const ForwardArguments& args, const BitRow& blocks, int position) {
  if (position < 0) return -1;
  if (args.segments_per_block == 1) return blocks.column(position) << args.segment_log2;
  const int entry = position / args.segments_per_block;
  const int from_top = position - entry * args.segments_per_block;
  return (blocks.column(entry) * args.segments_per_block + args.segments_per_block - 1 - from_top) << args.segment_log2;
}

// What goes into one stage: computed before the stage is free, because the time from a stage's release to its refill
// decides whether two stages are enough.
template <class Traits>
struct StagePlan {
  int key;      // first key of the segment that this lane loads; -1: none
  int granule;  // first key of this lane's granule
  bool clip;    // some segment reaches past the last visible key

  __device__ __forceinline__ StagePlan(const ForwardArguments& args, const BitRow& blocks, const TileSlot& tile,
                                       int first, int lane) {
    const int segments = Traits::kTileN >> args.segment_log2;
    const int segment_rows = 1 << args.segment_log2;
    key = lane < segments ? segment_key(args, blocks, first + lane) : -1;
    clip = !args.whole_rows || __any_sync(0xffffffffu, key >= 0 && key + segment_rows > tile.key_end);
    granule = key_of_row(args, (lane % Traits::kGranules) * kGranule, kNoKey);
  }

  // Key in row `in_stage` of the stage.
  __device__ __forceinline__ int key_of_row(const ForwardArguments& args, int in_stage, int if_none) const {
    const int first = __shfl_sync(0xffffffffu, key, in_stage >> args.segment_log2);
    return first < 0 ? if_none : first + (in_stage & ((1 << args.segment_log2) - 1));
  }
};

// Issues the loads of one stage. `granule_keys`, for a key stage, receives the first key of each granule.
template <class Traits>
__device__ __forceinline__ void fill_stage(const ForwardArguments& args, const StagePlan<Traits>& plan, int head,
                                           int run_begin, int key_end, const CUtensorMap* whole,
                                           const CUtensorMap* clipped, uint8_t* stage, uint64_t* full,
                                           int32_t* granule_keys, int lane) {
  if (lane == 0) mbarrier_arrive_expect(full, Traits::kStageBytes);
  __syncwarp();
  if (!plan.clip) {
    if (lane < Traits::kTileN >> args.segment_log2) {
      const int first_row = plan.key < 0 ? int{kOutOfBounds} : run_begin + plan.key;
      cute::SM90_TMA_LOAD_5D::copy(whole, full, kKeepInL2,
                                   stage + (lane << args.segment_log2) * (Traits::kChunks * Traits::kChunkBytes), 0,
                                   first_row, 0, 0, head);
    }
  } else {
    constexpr int kBoxes = Traits::kTileN / 8 * Traits::kChunks;  // of 8 rows and one chunk
    for (int first_box = 0; first_box < kBoxes; first_box += 32) {
      const int box = first_box + lane;
      const int row = plan.key_of_row(args, box / Traits::kChunks * 8 % Traits::kTileN, key_end);
      if (box < kBoxes) {
        cute::SM90_TMA_LOAD_5D::copy(clipped, full, kKeepInL2, stage + box * Traits::kAtomBytes,
                                     box % Traits::kChunks * Traits::kChunkColumns, kRunEnd - key_end + row,
                                     int{kRunEnd}, run_begin + key_end, head);
      }
    }
  }
  if (granule_keys != nullptr && lane < Traits::kGranules) {
    // The lane that writes a granule arrives for it. Neither is on the way of the loads, which take far longer.
    granule_keys[lane] = plan.granule;
    mbarrier_arrive(full);
  }
}

// Streams the keys or the values of every tile through their ring of stages.
template <class Traits, bool kKeys>
__device__ __forceinline__ void run_stream_warp(const ForwardArguments& args, typename Traits::Storage& storage,
                                                int lane) {
  const int segments = Traits::kTileN >> args.segment_log2;
  const CUtensorMap* whole = kKeys ? &args.map_k : &args.map_v;
  const CUtensorMap* clipped = kKeys ? &args.map_k_clipped : &args.map_v_clipped;
  const int batch_rows = kKeys ? args.k_batch_rows : args.v_batch_rows;
  uint64_t* full = kKeys ? storage.keys_full : storage.values_full;
  uint64_t* empty = kKeys ? storage.keys_empty : storage.values_empty;

  RingPosition<kTileSlots> slot(0);
  RingPosition<kKeys ? Traits::kKeyStages : Traits::kValueStages> stage(1);
  while (true) {
    const TileSlot tile = wait_tile(storage, slot);
    const uint32_t first_byte = storage.tiles[slot.index].first_chunk[lane];
    release_tile(storage, slot, lane);
    if (tile.item.bit_row < 0) break;
    if (kKeys && tile.stages <= kTileLead && lane == 0) mbarrier_arrive(&storage.tile_wanted);

    BitRow blocks(args.bits + static_cast<int64_t>(tile.item.bit_row) * args.row_bytes, args.row_bytes,
                  tile.item.col_end, kKeys ? storage.key_columns : storage.value_columns, first_byte);
    for (int i = 0; i < tile.stages; ++i) {
      const int first = i * segments - tile.padding;
      blocks.expand((first + segments + args.segments_per_block - 1) / args.segments_per_block, lane);
      const StagePlan<Traits> plan(args, blocks, tile, first, lane);
      mbarrier_wait(&empty[stage.index], stage.parity);
      uint8_t* destination =
          reinterpret_cast<uint8_t*>(kKeys ? storage.keys : storage.values) + stage.index * Traits::kStageBytes;
      fill_stage<Traits>(args, plan, tile.item.head / args.heads_per_key_head,
                         tile.item.k_begin + tile.item.sequence * batch_rows, tile.key_end, whole, clipped, destination,
                         &full[stage.index], kKeys ? storage.granule_keys[stage.index] : nullptr, lane);
      if (kKeys && i == tile.stages - kTileLead - 1 && lane == 0) mbarrier_arrive(&storage.tile_wanted);
      stage.advance();
    }
  }
}

// Stores finished outputs from the buffers that held the queries, then hands the buffers back.
template <class Traits>
__device__ __forceinline__ void run_output_warp(const ForwardArguments& args, typename Traits::Storage& storage,
                                                int lane) {
  using Element = typename Traits::Element;
  RingPosition<kTileSlots> slot(0);
  RingPosition<Traits::kQueryBuffers> buffer(0);
  while (true) {
    const WorkItem item = wait_tile(storage, slot).item;
    const int stages = storage.tiles[slot.index].stages;
    release_tile(storage, slot, lane);
    if (item.bit_row < 0) break;
    if (stages == 0) continue;

    for (int unit = 0; unit < Traits::kUnits; ++unit) {
      mbarrier_wait(&storage.output_full[buffer.index][unit], buffer.parity);
      const uint8_t* source = reinterpret_cast<const uint8_t*>(storage.queries[buffer.index][unit]);
      for (int first = 0; first < kUnitRows; first += args.query_piece) {
        const RowSpan span(args, item, unit * kUnitRows + first);
        if (span.count <= 0) continue;
        if (span.count >= args.query_piece) {
          const int row = item.q_begin + item.sequence * args.out_batch_rows + span.row;
          if (lane < Traits::kChunks && lane * Traits::kChunkColumns < args.head_dim) {
            cute::SM90_TMA_STORE_3D::copy(&args.map_out, source + (lane * kUnitRows + first) * Traits::kChunkBytes,
                                          lane * Traits::kChunkColumns, row, span.head);
          }
          continue;
        }
        // A piece that the sequence or the block cuts: the copy engine would overwrite the rows that follow.
        Element* out = static_cast<Element*>(args.out) + item.sequence * args.out_batch_stride +
                       (static_cast<int64_t>(item.q_begin) + span.row) * args.out_row_stride +
                       span.head * args.out_head_stride;
        const int vectors = args.head_dim / 8;  // of 16 bytes
        for (int i = lane; i < span.count * vectors; i += 32) {
          const int row = i / vectors, vector = i - row * vectors;
          const int in_unit = first + row;
          // The swizzle exchanges the 16-byte vectors of a row by the row's place in the pattern of 1 KB.
          constexpr int kVectors = Traits::kChunkBytes / 16;
          const int swizzled = (vector ^ (in_unit * static_cast<int>(Traits::kChunkBytes) / 128)) % kVectors;
          const uint8_t* from =
              source + (vector / kVectors * kUnitRows + in_unit) * Traits::kChunkBytes + swizzled * 16;
          *reinterpret_cast<uint4*>(out + row * args.out_row_stride + vector * 8) =
              *reinterpret_cast<const uint4*>(from);
        }
      }
      if (lane < Traits::kChunks) {
        cute::tma_store_arrive();
        cute::tma_store_wait<0>();
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(&storage.queries_empty[buffer.index][unit]);
    }
    buffer.advance();
  }
}

}  // namespace hbsattn::sm90
