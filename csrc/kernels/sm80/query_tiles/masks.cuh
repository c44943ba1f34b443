#pragma once

#include "kernels/common/query_dropout.cuh"
#include "kernels/sm80/query_tiles/stream.cuh"

// What a warp's scores of a stage are changed by, on their way to weights.

namespace hbsattn::sm80 {

// The part of a tile that this CTA has: its rows begin at `first_row`. False: it has none.
template <class Traits>
__device__ __forceinline__ bool find_part(const QueryTiles& args, WorkItem& item, int& first_row) {
  const int index = static_cast<int>(blockIdx.x) / Traits::kCtasOfTile;
  first_row = static_cast<int>(blockIdx.x) % Traits::kCtasOfTile * Traits::kTileM;
  if (index >= args.num_items) return false;
  item = args.items[index];
  if (item.bit_row < 0) return false;
  clamp_item<true, false>(args, item);
  return item.first_row + first_row < item.united * args.block_rows.divisor;
}

// Rows with nothing to attend: output 0 and, if there is one, the log-sum-exp of a sink alone.
template <class Traits, bool kWithLse>
__device__ __forceinline__ void write_empty_rows(const QueryTiles& args, const WorkItem& item, int first_row) {
  using Element = typename Traits::Element;
  constexpr int kRowThreads = 8;
  for (int row = threadIdx.x / kRowThreads; row < Traits::kTileM; row += Traits::kThreads / kRowThreads) {
    const RowPlace place = place_row<true>(args, item, first_row + row);
    if (place.count <= 0) continue;
    Element* out = out_of_row<Element>(args, item, place);
    constexpr int kColumns = Traits::Queries::kVectorColumns;
    for (int vector = threadIdx.x % kRowThreads; vector * kColumns < args.out_columns; vector += kRowThreads) {
      *reinterpret_cast<uint4*>(out + vector * kColumns) = make_uint4(0, 0, 0, 0);
    }
    if (kWithLse && threadIdx.x % kRowThreads == 0) *lse_of_row(args, item, place) = sink_of_head(args, place.head);
  }
}

// Leaves what masks ask of a strip of 16 rows, from `row` of the tile on; behind KeyStream's first barrier. `altered`:
// weights may be dropped. `matrix_row`: of the strip, in the CTA's queries.
template <class Traits>
__device__ __forceinline__ void open_strip(const QueryTileArguments& args, typename Traits::Storage& storage,
                                           const WorkItem& item, int strip, int row, int matrix_row, bool altered) {
  const int lane = threadIdx.x % 32;
  storage.limits[threadIdx.x / 32][strip].leave(KeyLimits<true>(args, item, storage.tile.rule, 0, row, lane), lane);
  if (altered && args.dropout.seed != nullptr) {
    leave_rows(args, item, row, lane, &storage.dropout_rows[matrix_row]);
  }
}

template <class Traits, bool kPartial, class Scores>
__device__ __forceinline__ void mask_scores(const KeyStream<Traits, kPartial>& stream, int strip, int stage,
                                            Scores& scores) {
  const int lane = threadIdx.x % 32;
  const KeyLimits<true> limits = stream.storage.limits[threadIdx.x / 32][strip].of_lane(lane);
  const auto code_of = [&](int granule) { return uniform(stream.code_of(stage, granule, limits.granules)); };
  if (stream.args.mask.ruled) {
    mask_by_rule(stream.args, scores, code_of, limits, stream.storage.tile.rule, lane);
  } else {
    mask_by_limits(scores, code_of, limits, lane);
  }
  if constexpr (kPartial) {
    if (!stream.has_partial(stage)) return;
    const int granule = lane % Traits::kGranules;
    const uint32_t partial = __ballot_sync(0xffffffffu, stream.is_partial(stage, granule, limits.granules));
    const PartialRows rows(stream.args, stream.storage.tile.item, limits);
    PartialStage<Traits::kGranules>(stream.args.partial, rows, limits, partial,
                                    stream.code_of(stage, granule, limits.granules), lane)
        .mask(scores, lane);
  }
}

// Drops weights, or what belongs to them.
template <DropAs kAs, class Traits, bool kPartial, class Weights>
__device__ __forceinline__ void drop_strip(const KeyStream<Traits, kPartial>& stream, int strip, int matrix_row,
                                           int stage, Weights& weights) {
  const int block = stream.storage.limits[threadIdx.x / 32][strip].granules;
  drop_weights<kAs>(stream.args.dropout, &stream.storage.dropout_rows[matrix_row], weights, threadIdx.x % 32,
                    [&](int granule) { return uniform(stream.code_of(stage, granule, block)); });
}

// Starts copies of the rows of a tile that this CTA has, from `first_row` on.
template <class Traits, class Rows = typename Traits::Queries>
__device__ __forceinline__ void load_rows(const QueryTiles& args, const WorkItem& item, const TensorRows& tensor,
                                          int first_row, typename Traits::Element* matrix) {
  const RowLoader<Rows, Traits::kThreads> loader(threadIdx.x);
  CUTE_UNROLL
  for (int pass = 0; pass < loader.kPasses; ++pass) {
    const RowPlace place = place_row<true>(args, item, first_row + pass * loader.kPassRows + loader.row);
    loader.load(shared_address(matrix), pass, tensor.head_of(item.sequence, place.head, item.q_begin + place.row),
                place.count > 0, tensor.columns);
  }
}

// Stores what a warp has of 16 rows of a tile, from `row` on, through `matrix`, in which they are from `matrix_row` on.
template <class Traits, class Sum>
__device__ __forceinline__ void store_rows(const QueryTiles& args, const WorkItem& item, int row, int matrix_row,
                                           const Sum& sum, typename Traits::Element* matrix) {
  using Element = typename Traits::Element;
  const int lane = threadIdx.x % 32;
  __syncwarp();  // all have read what was there
  leave_strip<typename Traits::Queries>(matrix, matrix_row, sum, lane);
  __syncwarp();
  store_strip<typename Traits::Queries>(matrix, matrix_row, args.out_columns, lane, [&](int in_strip) -> Element* {
    const RowPlace place = place_row<true>(args, item, row + in_strip);
    return place.count > 0 ? out_of_row<Element>(args, item, place) : nullptr;
  });
}

}  // namespace hbsattn::sm80
