#pragma once

// Builds the tensor maps that the copy engine (TMA) reads. Host code, CuTe-free.

#include <cuda.h>

#include "hbsattn/params.h"
#include "hbsattn/status.h"

namespace hbsattn {

// A tensor as the copy engine sees it: rows, or heads, of all batch entries in one dimension.
struct MatrixRows {
  void* data;
  int64_t rows;        // in all
  int64_t row_stride;  // elements
  int64_t heads;
  int64_t head_stride;  // elements
  int columns;
  DType dtype;

  // Of `chunk` columns each.
  constexpr int chunks(int chunk) const { return (columns + chunk - 1) / chunk; }
};

// Boxes are `chunk` = 64 or 32 columns wide, which is also the width of their swizzle.

// (columns, rows, heads) with a box of a chunk of `box_rows` rows of `box_heads` heads. Columns behind the last read as
// zeros and are not written.
Status encode_rows(const MatrixRows& tensor, int chunk, int box_rows, int box_heads, CUtensorMap* map);

// (columns of a chunk, rows, chunks, groups of 8 rows, heads) with a box of `box_rows` whole rows of `chunks` chunks,
// of `box_heads` heads, which arrive as [head][group of 8][chunk][8][columns]. Columns behind the last are what follows
// in memory, up to the end of its chunk; chunks behind that read as zeros. Needs box_rows % 8 == 0.
Status encode_whole_rows(const MatrixRows& tensor, int chunk, int chunks, int box_rows, CUtensorMap* map,
                         int box_heads = 1);

// (columns, heads of a group, groups, 1, rows) with a box of a chunk of 8 heads of a row. Columns behind the last and
// heads of the next group read as zeros.
Status encode_eight_heads(const MatrixRows& tensor, int chunk, int group, CUtensorMap* map);

// 8 rows of a chunk of a run of rows that may end anywhere; rows past the end read as zeros although the tensor goes
// on. A box that starts `r` rows into a run of `n` rows that begins at row `b` has the coordinates
//   (column, kRunEnd - n + r, kRunEnd, b + n, head).
// The second coordinate makes the hardware's bounds check stop at the run's end. The other two undo its effect on the
// address: the third dimension's stride is 2^34 - row_stride bytes, so kRunEnd = 2^30 of them are
// -2^30 rows modulo 2^64.
inline constexpr int kRunEnd = 1 << 30;
Status encode_clipped_rows(const MatrixRows& tensor, int chunk, CUtensorMap* map);

}  // namespace hbsattn
