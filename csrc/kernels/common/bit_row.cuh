#pragma once

#include <cstdint>

namespace hbsattn {

// Consecutive rows of the bit matrix that are read as one: a block is active if it is with any of them.
struct BitRows {
  const uint32_t* first;
  int count;
  int words;  // of a row

  __device__ __forceinline__ uint32_t word(int index) const {
    uint32_t any = __ldg(first + index);
    for (int row = 1; row < count; ++row) any |= __ldg(first + row * words + index);
    return any;
  }
  // The rows that are active with a column, one bit each.
  __device__ __forceinline__ uint32_t with(int column) const {
    uint32_t rows = 0;
    for (int row = 0; row < count; ++row) {
      rows |= (__ldg(first + row * words + column / 32) >> (column % 32) & 1) << row;
    }
    return rows;
  }
};

// Two rows, of which those columns are active that both have, but each counts as its complement if so told.
struct PairRows {
  const uint32_t* first;
  const uint32_t* second;
  uint32_t flip_first, flip_second;  // ~0: the complement

  __device__ __forceinline__ uint32_t word(int index) const {
    return (__ldg(first + index) ^ flip_first) & (__ldg(second + index) ^ flip_second);
  }
};

// The active blocks of bit rows, largest column first, expanded by one warp into a small ring in shared memory.
// Every kernel that asks which blocks a row has asks it here; dense, causal and sparse rows differ in bits alone.
//
// Lanes hold a chunk of 1024 columns, a word each, while the next chunk is on its way from global memory. A round
// expands kBits columns a lane; columns without blocks are skipped in large steps.
template <int kBits, int kEntries, class Rows = BitRows>
struct BitRow {
  static constexpr int kColumns = 1024;  // of a chunk
  static constexpr int kRoundColumns = 32 * kBits;
  static_assert(kEntries >= kRoundColumns + 32, "a round's columns, and those of the last one that are to be read");
  static_assert((kEntries & (kEntries - 1)) == 0);

  Rows rows;
  int32_t* ring;
  int col_begin, col_end;  // columns outside are ignored
  int lane;
  int chunk;           // that `word` belongs to
  uint32_t word;       // this lane's columns of the chunk
  uint32_t next_word;  // and of the chunk before it
  uint32_t pending;    // words of the chunk that have columns left to expand
  int made = 0;        // entries written so far

  static __device__ __forceinline__ int first_chunk(int col_end) { return (col_end - 1) / kColumns; }

  static __device__ __forceinline__ uint32_t load(const Rows& rows, int col_begin, int col_end, int chunk, int lane) {
    const int first_col = chunk * kColumns + lane * 32;
    if (chunk < 0 || first_col >= col_end || first_col + 32 <= col_begin) return 0;
    uint32_t word = rows.word(first_col / 32);
    if (first_col < col_begin) word &= ~0u << (col_begin - first_col);
    return first_col + 32 <= col_end ? word : word & ((1u << (col_end - first_col)) - 1);
  }

  // `first_word` is load(rows, col_begin, col_end, first_chunk(col_end), lane). A row without columns is not expanded.
  __device__ __forceinline__ BitRow(const Rows& rows, int col_begin, int col_end, int32_t* ring, uint32_t first_word,
                                    int lane)
      : rows(rows),
        ring(ring),
        col_begin(col_begin),
        col_end(col_end),
        lane(lane),
        chunk(first_chunk(col_end)),
        word(first_word),
        next_word(load(rows, col_begin, col_end, chunk - 1, lane)),
        pending(__ballot_sync(0xffffffffu, first_word != 0)) {}

  // What a warp leaves in shared memory, to go on from later.
  struct State {
    uint32_t word[32], next_word[32];
    uint32_t pending;
    int chunk, made;
  };

  __device__ __forceinline__ BitRow(const Rows& rows, int col_begin, int col_end, int32_t* ring, const State& state,
                                    int lane)
      : rows(rows),
        ring(ring),
        col_begin(col_begin),
        col_end(col_end),
        lane(lane),
        chunk(state.chunk),
        word(state.word[lane]),
        next_word(state.next_word[lane]),
        pending(state.pending),
        made(state.made) {}

  __device__ __forceinline__ void leave(State& state) const {
    __syncwarp();  // all lanes have read what is overwritten
    state.word[lane] = word;
    state.next_word[lane] = next_word;
    if (lane == 0) {
      state.pending = pending;
      state.chunk = chunk;
      state.made = made;
    }
    __syncwarp();
  }

  // Makes at least `count` entries, or all there are.
  __device__ __forceinline__ void expand(int count) {
    __syncwarp();  // lanes have read what is overwritten
    while (made < count) {
      while (pending == 0) {
        if (--chunk < col_begin / kColumns) return;
        word = next_word;
        next_word = load(rows, col_begin, col_end, chunk - 1, lane);
        pending = __ballot_sync(0xffffffffu, word != 0);
      }
      // The round's words are kBits in a row; all above them are done. Lane 0 has the largest columns.
      const int first_word = (31 - __clz(pending)) / kBits * kBits;
      pending &= (1u << first_word) - 1;
      const int offset = (31 - lane) * kBits;
      const uint32_t bits = __shfl_sync(0xffffffffu, word, first_word + offset / 32) >> (offset % 32);
      const uint32_t larger = (1u << lane) - 1;  // lanes
      int position = made;
      uint32_t with[kBits];
#pragma unroll
      for (int bit = 0; bit < kBits; ++bit) {
        with[bit] = __ballot_sync(0xffffffffu, (bits >> bit) & 1);
        position += __popc(with[bit] & larger);
        made += __popc(with[bit]);
      }
#pragma unroll
      for (int bit = kBits - 1; bit >= 0; --bit) {
        if ((bits >> bit) & 1) ring[position++ & (kEntries - 1)] = chunk * kColumns + first_word * 32 + offset + bit;
      }
      __syncwarp();
    }
  }

  __device__ __forceinline__ int column(int position) const { return ring[position & (kEntries - 1)]; }
};

}  // namespace hbsattn
