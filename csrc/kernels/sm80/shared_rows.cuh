#pragma once

#include <cute/tensor.hpp>

#include "kernels/common/convert.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/sm80/ptx.cuh"

// Matrices of 16-bit numbers or float32 in shared memory, and products of them. A step of a product is 16 columns of
// its first operand, or 8 of float32: 32 bytes of a row.

namespace hbsattn::sm80 {

// Rows lie in chunks of 128 bytes, or 64 where their length is no multiple of that: [chunk][row][columns]. In a chunk
// the vectors of 16 bytes of a row are exchanged by the row's place, so that the same vector of 8 rows is in all banks.
template <class Element_, int kRows_, int kColumns_>
struct SharedRows {
  using Element = Element_;
  static constexpr int kRows = kRows_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kVectorColumns = 16 / sizeof(Element);
  static constexpr int kStepColumns = 2 * kVectorColumns;
  static constexpr int kVectors = kColumns / kVectorColumns;
  static constexpr int kChunkVectors = kVectors % 8 == 0 ? 8 : 4;
  static constexpr int kChunks = kVectors / kChunkVectors;
  static constexpr int kRowBytes = 16 * kChunkVectors;  // of a chunk
  static constexpr int kChunkBytes = kRows * kRowBytes;
  static constexpr int kBytes = kChunks * kChunkBytes;
  static_assert(kVectors % kChunkVectors == 0 && kRows % 16 == 0);

  static __device__ __forceinline__ uint32_t offset(int row, int vector) {
    const int exchanged = kChunkVectors == 8 ? row & 7 : row >> 1 & 3;
    return vector / kChunkVectors * kChunkBytes + row * kRowBytes + (vector % kChunkVectors ^ exchanged) * 16;
  }

  // Of the two columns of a group of 8 that a lane has in accumulators.
  static __device__ __forceinline__ uint32_t offset_of_pair(int row, int group, int lane) {
    if constexpr (sizeof(Element) == 2) {
      return offset(row, group) + lane % 4 * 4;
    } else {
      return offset(row, 2 * group + lane % 4 / 2) + lane % 2 * 8;
    }
  }
};

// Stores two neighbouring columns of an accumulator.
template <class Element>
__device__ __forceinline__ void store_pair(void* destination, float low, float high) {
  if constexpr (std::is_same_v<Element, float>) {
    *static_cast<float2*>(destination) = make_float2(low, high);
  } else {
    *static_cast<uint32_t*>(destination) = pack_pair<Element>(low, high);
  }
}

// What patches are read as: first operands of products, of 16 rows and a step's columns, or of 16 columns and a step's
// rows; second ones, of a step's columns, for 8 of 16 rows each; or second ones, of a step's rows, for 8 of 16 columns
// each.
enum class Operand { kFirst, kFirstByColumns, kByRows, kByColumns };

// Reads patches of a matrix. Words of first operands, by halves of rows and of columns of the operand: (0, 0), (1, 0),
// (0, 1), (1, 1); of the others, two second operands.
template <class Rows, Operand kAs = Operand::kFirst>
struct PatchReader {
  // Rows of a step of float32 are taken in an order in which a lane has two that follow one another, as it has such
  // columns of accumulators. Rows of 32 bits cannot be transposed by ldmatrix.
  static constexpr bool kTransposed = kAs == Operand::kByColumns || kAs == Operand::kFirstByColumns;
  static constexpr bool kByWords = kTransposed && sizeof(typename Rows::Element) == 4;
  static_assert(!kByWords || kAs == Operand::kByColumns);

  uint32_t address;  // of this lane's vector of the first patch, or of its word

  // `matrix` is aligned to 128 bytes.
  __device__ __forceinline__ PatchReader(uint32_t matrix, int lane)
      : address(matrix + (kByWords ? Rows::offset(2 * (lane & 3), lane >> 4) + (lane >> 2 & 3) * 4
                          : kAs == Operand::kByRows || kAs == Operand::kFirstByColumns
                              ? Rows::offset((lane & 7) + lane / 16 * 8, lane >> 3 & 1)
                              : Rows::offset(lane & 15, lane >> 4))) {}

