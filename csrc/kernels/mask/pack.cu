#include <algorithm>

#include "kernels/common/launch.cuh"
#include "kernels/instances.h"
#include "plan/layout.h"

namespace hbsattn::kernels {
namespace {

using mask::EvenSequences;
using mask::RowPlace;

constexpr int kDenseThreads = 256;
constexpr int kListWarps = 4;
constexpr int kListWords = 512;  // of a bit row, made at a time in shared memory

// Eight columns of a dense row, those before `end` of them, as bits.
__device__ uint32_t read_columns(const uint8_t* row, int64_t col_stride, int count) {
  if (count == 8 && col_stride == 1 && reinterpret_cast<uintptr_t>(row) % 8 == 0) {
    return mask::nonzero_bytes(*reinterpret_cast<const uint64_t*>(row));
  }
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count && row[i * col_stride] != 0) bits |= 1u << i;
  }
  return bits;
}

// Where the table of sequences is there already, nothing is to be done; even ones are written by whom `thread` of
// `threads` says.
__device__ void fill_table(const PackParams&, const Sequence*, int64_t, int64_t) {}
__device__ void fill_table(const PackParams& params, const EvenSequences& sequences, int64_t thread, int64_t threads) {
  for (int64_t b = thread; b < params.shape.batch; b += threads) params.table.sequences[b] = sequences[b];
}

// A thread makes one byte: eight columns. blockDim is (bytes, bit rows), the grid (bit rows, bytes). `Sequences`: the
// table of sequences, or what it is to hold.
template <class Sequences>
__global__ void __launch_bounds__(kDenseThreads) pack_dense_kernel(const PackParams params, const Sequences sequences) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  if (blockIdx.y == 0) {
    const int in_cta = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
    fill_table(params, sequences, int64_t{blockIdx.x} * kDenseThreads + in_cta, int64_t{gridDim.x} * kDenseThreads);
  }
  const MaskShape& shape = params.shape;
  const PackSource& source = params.source;
  const int64_t bit_row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const int64_t byte = int64_t{blockIdx.y} * blockDim.x + threadIdx.x;
  const int64_t row_bytes = shape.words() * 4;
  if (bit_row >= shape.heads * shape.rows || byte >= row_bytes) return;

  const int32_t head = static_cast<int32_t>(bit_row) / static_cast<int32_t>(shape.rows);
  const RowPlace place = mask::locate_row(shape, sequences, bit_row - head * shape.rows);
  const int64_t row = source.flat ? bit_row - head * shape.rows : place.block;
  const int64_t first_col = source.flat ? place.sequence.col_begin : 0;

  int64_t end = mask::visible_columns(shape, place);
  if (row >= source.dense_rows) end = 0;
  end = mask::smaller(end, source.dense_cols - first_col);
  const int count = static_cast<int>(mask::clamp<int64_t>(end - 8 * byte, 0, 8));
  uint32_t bits = 0;
  if (count > 0) {
    const int64_t batch_offset = source.flat ? 0 : place.index * source.batch_stride;
    const uint8_t* first = source.dense + batch_offset + head * source.head_stride + row * source.row_stride +
                           (first_col + 8 * byte) * source.col_stride;
    bits = read_columns(first, source.col_stride, count);
  }
  reinterpret_cast<uint8_t*>(params.bits)[bit_row * row_bytes + byte] = static_cast<uint8_t>(bits);
}

// The entries that a source lists for one bit row.
struct List {
  const int32_t* entries = nullptr;
  int64_t count = 0;
};

__device__ List find_list(const PackParams& params, int32_t head, int64_t row, const RowPlace& place) {
  const MaskShape& shape = params.shape;
  const PackSource& source = params.source;
  if (source.form == PackSource::Form::kCsr) {
    const int32_t* bounds = source.indptr + head * (shape.rows + 1) + row;
    const int64_t begin = mask::clamp<int64_t>(bounds[0], 0, source.nnz);
    const int64_t end = mask::clamp<int64_t>(bounds[1], begin, source.nnz);
    return {source.indices + begin, end - begin};
  }
  int64_t list = head * shape.rows + row;
  if (!source.flat) {
    const int64_t q_blocks = shape.rows / shape.batch;
    if (place.block >= q_blocks) return {};
    list = place.index * source.batch_stride + head * q_blocks + place.block;
  }
  return {source.indices + list * source.width, mask::clamp<int64_t>(source.counts[list], 0, source.width)};
}

