#pragma once

#include "kernels/common/launch.cuh"
#include "kernels/common/softcap.cuh"
#include "kernels/common/softmax.cuh"
#include "kernels/sm80/query_tiles/masks.cuh"

namespace hbsattn::sm80 {

// A CTA computes kTileM rows of a tile. A warp has strips of 16 rows:
//
//   S = Q K^T      P = exp(S - max)      O += P V
//
// kAltered: for calls that drop weights or cap scores.
template <class Config, bool kAltered>
__global__ void __launch_bounds__(32 * Config::kWarps, Config::kCtasPerSm)
    forward_kernel(const __grid_constant__ QueryTileArguments args) {
  using Traits = QueryTileTraits<Config>;
  using Element = typename Traits::Element;
  constexpr int kStrips = Traits::kStrips;
  extern __shared__ __align__(128) uint8_t shared[];
  auto& storage = *reinterpret_cast<typename Traits::Storage*>(shared);
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  wait_for_earlier_kernels();
  let_next_kernel_start();
  if (args.sequences != nullptr && warp == Traits::kWarps - 1) write_gaps<true>(args, lane, sizeof(Element));
  WorkItem item;
  int first_row;
  if (!find_part<Traits>(args, item, first_row)) return;
  const KeyStream<Traits> stream(args, storage, item, key_end_of_tile<true>(args, item, first_row + Traits::kTileM));
  if (stream.stages == 0) {
    write_empty_rows<Traits, true>(args, item, first_row);
    return;
  }
  if (args.cycles != nullptr && threadIdx.x == 0) record_cycles(args, false);
  stream.begin([&] { load_rows<Traits>(args, item, args.q, first_row, storage.queries); });

  const int matrix_row = warp * 16 * kStrips;  // of the warp's first strip, in the CTA's queries
  OnlineSoftmax softmax[kStrips];
  Accumulator<Traits::kHeadDim> outputs[kStrips];
  CUTE_UNROLL
  for (int i = 0; i < kStrips; ++i) {
    open_strip<Traits>(args, storage, item, i, first_row + matrix_row + 16 * i, matrix_row + 16 * i, kAltered);
    cute::clear(outputs[i]);
  }
  const PatchReader<typename Traits::Queries> queries(shared_address(storage.queries), lane);

#pragma unroll 1
  for (int stage = 0; stage < stream.stages; ++stage) {
    const int buffer = stage % Traits::kStages;
    const bool masked = stream.is_masked(stage);
    stream.wait_keys(stage);
    Accumulator<Traits::kTileN> scores[kStrips];
    multiply_rows<Element>(
        scores, queries, matrix_row,
        PatchReader<typename Traits::Keys, Operand::kByRows>(shared_address(storage.keys[buffer]), lane));
    if constexpr (kAltered) {
      if (args.cap.scale > 0.f) {
        CUTE_UNROLL
        for (int i = 0; i < kStrips; ++i) cap_scores(scores[i], args.cap);
      }
    }
    if (masked) {
      CUTE_UNROLL
      for (int i = 0; i < kStrips; ++i) mask_scores(stream, i, stage, scores[i]);
    }
    CUTE_UNROLL
    for (int i = 0; i < kStrips; ++i) {
      if (stage == 0) {
        softmax[i].begin(scores[i], args.scale_log2);
      } else {
        OnlineSoftmax::Growth growth = softmax[i].find_growth(scores[i], args.scale_log2);
        if (__any_sync(0xffffffffu, fmaxf(growth.by[0], growth.by[1]) > softmax[i].kSlack)) {
          // Rows that do not exist have no say in when the others are rescaled, or results would depend on them.
          const KeyLimits<true>& limits = storage.limits[i][threadIdx.x];
          CUTE_UNROLL
          for (int row = 0; row < 2; ++row) {
            if (limits.value[row] <= limits.kNoRow) growth.by[row] = -INFINITY;
          }
          softmax[i].grow(growth, args.scale_log2, outputs[i]);
        }
      }
      softmax[i].template exponentiate<false>(scores[i], args.scale_log2, 0.f);
      if (kAltered && args.dropout.seed != nullptr) {
        drop_strip<DropAs::kZero>(stream, i, matrix_row + 16 * i, stage, scores[i]);
      }
    }
    stream.wait_values(stage);
    const PatchReader<typename Traits::Keys, Operand::kByColumns> values(shared_address(storage.values[buffer]), lane);
    const auto read_weights = [&](int step, uint32_t (&words)[kStrips][4]) {
      CUTE_UNROLL
      for (int i = 0; i < kStrips; ++i) to_operand<Element>(scores[i], step, words[i]);
    };
    multiply_columns<Element>(outputs, read_weights, values);
  }

  CUTE_UNROLL
  for (int i = 0; i < kStrips; ++i) {
    if (args.sinks != nullptr) {
      CUTE_UNROLL
      for (int row = 0; row < 2; ++row) {
        const RowPlace place = place_row<true>(args, item, first_row + matrix_row + 16 * i + lane / 4 + 8 * row);
        if (place.count <= 0) continue;
        softmax[i].join_sink(row, sink_of_head(args, place.head) * static_cast<float>(M_LOG2E), args.scale_log2,
                             lane % 4 == 0, outputs[i]);
      }
    }
    float lse[2];
    softmax[i].finish(outputs[i], args.scale, kAltered ? args.dropout.scale : 1.f, lse);
    CUTE_UNROLL
    for (int row = 0; row < 2; ++row) {
      const RowPlace place = place_row<true>(args, item, first_row + matrix_row + 16 * i + lane / 4 + 8 * row);
      if (lane % 4 == 0 && place.count > 0) *lse_of_row(args, item, place) = lse[row];
    }
    store_rows<Traits>(args, item, first_row + matrix_row + 16 * i, matrix_row + 16 * i, outputs[i], storage.queries);
  }
  if (args.cycles != nullptr && lane == 0) record_cycles(args, true);
}

}  // namespace hbsattn::sm80