  // `row`: of the first; `patch`: of 32 bytes of a row or, of kByColumns, of 16 columns.
  __device__ __forceinline__ void read(int row, int patch, uint32_t (&words)[4]) const {
    if constexpr (kByWords) {
      static_assert(Rows::kRowBytes == 128);
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int vector = 4 * patch + i / 2 * 2, odd = i % 2;  // whose row's vectors are exchanged with neighbours
        words[i] = load_word((address ^ (vector % Rows::kChunkVectors + odd) * 16) + (row + odd) * Rows::kRowBytes +
                             vector / Rows::kChunkVectors * Rows::kChunkBytes);
      }
    } else {
      constexpr int kPatches = Rows::kChunkVectors / 2;  // of a chunk
      load_matrices<kTransposed>(
          (address ^ (patch % kPatches * 32)) + row * Rows::kRowBytes + patch / kPatches * Rows::kChunkBytes, words);
    }
  }
};

// Accumulators of a warp's 16 rows: a lane's linear index is column pair + 2 * row + 4 * (group of 8 columns), for the
// rows lane / 4 and lane / 4 + 8 and the columns 2 (lane % 4) of a group.
template <int kColumns>
using Accumulator = decltype(cute::make_tensor<float>(cute::Shape<cute::Int<kColumns / 2>>{}));

// Of an accumulator, the columns of a step as a first operand.
template <class Element, class Sum>
__device__ __forceinline__ void to_operand(const Sum& sum, int step, uint32_t (&words)[4]) {
  CUTE_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<Element, float>) {
      words[i] = __float_as_uint(sum(4 * step + i % 2 * 2 + i / 2));
    } else {
      words[i] = pack_pair<Element>(sum(8 * step + 2 * i), sum(8 * step + 2 * i + 1));
    }
  }
}

// Of a step of a product of float32 numbers, the factors of some patches in two parts each. Those of keys and values
// are cut (kCuts), which takes an instruction less, those of queries rounded: what both parts of two numbers leave out
// of their product is then as often above it as below.
template <int kStrips_, int kPatches_, bool kCutsA>
struct SplitFactors {
  static constexpr int kStrips = kStrips_;
  static constexpr int kPatches = kPatches_;
  uint32_t a_high[kStrips][4], a_low[kStrips][4], b_high[kPatches][4], b_low[kPatches][4];

  __device__ __forceinline__ void set_a(const uint32_t (&words)[kStrips][4]) {
    CUTE_UNROLL
    for (int i = 0; i < 4 * kStrips; ++i) {
      split_float<kCutsA>(words[i / 4][i % 4], a_high[i / 4][i % 4], a_low[i / 4][i % 4]);
    }
  }
  __device__ __forceinline__ void set_b(int patch, const uint32_t (&words)[4]) {
    CUTE_UNROLL
    for (int i = 0; i < 4; ++i) split_float<!kCutsA>(words[i], b_high[patch][i], b_low[patch][i]);
  }
};

// Of what three products of parts add up to, the sums of the two lesser ones are apart: tensor cores cut what they add
// to a sum to its own last digits, always downwards, and with sums of the greater ones alone that happens a third as
// often. The products of some patches come one after another, as those that add to the same sum wait for each other.
// kTransposed: which of the two lesser products comes first, so that scores of keys and queries are bitwise those of
// queries and keys.
template <bool kTransposed, class Sum, class Factors>
__device__ __forceinline__ void multiply_split(Sum (&greater)[Factors::kStrips], Sum (&lesser)[Factors::kStrips],
                                               int first_patch, const Factors& factors) {
  const auto multiply = [&](Sum(&sums)[Factors::kStrips], const auto& a, const auto& b) {
    CUTE_UNROLL
    for (int patch = 0; patch < Factors::kPatches; ++patch) {
      CUTE_UNROLL
      for (int strip = 0; strip < Factors::kStrips; ++strip) {
        multiply_add_tf32(sums[strip], 2 * (first_patch + patch), a[strip], b[patch][0], b[patch][1]);
        multiply_add_tf32(sums[strip], 2 * (first_patch + patch) + 1, a[strip], b[patch][2], b[patch][3]);
      }
    }
  };
  multiply(lesser, kTransposed ? factors.a_high : factors.a_low, kTransposed ? factors.b_low : factors.b_high);
  multiply(greater, factors.a_high, factors.b_high);
  multiply(lesser, kTransposed ? factors.a_low : factors.a_high, kTransposed ? factors.b_high : factors.b_low);
}

// For the same reason, sums of long products of float32 numbers are made of those of so many steps.
inline constexpr int kSplitSteps = 4;

