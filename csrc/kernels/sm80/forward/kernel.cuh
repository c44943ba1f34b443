#pragma once

#include <algorithm>

#include "kernels/common/launch.cuh"
#include "kernels/common/softcap.cuh"
#include "kernels/common/softmax.cuh"
#include "kernels/sm80/query_tiles/masks.cuh"

namespace hbsattn::sm80 {

// A CTA computes kTileM rows of a tile. A warp has strips of 16 rows:
//
//   S = Q K^T      P = exp(S - max)      O += P V
//
// kAltered: for altered calls (is_altered).
template <class Config, bool kAltered>
__global__ void __launch_bounds__(32 * Config::kWarps, Config::kCtasPerSm)
    forward_kernel(const __grid_constant__ QueryTileArguments args) {
  using Traits = QueryTileTraits<Config>;
  using Element = typename Traits::Element;
  using ReadQueries = typename Traits::ReadQueries;
  constexpr int kStrips = Traits::kStrips, kHeldSteps = Traits::kHeldColumns / 16;
  extern __shared__ __align__(128) uint8_t shared[];
  auto& storage = *reinterpret_cast<typename Traits::Storage*>(shared);
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  wait_for_earlier_kernels();
  let_next_kernel_start();
  if (args.sequences != nullptr && warp == Traits::kWarps - 1) write_gaps<true>(args, lane, sizeof(Element));
  WorkItem item;
  int first_row;
  if (!find_part<Traits>(args, item, first_row)) return;
  const KeyStream<Traits, kAltered> stream(args, storage, item,
                                           key_end_of_tile<true>(args, item, first_row + Traits::kTileM));
  if (stream.stages == 0) {
    write_empty_rows<Traits, true>(args, item, first_row);
    return;
  }
  if (args.cycles != nullptr && threadIdx.x == 0) record_cycles(args, false);
  const int matrix_row = warp * 16 * kStrips;  // of the warp's first strip, in the CTA's queries
  uint32_t held[std::max(kHeldSteps, 1)][kStrips][4];
  if constexpr (kHeldSteps > 0) {
    // They come through the room of what comes later.
    using Held = SharedRows<Element, Traits::kTileM, Traits::kHeldColumns>;
    static_assert(Traits::Queries::kBytes <= sizeof(storage.queries) + 2 * Traits::Keys::kBytes, "of one stage");
    load_rows<Traits, Held>(args, item, args.q, first_row, storage.queries);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    const PatchReader<Held> reader(shared_address(storage.queries), lane);
    CUTE_UNROLL
    for (int step = 0; step < kHeldSteps; ++step) {
      CUTE_UNROLL
      for (int i = 0; i < kStrips; ++i) reader.read(matrix_row + 16 * i, step, held[step][i]);
    }
  }
  stream.begin([&] {
    if constexpr (Traits::kHeldColumns < Traits::kHeadDim) {
      load_rows<Traits, ReadQueries>(args, item, args.q.from<Element>(Traits::kHeldColumns), first_row,
                                     storage.queries);
    }
  });

  OnlineSoftmax softmax[kStrips];
  Accumulator<Traits::kHeadDim> outputs[kStrips];
  CUTE_UNROLL
  for (int i = 0; i < kStrips; ++i) {
    const int row = first_row + matrix_row + 16 * i;
    open_strip<Traits>(args, storage, item, i, row, matrix_row + 16 * i, kAltered);
    cute::clear(outputs[i]);
    softmax[i].clear();
    // Rows that do not exist have no say in when the others are rescaled, or results would depend on them.
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (place_row<true>(args, item, row + lane / 4 + 8 * half).count <= 0) softmax[i].row_max[half] = INFINITY;
    }
  }
  const PatchReader<ReadQueries> queries(shared_address(storage.queries), lane);
  const auto read_queries = [&](int step, uint32_t (&words)[kStrips][4]) {
    CUTE_UNROLL
    for (int i = 0; i < kStrips; ++i) {
      if (step < kHeldSteps) {
        CUTE_UNROLL
        for (int word = 0; word < 4; ++word) words[i][word] = held[step][i][word];
      } else {
        queries.read(matrix_row + 16 * i, step - kHeldSteps, words[i]);
      }
    }
  };

#pragma unroll 1
  for (int stage = 0; stage < stream.stages; ++stage) {
    const bool masked = stream.is_masked(stage);
    if (stream.has_two_stages()) {
      stream.wait_pair(stage);
    } else {
      stream.wait_keys(stage);
    }
    Accumulator<Traits::kTileN> scores[kStrips];
    const PatchReader<typename Traits::Keys, Operand::kByRows> keys(stream.keys_of(stage), lane);
    multiply_rows<Element>(scores, read_queries, keys, args.allow_tf32);
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
    OnlineSoftmax::Growth growth[kStrips];
    float most = 0.f;
    CUTE_UNROLL
    for (int i = 0; i < kStrips; ++i) {
      growth[i] = softmax[i].find_growth(scores[i], args.scale_log2);
      most = fmaxf(most, fmaxf(growth[i].by[0], growth[i].by[1]));
    }
    if (__any_sync(0xffffffffu, most > OnlineSoftmax::kSlack)) {
      CUTE_UNROLL
      for (int i = 0; i < kStrips; ++i) softmax[i].grow(growth[i], args.scale_log2, outputs[i]);
    }
    CUTE_UNROLL
    for (int i = 0; i < kStrips; ++i) {
      softmax[i].template exponentiate<false>(scores[i], args.scale_log2, 0.f);
      if (kAltered && args.dropout.seed != nullptr) {
        drop_strip<DropAs::kZero>(stream, i, matrix_row + 16 * i, stage, scores[i]);
      }
    }
    if (!stream.has_two_stages()) stream.wait_values(stage);
    const PatchReader<typename Traits::Keys, Operand::kByColumns> values(stream.values_of(stage), lane);
    const auto read_weights = [&](int step, uint32_t (&words)[kStrips][4]) {
      CUTE_UNROLL
      for (int i = 0; i < kStrips; ++i) to_operand<Element>(scores[i], step, words[i]);
    };
    multiply_columns<Element>(outputs, read_weights, values, args.allow_tf32);
  }

  // Rows leave through stages, too, if there is less room for queries.
  if (kHeldSteps > 0) __syncthreads();
  const WorkItem& kept = storage.tile.item;  // registers are scarce
  CUTE_UNROLL
  for (int i = 0; i < kStrips; ++i) {
    if (args.sinks != nullptr) {
      CUTE_UNROLL
      for (int row = 0; row < 2; ++row) {
        const RowPlace place = place_row<true>(args, kept, first_row + matrix_row + 16 * i + lane / 4 + 8 * row);
        if (place.count <= 0) continue;
        softmax[i].join_sink(row, sink_of_head(args, place.head) * static_cast<float>(M_LOG2E), args.scale_log2,
                             lane % 4 == 0, outputs[i]);
      }
    }
    float lse[2];
    softmax[i].finish(outputs[i], args.scale, kAltered ? args.dropout.scale : 1.f, lse);
    CUTE_UNROLL
    for (int row = 0; row < 2; ++row) {
      const RowPlace place = place_row<true>(args, kept, first_row + matrix_row + 16 * i + lane / 4 + 8 * row);
      if (lane % 4 == 0 && place.count > 0) *lse_of_row(args, kept, place) = lse[row];
    }
    store_rows<Traits>(args, kept, first_row + matrix_row + 16 * i, matrix_row + 16 * i, outputs[i], storage.queries);
  }
  if (args.cycles != nullptr && lane == 0) record_cycles(args, true);
}

}  // namespace hbsattn::sm80
