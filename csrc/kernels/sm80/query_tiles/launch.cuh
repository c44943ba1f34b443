#pragma once

#include <algorithm>
#include <string>

#include "kernels/common/launch.cuh"
#include "kernels/common/query_tiles_launch.cuh"
#include "kernels/instances.h"
#include "kernels/sm80/query_tiles/traits.cuh"
#include "plan/lists.h"

namespace hbsattn::kernels {

inline sm80::TensorRows tensor_rows(const ForwardParams& params, const TensorView& tensor) {
  const TensorView view = view_of(params, tensor);
  const int64_t element_bytes = element_size_of(params.dtype);
  return {static_cast<const uint8_t*>(view.data), params.packed ? 0 : element_bytes * view.batch_stride,
          element_bytes * view.head_stride, static_cast<int>(element_bytes * view.row_stride), view.columns};
}

// Fills what a kernel gets that streams keys and values past tiles of query rows.
template <class Config>
void fill_arguments(const ForwardParams& params, sm80::QueryTileArguments& args) {
  fill_query_tiles(params, true, Config::kTileN, args);
  // A list may have room for more, which has no tiles.
  args.num_items = static_cast<int>(std::min<int64_t>(
      params.num_items,
      count_query_items(params.mask.shape, params.heads_q, params.heads_k, params.head_dim, params.pack_heads, true)));
  args.q = tensor_rows(params, params.q);
  args.k = tensor_rows(params, params.k);
  args.v = tensor_rows(params, params.v);
  args.two_stages = true;
  args.allow_tf32 = params.allow_tf32;
  if (params.rows_k == 0) args.k.data = args.v.data = args.q.data;  // nothing is read, but an address is asked for
}

// A grid with a CTA for each part of a tile.
template <class Config, class Arguments>
Status launch_query_tiles(const char* what, void (*kernel)(Arguments), const Arguments& args, int shared_bytes,
                          Stream stream) {
  using Traits = sm80::QueryTileTraits<Config>;
  constexpr int64_t kMostCtas = (int64_t{1} << 31) - 1;
  const int64_t ctas = std::max<int64_t>(int64_t{args.num_items} * Traits::kCtasOfTile, 1);
  if (ctas > kMostCtas) {
    return Status::NotSupported("a work list of " + std::to_string(args.num_items) + " tiles; expected at most " +
                                std::to_string(kMostCtas / Traits::kCtasOfTile));
  }
  return launch(what, kernel, static_cast<unsigned>(ctas), Traits::kThreads, shared_bytes, stream, args);
}

}  // namespace hbsattn::kernels