template <class Sum>
__device__ __forceinline__ void add_to(Sum& sum, const Sum& part) {
  CUTE_UNROLL
  for (int i = 0; i < cute::size(sum); ++i) sum(i) += part(i);
}

// Of multiply_rows(), kSplitSteps steps of float32 numbers; lesser products are added to `lesser`.
template <bool kTransposed, int kStrips, class ReadRows, class RowsB, class Sum>
__device__ __forceinline__ void multiply_split_rows(Sum (&sums)[kStrips], Sum (&lesser)[kStrips], ReadRows&& read_rows,
                                                    const PatchReader<RowsB, Operand::kByRows>& b, int first_step) {
  constexpr int kPatches = RowsB::kRows / 16, kTogether = kPatches % 2 == 0 ? 2 : 1;
  CUTE_UNROLL
  for (int strip = 0; strip < kStrips; ++strip) cute::clear(sums[strip]);
  CUTE_UNROLL
  for (int step = first_step; step < first_step + kSplitSteps; ++step) {
    SplitFactors<kStrips, kTogether, kTransposed> factors;
    uint32_t of_a[kStrips][4];
    read_rows(step, of_a);
    factors.set_a(of_a);
    CUTE_UNROLL
    for (int patch = 0; patch < kPatches; patch += kTogether) {
      CUTE_UNROLL
      for (int i = 0; i < kTogether; ++i) {
        uint32_t of_b[4];
        b.read(16 * (patch + i), step, of_b);
        factors.set_b(i, of_b);
      }
      multiply_split<kTransposed>(sums, lesser, patch, factors);
    }
  }
}

template <int kNumbers>
__device__ __forceinline__ void round_to_tf32(uint32_t (&words)[kNumbers]) {
  CUTE_UNROLL
  for (int i = 0; i < kNumbers; ++i) words[i] = round_to_tf32(words[i]);
}

// sum += a first operand x two second ones, of `patch`.
template <class Sum>
__device__ __forceinline__ void multiply_rounded(Sum& sum, int patch, const uint32_t (&of_a)[4],
                                                 const uint32_t (&of_b)[4]) {
  multiply_add_tf32(sum, 2 * patch, of_a, of_b[0], of_b[1]);
  multiply_add_tf32(sum, 2 * patch + 1, of_a, of_b[2], of_b[3]);
}

// As multiply_rows(), of float32 numbers rounded to TF32.
template <int kStrips, class ReadRows, class RowsB, class Sum>
__device__ __forceinline__ void multiply_rounded_rows(Sum (&sums)[kStrips], ReadRows&& read_rows,
                                                      const PatchReader<RowsB, Operand::kByRows>& b) {
  CUTE_UNROLL
  for (int strip = 0; strip < kStrips; ++strip) cute::clear(sums[strip]);
#pragma unroll 2
  for (int step = 0; step < RowsB::kColumns / RowsB::kStepColumns; ++step) {
    uint32_t of_a[kStrips][4];
    read_rows(step, of_a);
    CUTE_UNROLL
    for (int strip = 0; strip < kStrips; ++strip) round_to_tf32(of_a[strip]);
    CUTE_UNROLL
    for (int patch = 0; patch < RowsB::kRows / 16; ++patch) {
      uint32_t of_b[4];
      b.read(16 * patch, step, of_b);
      round_to_tf32(of_b);
      CUTE_UNROLL
      for (int strip = 0; strip < kStrips; ++strip) multiply_rounded(sums[strip], patch, of_a[strip], of_b);
    }
  }
}

