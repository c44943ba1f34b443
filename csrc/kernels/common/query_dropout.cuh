#pragma once

#include <cute/tensor.hpp>

#include "kernels/common/dropout.cuh"
#include "kernels/common/query_tiles.cuh"

// Dropout in tiles of queries: kernels that alter weights have it.

namespace hbsattn {

// Tells a warp of which queries its 16 rows are. In shared memory, as registers are scarce.
__device__ __forceinline__ void leave_rows(const QueryTiles& args, const WorkItem& item, int warp_row, int lane,
                                           DropoutRow* rows) {
  __syncwarp();  // all have read those of the tile before
  if (lane < kGranule) {
    const RowPlace place = place_row<true>(args, item, warp_row + lane);
    rows[lane] = {place.row, DropoutStream::open(args.dropout, item.sequence, args.heads_q, place.head)};
  }
  __syncwarp();
}

// Drops weights of a stage, or what belongs to them. code_of(i): of its i-th granule.
template <DropAs kAs, class Weights, class CodeOf>
__device__ __forceinline__ void drop_weights(const Dropout& dropout, const DropoutRow* rows, Weights& weights, int lane,
                                             CodeOf&& code_of) {
  constexpr int kCount = decltype(cute::size(weights))::value;
  if (dropout.aligned) {
    const DropoutRow first = rows[0];
#pragma unroll
    for (int granule = 0; granule < kCount / 8; ++granule) {
      drop_patch<kAs, false>(dropout, first.stream, first.query, code_of(granule), lane, weights, 8 * granule);
    }
    return;
  }
  drop_singly<kAs, kCount>(weights, [&](int i) {
    const DropoutRow row = rows[lane / 4 + (i >> 1 & 1) * 8];
    const int key = granule_first_key(code_of(i / 8)) + (i >> 2 & 1) * 8 + 2 * (lane & 3) + (i & 1);
    return is_dropped(dropout, row.stream, row.query, key);
  });
}

}  // namespace hbsattn
