#pragma once

#include "kernels/sm80/query_tiles/traits.cuh"

// How the keys and values of a tile's active blocks come to shared memory.

namespace hbsattn::sm80 {

// Copies rows into a matrix of shared memory, all threads of a CTA together. A thread copies the same
// vector of each chunk, of every kPassRows-th row.
template <class Rows, int kThreads>
struct RowLoader {
  static constexpr int kRowThreads = Rows::kChunkVectors;
  static constexpr int kPassRows = kThreads / kRowThreads;
  static constexpr int kPasses = Rows::kRows / kPassRows;
  static_assert(kPasses * kPassRows == Rows::kRows && kPassRows % 8 == 0);

  int row, vector;  // of this thread's first
  uint32_t offset;

  __device__ __forceinline__ explicit RowLoader(int thread)
      : row(thread / kRowThreads), vector(thread % kRowThreads), offset(Rows::offset(row, vector)) {}

  // `source`: the row, if it exists.
  __device__ __forceinline__ void load(uint32_t matrix, int pass, const uint8_t* source, bool exists,
                                       int columns) const {
    load_vectors(matrix, pass, source + vector * 16, exists, columns);
  }

  // `source`: of the row, this thread's first vector.
  __device__ __forceinline__ void load_vectors(uint32_t matrix, int pass, const uint8_t* source, bool exists,
                                               int columns) const {
    CUTE_UNROLL
    for (int chunk = 0; chunk < Rows::kChunks; ++chunk) {
      const int in_row = chunk * kRowThreads + vector;
      copy_async(matrix + offset + pass * kPassRows * Rows::kRowBytes + chunk * Rows::kChunkBytes,
                 source + chunk * Rows::kRowBytes, exists && in_row * Rows::kVectorColumns < columns);
    }
  }
};

// A warp copies what it left in rows of shared memory to 16 rows of a tensor. destination_of(row): where a row of the
// strip goes, null if it does not exist; `first_row`: of the strip.
template <class Rows, class DestinationOf>
__device__ __forceinline__ void store_strip(const typename Rows::Element* matrix, int first_row, int columns, int lane,
                                            DestinationOf&& destination_of) {
  constexpr int kRowThreads = Rows::kChunkVectors;
  CUTE_UNROLL
  for (int pass = 0; pass < 16 * kRowThreads / 32; ++pass) {
    const int row = pass * (32 / kRowThreads) + lane / kRowThreads;
    typename Rows::Element* destination = destination_of(row);
    if (destination == nullptr) continue;
    CUTE_UNROLL
    for (int chunk = 0; chunk < Rows::kChunks; ++chunk) {
      const int vector = chunk * kRowThreads + lane % kRowThreads;
      if (vector * Rows::kVectorColumns >= columns) break;
      *reinterpret_cast<uint4*>(destination + vector * Rows::kVectorColumns) = *reinterpret_cast<const uint4*>(
          reinterpret_cast<const uint8_t*>(matrix) + Rows::offset(first_row + row, vector));
    }
  }
}

// Leaves 16 rows of an accumulator in shared memory. kShare: of so many warps each has a part of every chunk's columns;
// `part`: which.
template <class Rows, int kShare = 1, class Sum>
__device__ __forceinline__ void leave_strip(typename Rows::Element* matrix, int first_row, const Sum& sum, int lane,
                                            int part = 0) {
  constexpr int kChunkGroups = Rows::kChunkVectors * Rows::kVectorColumns / 8;  // of 8 columns
  constexpr int kGroups = kChunkGroups / kShare;                                // of them, that a warp has
  CUTE_UNROLL
  for (int i = 0; i < cute::size(sum); i += 2) {
    const int row = first_row + lane / 4 + (i >> 1 & 1) * 8, in_warp = i / 4;
    const int group = in_warp / kGroups * kChunkGroups + part * kGroups + in_warp % kGroups;
    store_pair<typename Rows::Element>(reinterpret_cast<uint8_t*>(matrix) + Rows::offset_of_pair(row, group, lane),
                                       sum(i), sum(i + 1));
  }
}

// The stages of a tile. The first warp lists their segments, a slot of 32 after another, while those of the slot before
// are in use; slots have more stages than are loaded ahead.
// kPartial: blocks may be partial.
template <class Traits, bool kPartial>
struct KeyStream {
  using Element = typename Traits::Element;
  using Loader = RowLoader<typename Traits::Keys, Traits::kThreads>;
  static constexpr uint32_t kStageBytes = Traits::Keys::kBytes;  // of keys, or of values
  static_assert(Traits::kStages <= 2);

