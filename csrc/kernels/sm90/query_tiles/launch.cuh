#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <numeric>

#include "kernels/common/launch.cuh"
#include "kernels/common/query_tiles_launch.cuh"
#include "kernels/instances.h"
#include "kernels/sm90/query_tiles/traits.cuh"
#include "kernels/sm90/tensor_rows.h"

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
  const TileShape tiles =
      shape_tiles(shape, params.heads_q, params.heads_k, params.head_dim, params.pack_heads, for_backward);
  const auto block_rows = static_cast<int>(tiles.block_rows);
  fill_query_tiles(params, for_backward, Config::kTileN, args);
  const int segment = 1 << args.segment_log2;
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

  args.item_step = 1;
  args.ticket = static_cast<int*>(params.workspace);
  args.q_batch_rows = q.batch_rows;
  args.k_batch_rows = k.batch_rows;
  args.v_batch_rows = v.batch_rows;
  args.out_batch_rows = out.batch_rows;
  args.q_batch_heads = q.batch_heads;
  args.k_batch_heads = k.batch_heads;
  args.v_batch_heads = v.batch_heads;
  args.out_batch_heads = out.batch_heads;
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
