#pragma once

#include "hbsattn/params.h"
#include "kernels/sm90/tensor_map.h"
#include "plan/rows.h"

namespace hbsattn::kernels {

// A tensor as the copy engine sees it, and how far apart its batch entries are.
struct RowsOfTensor {
  MatrixRows matrix;
  int batch_rows, batch_heads;
};

inline RowsOfTensor rows_of(const TensorView& view, const ForwardParams& params, int64_t rows, int heads) {
  const TensorSpan span = span_tensor(params, view, rows, heads);
  // The stride of a dimension of one is arbitrary in torch; the copy engine wants a sane one.
  const int32_t columns = view_of(params, view).columns;
  const int64_t head_stride = span.heads > 1 ? view.head_stride : columns;
  const int64_t row_stride = span.rows > 1 ? view.row_stride : columns;
  return {{view.data, span.rows, row_stride, span.heads, head_stride, columns, params.dtype},
          static_cast<int>(span.batch_rows),
          static_cast<int>(span.batch_heads)};
}

// The heads of each row as rows, and the rows as heads.
inline MatrixRows exchange_rows_and_heads(const MatrixRows& matrix) {
  return {matrix.data, matrix.heads, matrix.head_stride, matrix.rows, matrix.row_stride, matrix.columns, matrix.dtype};
}

}  // namespace hbsattn::kernels
