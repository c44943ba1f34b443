#pragma once

#include <cmath>

#include "kernels/common/query_tiles.cuh"
#include "plan/rows.h"

// What tiles of queries that compute gradients know of their rows.

namespace hbsattn {

// Of a thread's two rows.
struct RowStatistics {
  float lse[2];  // +inf: the row does not exist or attends to nothing
  float delta[2];

  // `args`: QueryTiles with the statistics of all rows, and their chunks.
  template <bool kGeneral, class Arguments>
  static __device__ __forceinline__ RowStatistics load(const Arguments& args, const WorkItem& item, int warp_row,
                                                       int lane) {
    RowStatistics statistics;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const RowPlace place = place_row<kGeneral>(args, item, warp_row + lane / 4 + 8 * row);
      statistics.lse[row] = INFINITY;
      statistics.delta[row] = 0.f;
      if (place.count <= 0) continue;
      int64_t chunk = place.head / args.chunks.stack.heads * args.chunks.count;
      int in_chunks = args.chunks.row_of_query(place.row, place.head);
      if (args.chunks.per_block == 0) {
        chunk += args.chunks.first(item.sequence, item.q_begin);
      } else {
        // United blocks follow one another in the sequence and in the mask.
        int block;
        args.q_block_size(block, in_chunks, place.row - item.block_row);
        const int mask_row = item.bit_row % static_cast<int>(args.mask.rows) + block;
        chunk += int64_t{mask_row} * args.chunks.per_block;
      }
      const int64_t position = chunk * kGranule + in_chunks;
      statistics.lse[row] = __ldg(args.statistics_lse + position);
      statistics.delta[row] = __ldg(args.delta + position);
    }
    return statistics;
  }
};

}  // namespace hbsattn
