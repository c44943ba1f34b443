#pragma once

#include "hbsattn/params.h"
#include "kernels/sm90/tensor_map.h"
#include "plan/rows.h"

namespace hbsattn::kernels {

// A batched tensor's entries are runs of rows of one long matrix: `batch_rows` apart.
struct RowsOfTensor {
  MatrixRows matrix;
  int batch_rows;
};

inline RowsOfTensor rows_of(const TensorView& view, const ForwardParams& params, int64_t rows, int heads) {
  const auto [batch_rows, all_rows] = span_rows(params, view, rows);
  // The stride of a dimension of one is arbitrary in torch; the copy engine wants a sane one.
  const int64_t head_stride = heads > 1 ? view.head_stride : params.head_dim;
  const int64_t row_stride = all_rows > 1 ? view.row_stride : params.head_dim;
  return {{view.data, all_rows, row_stride, heads, head_stride, params.head_dim, params.dtype},
          static_cast<int>(batch_rows)};
}

}  // namespace hbsattn::kernels
