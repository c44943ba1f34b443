#pragma once

// What the backward pass needs beside a mask's bits lies in one int32 tensor: the columns of the mask, the work list of
// keys, the work list of queries. Its size depends on shapes alone, so that a traced program knows it; a call that does
// not need one of them leaves it unwritten.

#include "hbsattn/hbsattn.h"

namespace hbsattn {

struct PlanParts {
  int64_t num_items, num_key_items;   // records there is room for
  int64_t columns, key_items, items;  // where each begins, in ints
  int64_t ints;                       // in all

  PlanParts(const MaskShape& shape, int32_t heads_q, int32_t heads_k, bool pack_heads, int64_t rows_k, bool packed)
      : num_items(item_capacity(shape, heads_q, heads_k, pack_heads)),
        num_key_items(key_item_capacity(shape, heads_q, rows_k, packed)) {
    constexpr int64_t kRecordInts = 16;
    static_assert(sizeof(KeyItem) == kRecordInts * sizeof(int32_t) && sizeof(WorkItem) == sizeof(KeyItem));
    columns = 0;
    const int64_t column_ints = shape.heads * shape.cols * shape.row_words();
    key_items = (column_ints + kRecordInts - 1) / kRecordInts * kRecordInts;
    items = key_items + kRecordInts * num_key_items;
    ints = items + kRecordInts * num_items;
  }
};

}  // namespace hbsattn