// sums[strip] = rows of the strips x rows of `b`, over all columns. `read_rows(step, words)` gives what the strips have
// of columns `step`. kTransposed: the rows of `b` are queries. allow_tf32: of float32, whether numbers may be rounded
// to TF32.
template <class Element, bool kTransposed = false, int kStrips, class ReadRows, class RowsB, class Sum>
__device__ __forceinline__ void multiply_rows(Sum (&sums)[kStrips], ReadRows&& read_rows,
                                              const PatchReader<RowsB, Operand::kByRows>& b, bool allow_tf32 = false) {
  constexpr int kSteps = RowsB::kColumns / RowsB::kStepColumns;
  if constexpr (std::is_same_v<Element, float>) {
    if (allow_tf32) {
      multiply_rounded_rows(sums, read_rows, b);
      return;
    }
    Sum lesser[kStrips];
    CUTE_UNROLL
    for (int strip = 0; strip < kStrips; ++strip) cute::clear(lesser[strip]);
    multiply_split_rows<kTransposed>(sums, lesser, read_rows, b, 0);
#pragma unroll 1
    for (int step = kSplitSteps; step < kSteps; step += kSplitSteps) {
      Sum parts[kStrips];
      multiply_split_rows<kTransposed>(parts, lesser, read_rows, b, step);
      CUTE_UNROLL
      for (int strip = 0; strip < kStrips; ++strip) add_to(sums[strip], parts[strip]);
    }
    CUTE_UNROLL
    for (int strip = 0; strip < kStrips; ++strip) add_to(sums[strip], lesser[strip]);
  } else {
    const auto multiply = [&](auto first, int step) {
      uint32_t of_a[kStrips][4];
      read_rows(step, of_a);
      CUTE_UNROLL
      for (int patch = 0; patch < RowsB::kRows / 16; ++patch) {
        uint32_t of_b[4];
        b.read(16 * patch, step, of_b);
        CUTE_UNROLL
        for (int strip = 0; strip < kStrips; ++strip) {
          multiply_add<Element, first.value>(sums[strip], 2 * patch, of_a[strip], of_b[0], of_b[1]);
          multiply_add<Element, first.value>(sums[strip], 2 * patch + 1, of_a[strip], of_b[2], of_b[3]);
        }
      }
    };
    multiply(std::true_type{}, 0);
    CUTE_UNROLL
    for (int step = 1; step < kSteps; ++step) multiply(std::false_type{}, step);
  }
}

// The same of rows of a matrix: 16 * kStrips from `first_row` on.
template <class Element, bool kTransposed = false, int kStrips, class RowsA, class RowsB, class Sum>
__device__ __forceinline__ void multiply_rows(Sum (&sums)[kStrips], const PatchReader<RowsA>& a, int first_row,
                                              const PatchReader<RowsB, Operand::kByRows>& b, bool allow_tf32 = false) {
  const auto read_rows = [&](int step, uint32_t (&words)[kStrips][4]) {
    CUTE_UNROLL
    for (int strip = 0; strip < kStrips; ++strip) a.read(first_row + 16 * strip, step, words[strip]);
  };
  multiply_rows<Element, kTransposed>(sums, read_rows, b, allow_tf32);
}

// sums[strip] += the strips' operands, which are columns `step`, x the rows of `b` of the same number, for all columns
// of b. Of 16-bit numbers.
template <class Element, int kStrips, class RowsB, class Sum>
__device__ __forceinline__ void multiply_step(Sum (&sums)[kStrips], const uint32_t (&of_a)[kStrips][4],
                                              const PatchReader<RowsB, Operand::kByColumns>& b, int step) {
  CUTE_UNROLL
  for (int patch = 0; patch < RowsB::kColumns / 16; ++patch) {
    uint32_t of_b[4];
    b.read(RowsB::kStepColumns * step, patch, of_b);
    CUTE_UNROLL
    for (int strip = 0; strip < kStrips; ++strip) {
      multiply_add<Element>(sums[strip], 2 * patch, of_a[strip], of_b[0], of_b[1]);
      multiply_add<Element>(sums[strip], 2 * patch + 1, of_a[strip], of_b[2], of_b[3]);
    }
  }
}

// The same of float32 numbers rounded to TF32: `step` of the operands x the rows of `b` from `first_row` on, for as
// many columns of it as there are sums.
template <int kStrips, class RowsB, class Sum>
__device__ __forceinline__ void multiply_rounded_step(Sum (&sums)[kStrips], uint32_t (&of_a)[kStrips][4],
                                                      const PatchReader<RowsB, Operand::kByColumns>& b, int first_row) {
  CUTE_UNROLL
  for (int strip = 0; strip < kStrips; ++strip) round_to_tf32(of_a[strip]);
  CUTE_UNROLL
  for (int patch = 0; patch < decltype(cute::size(sums[0]))::value / 8; ++patch) {
    uint32_t of_b[4];
    b.read(first_row, patch, of_b);
    round_to_tf32(of_b);
    CUTE_UNROLL
    for (int strip = 0; strip < kStrips; ++strip) multiply_rounded(sums[strip], patch, of_a[strip], of_b);
  }
}

// The first operands of some steps of float32, in two parts.
template <int kSteps, int kStrips>
struct SplitOperands {
  uint32_t high[kSteps][kStrips][4], low[kSteps][kStrips][4];

