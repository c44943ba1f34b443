#pragma once

#include "kernels/common/row_sums.cuh"
#include "kernels/sm80/backward_keys/traits.cuh"

// Gradients of queries by tiles of keys, of float32: all warps leave gradients of scores, and each adds some columns of
// what they and the keys give to sums in global memory.

namespace hbsattn::sm80 {

// Leaves a warp's gradients of scores, of 16 keys from `warp_key` on, a row for each query. A step's keys lie in the
// order in which PatchReader takes rows of 32 bits: first the even ones.
template <class Traits, class Sum>
__device__ __forceinline__ void leave_grad_scores(typename Traits::Element* matrix, int warp_key, const Sum& grads,
                                                  int lane) {
  using Rows = typename Traits::GradScores;
  const int key = lane / 4;
  CUTE_UNROLL
  for (int i = 0; i < cute::size(grads); ++i) {
    const int in_group = 2 * (lane % 4) + i % 2, half = i >> 1 & 1;
    const uint32_t place = Rows::offset(in_group, (warp_key / 4 + key % 2) ^ 2 * half) + i / 4 * 8 * Rows::kRowBytes;
    *reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(matrix) + place + key / 2 * 4) = grads(i);
  }
}

template <class Traits>
__device__ __forceinline__ void add_split_queries(const BackwardByKeysArguments& args,
                                                  const typename Traits::Storage& storage,
                                                  const StageInfo<Traits::kGranules>& info, int warp, int lane) {
  using Element = typename Traits::Element;
  using Keys = typename Traits::Keys;
  constexpr int kStrips = Traits::kGranules, kColumns = Traits::kQueryColumns;
  const PatchReader<typename Traits::GradScores> grads(shared_address(storage.grad_scores), lane);
  const int first_vector = warp * kColumns / Keys::kVectorColumns;
  PatchReader<Keys, Operand::kByColumns> keys(
      shared_address(storage.keys) + first_vector / Keys::kChunkVectors * Keys::kChunkBytes, lane);
  keys.address ^= first_vector % Keys::kChunkVectors * 16;
  Accumulator<kColumns> sums[kStrips];
  CUTE_UNROLL
  for (int i = 0; i < kStrips; ++i) cute::clear(sums[i]);
  constexpr int kSteps = kSplitSteps;
  if (args.allow_tf32) {
#pragma unroll 2
    for (int step = 0; step < Traits::kTileN / Keys::kStepColumns; ++step) {
      uint32_t words[kStrips][4];
      CUTE_UNROLL
      for (int i = 0; i < kStrips; ++i) grads.read(16 * i, step, words[i]);
      multiply_rounded_step(sums, words, keys, Keys::kStepColumns * step);
    }
  } else {
    CUTE_UNROLL
    for (int first_step = 0; first_step < Traits::kTileN / Keys::kStepColumns; first_step += kSteps) {
      SplitOperands<kSteps, kStrips> of_grads;
      CUTE_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        uint32_t words[kStrips][4];
        CUTE_UNROLL
        for (int i = 0; i < kStrips; ++i) grads.read(16 * i, first_step + step, words[i]);
        of_grads.set(step, words);
      }
      multiply_split_columns(sums, of_grads, keys, Keys::kStepColumns * first_step);
    }
  }
  CUTE_UNROLL
  for (int i = 0; i < kStrips; ++i) {
    if (info.queries[i] < 0) continue;
    float* destination =
        args.grad_q + int64_t{info.chunks[i]} * (kGranule * Traits::kHeadDim) + warp * (kColumns * kGranule);
    CUTE_UNROLL
    for (int column = 0; column < kColumns; column += 8) {
      const int j = column / 2;
      add_to_group(destination + column * kGranule, sums[i](j), sums[i](j + 1), sums[i](j + 2), sums[i](j + 3), lane);
    }
  }
}

}  // namespace hbsattn::sm80
