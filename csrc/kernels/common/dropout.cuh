#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/common/ptx.cuh"
#include "plan/dropout.h"

// Which weights dropout leaves: a number of 15 bits for each pair of a query and a key, out of Philox 4x32 (Salmon et
// al., Parallel random numbers: as easy as 1, 2, 3, SC 2011), that depends on where the two lie in their sequence and
// on nothing that a kernel chooses. hbsattn/_dropout.py has the same function.
//
// A patch of 16 queries and 16 keys takes 16 calls of the generator. A call serves the queries 2a, 2a + 1, 2a + 8 and
// 2a + 9 of a patch and the keys 2b, 2b + 1, 2b + 8 and 2b + 9. In accumulators, whether their rows are the queries or
// the keys, a thread holds 8 of these 16 pairs, and no others: it makes one call for 8 numbers.

namespace hbsattn {

struct PhiloxWords {
  uint32_t word[4];
};

// Written out, as ptxas adds zeros to what it takes out of a product of 64 bits.
__device__ __forceinline__ void multiply(uint32_t a, uint32_t b, uint32_t& low, uint32_t& high) {
  asm("{\n"
      ".reg .b64 product;\n"
      "mul.wide.u32 product, %2, %3;\n"
      "mov.b64 {%0, %1}, product;\n"
      "}\n"
      : "=r"(low), "=r"(high)
      : "r"(a), "r"(b));
}

template <int kRounds>
__device__ __forceinline__ PhiloxWords philox(PhiloxWords x, uint32_t key0, uint32_t key1) {
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    uint32_t low[2], high[2];
    multiply(0xD2511F53, x.word[0], low[0], high[0]);
    multiply(0xCD9E8D57, x.word[2], low[1], high[1]);
    x = {{high[1] ^ x.word[1] ^ key0, low[1], high[0] ^ x.word[3] ^ key1, low[0]}};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return x;
}

// The random numbers of a query head of a sequence.
struct DropoutStream {
  uint32_t word[2];

  static __device__ __forceinline__ DropoutStream open(const Dropout& dropout, int sequence, int heads_q, int head) {
    const auto seed = static_cast<uint64_t>(__ldg(dropout.seed)),
               offset = static_cast<uint64_t>(__ldg(dropout.seed + 1));
    const auto number = static_cast<uint32_t>(sequence) * static_cast<uint32_t>(heads_q) + static_cast<uint32_t>(head);
    const PhiloxWords words =
        philox<10>({{static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32), number, 0}},
                   static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    return {{words.word[0], words.word[1]}};
  }