  const QueryTileArguments& args;
  typename Traits::Storage& storage;
  const int stages, masked, clean_end;

  // What is in shared memory of it is there for others behind the next barrier.
  __device__ __forceinline__ KeyStream(const QueryTileArguments& args, typename Traits::Storage& storage,
                                       const WorkItem& item, int key_end)
      : KeyStream(args, storage, item, key_end,
                  count_stages<true>(args, item, Traits::kTileNLog2 - args.segment_log2)) {}

  // Segments of a stage, and stages of a slot.
  __device__ __forceinline__ int stage_segments_log2() const { return Traits::kTileNLog2 - args.segment_log2; }
  __device__ __forceinline__ int slot_stages_log2() const { return 5 - stage_segments_log2(); }

  // The first warp lists the segments of a slot; they are there for others behind the next barrier.
  __device__ __forceinline__ void list(int slot) const {
    const int first_stage = slot << slot_stages_log2();
    if (threadIdx.x >= 32 || first_stage >= stages) return;
    const int lane = threadIdx.x, padding = storage.tile.stages.padding;
    const WorkItem& item = storage.tile.item;
    const BitRows rows = hbsattn::rows_of<true>(args, item);
    typename Traits::Blocks blocks =
        slot == 0
            ? typename Traits::Blocks(
                  rows, 0, item.col_end, storage.columns,
                  Traits::Blocks::load(rows, 0, item.col_end, Traits::Blocks::first_chunk(item.col_end), lane), lane)
            : typename Traits::Blocks(rows, 0, item.col_end, storage.columns, storage.blocks, lane);
    const int first = (first_stage << stage_segments_log2()) - padding;
    const int last = min(first + 32, (stages << stage_segments_log2()) - padding);
    blocks.expand(args.segments_per_block.div(last + args.segments_per_block.divisor - 1));
    StageSegment segment{find_segment<true>(args, item, rows, blocks, first + lane, last, storage.tile.key_end)};
    if (kPartial && args.partial.words != nullptr) {
      segment.partial = partial_with(args, item, segment);
      const uint32_t any = __ballot_sync(0xffffffffu, segment.partial != 0);
      if (lane == 0) storage.with_partial[slot & 1] = any;
    }
    if (segment.key < 0) segment.end = segment.key;
    storage.segments[slot & 1][lane] = segment;
    blocks.leave(storage.blocks);
  }

  // Lists the slot that begins with a stage, if one does.
  __device__ __forceinline__ void list_before(int stage) const {
    if ((stage & ((1 << slot_stages_log2()) - 1)) == 0) list(stage >> slot_stages_log2());
  }

  // Of a stage, the segment of a row.
  __device__ __forceinline__ const StageSegment& segment_of(int stage, int row) const {
    const int slot = stage >> slot_stages_log2() & 1, in_slot = stage & ((1 << slot_stages_log2()) - 1);
    return storage.segments[slot][(in_slot << stage_segments_log2()) + (row >> args.segment_log2)];
  }

  // With two stages the keys and the values of the next one come while one is computed.
  __device__ __forceinline__ bool has_two_stages() const { return Traits::kStages == 2 && args.two_stages; }

  // Where keys and values of a stage lie. Those of one stage take the first half of the room for two.
  __device__ __forceinline__ uint32_t keys_of(int stage) const {
    return shared_address(storage.keys) + (has_two_stages() ? (stage & 1) * kStageBytes : 0);
  }
  __device__ __forceinline__ uint32_t values_of(int stage) const {
    return shared_address(storage.keys) + (has_two_stages() ? (2 + (stage & 1)) * kStageBytes : kStageBytes);
  }

  enum class Part { kKeys, kValues, kBoth };

