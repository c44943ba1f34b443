#pragma once

#include <climits>
#include <cute/tensor.hpp>

#include "kernels/common/query_tiles.cuh"

// Which keys each query of a tile may attend to, and the scores of the others.

namespace hbsattn {

// The last key, in the sequence, that each of a thread's two rows may attend to, less the thread's own column offset
// in a group of 8 columns: what a granule's key position is compared with.
template <bool kGeneral, bool kPairs = false>
struct KeyLimits {
  int value[2];
  int least;     // of the rows of the warp; the general kernel's
  int granules;  // of the warp's query block, in those of a stage

  // Where heads have rules: the buffer of queries, which is that of the tile's rule; where the warp's first row lies
  // among the keys; or, in the general kernel, each of the thread's rows, and the last of the warp's.
  int buffer, place[kGeneral ? 2 : 1], last_place;

  // The limit of a row that does not exist. What its queries are is not known.
  static constexpr int kNoRow = INT_MIN / 2;

  KeyLimits() = default;
  __device__ __forceinline__ KeyLimits(const QueryTiles& args, const WorkItem& item,
                                       [[maybe_unused]] const TileRule& rule, int buffer, int warp_row, int lane)
      : granules(0), buffer(buffer) {
    [[maybe_unused]] bool exists[2];
    int first_row = item.block_row;
    if constexpr (kPairs) {
      first_row = place_row<true>(args, item, warp_row).row;
    } else if (!kGeneral) {
      first_row += args.q_block_size.rem(item.first_row + warp_row);
      place[0] = uniform(first_row + item.diagonal);
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
        this->place[row] = exists[row] ? query + item.diagonal : kNoRow + kGranule;  // no difference overflows
      }
      value[row] = rule_of(args.mask, item).last_key(query, item.k_len);
      if (!kPairs && args.mask.ruled) {
        const HeadRule of_head{rule.left, rule.right, rule.sink, 0};
        value[row] = rule_of(args.mask, item, of_head).last_key(query, item.k_len);
      }
    }
    if constexpr (kGeneral) {
      least = __reduce_min_sync(0xffffffffu, min(exists[0] ? value[0] : INT_MAX, exists[1] ? value[1] : INT_MAX));
      last_place = __reduce_max_sync(0xffffffffu, max(place[0], place[1]));
      if (!exists[0]) value[0] = kNoRow;
      if (!exists[1]) value[1] = kNoRow;
      if (item.united > 1) granules = args.block_rows.div(warp_row);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) value[row] -= 2 * (lane & 3);
  }

  __device__ __forceinline__ int place_of(int row, int lane) const {
    return kGeneral ? place[kGeneral ? row : 0] : place[0] + lane / 4 + 8 * row;
  }
  __device__ __forceinline__ int find_last_place() const { return kGeneral ? last_place : place[0] + kGranule - 1; }
};

// The same where heads have rules: before the sink, causality alone hides keys; behind it, all before the row's window
// are hidden, too.
template <bool kGeneral, class Scores, class CodeOf>
__device__ __forceinline__ void mask_by_rule(const QueryTiles& args, Scores& scores, CodeOf&& code_of,
                                             const KeyLimits<kGeneral>& limits, const TileRule& rule, int lane) {
  const int offset = 2 * (lane & 3), sink = rule.sink - offset;
  const int seen_by_all = max(uniform(limits.find_last_place() - rule.left), uniform(rule.sink));
  CUTE_UNROLL
  for (int i = 0; i < cute::size(scores) / 8; ++i) {
    const int code = code_of(i);
    if (kGeneral && code >= 0 && code + kGranule - 1 <= limits.least && code >= seen_by_all) continue;
    const int first_key = kGeneral ? granule_first_key(code) : code;
    const int last_key = kGeneral ? granule_last_key(code) - offset : INT_MAX;
    CUTE_UNROLL
    for (int row = 0; row < 2; ++row) {
      const int limit = min(limits.value[row], last_key);
      const auto hide = [&](auto&& sees) {
        CUTE_UNROLL
        for (int j = 0; j < 4; ++j) {
          float& score = scores(8 * i + (j >> 1) * 4 + 2 * row + (j & 1));
          score = sees(first_key + (j >> 1) * 8 + (j & 1)) ? score : -INFINITY;
        }
      };
      if (first_key >= seen_by_all) {
        hide([&](int key) { return key <= limit; });
      } else {
        const int first = limits.place_of(row, lane) - rule.left - offset;
        const int sink_limit = args.mask.causal ? limit : min(rule.key_end - 1 - offset, last_key);
        hide([&](int key) { return key < sink ? key <= sink_limit : key >= first && key <= limit; });
      }
    }
  }
}

