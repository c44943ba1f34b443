#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/common/launch.cuh"
#include "kernels/instances.h"
#include "kernels/sm90/query_tiles/traits.cuh"
#include "kernels/sm90/tensor_rows.h"
#include "plan/score_scale.h"

namespace hbsattn::kernels {

// Fills what a kernel gets that streams keys and values past tiles of query rows, and tells whether the general one is
// needed. `for_backward`: as in PlanParams.
template <class Config>
Status set_arguments(const ForwardParams& params, bool for_backward, sm90::QueryTileArguments& args, bool& general) {
  using Traits = sm90::QueryTileTraits<Config>;
  const MaskShape& shape = params.mask.shape;
  const RowsOfTensor q = rows_of(params.q, params, params.rows_q, params.heads_q);
  const RowsOfTensor out = rows_of(params.out, params, params.rows_q, params.heads_q);
  RowsOfTensor k = rows_of(params.k, params, params.rows_k, params.heads_k);
  RowsOfTensor v = rows_of(params.v, params, params.rows_k, params.heads_k);
  if (params.rows_k == 0) {
    // Nothing will be loaded, but a tensor map needs an address and a row.
    k = v = {q.matrix, 0, 0};
    k.matrix.heads = v.matrix.heads = 1;
  }
  const int group = params.heads_q / params.heads_k;
  const TileShape tiles =
      shape_tiles(shape, params.heads_q, params.heads_k, params.head_dim, params.pack_heads, for_backward);
  const auto block_rows = static_cast<int>(tiles.block_rows);
  args.packed_heads = tiles.packed_heads;
  args.united = tiles.united;
  args.block_rows = block_rows;
  if (args.packed_heads > 1 && shape.q_block_size % kGranule != 0) {
    args.box_rows = shape.q_block_size;
    args.box_heads = args.packed_heads;
    args.query_piece = tiles.united > 1 ? block_rows : sm90::kUnitRows;
    args.query_bytes = sm90::kUnitRows / args.query_piece * block_rows * Config::kHeadDim *
                       static_cast<int>(sizeof(typename Traits::Element));
  } else {
    args.box_rows = std::max(std::gcd(shape.q_block_size, sm90::kUnitRows), kGranule);
    args.box_heads = 1;
    args.query_piece = args.box_rows;
    args.query_bytes = Traits::kUnitBytes;
  }
  args.ragged_blocks = shape.k_block_size % kGranule != 0;
  const int segment =
      args.ragged_blocks ? kGranule : std::min(shape.k_block_size & -shape.k_block_size, Config::kTileN);
  HBSATTN_RETURN_IF_ERROR(encode_rows(q.matrix, Config::kChunkColumns, args.box_rows, args.box_heads, &args.map_q));
  HBSATTN_RETURN_IF_ERROR(encode_rows(out.matrix, Config::kChunkColumns, args.box_rows, args.box_heads, &args.map_out));
  HBSATTN_RETURN_IF_ERROR(encode_clipped_rows(q.matrix, Config::kChunkColumns, &args.map_q_clipped));
  HBSATTN_RETURN_IF_ERROR(encode_clipped_rows(k.matrix, Config::kChunkColumns, &args.map_k_clipped));
  HBSATTN_RETURN_IF_ERROR(encode_clipped_rows(v.matrix, Config::kChunkColumns, &args.map_v_clipped));
  // Whole rows take the rest of their last chunk from what follows. Behind any row but the last one that is the
  // tensor's own memory.
  const auto count_tail = [](const MatrixRows& tensor) {
    return tensor.chunks(Config::kChunkColumns) * Config::kChunkColumns - tensor.columns;
  };
  const auto holds_tail = [&](const MatrixRows& tensor) {
    return count_tail(tensor) == 0 || tensor.row_stride >= count_tail(tensor);
  };
  args.whole_rows = !args.ragged_blocks && holds_tail(k.matrix) && holds_tail(v.matrix);
  if (args.whole_rows) {
    HBSATTN_RETURN_IF_ERROR(encode_whole_rows(k.matrix, Config::kChunkColumns, Traits::kChunks, segment, &args.map_k));
    HBSATTN_RETURN_IF_ERROR(
        encode_whole_rows(v.matrix, Config::kChunkColumns, Traits::kValueChunks, segment, &args.map_v));
    const auto tail_of = [&](const MatrixRows& tensor) {
      return sm90::RowTail{tensor.columns / 8, count_tail(tensor) / 8};
    };
    args.k_tail = tail_of(k.matrix);
    args.v_tail = tail_of(v.matrix);
    const auto count_rows = [&](const MatrixRows& tensor) {
      return static_cast<int>(tensor.rows) - (count_tail(tensor) > 0);
    };
    args.whole_k_rows = count_rows(k.matrix);
    args.whole_v_rows = count_rows(v.matrix);
  }

  args.mask = shape;
  args.sequences = params.packed ? params.mask.sequences : nullptr;
  args.bits = params.mask.bits;
  args.rules = params.mask.rules;
  args.items = params.items;
  args.num_items = static_cast<int>(params.num_items);
  args.item_step = 1;
  args.ticket = static_cast<int*>(params.workspace);
  args.out = params.out.data;
  args.out_batch_stride = view_of(params, params.out).batch_stride;
  args.out_columns = view_of(params, params.out).columns;
  args.out_row_stride = params.out.row_stride;
  args.out_head_stride = params.out.head_stride;
  args.lse = params.lse;
  args.rows_q = static_cast<int>(params.rows_q);
  args.rows_k = static_cast<int>(params.rows_k);
  args.q_batch_rows = q.batch_rows;
  args.k_batch_rows = k.batch_rows;
  args.v_batch_rows = v.batch_rows;
  args.out_batch_rows = out.batch_rows;
  args.q_batch_heads = q.batch_heads;
  args.k_batch_heads = k.batch_heads;
  args.v_batch_heads = v.batch_heads;
  args.out_batch_heads = out.batch_heads;
  args.lse_batch_stride_rows = params.packed ? 0 : args.rows_q;
  args.heads_q = params.heads_q;
  args.heads_per_key_head = group;
  args.row_words = static_cast<int>(shape.words());
  args.q_block_size = shape.q_block_size;
  args.k_block_size = shape.k_block_size;
  // Blocks may be longer than all sequences; those then have one.
  const auto block_keys = static_cast<int>(std::clamp<int64_t>(params.rows_k, 1, shape.k_block_size));
  args.segments_per_block = (block_keys + segment - 1) / segment;
  while ((1 << args.segment_log2) < segment) ++args.segment_log2;
  args.sinks = params.sinks;
  args.dropout = make_dropout(params);
  const ScoreScale scale = make_score_scale(params);
  args.cap = scale.cap;
  args.scale = scale.natural;
  args.scale_log2 = scale.log2;
  general = needs_general_kernel(params, tiles);
  return Status::Ok();
}

// Persistent CTAs: as many as run at once, or as there are items.
inline Status count_ctas(const sm90::QueryTileArguments& args, int ctas_per_sm, int* ctas) {
  int device_capability = 0, multiprocessors = 0;
  HBSATTN_RETURN_IF_ERROR(current_device(&device_capability, &multiprocessors));
  // At least one writes the queries that belong to no tile.
  *ctas = std::max(std::min(multiprocessors * ctas_per_sm, args.num_items), 1);
  return Status::Ok();
}

// Starts them. Their ticket is to be 0, unless each item has a CTA.
template <class Arguments>
Status launch_tiles(void (*kernel)(Arguments), const Arguments& args, int threads, int ctas_per_sm, int shared_bytes,
                    const char* what, Stream stream) {
  int ctas = 0;
  HBSATTN_RETURN_IF_ERROR(count_ctas(args, ctas_per_sm, &ctas));
  return launch(what, kernel, ctas, threads, shared_bytes, stream, args);
}

}  // namespace hbsattn::kernels
