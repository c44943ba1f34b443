#pragma once

#include "plan/tiles.h"

namespace hbsattn {
constexpr int64_t max_items_of(const MaskShape& shape, int32_t heads_q, int32_t heads_k, bool pack_heads) {
  const int32_t group = heads_q / heads_k;
  int32_t heads = 1;
  if (pack_heads && !(shape.heads == heads_q && group > 1)) {
    if (shape.q_block_size % 16 == 0) {
      heads = group;
    } else {
      for (int32_t n = 2; n <= group && int64_t{n} * shape.q_block_size <= 64; ++n) {
        if (group % n == 0) heads = n;
      }
    }
  }
  return heads_q / heads * shape.rows * ((int64_t{heads} * shape.q_block_size + 63) / 64);
}
}