// One rule for causality, the ends of blocks and sequences, and padding: a key past the row's limit or past its
// block does not count. code_of(i): of the i-th granule of the scores.
template <bool kGeneral, bool kPairs, class Scores, class CodeOf>
__device__ __forceinline__ void mask_by_limits(Scores& scores, CodeOf&& code_of,
                                               const KeyLimits<kGeneral, kPairs>& limits, int lane) {
  CUTE_UNROLL
  for (int i = 0; i < cute::size(scores) / 8; ++i) {
    const int code = code_of(i);
    int first_key = code, limit[2] = {limits.value[0], limits.value[1]};
    if constexpr (kGeneral) {
      if (code >= 0 && code + kGranule - 1 <= limits.least) continue;
      first_key = granule_first_key(code);
      const int last_key = granule_last_key(code) - 2 * (lane & 3);
      limit[0] = min(limit[0], last_key);
      limit[1] = min(limit[1], last_key);
    }
    CUTE_UNROLL
    for (int j = 0; j < 8; ++j) {
      const int key = first_key + (j >> 2) * 8 + (j & 1);
      float& score = scores(8 * i + j);
      score = key > limit[(j >> 1) & 1] ? -INFINITY : score;
    }
  }
}

// What partial blocks ask of a warp's rows.
struct PartialRows {
  int bit_row;      // of the warp's block, over all mask heads
  int first_place;  // where the block's first query lies among the keys

  PartialRows() = default;
  __device__ __forceinline__ PartialRows(const QueryTiles& args, const WorkItem& item, const KeyLimits<true>& limits)
      : bit_row(item.bit_row + limits.granules),
        first_place(item.block_row + limits.granules * args.q_block_size.divisor + item.diagonal) {}
};

// Which keys of a stage count for a thread's two rows by the matrices of partial blocks.
template <int kGranules>
struct PartialStage {
  // Of a granule's 16 keys, one bit each, for the first row and, 16 bits on, for the second.
  uint32_t counts[kGranules];

  PartialStage() = default;
  // What matrices are there is looked up by a lane for each granule, and all their rows are read before any is used.
  // `partial`: the granules that are of partial blocks, one bit each; `code`: that of granule lane % kGranules.
  __device__ __forceinline__ PartialStage(const PartialBlocks& blocks, const PartialRows& rows,
                                          const KeyLimits<true>& limits, uint32_t partial, int code, int lane) {
    int column, in_block, matrix = PartialBlocks::kWhole;
    blocks.k_block_size(column, in_block, granule_first_key(code));
    if (partial >> (lane % kGranules) & 1) matrix = blocks.find(rows.bit_row, min(column, blocks.columns - 1));
    CUTE_UNROLL
    for (int i = 0; i < kGranules; ++i) {
      const int of_granule = __shfl_sync(0xffffffffu, matrix, i);
      const int granule = __shfl_sync(0xffffffffu, in_block, i) / kGranule;
      counts[i] = 0;
      CUTE_UNROLL
      for (int row = 0; row < 2; ++row) {
        const int query = limits.value[row] > limits.kNoRow ? limits.place[row] - rows.first_place : -1;
        counts[i] |= blocks.read(of_granule, query, granule) << (16 * row);
      }
    }
  }

  // Hides the others, besides limits.
  template <class Scores>
  __device__ __forceinline__ void mask(Scores& scores, int lane) const {
    CUTE_UNROLL
    for (int i = 0; i < kGranules; ++i) {
      const uint32_t mine = counts[i] >> (2 * (lane & 3));
      CUTE_UNROLL
      for (int j = 0; j < 8; ++j) {
        float& score = scores(8 * i + j);
        score = mine >> ((j >> 1 & 1) * 16 + (j >> 2) * 8 + (j & 1)) & 1 ? score : -INFINITY;
      }
    }
  }
};

}  // namespace hbsattn
