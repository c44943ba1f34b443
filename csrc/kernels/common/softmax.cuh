#pragma once

#include <cute/tensor.hpp>

#include "kernels/common/ptx.cuh"

namespace hbsattn {

// Online softmax over the accumulators of one warpgroup's 64-row tile. A thread holds two rows; an accumulator's
// linear index is column pair + 2 * row + 4 * (group of 8 columns).
struct OnlineSoftmax {
  float row_max[2];  // of the raw scores, up to kSlack: what exponents are relative to
  float row_sum[2];  // this thread's share; summed over the quad at the end
  float offset[2];   // what is subtracted from the scaled scores: scale_log2 * row_max

  // Maxima may be exceeded by this many powers of two before sums and outputs are rescaled, which then hardly happens
  // after the first stages. Probabilities up to 256 suit fp16, too; their relative precision is the same.
  static constexpr float kSlack = 8.f;

  template <class Scores>
  static __device__ __forceinline__ float find_max(const Scores& scores, int row) {
    constexpr int kGroups = decltype(cute::size(scores))::value / 4;
    float even = scores(2 * row), odd = scores(2 * row + 1);
#pragma unroll
    for (int group = 1; group < kGroups; ++group) {
      even = fmaxf(even, scores(4 * group + 2 * row));
      odd = fmaxf(odd, scores(4 * group + 2 * row + 1));
    }
    float maximum = fmaxf(even, odd);
    maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 1));
    return fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 2));
  }

  __device__ __forceinline__ void set_max(int row, float maximum, float scale_log2) {
    row_max[row] = maximum;
    // A row may have only -inf so far, which must give zeros, not NaN.
    offset[row] = maximum == -INFINITY ? 0.f : maximum * scale_log2;
  }

  // A later maximum. Gives what sums and outputs so far have to be multiplied by: they are relative to the offset as it
  // was rounded, which at logits of 2^17 is half a percent from the product of the maximum and the scale.
  __device__ __forceinline__ float move_max(int row, float maximum, float scale_log2) {
    const bool had_any = row_max[row] != -INFINITY;
    const float before = offset[row];
    set_max(row, maximum, scale_log2);
    return had_any ? exp2_approx(before - offset[row]) : 0.f;
  }

  // The first scores of a tile.
  template <class Scores>
  __device__ __forceinline__ void begin(const Scores& scores, float scale_log2) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      set_max(row, find_max(scores, row), scale_log2);
      row_sum[row] = 0.f;
    }
  }

  // A sink joins the first scores, in sums of their own: those of one thread of the quad, where it is `mine`. Its score
  // is scaled; -inf: there is none.
  __device__ __forceinline__ void add_sink(int row, float sink, float scale_log2, bool mine) {
    const float unscaled = __fdividef(sink, scale_log2);
    if (unscaled > row_max[row]) set_max(row, unscaled, scale_log2);
    if (mine) row_sum[row] += exp2_approx(sink - offset[row]);
  }

  // The same at the end. Until then, the first score that a row sees is its maximum, whose weight is 1 as rounded.
  template <class Output>
  __device__ __forceinline__ void join_sink(int row, float sink, float scale_log2, bool mine, Output& output) {
    const float unscaled = __fdividef(sink, scale_log2);
    if (unscaled > row_max[row]) {
      const float rescale = move_max(row, unscaled, scale_log2);
      row_sum[row] *= rescale;
#pragma unroll
      for (int i = 0; i < decltype(cute::size(output))::value; ++i) {
        if ((i >> 1 & 1) == row) output(i) *= rescale;
      }
    }
    if (mine) row_sum[row] += exp2_approx(sink - offset[row]);
  }

  // Nothing to attend.
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      row_max[row] = -INFINITY;
      row_sum[row] = offset[row] = 0.f;
    }
  }

  // Maxima of further scores, and by how many powers of two they exceed those that are in use.
  struct Growth {
    float maximum[2], by[2];
  };
  template <class Scores>
  __device__ __forceinline__ Growth find_growth(const Scores& scores, float scale_log2) const {
    Growth growth;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      growth.maximum[row] = find_max(scores, row);
      growth.by[row] = (growth.maximum[row] - row_max[row]) * scale_log2;
    }
    return growth;
  }

  // Moves to the new maxima if any row of the warp has to.
  template <class Output>
  __device__ __forceinline__ void grow(const Growth& growth, float scale_log2, Output& output) {
    if (!__any_sync(0xffffffffu, fmaxf(growth.by[0], growth.by[1]) > kSlack)) return;
    float rescale[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      rescale[row] = move_max(row, fmaxf(row_max[row], growth.maximum[row]), scale_log2);
      row_sum[row] *= rescale[row];
    }
#pragma unroll
    for (int i = 0; i < decltype(cute::size(output))::value; ++i) output(i) *= rescale[(i >> 1) & 1];
  }

  // Turns scores into exp2(scale_log2 * (score - max)) and sums them. kPaced: left alone, ptxas computes all exponents
  // before most of the exponentials, whose unit waits meanwhile; it is kept from that by exponents that seem to depend
  // on the sum of two parts before. Pays where exponentials take as long as products. `zero` is 0, which the compiler
  // must not know.
  template <bool kPaced, class Scores>
  __device__ __forceinline__ void exponentiate(Scores& scores, float scale_log2, float zero) {
    constexpr int kGroups = decltype(cute::size(scores))::value / 4;
    if constexpr (kPaced) {
      constexpr int kPartGroups = 2;
      static_assert(kGroups % kPartGroups == 0);
      float even[2] = {}, odd[2] = {}, subtract[2][2] = {{offset[0], offset[1]}, {offset[0], offset[1]}};
#pragma unroll
      for (int part = 0; part < kGroups / kPartGroups; ++part) {
#pragma unroll
        for (int in_part = 0; in_part < kPartGroups; ++in_part) {
          const int group = part * kPartGroups + in_part;
#pragma unroll
          for (int row = 0; row < 2; ++row) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              float& score = scores(4 * group + 2 * row + c);
              score = exp2_approx(score * scale_log2 - subtract[part % 2][row]);
            }
            even[row] += scores(4 * group + 2 * row);
            odd[row] += scores(4 * group + 2 * row + 1);
          }
        }
#pragma unroll
        for (int row = 0; row < 2; ++row) subtract[part % 2][row] += even[row] * zero;
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) row_sum[row] += even[row] + odd[row];
    } else {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& score = scores(4 * group + 2 * row + c);
            score = exp2_approx(score * scale_log2 - offset[row]);
          }
        }
        float even = 0.f, odd = 0.f;
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          even += scores(4 * group + 2 * row);
          odd += scores(4 * group + 2 * row + 1);
        }
        row_sum[row] += even + odd;
      }
    }
  }

  // Sums the quad's shares, divides the output by them and gives the natural log-sum-exp of both rows. A row with
  // nothing to attend gets output 0 and -inf. `output_scale`: what the output is to be multiplied by.
  template <class Output>
  __device__ __forceinline__ void finish(Output& output, float scale, float output_scale, float (&lse)[2]) {
    float inverse[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float sum = row_sum[row];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      inverse[row] = sum == 0.f ? 0.f : __fdividef(output_scale, sum);
      lse[row] = sum == 0.f ? -INFINITY : row_max[row] * scale + __logf(sum);
    }
#pragma unroll
    for (int i = 0; i < decltype(cute::size(output))::value; ++i) {
      // A select, not a product with 0: values that only other rows of the tile attend to may be NaN.
      output(i) = inverse[(i >> 1) & 1] == 0.f ? 0.f : output(i) * inverse[(i >> 1) & 1];
    }
  }
};

}  // namespace hbsattn
