#pragma once

#include <cstdint>

#include "plan/rows.h"

// Rows of packed tensors that belong to no tile: what lies behind the last sequence, and queries or keys that the mask
// has no block for. Results there are those of rows with nothing to attend.

namespace hbsattn {

// One warp of each of `ctas` CTAs calls it: find(index) is the gap behind a sequence, and write(row) is called by all
// lanes of one of the warps. Gaps between sequences are rare; the rows behind the last one are shared out.
template <class Find, class Write>
__device__ __forceinline__ void visit_gaps(int sequences, int cta, int ctas, int lane, Find&& find, Write&& write) {
  for (int64_t first = int64_t{32} * cta - 1; first < sequences - 1; first += int64_t{32} * ctas) {
    const int64_t index = first + lane;
    RowGap mine{0, 0};
    if (index < sequences - 1) mine = find(static_cast<int>(index));
    for (uint32_t open = __ballot_sync(0xffffffffu, mine.begin < mine.end); open != 0; open &= open - 1) {
      const int source = __ffs(static_cast<int>(open)) - 1;
      const int end = __shfl_sync(0xffffffffu, mine.end, source);
      for (int row = __shfl_sync(0xffffffffu, mine.begin, source); row < end; ++row) write(row);
    }
  }
  const RowGap last = find(sequences - 1);
  for (int64_t row = int64_t{last.begin} + cta; row < last.end; row += ctas) write(static_cast<int>(row));
}

// A warp writes zeros to a row of `heads` heads of a tensor, whose elements have so many bytes. Strides in elements.
__device__ __forceinline__ void clear_row(void* tensor, int64_t row, int64_t row_stride, int64_t head_stride, int heads,
                                          int head_dim, int element_bytes, int lane) {
  auto* row_data = static_cast<uint8_t*>(tensor) + row * row_stride * element_bytes;
  const int row_bytes = head_dim * element_bytes;
  for (int head = 0; head < heads; ++head) {
    for (int byte = 16 * lane; byte < row_bytes; byte += 16 * 32) {
      *reinterpret_cast<uint4*>(row_data + head * head_stride * element_bytes + byte) = make_uint4(0, 0, 0, 0);
    }
  }
}

}  // namespace hbsattn
