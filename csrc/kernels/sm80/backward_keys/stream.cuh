#pragma once

#include "kernels/sm80/backward_keys/traits.cuh"
#include "kernels/sm80/query_tiles/stream.cuh"

// How the queries of a tile, with output gradients and statistics, come to shared memory.

namespace hbsattn::sm80 {

// The stages of a tile: those of one stack of query heads after another. One warp lists them, some at a time and
// ahead of their loads. There is no count of them: behind the last are such that do not exist.
template <class Traits>
struct QueryStream {
  using Element = typename Traits::Element;
  using Info = StageInfo<Traits::kGranules>;
  using Loader = RowLoader<typename Traits::Queries, Traits::kThreads>;

  const BackwardKeysArguments& args;
  typename Traits::Storage& storage;
  const KeyItem& item;  // in shared memory: out of registers
  const int lane;
  const Loader loader;

  __device__ __forceinline__ QueryStream(const BackwardKeysArguments& args, typename Traits::Storage& storage)
      : args(args), storage(storage), item(storage.item), lane(threadIdx.x % 32), loader(threadIdx.x) {}

  __device__ __forceinline__ const Info& info_of(int stage) const {
    return storage.infos[stage & (Traits::kInfos - 1)];
  }
  __device__ __forceinline__ bool exists(int stage) const { return info_of(stage).of_stack >= 0; }

  // Where listing begins; one thread calls it.
  __device__ __forceinline__ void open() const {
    storage.cursor = {args.sets.first_head(item.query_set) / args.chunks.stack.heads, 0, 0};
  }

  // A warp lists `count` stages or more, or all there are. Others see them behind the next barrier.
  __device__ __forceinline__ void list(int count) const {
    if (threadIdx.x / 32 != Traits::kListWarp || storage.cursor.listed >= count) return;
    using Blocks = typename Traits::Blocks;
    StageCursor cursor = storage.cursor;
    const int heads = args.chunks.stack.heads;
    const int end_stack = (args.sets.first_head(item.query_set) + args.sets.tile_heads) / heads;
    if (cursor.stack >= end_stack) return;
    const int stage_segments_log2 = Traits::kTileMLog2 - args.segment_log2;
    const int segments = min(32, Traits::kListed << stage_segments_log2);  // that are listed at a time
    const int per_block = args.segments_per_block.divisor;
    while (cursor.listed < count && cursor.stack < end_stack) {
      const ColumnBits bits(args, item, cursor.stack * heads);
      const auto [begin, end] = bits.blocks;
      bool more = false;  // of this stack
      if (begin < end) {
        Blocks blocks = cursor.segment == 0 ? Blocks(bits.rows, begin, end, storage.columns,
                                                     bits.template load<Blocks>(Blocks::first_chunk(end), lane), lane)
                                            : Blocks(bits.rows, begin, end, storage.columns, storage.blocks, lane);
        const int last = cursor.segment + segments;
        blocks.expand(args.segments_per_block.div(last + per_block - 1));
        list_stages(cursor, bits, blocks, last, stage_segments_log2);
        blocks.leave(storage.blocks);
        // Where these are as many as were asked for, there may be others.
        more = blocks.made * per_block >= last;
        cursor.segment = last;
      }
      if (!more) {
        ++cursor.stack;
        cursor.segment = 0;
      }
    }
    // As many as are asked for behind the last one.
    if (cursor.stack >= end_stack && lane < Traits::kStages - 1) {
      storage.infos[cursor.listed + lane & (Traits::kInfos - 1)].of_stack = -1;
    }
    __syncwarp();
    if (lane == 0) storage.cursor = cursor;
    __syncwarp();
  }