  // Of the call that serves a query and a key. The words belong to (2a, 2b), (2a, 2b + 1), (2a + 1, 2b), (2a + 1,
  // 2b + 1); a byte of each to those at a distance of (0, 0), (8, 0), (0, 8) and (8, 8).
  __device__ __forceinline__ PhiloxWords draw(uint32_t queries, uint32_t keys) const {
    return philox<7>({{queries, keys, word[0], word[1]}}, 0, 0);
  }
};

// A query, and the random numbers of its head.
struct DropoutRow {
  int query;  // in its sequence
  DropoutStream stream;
};

// Which of the calls of all patches serves a position.
__device__ __forceinline__ uint32_t dropout_call(int position) {
  return static_cast<uint32_t>(position >> 4) * 4 + ((position & 7) >> 1);
}

// Whether the weight of a query and a key is dropped.
__device__ __forceinline__ bool is_dropped(const Dropout& dropout, const DropoutStream& stream, int query, int key) {
  const PhiloxWords words = stream.draw(dropout_call(query), dropout_call(key));
  const bool odd_query = query & 1, odd_key = key & 1;
  const uint32_t of_even_query = odd_key ? words.word[1] : words.word[0];
  const uint32_t high = odd_query ? (odd_key ? words.word[3] : words.word[2]) : of_even_query;
  const uint32_t low = odd_key ? words.word[0] ^ words.word[2] : words.word[1] ^ words.word[3];
  const int shift = 8 * ((query >> 3 & 1) + 2 * (key >> 3 & 1));
  const uint32_t number = (high >> shift & 0x7f) << 8 | (low >> shift & 0xff);
  return (number < dropout.limit) != dropout.below_are_kept;
}

// What becomes of weights that are dropped: they are 0 or, where the weight itself is needed, too, negative.
enum class DropAs { kZero, kNegative };

// Drops up to two weights, by the numbers in the halves of `numbers`.
template <DropAs kAs>
__device__ __forceinline__ void drop_two(const Dropout& dropout, uint32_t numbers, float& first, float& second) {
  const uint32_t limits = dropout.limit * 0x10001u, below_are_kept = dropout.below_are_kept;
  if constexpr (kAs == DropAs::kZero) {
    asm("{\n"
        ".reg .pred p, q, kept;\n"
        "setp.ne.u32 kept, %4, 0;\n"
        "setp.lt.xor.f16x2 p|q, %2, %3, kept;\n"
        "selp.f32 %0, 0f00000000, %0, p;\n"
        "selp.f32 %1, 0f00000000, %1, q;\n"
        "}\n"
        : "+f"(first), "+f"(second)
        : "r"(numbers), "r"(limits), "r"(below_are_kept));
  } else {
    asm("{\n"
        ".reg .pred p, q, kept;\n"
        "setp.ne.u32 kept, %4, 0;\n"
        "setp.lt.xor.f16x2 p|q, %2, %3, kept;\n"
        "@p neg.f32 %0, %0;\n"
        "@q neg.f32 %1, %1;\n"
        "}\n"
        : "+f"(first), "+f"(second)
        : "r"(numbers), "r"(limits), "r"(below_are_kept));
  }
}

// Drops weights of a patch, of which a thread has the eight from index `begin` on. Rows of the accumulators are
// queries, or keys if kKeyRows; `first_row` and `first_column` are where the patch lies in the sequence, multiples
// of 16.
template <DropAs kAs, bool kKeyRows, class Weights>
__device__ __forceinline__ void drop_patch(const Dropout& dropout, const DropoutStream& stream, int first_row,
                                           int first_column, int lane, Weights& weights, int begin) {
  const uint32_t row = dropout_call(first_row) + (lane >> 3), column = dropout_call(first_column) + (lane & 3);
  const PhiloxWords words = kKeyRows ? stream.draw(column, row) : stream.draw(row, column);
  const bool odd_row = lane >> 2 & 1;
  const uint32_t of_even_key = words.word[1] ^ words.word[3], of_odd_key = words.word[0] ^ words.word[2];
#pragma unroll
  for (int odd_column = 0; odd_column < 2; ++odd_column) {
    const uint32_t even = words.word[kKeyRows ? 2 * odd_column : odd_column];
    const uint32_t odd = words.word[kKeyRows ? 2 * odd_column + 1 : 2 + odd_column];
    const uint32_t high = (odd_row ? odd : even) & 0x7f7f7f7fu;
    const uint32_t low = (kKeyRows ? odd_row : odd_column == 1) ? of_odd_key : of_even_key;
    // Eight rows on lies two elements on, eight columns four. Bytes 0 and 1 of a word are eight queries apart.
    constexpr int kEightQueries = kKeyRows ? 4 : 2, kEightKeys = kKeyRows ? 2 : 4;
#pragma unroll
    for (int key = 0; key < 2; ++key) {
      const uint32_t numbers = __byte_perm(high, low, key == 0 ? 0x1504 : 0x3726);
      const int element = begin + odd_column + key * kEightKeys;
      drop_two<kAs>(dropout, numbers, weights(element), weights(element + kEightQueries));
    }
  }
}

// The same for weights anywhere, kCount of a thread; is_dropped_at(i) tells of the i-th. In a loop, of which some
// rounds hide the latency of each other.
template <DropAs kAs, int kCount, class Weights, class IsDroppedAt>
__device__ __forceinline__ void drop_singly(Weights& weights, IsDroppedAt&& is_dropped_at) {
  constexpr int kWords = (kCount + 31) / 32;
  uint32_t dropped[kWords] = {};
#pragma unroll 2
  for (int i = 0; i < kCount; ++i) {
    const uint32_t bit = static_cast<uint32_t>(is_dropped_at(i)) << (i % 32);
#pragma unroll
    for (int word = 0; word < kWords; ++word) dropped[word] |= i / 32 == word ? bit : 0;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (dropped[i / 32] >> (i % 32) & 1) weights(i) = kAs == DropAs::kZero ? 0.f : -weights(i);
  }
}

}  // namespace hbsattn