  // Starts copies of the keys, or the values, of a stage, or of both.
  template <Part kPart>
  __device__ __forceinline__ void load(int stage) const {
    if (stage < stages) {
      const Loader loader(threadIdx.x);
      // All that is looked up comes before the copies, which it would wait for else.
      const uint8_t* of_keys = storage.tile.keys + loader.vector * 16;
      const uint8_t* of_values = storage.tile.values + loader.vector * 16;
      // Or the compiler would add them up once for each row.
      asm("" : "+l"(of_keys), "+l"(of_values));
      int keys[Loader::kPasses];
      bool exists[Loader::kPasses];
      CUTE_UNROLL
      for (int pass = 0; pass < Loader::kPasses; ++pass) {
        const int row = pass * Loader::kPassRows + loader.row;
        const StageSegment segment = segment_of(stage, row);
        keys[pass] = segment.key + (row & ((1 << args.segment_log2) - 1));
        exists[pass] = keys[pass] < segment.end;
      }
      const auto copy = [&](uint32_t matrix, const TensorRows& tensor, const uint8_t* first) {
        CUTE_UNROLL
        for (int pass = 0; pass < Loader::kPasses; ++pass) {
          loader.load_vectors(matrix, pass, first + int64_t{keys[pass]} * tensor.row_stride, exists[pass],
                              tensor.columns);
        }
      };
      if (kPart != Part::kValues) copy(keys_of(stage), args.k, of_keys);
      if (kPart != Part::kKeys) copy(values_of(stage), args.v, of_values);
    }
    commit_copies();
  }

  // Before the first stage: the first slot, and what is loaded ahead. `load_queries` belongs to the first group of
  // copies.
  template <class LoadQueries>
  __device__ __forceinline__ void begin(LoadQueries&& load_queries) const {
    __syncthreads();
    list(0);
    load_queries();
    __syncthreads();
    if (has_two_stages()) {
      load<Part::kBoth>(0);
    } else {
      load<Part::kKeys>(0);
    }
  }

  // Of two stages: keys and values of one are there, and nobody reads those of the one before any more.
  __device__ __forceinline__ void wait_pair(int stage) const {
    wait_copies<0>();
    __syncthreads();
    load<Part::kBoth>(stage + 1);
    list_before(stage + 2);
  }

  // Of one: the keys of a stage are there, and nobody reads the values of the stage before any more.
  __device__ __forceinline__ void wait_keys(int stage) const {
    wait_copies<0>();
    __syncthreads();
    load<Part::kValues>(stage);
  }

  // Of one: the values of a stage are there, and nobody reads its keys any more.
  __device__ __forceinline__ void wait_values(int stage) const {
    wait_copies<0>();
    __syncthreads();
    load<Part::kKeys>(stage + 1);
    list_before(stage + 2);
  }

  // Whether a stage has keys of a block that is partial.
  __device__ __forceinline__ bool has_partial(int stage) const {
    if (!kPartial || args.partial.words == nullptr) return false;
    const int first = (stage & ((1 << slot_stages_log2()) - 1)) << stage_segments_log2();
    const uint32_t segments = storage.with_partial[stage >> slot_stages_log2() & 1] >> first;
    return (segments & ((1u << (1 << stage_segments_log2())) - 1)) != 0;
  }

  __device__ __forceinline__ bool is_masked(int stage) const {
    return stage < masked || stage >= clean_end || has_partial(stage);
  }

  // Whether a granule of such a stage is of a block that is partial for a block of the tile.
  __device__ __forceinline__ bool is_partial(int stage, int granule, int block) const {
    return segment_of(stage, granule * kGranule).partial >> block & 1;
  }

  // What a granule of a stage holds for a block of the tile, as encode_granule() has it.
  __device__ __forceinline__ int code_of(int stage, int granule, int block) const {
    const int row = granule * kGranule;
    const StageSegment segment = segment_of(stage, row);
    const int key = segment.key + (row & ((1 << args.segment_log2) - 1));
    if (segment.key < 0 || !(segment.with >> block & 1)) return kNoKey;
    return args.ragged_blocks ? encode_granule(key, segment.end) : key;
  }

 private:
  __device__ __forceinline__ KeyStream(const QueryTileArguments& args, typename Traits::Storage& storage,
                                       const WorkItem& item, int key_end, const TileStages& counted)
      : args(args), storage(storage), stages(counted.stages), masked(counted.masked), clean_end(counted.clean_end) {
    if (threadIdx.x > 0) return;
    const int head = args.heads_per_key_head.div(item.head);
    TileRule rule{};
    if (args.mask.ruled) {
      const HeadRule of_head = rule_of_head(args, item);
      rule = {of_head.left, of_head.right, of_head.sink, item.k_len};
    }
    storage.tile = {item,
                    counted,
                    key_end,
                    rule,
                    args.k.head_of(item.sequence, head, item.k_begin),
                    args.v.head_of(item.sequence, head, item.k_begin)};
  }
};

}  // namespace hbsattn::sm80
