#pragma once

#include <cute/tensor.hpp>

#include "kernels/common/ptx.cuh"

namespace hbsattn {

// Online softmax over the accumulators of one warpgroup's 64-row tile. A thread holds two rows; an accumulator's
// linear index is column pair + 2 * row + 4 * (group of 8 columns).
struct OnlineSoftmax {
  float row_max[2];  // of the raw scores
  float row_sum[2];  // this thread's share; summed over the quad at the end
  float rescale[2];  // what the accumulated output must be multiplied by after the latest update
  float offset[2];   // what is subtracted from the scaled scores: scale_log2 * row_max

  // Takes the new scores' maxima into account. kFirst: nothing came before. kMayBeEmpty: a row may have only -inf so
  // far, which must give zeros, not NaN.
  template <bool kFirst, bool kMayBeEmpty, class Scores>
  __device__ __forceinline__ void update_max(const Scores& scores, float scale_log2) {
    constexpr int kGroups = decltype(cute::size(scores))::value / 4;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float maximum = kFirst ? scores(2 * row) : fmaxf(row_max[row], scores(2 * row));
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        if (group > 0) maximum = fmaxf(maximum, scores(4 * group + 2 * row));
        maximum = fmaxf(maximum, scores(4 * group + 2 * row + 1));
      }
      maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 1));
      maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 2));
      offset[row] = maximum * scale_log2;
      if (kMayBeEmpty) offset[row] = maximum == -INFINITY ? 0.f : offset[row];
      if (kFirst) {
        row_sum[row] = 0.f;
      } else {
        rescale[row] = exp2_approx(row_max[row] * scale_log2 - offset[row]);
        row_sum[row] *= rescale[row];
      }
      row_max[row] = maximum;
    }
  }

  // Turns scores into exp2(scale_log2 * (score - max)) and sums them.
  template <class Scores>
  __device__ __forceinline__ void exponentiate(Scores& scores, float scale_log2) {
    constexpr int kGroups = decltype(cute::size(scores))::value / 4;
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

  template <class Output>
  __device__ __forceinline__ void rescale_output(Output& output) const {
#pragma unroll
    for (int i = 0; i < decltype(cute::size(output))::value; ++i) output(i) *= rescale[(i >> 1) & 1];
  }

  // Sums the quad's shares, divides the output by them and gives the natural log-sum-exp of both rows. A row with
  // nothing to attend gets output 0 and -inf.
  template <class Output>
  __device__ __forceinline__ void finish(Output& output, float scale, float (&lse)[2]) {
    float inverse[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float sum = row_sum[row];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      inverse[row] = sum == 0.f ? 0.f : __fdividef(1.f, sum);
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
