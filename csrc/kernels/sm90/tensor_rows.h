#pragma once

#include <algorithm>

#include "hbsattn/params.h"
#include "kernels/sm90/tensor_map.h"

namespace hbsattn::kernels {

// A batched tensor's entries are runs of rows of one long matrix, `batch_rows` apart, or, where batch entries lie
// between rows, heads of it, `batch_heads` apart. The other is 0.
struct RowsOfTensor {
  MatrixRows matrix;
  int batch_rows, batch_heads;

  // Its longest dimension: of rows or of heads.
  int64_t span() const { return std::max(matrix.rows, matrix.heads); }
};

inline RowsOfTensor rows_of(const TensorView& view, const ForwardParams& params, int64_t rows, int heads) {
  const bool batched = !params.packed && params.mask.shape.batch > 1;
  const bool by_rows = batched && view.batch_stride % view.row_stride == 0, by_heads = batched && !by_rows;
  const int64_t batch_rows = by_rows ? view.batch_stride / view.row_stride : 0;
  const int64_t batch_heads = by_heads ? view.batch_stride / view.head_stride : 0;
  const int64_t others = params.mask.shape.batch - 1;
  const int64_t all_rows = others * batch_rows + rows, all_heads = others * batch_heads + heads;
  // The stride of a dimension of one is arbitrary in torch; the copy engine wants a sane one.
  const int64_t head_stride = all_heads > 1 ? view.head_stride : params.head_dim;
  const int64_t row_stride = all_rows > 1 ? view.row_stride : params.head_dim;
  return {{view.data, all_rows, row_stride, all_heads, head_stride, params.head_dim, params.dtype},
          static_cast<int>(batch_rows),
          static_cast<int>(batch_heads)};
}

}  // namespace hbsattn::kernels
