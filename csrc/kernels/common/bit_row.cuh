#pragma once

#include <cstdint>

namespace hbsattn {

// The active blocks of one bit row, largest column first, expanded by one warp into a small ring in shared memory.
// Every kernel that asks which blocks a row has asks it here; dense, causal and sparse rows differ in bits alone.
//
// A round takes a chunk of 256 columns, eight per lane. The chunk after the current one is already on its way from
// global memory while the current one is used.
struct BitRow {
  static constexpr int kEntries = 512;  // ring size: two full chunks
  static constexpr int kChunkBytes = 32;

  const uint8_t* row;
  int32_t* ring;
  int row_bytes;
  int col_end;   // columns from here on are ignored
  int chunk;     // the chunk that `next_byte` belongs to
  int made = 0;  // entries written so far
  uint32_t next_byte;

  // Byte of `lane` in a chunk: lane 0 has the largest columns.
  static __device__ __forceinline__ uint32_t load(const uint8_t* row, int row_bytes, int chunk, int lane) {
    const int index = chunk * kChunkBytes + kChunkBytes - 1 - lane;
    return index < row_bytes ? __ldg(row + index) : 0u;
  }

  static __device__ __forceinline__ int first_chunk(int col_end) { return (col_end - 1) >> 8; }

  // `first_byte` is load(row, row_bytes, first_chunk(col_end), lane).
  __device__ __forceinline__ BitRow(const uint8_t* row, int row_bytes, int col_end, int32_t* ring, uint32_t first_byte)
      : row(row),
        ring(ring),
        row_bytes(row_bytes),
        col_end(col_end),
        chunk(first_chunk(col_end)),
        next_byte(first_byte) {}

  // Makes at least `count` entries, or all there are.
  __device__ __forceinline__ void expand(int count, int lane) {
    while (made < count && chunk >= 0) {
      const int first_col = (chunk * kChunkBytes + kChunkBytes - 1 - lane) * 8;
      uint32_t byte = next_byte;
      if (first_col + 8 > col_end) byte &= (1u << max(col_end - first_col, 0)) - 1u;
      if (--chunk >= 0) next_byte = load(row, row_bytes, chunk, lane);

      const int count_here = __popc(byte);
      int inclusive = count_here;
#pragma unroll
      for (int delta = 1; delta < 32; delta <<= 1) {
        const int below = __shfl_up_sync(0xffffffffu, inclusive, delta);
        if (lane >= delta) inclusive += below;
      }
      int position = made + inclusive - count_here;
      made += __shfl_sync(0xffffffffu, inclusive, 31);
      __syncwarp();
      while (byte) {
        const int bit = 31 - __clz(byte);
        ring[position++ & (kEntries - 1)] = first_col + bit;
        byte ^= 1u << bit;
      }
      __syncwarp();
    }
  }

  __device__ __forceinline__ int column(int position) const { return ring[position & (kEntries - 1)]; }
};

}  // namespace hbsattn