  // Starts copies of a stage: its rows, those that do not exist being zeros, and their statistics. Ends a group.
  __device__ __forceinline__ void load(int stage) const {
    if (exists(stage)) {
      const Info& info = info_of(stage);
      const int buffer = stage % Traits::kStages, rows_log2 = args.chunks.stack.rows_log2;
      CUTE_UNROLL
      for (int pass = 0; pass < Loader::kPasses; ++pass) {
        const int row = pass * Loader::kPassRows + loader.row, granule = row / kGranule;
        const int first = info.queries[granule], in_stack = first + row % kGranule;
        const bool there =
            first >= 0 && in_stack < info.ends[granule] && args.chunks.head_of_row(in_stack) < args.chunks.stack.heads;
        const int copied = there ? in_stack : 0;  // what is not read is an address of the tensor nevertheless
        const int head = info.of_stack * args.chunks.stack.heads + args.chunks.head_of_row(copied);
        const int query = item.q_begin + (copied >> rows_log2);
        const auto copy = [&](const TensorRows& tensor, Element* matrix) {
          const uint8_t* source = tensor.head_of(item.sequence, head, query);
          loader.load(shared_address(matrix), pass, source, there, tensor.columns);
        };
        copy(args.q, storage.queries[buffer]);
        copy(args.grad_out, storage.grad_out[buffer]);
      }
      // Four rows a thread. Of a granule that is padding there are statistics, too, which make its weights 0.
      constexpr int kVectors = Traits::kTileM / 4;
      const int vector = static_cast<int>(threadIdx.x) % kVectors, first_row = 4 * vector;
      if (threadIdx.x < 2 * kVectors) {
        const bool is_lse = threadIdx.x < kVectors;
        const int64_t chunk = info.chunks[first_row / kGranule];
        const float* source = (is_lse ? args.lse : args.delta) + chunk * kGranule + first_row % kGranule;
        copy_async(shared_address(&(is_lse ? storage.lse : storage.delta)[buffer][first_row]), source, true);
      }
    }
    commit_copies();
  }

  // Before the first stage: lists stages, and starts copies of those that are loaded ahead.
  __device__ __forceinline__ void begin() const {
    list(Traits::kStages);
    __syncthreads();
    CUTE_UNROLL
    for (int stage = 0; stage < Traits::kStages - 1; ++stage) load(stage);
  }

  // Whether there is a stage. If so, its rows are there, as is all that was copied before them, and what is behind it
  // is on its way. Nobody reads the stage before any more.
  __device__ __forceinline__ bool next(int stage) const {
    wait_copies<Traits::kStages - 2>();
    __syncthreads();
    if (!exists(stage)) return false;
    load(stage + Traits::kStages - 1);
    list(stage + Traits::kStages + 1);
    return true;
  }

 private:
  // Lists the stages of segments up to `last`, but for those without queries that see a key of the tile.
  __device__ __forceinline__ void list_stages(StageCursor& cursor, const ColumnBits& bits,
                                              const typename Traits::Blocks& blocks, int last,
                                              int stage_segments_log2) const {
    const int position = cursor.segment + lane;
    QueryPlan plan = plan_queries<Traits::kTileRows, true, true, true>(args, item, bits, blocks, cursor.stack, position,
                                                                       position < last);
    HeadRule rule = rule_of_stack<true>(args, cursor.stack);
    if (plan.query >= 0) {
      const int last_row = min(plan.query + (1 << args.segment_log2), plan.end) - 1;
      const int end = rule_of(args.mask, item, rule)
                          .visible_end(last_row >> args.chunks.stack.rows_log2, item.first_key + item.keys);
      if (end <= item.first_key) plan.query = -1;
    }
    if (args.partial.words != nullptr && plan.query >= 0) {
      plan.clean = plan.clean && !has_partial(args, item, cursor.stack, plan);
    }
    const uint32_t there = __ballot_sync(0xffffffffu, plan.query >= 0);
    const uint32_t clean = __ballot_sync(0xffffffffu, plan.query >= 0 && plan.clean);
    const int row = lane % Traits::kGranules * kGranule;
    const int in_segment = row & ((1 << args.segment_log2) - 1);
    for (int segment = 0; segment < last - cursor.segment; segment += 1 << stage_segments_log2) {
      const uint32_t lanes = ((1u << (1 << stage_segments_log2)) - 1) << segment;
      if ((there & lanes) == 0) continue;
      const int source = segment + (row >> args.segment_log2);
      const int query = __shfl_sync(0xffffffffu, plan.query, source);
      const int end = __shfl_sync(0xffffffffu, plan.end, source);
      const int with = __shfl_sync(0xffffffffu, plan.with, source);
      const int chunk = __shfl_sync(0xffffffffu, plan.chunk, source);
      Info& info = storage.infos[cursor.listed++ & (Traits::kInfos - 1)];
      if (lane < Traits::kGranules) {
        info.queries[lane] = query < 0 ? -1 : query + in_segment;
        info.ends[lane] = end;
        info.withs[lane] = query < 0 ? 0 : with;
        info.chunks[lane] = query < 0 ? args.padding_chunk : chunk + in_segment / kGranule;
      }
      if (lane == 0) {
        info.of_stack = cursor.stack;
        info.masked = (clean & lanes) != lanes;
        info.rule[0] = rule.sink - item.diagonal;
        info.rule[1] = rule.left;
        info.rule[2] = rule.right;
      }
    }
  }
};

}  // namespace hbsattn::sm80
