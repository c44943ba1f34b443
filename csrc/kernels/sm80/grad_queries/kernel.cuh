#pragma once

#include "kernels/common/launch.cuh"
#include "kernels/common/row_statistics.cuh"
#include "kernels/common/softcap.cuh"
#include "kernels/sm80/pairs.cuh"
#include "kernels/sm80/query_tiles/masks.cuh"

namespace hbsattn::sm80 {

template <class Config>
struct GradQueriesTraits : QueryTileTraits<Config> {
  using Forward = QueryTileTraits<Config>;
  struct alignas(128) Storage : Forward::Storage {
    alignas(128) typename Forward::Element grad_out[Forward::kTileM * Forward::kHeadDim];
  };
};

// `out` is the gradient of the queries.
struct GradQueriesArguments : QueryTileArguments {
  TensorRows grad_out;
  // Of all rows, in the chunks of the workspace: (stacks, chunks, 16).
  const float* statistics_lse;  // times log2(e); +inf: the row attends to nothing
  const float* delta;           // what each row of P o dP sums to
  QueryChunks chunks;
};

// From the products of a strip and a stage to its weights. Those that are dropped are negative.
template <bool kAltered, class Traits, class Scores>
__device__ __forceinline__ void weigh(const KeyStream<Traits, kAltered>& stream, int strip, int matrix_row, int stage,
                                      const RowStatistics& rows, Scores& scores) {
  const QueryTileArguments& args = stream.args;
  const bool caps = kAltered && args.cap.scale > 0.f;
  if (kAltered && caps) cap_scores(scores, args.cap);
  if (stream.is_masked(stage)) mask_scores(stream, strip, stage, scores);
  CUTE_UNROLL
  for (int i = 0; i < cute::size(scores); ++i) {
    float weight = exp2_approx(scores(i) * args.scale_log2 - rows.lse[(i >> 1) & 1]);
    if constexpr (kAltered) {
      // Times the cap's derivative. The score of a key that a query must not see is -inf, and its weight 0.
      if (caps) weight = weight == 0.f ? 0.f : weight * (1.f - scores(i) * scores(i));
    }
    scores(i) = weight;
  }
  if (kAltered && args.dropout.seed != nullptr) {
    drop_strip<DropAs::kNegative>(stream, strip, matrix_row, stage, scores);
  }
}

// Turns the gradients of a strip's weights into those of its scores.
template <bool kAltered, class Weights, class Scores>
__device__ __forceinline__ void differentiate(const Weights& weights, const RowStatistics& rows, Scores&& grads) {
  CUTE_UNROLL
  for (int i = 0; i < cute::size(grads); ++i) {
    const float weight = weights(i), delta = rows.delta[(i >> 1) & 1];
    const bool dropped = kAltered && signbit(weight);
    // A weight of 0 does not silence a NaN.
    grads(i) = weight == 0.f ? 0.f : weight * (dropped ? delta : grads(i) - delta);
  }
}

// A CTA computes kTileM rows of a tile. A warp has strips of 16 rows, and streams keys and values as the forward:
//
//   P = exp(S - lse)      dP = dO V^T      dS = P o (dP - delta)      dQ += dS K
//
// One warp sums a row's gradient, stage after stage: the same in every run.
template <class Config, bool kAltered>
__global__ void __launch_bounds__(32 * Config::kWarps, Config::kCtasPerSm)
    grad_queries_kernel(const __grid_constant__ GradQueriesArguments args) {
  using Traits = GradQueriesTraits<Config>;
  using Element = typename Traits::Element;
  using ReadQueries = typename Traits::ReadQueries;
  constexpr int kStrips = Traits::kStrips;
  constexpr bool kHolds = Traits::kHeldColumns > 0;
  static_assert(!kHolds ||
                (kStrips == 1 && Traits::kTileM * Traits::kHeldColumns <= Traits::kTileN * Traits::kHeadDim));
  extern __shared__ __align__(128) uint8_t shared[];
  auto& storage = *reinterpret_cast<typename Traits::Storage*>(shared);
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  wait_for_earlier_kernels();
  let_next_kernel_start();
  if (args.sequences != nullptr && warp == Traits::kWarps - 1) write_gaps<false>(args, lane, sizeof(Element));
  WorkItem item;
  int first_row;
  if (!find_part<Traits>(args, item, first_row)) return;
  const KeyStream<Traits, kAltered> stream(args, storage, item,
                                           key_end_of_tile<true>(args, item, first_row + Traits::kTileM));
  if (stream.stages == 0) {
    write_empty_rows<Traits, false>(args, item, first_row);
    return;
  }
  using Held = SharedRows<Element, Traits::kTileM, kHolds ? Traits::kHeldColumns : 64>;
  stream.begin([&] {
    // What registers hold comes through a stage that is not loaded yet.
    if constexpr (kHolds) load_rows<Traits, Held>(args, item, args.q, first_row, storage.values[1]);
    load_rows<Traits, ReadQueries>(args, item, args.q.from<Element>(Traits::kHeldColumns), first_row, storage.queries);
    load_rows<Traits>(args, item, args.grad_out, first_row, storage.grad_out);
  });

  const int matrix_row = warp * 16 * kStrips;  // of the warp's first strip, in the CTA's queries
  RowStatistics rows[kStrips];
  Accumulator<Traits::kHeadDim> grads[kStrips];
  CUTE_UNROLL
  for (int i = 0; i < kStrips; ++i) {
    const int row = first_row + matrix_row + 16 * i;
    open_strip<Traits>(args, storage, item, i, row, matrix_row + 16 * i, kAltered);
    rows[i] = RowStatistics::load<true>(args, item, row, lane);
    cute::clear(grads[i]);
  }
  const PatchReader<ReadQueries> queries(shared_address(storage.queries), lane);
  const PatchReader<typename Traits::Queries> grad_out(shared_address(storage.grad_out), lane);
  uint32_t held[kHolds ? Traits::kHeldColumns / 16 : 1][4];
  if constexpr (kHolds) {
    wait_copies<0>();
    __syncthreads();
    hold_rows(PatchReader<Held>(shared_address(storage.values[1]), lane), matrix_row, held);
  }

#pragma unroll 1
  for (int stage = 0; stage < stream.stages; ++stage) {
    stream.wait_pair(stage);
    const PatchReader<typename Traits::Keys, Operand::kByRows> keys(stream.keys_of(stage), lane);
    const PatchReader<typename Traits::Keys, Operand::kByRows> values(stream.values_of(stage), lane);
    const PatchReader<typename Traits::Keys, Operand::kByColumns> transposed_keys(stream.keys_of(stage), lane);
    Accumulator<Traits::kTileN> weights[kStrips], grad_scores[kStrips];
    if constexpr (kHolds) {
      multiply_held<Element>(weights[0], held, keys,
                             [&](int step, uint32_t (&words)[4]) { queries.read(matrix_row, step, words); });
    } else {
      multiply_rows<Element>(weights, queries, matrix_row, keys, args.allow_tf32);
    }
    CUTE_UNROLL
    for (int i = 0; i < kStrips; ++i) {
      weigh<kAltered>(stream, i, matrix_row + 16 * i, stage, rows[i], weights[i]);
    }
    multiply_rows<Element>(grad_scores, grad_out, matrix_row, values, args.allow_tf32);
    CUTE_UNROLL
    for (int i = 0; i < kStrips; ++i) differentiate<kAltered>(weights[i], rows[i], grad_scores[i]);
    const auto read_grads = [&](int step, uint32_t (&words)[kStrips][4]) {
      CUTE_UNROLL
      for (int i = 0; i < kStrips; ++i) to_operand<Element>(grad_scores[i], step, words[i]);
    };
    multiply_columns<Element>(grads, read_grads, transposed_keys, args.allow_tf32);
  }

  CUTE_UNROLL
  for (int i = 0; i < kStrips; ++i) {
    CUTE_UNROLL
    for (int j = 0; j < cute::size(grads[i]); ++j) {
      // A select, not a product with 0: keys that only other rows of the tile attend to may be NaN.
      grads[i](j) = rows[i].lse[(j >> 1) & 1] == INFINITY ? 0.f : args.scale * grads[i](j);
    }
    store_rows<Traits>(args, item, first_row + matrix_row + 16 * i, matrix_row + 16 * i, grads[i], storage.grad_out);
  }
}

}  // namespace hbsattn::sm80
