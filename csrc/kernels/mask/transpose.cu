#include "kernels/common/launch.cuh"
#include "kernels/instances.h"
#include "plan/layout.h"

namespace hbsattn::kernels {
namespace {

// A CTA transposes a square of kWords words of rows by kWords words of columns: at both ends a line of it is a sector
// of memory. Each warp takes one word of rows.
constexpr int kWords = 8;
constexpr int kThreads = 32 * kWords;

// Bit i of the word that lane j gives becomes bit j of the one that lane i gets: five times, lanes that differ in one
// bit of their number swap the bits that differ in the same bit of theirs.
__device__ uint32_t transpose_warp(uint32_t word, int lane) {
  uint32_t low = 0x0000ffffu;  // bits whose number has a 0 there
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) {
    const uint32_t other = __shfl_xor_sync(~0u, word, delta);
    word = (lane & delta) == 0 ? (word & low) | (other & low) << delta : (word & ~low) | (other & ~low) >> delta;
    low ^= low << (delta / 2);
  }
  return word;
}

__global__ void __launch_bounds__(kThreads)
    transpose_kernel(const MaskShape shape, const uint32_t* bits, uint32_t* columns) {
  __shared__ uint32_t square[kThreads][kWords + 1];
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t words = shape.words(), row_words = shape.row_words();
  const auto squares_across = static_cast<uint32_t>(mask::ceil_div(words, kWords));
  const auto squares_down = static_cast<uint32_t>(mask::ceil_div(row_words, kWords));
  const uint32_t line = blockIdx.x / squares_across;
  const int64_t first_word = int64_t{blockIdx.x % squares_across} * kWords;
  const int64_t first_row_word = int64_t{line % squares_down} * kWords;
  const int64_t head = line / squares_down;

  const int64_t row = 32 * (first_row_word + warp) + lane;
  const uint32_t* source = bits + (head * shape.rows + row) * words + first_word;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const uint32_t word = row < shape.rows && first_word + i < words ? source[i] : 0;
    square[32 * i + lane][warp] = transpose_warp(word, lane);
  }
  __syncthreads();

  const int in_line = threadIdx.x % kWords;
  if (first_row_word + in_line >= row_words) return;
  for (int i = threadIdx.x / kWords; i < kThreads; i += kThreads / kWords) {
    const int64_t col = 32 * first_word + i;
    if (col >= shape.cols) break;
    columns[(head * shape.cols + col) * row_words + first_row_word + in_line] = square[i][in_line];
  }
}

}  // namespace

Status transpose_mask(const TransposeParams& params, Stream stream) {
  const MaskShape& shape = params.mask.shape;
  const int64_t squares =
      shape.heads * mask::ceil_div(shape.words(), kWords) * mask::ceil_div(shape.row_words(), kWords);
  if (squares == 0) return Status::Ok();
  return launch("the launch of transpose", transpose_kernel, static_cast<unsigned>(squares), kThreads, 0, stream, shape,
                params.mask.bits, params.columns);
}

}  // namespace hbsattn::kernels
