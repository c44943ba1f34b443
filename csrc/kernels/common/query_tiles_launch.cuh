#pragma once

#include <algorithm>

#include "kernels/common/query_tiles.cuh"
#include "kernels/instances.h"

namespace hbsattn::kernels {

// Fills what kernels of every family get of a call. `for_backward`: as in PlanParams; `stage_keys`: of a stage.
inline void fill_query_tiles(const ForwardParams& params, bool for_backward, int stage_keys, QueryTiles& args) {
  const MaskShape& shape = params.mask.shape;
  const TileShape tiles =
      shape_tiles(shape, params.heads_q, params.heads_k, params.head_dim, params.pack_heads, for_backward);
  args.mask = shape;
  args.sequences = params.packed ? params.mask.sequences : nullptr;
  args.bits = params.mask.bits;
  args.rules = params.mask.rules;
  args.items = params.items;
  args.num_items = static_cast<int>(params.num_items);
  args.out = params.out.data;
  args.out_batch_stride = view_of(params, params.out).batch_stride;
  args.out_columns = view_of(params, params.out).columns;
  args.out_row_stride = params.out.row_stride;
  args.out_head_stride = params.out.head_stride;
  args.lse = params.lse;
  args.rows_q = static_cast<int>(params.rows_q);
  args.rows_k = static_cast<int>(params.rows_k);
  args.lse_batch_stride_rows = params.packed ? 0 : args.rows_q;
  args.heads_q = params.heads_q;
  args.heads_per_key_head = params.heads_q / params.heads_k;
  args.row_words = static_cast<int>(shape.words());
  args.q_block_size = shape.q_block_size;
  args.packed_heads = tiles.packed_heads;
  args.united = tiles.united;
  args.block_rows = static_cast<int>(tiles.block_rows);
  args.k_block_size = shape.k_block_size;
  args.ragged_blocks = shape.k_block_size % kGranule != 0;
  const int segment = args.ragged_blocks ? kGranule : std::min(shape.k_block_size & -shape.k_block_size, stage_keys);
  while ((1 << args.segment_log2) < segment) ++args.segment_log2;
  // Blocks may be longer than all sequences; those then have one.
  const auto block_keys = static_cast<int>(std::clamp<int64_t>(params.rows_k, 1, shape.k_block_size));
  args.segments_per_block = (block_keys + segment - 1) / segment;
  args.sinks = params.sinks;
  args.dropout = make_dropout(params);
  const ScoreScale scale = make_score_scale(params);
  args.cap = scale.cap;
  args.partial = partial_blocks_of(params.mask);
  args.scale = scale.natural;
  args.scale_log2 = scale.log2;
}

// Where a forward call is to leave the clocks of multiprocessors.
inline Status record_cycles_of(const ForwardParams& params, QueryTiles& args) {
  if (params.cycles == nullptr) return Status::Ok();
  int capability = 0, multiprocessors = 0;
  HBSATTN_RETURN_IF_ERROR(current_device(&capability, &multiprocessors));
  args.cycles = reinterpret_cast<unsigned long long*>(params.cycles);
  args.cycle_rows = 2 * multiprocessors;
  return Status::Ok();
}

}  // namespace hbsattn::kernels