// A warp makes one bit row. `Sequences`: as above.
template <class Sequences>
__global__ void __launch_bounds__(32 * kListWarps)
    pack_lists_kernel(const PackParams params, const Sequences sequences) {
  __shared__ uint32_t chunks[kListWarps][kListWords];
  let_next_kernel_start();
  wait_for_earlier_kernels();
  fill_table(params, sequences, int64_t{blockIdx.x} * blockDim.x + threadIdx.x, int64_t{gridDim.x} * blockDim.x);
  const MaskShape& shape = params.shape;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t bit_row = int64_t{blockIdx.x} * kListWarps + warp;
  if (bit_row >= shape.heads * shape.rows) return;

  const int32_t head = static_cast<int32_t>(bit_row) / static_cast<int32_t>(shape.rows);
  const int64_t row = bit_row - head * shape.rows;
  const RowPlace place = mask::locate_row(shape, sequences, row);
  const int64_t visible = mask::visible_columns(shape, place);
  const List list = visible > 0 ? find_list(params, head, row, place) : List{};

  uint32_t* chunk = chunks[warp];
  for (int64_t first_word = 0; first_word < shape.words(); first_word += kListWords) {
    const int words = static_cast<int>(mask::smaller<int64_t>(shape.words() - first_word, kListWords));
    for (int w = lane; w < words; w += 32) chunk[w] = 0;
    __syncwarp();
    const int64_t first_col = first_word * 32;
    const int64_t end_col = mask::smaller<int64_t>(visible, first_col + 32 * words);
    if (first_col < end_col) {
      for (int64_t i = lane; i < list.count; i += 32) {
        const int64_t col = list.entries[i];
        if (col < first_col || col >= end_col) continue;
        const int in_chunk = static_cast<int>(col - first_col);
        atomicOr(&chunk[in_chunk / 32], 1u << in_chunk % 32);
      }
    }
    __syncwarp();
    for (int w = lane; w < words; w += 32) params.bits[bit_row * shape.words() + first_word + w] = chunk[w];
    __syncwarp();
  }
}

template <class Sequences>
Status launch_pack(const PackParams& params, const Sequences& sequences, Stream stream) {
  const int64_t bit_rows = params.shape.heads * params.shape.rows;
  const int64_t row_bytes = params.shape.words() * 4;
  if (params.source.form != PackSource::Form::kDense) {
    const auto grid = static_cast<unsigned>(mask::ceil_div(bit_rows, kListWarps));
    return launch("the launch of pack_lists", pack_lists_kernel<Sequences>, grid, 32 * kListWarps, 0, stream, params,
                  sequences);
  }
  // Short rows share a CTA.
  unsigned bytes = 4;
  while (bytes < kDenseThreads && bytes < row_bytes) bytes *= 2;
  const dim3 block(bytes, kDenseThreads / bytes);
  const dim3 grid(static_cast<unsigned>(mask::ceil_div(bit_rows, block.y)),
                  static_cast<unsigned>(mask::ceil_div(row_bytes, block.x)));
  return launch("the launch of pack_dense", pack_dense_kernel<Sequences>, grid, block, 0, stream, params, sequences);
}

}  // namespace

Status pack_mask(const PackParams& params, Stream stream) {
  const bool some = params.shape.heads * params.shape.rows > 0 && params.shape.words() > 0;
  if (params.table.sequences != nullptr) {
    // Even sequences follow from numbers that the host has: one kernel computes them and packs.
    if (some && params.table.cu_seqlens_q == nullptr) {
      return launch_pack(params, mask::make_even_sequences(params.table), stream);
    }
    HBSATTN_RETURN_IF_ERROR(make_sequences(params.table, stream));
  }
  return some ? launch_pack(params, params.sequences, stream) : Status::Ok();
}

}  // namespace hbsattn::kernels
