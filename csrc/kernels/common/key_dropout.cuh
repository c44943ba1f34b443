#pragma once

#include <cute/tensor.hpp>

#include "kernels/common/dropout.cuh"
#include "kernels/common/key_tiles.cuh"
#include "kernels/common/ptx.cuh"

// Dropout in tiles of keys: kernels that alter weights have it.

namespace hbsattn {

// What dropout needs of a tile, and of the queries that it streams.
struct KeyDropout {
  int sequence = 0, first_key = 0;  // of the warp's keys
  int stack = -1;                   // of the last stage, whose stream this is, unless heads are stacked
  DropoutStream stream;

  KeyDropout() = default;
  __device__ __forceinline__ KeyDropout(const KeyItem& item, int warp_key)
      : sequence(uniform(item.sequence)), first_key(uniform(item.first_key + warp_key)) {}

  // Makes those weights of a stage negative that are dropped. They are keys x queries, those of granules from some one
  // of the stage on. `info` tells of the stage: stack(), and query(granule) as for mask_queries.
  template <class Weights, class Info>
  __device__ __forceinline__ void drop(const KeyTiles& args, Weights& weights, const Info& info, int first_granule,
                                       int lane) {
    constexpr int kCount = decltype(cute::size(weights))::value;
    const Dropout& dropout = args.dropout;
    const HeadStack& heads = args.chunks.stack;
    const int of_stage = info.stack();
    if (of_stage != stack && heads.heads == 1) {
      stack = of_stage;
      stream = DropoutStream::open(dropout, sequence, args.heads_q, stack);
    }
    const auto first_query = [&](int granule) { return info.query(first_granule + granule); };
    if (dropout.aligned && heads.heads == 1) {
#pragma unroll
      for (int granule = 0; granule < kCount / 8; ++granule) {
        drop_patch<DropAs::kNegative, true>(dropout, stream, first_key, first_query(granule), lane, weights,
                                            8 * granule);
      }
      return;
    }
    drop_singly<DropAs::kNegative, kCount>(weights, [&](int i) {
      const int row = first_query(i / 8) + (i >> 2 & 1) * 8 + 2 * (lane & 3) + (i & 1);  // of the stack
      const int key = first_key + lane / 4 + (i >> 1 & 1) * 8;
      DropoutStream of_head = stream;
      if (heads.heads > 1) {
        of_head =
            DropoutStream::open(dropout, sequence, args.heads_q, of_stage * heads.heads + args.chunks.head_of_row(row));
      }
      return is_dropped(dropout, of_head, row >> heads.rows_log2, key);
    });
  }
};

}  // namespace hbsattn
