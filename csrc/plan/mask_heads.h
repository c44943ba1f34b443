#pragma once

// Which mask a query head has. Neighbouring heads share one, each mask as many. Nobody else knows that: where heads are
// to name their masks, a table takes the place of these functions.

#include <cstdint>

#include "hbsattn/params.h"

namespace hbsattn {

constexpr int32_t count_heads_of_mask(const MaskShape& shape, int32_t heads_q) { return heads_q / shape.heads; }

// `heads_of_mask`: count_heads_of_mask().
constexpr int32_t mask_of_head(int32_t head, int32_t heads_of_mask) { return head / heads_of_mask; }

// Masks of a run of query heads: all share one, or the run holds all heads of each.
constexpr int32_t count_masks_of_heads(int32_t heads, int32_t heads_of_mask) {
  return heads <= heads_of_mask ? 1 : heads / heads_of_mask;
}

}  // namespace hbsattn