  __device__ __forceinline__ void set(int step, const uint32_t (&words)[kStrips][4]) {
    CUTE_UNROLL
    for (int i = 0; i < 4 * kStrips; ++i) {
      split_float<false>(words[i / 4][i % 4], high[step][i / 4][i % 4], low[step][i / 4][i % 4]);
    }
  }
};

// multiply_columns() of float32: operands of some steps x rows of `b` from `first_row` on, for as many columns of it as
// there are sums. What the lesser products of some steps add up to is what the greater ones are added to.
template <int kSteps, int kStrips, class RowsB, class Sum>
__device__ __forceinline__ void multiply_split_columns(Sum (&sums)[kStrips], const SplitOperands<kSteps, kStrips>& a,
                                                       const PatchReader<RowsB, Operand::kByColumns>& b,
                                                       int first_row) {
  constexpr int kTogether = kSteps < kSplitSteps ? kSteps : kSplitSteps;
  constexpr int kAllPatches = decltype(cute::size(sums[0]))::value / 8;
  // At a time, as products that add to the same sum wait for each other.
  constexpr int kPatches = kAllPatches % 2 == 0 ? 2 : 1;
  CUTE_UNROLL
  for (int patch = 0; patch < kAllPatches; patch += kPatches) {
    CUTE_UNROLL
    for (int first_step = 0; first_step < kSteps; first_step += kTogether) {
      Accumulator<16 * kPatches> part[kStrips];
      CUTE_UNROLL
      for (int strip = 0; strip < kStrips; ++strip) cute::clear(part[strip]);
      const auto multiply = [&](const uint32_t (&of_a)[kStrips][4], const uint32_t (&of_b)[kPatches][4]) {
        CUTE_UNROLL
        for (int group = 0; group < 2 * kPatches; ++group) {
          const uint32_t* words = of_b[group / 2] + group % 2 * 2;
          CUTE_UNROLL
          for (int strip = 0; strip < kStrips; ++strip) {
            multiply_add_tf32(part[strip], group, of_a[strip], words[0], words[1]);
          }
        }
      };
      uint32_t b_high[kTogether][kPatches][4];
      CUTE_UNROLL
      for (int i = 0; i < kTogether; ++i) {
        uint32_t b_low[kPatches][4];
        CUTE_UNROLL
        for (int j = 0; j < kPatches; ++j) {
          uint32_t of_b[4];
          b.read(first_row + RowsB::kStepColumns * (first_step + i), patch + j, of_b);
          CUTE_UNROLL
          for (int k = 0; k < 4; ++k) split_float<true>(of_b[k], b_high[i][j][k], b_low[j][k]);
        }
        multiply(a.low[first_step + i], b_high[i]);
        multiply(a.high[first_step + i], b_low);
      }
      CUTE_UNROLL
      for (int i = 0; i < kTogether; ++i) multiply(a.high[first_step + i], b_high[i]);
      CUTE_UNROLL
      for (int strip = 0; strip < kStrips; ++strip) {
        CUTE_UNROLL
        for (int i = 0; i < 8 * kPatches; ++i) sums[strip](8 * patch + i) += part[strip](i);
      }
    }
  }
}

// sums[strip] += operands x rows of `b`, for all columns of it. `read_operands(step, words)` gives what the strips have
// of columns `step`, which belong to rows `step`.
template <class Element, int kStrips, class RowsB, class Sum, class ReadOperands>
__device__ __forceinline__ void multiply_columns(Sum (&sums)[kStrips], ReadOperands&& read_operands,
                                                 const PatchReader<RowsB, Operand::kByColumns>& b,
                                                 bool allow_tf32 = false) {
  constexpr int kSteps = RowsB::kRows / RowsB::kStepColumns;
  if constexpr (std::is_same_v<Element, float>) {
    if (allow_tf32) {
      CUTE_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        uint32_t of_a[kStrips][4];
        read_operands(step, of_a);
        multiply_rounded_step(sums, of_a, b, RowsB::kStepColumns * step);
      }
      return;
    }
    SplitOperands<kSteps, kStrips> a;
    CUTE_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      uint32_t of_a[kStrips][4];
      read_operands(step, of_a);
      a.set(step, of_a);
    }
    multiply_split_columns(sums, a, b, 0);
  } else {
    CUTE_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      uint32_t of_a[kStrips][4];
      read_operands(step, of_a);
      multiply_step<Element>(sums, of_a, b, step);
    }
  }
}

}  // namespace hbsattn::sm80
