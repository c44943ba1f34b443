#pragma once

#include "kernels/common/key_tiles.cuh"
#include "plan/layout.h"
#include "plan/mask_heads.h"
#include "plan/rule.h"

// Which keys of a tile some query sees.

namespace hbsattn {

// Keys, from the tile's first on, that some query sees which attends to one of the united blocks. What lies behind must
// not be read: a weight of 0 does not silence a NaN.
__device__ __forceinline__ int count_seen_keys(const KeyTiles& args, const KeyItem& item, int block, int lane) {
  if (!args.mask.causal && !args.mask.ruled) return item.active >> block & 1 ? item.keys : 0;
  // Both counted from the tile's first key on.
  const auto count = [&](int last_row, int head) {
    if (last_row < 0) return 0;
    const int last_query = min((last_row - item.row_begin + 1) * args.mask.q_block_size, item.q_len) - 1;
    HeadRule rule = read_rule(args.rules, mask_of_head(head, args.heads_of_mask));
    rule.sink -= item.first_key;
    return max(rule_of(args.mask, item, rule).visible_end(last_query - item.first_key, item.keys), 0);
  };
  int last_row = -1, seen = 0;
  const int first_head = args.sets.first_head(item.query_set);
  for (int head = first_head; head < first_head + args.sets.tile_heads; head += args.heads_of_mask) {
    const ColumnBits bits(args, item, head);
    const uint32_t* column = bits.rows.first + static_cast<int64_t>(block) * bits.rows.words;
    const auto [begin, end] = bits.blocks;
    for (int top = (end - 1) / 32; 32 * top + 31 >= begin && 32 * top + 31 > last_row; top -= 32) {
      const int word = top - lane;
      uint32_t rows = word >= 0 && begin < end ? __ldg(column + word) : 0;
      rows &= mask::bits_before(end, word) & ~mask::bits_before(begin, word);
      const int last = rows == 0 ? -1 : 32 * word + 31 - __clz(rows);
      last_row = max(last_row, __reduce_max_sync(0xffffffffu, last));
    }
    if (!args.mask.ruled) continue;
    seen = max(seen, count(last_row, head));
    last_row = -1;
  }
  return args.mask.ruled ? seen : count(last_row, first_head);
}

}  // namespace hbsattn
