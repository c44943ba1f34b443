#pragma once

#include <climits>
#include <cute/tensor.hpp>

#include "kernels/sm90/query_tiles/producer.cuh"
#include "kernels/sm90/query_tiles/traits.cuh"
#include "plan/rule.h"

// Which keys each query of a tile may attend to, and the scores of the others.

namespace hbsattn::sm90 {

// The last key, in the sequence, that each of a thread's two rows may attend to, less the thread's own column offset
// in a group of 8 columns: what a granule's key position is compared with.
template <bool kGeneral, bool kPairs = false>
struct KeyLimits {
  int value[2];
  int least;     // of the rows of the warp; the general kernel's
  int granules;  // of the warp's query block, in those of a stage
  // Where heads have rules, the general kernel's: the first key in each row's window, less the same offset, and the
  // last of them; keys before `sink` are hidden by no window, and only from `sink_value` on by causality.
  int first[2], latest, sink, sink_value[2];

  // The limit of a row that does not exist. What its queries are is not known.
  static constexpr int kNoRow = INT_MIN / 2;

  __device__ __forceinline__ KeyLimits(const QueryTileArguments& args, const WorkItem& item,
                                       [[maybe_unused]] const HeadRule& rule, int warp_row, int lane)
      : granules(0) {
    [[maybe_unused]] bool exists[2];
    int first_row = item.block_row;
    if constexpr (kPairs) {
      first_row = place_row<true>(args, item, warp_row).row;
    } else if (!kGeneral) {
      first_row += args.q_block_size.rem(item.first_row + warp_row);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int in_warp = lane / 4 + 8 * row;
      int query = first_row + in_warp;
      if constexpr (kGeneral) {
        // In a box of several heads, those of a warp's rows may differ.
        const RowPlace place = place_row<kGeneral>(args, item, warp_row + in_warp);
        query = place.row;
        exists[row] = place.count > 0;
      }
      value[row] = rule_of(args.mask, item).last_key(query, item.k_len);
      if constexpr (kGeneral) {
        const WindowRule<int32_t> window = rule_of(args.mask, item, rule);
        value[row] = window.last_key(query, item.k_len);
        first[row] = window.first_key(query);
        sink_value[row] = window.last_sink_key(query, item.k_len);
      }
    }
    const int offset = 2 * (lane & 3);
    if constexpr (kGeneral) {
      least = __reduce_min_sync(0xffffffffu, min(exists[0] ? value[0] : INT_MAX, exists[1] ? value[1] : INT_MAX));
      latest = __reduce_max_sync(0xffffffffu, max(exists[0] ? first[0] : INT_MIN, exists[1] ? first[1] : INT_MIN));
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        if (!exists[row]) value[row] = sink_value[row] = kNoRow;
        first[row] -= offset;
        sink_value[row] -= offset;
      }
      sink = min(rule.sink, item.k_len) - offset;
      if (item.united > 1) granules = args.block_rows.div(warp_row);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) value[row] -= offset;
  }
};

// One rule for causality, the ends of blocks and sequences, and padding: a key past the row's limit or past its
// block does not count. Where heads have rules, nor does one before the row's window, but for the sink. `granules`:
// those of the stage.
template <class Traits, bool kGeneral, bool kPairs, class Scores>
__device__ __forceinline__ void mask_scores(Scores& scores, const int32_t* granules,
                                            const KeyLimits<kGeneral, kPairs>& limits, int lane) {
  if (kGeneral) granules += limits.granules * Traits::kGranules;
  CUTE_UNROLL
  for (int i = 0; i < Traits::kGranules; ++i) {
    // Lane 0 alone reads, because its arrival at keys_empty is what lets the producer overwrite them.
    const int code = __shfl_sync(0xffffffffu, lane == 0 ? granules[i] : 0, 0);
    int first_key = code, limit[2] = {limits.value[0], limits.value[1]};
    if constexpr (kGeneral) {
      if (code >= 0 && code + kGranule - 1 <= limits.least && code >= limits.latest) continue;
      first_key = granule_first_key(code);
      const int last_key = granule_last_key(code) - 2 * (lane & 3);
      limit[0] = min(limit[0], last_key);
      limit[1] = min(limit[1], last_key);
      if (first_key < limits.latest) {
        const int sink_limit[2] = {min(limits.sink_value[0], last_key), min(limits.sink_value[1], last_key)};
        CUTE_UNROLL
        for (int j = 0; j < 8; ++j) {
          const int key = first_key + (j >> 2) * 8 + (j & 1), row = (j >> 1) & 1;
          const bool of_sink = key < limits.sink;
          const bool seen = key <= (of_sink ? sink_limit[row] : limit[row]) && (of_sink || key >= limits.first[row]);
          float& score = scores(8 * i + j);
          score = seen ? score : -INFINITY;
        }
        continue;
      }
    }
    CUTE_UNROLL
    for (int j = 0; j < 8; ++j) {
      const int key = first_key + (j >> 2) * 8 + (j & 1);
      float& score = scores(8 * i + j);
      score = key > limit[(j >> 1) & 1] ? -INFINITY : score;
    }
  }
}

}  // namespace hbsattn::sm90
