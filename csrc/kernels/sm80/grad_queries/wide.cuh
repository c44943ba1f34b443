#pragma once

#include "kernels/sm80/grad_queries/kernel.cuh"
#include "kernels/sm80/pairs.cuh"

// The gradient of queries whose rows are so wide that a warp has registers for first operands of them and half the sum.

namespace hbsattn::sm80 {

template <class Config>
struct WideGradQueriesTraits : QueryTileTraits<Config> {
  using Base = QueryTileTraits<Config>;
  using Base::kHeadDim, Base::kStages, Base::kTileM, Base::kTileN, Base::kGranules;
  using typename Base::Element;
  static constexpr int kPairs = Base::kWarps / 2;  // of warps that share 16 rows
  static_assert(kStages * kTileN >= kTileM, "tiles come and leave through stages");

  struct alignas(128) Storage {
    Element keys[kStages][kTileN * kHeadDim];    // queries come through here, and their gradients leave
    Element values[kStages][kTileN * kHeadDim];  // output gradients come
    float4 weights[kPairs][kGranules][2][32];    // from one warp of a pair to the other,
    uint4 operands[kPairs][kGranules][32];       // and gradients of scores back
    int32_t columns[Base::kColumnEntries];       // as in QueryTileTraits
    typename Base::Blocks::State blocks;
    TileState tile;
    StageSegment segments[2][32];
    uint32_t with_partial[2];
    StripLimits limits[kPairs][1];
    DropoutRow dropout_rows[kTileM];
  };
};

// Two warps share 16 rows: one computes weights, the other, which needs these for it, gradients of scores, and both
// half the columns of the gradient of the queries.
//
//   P = exp(Q K^T - lse)        dP = dO V^T    dS = P o (dP - delta)        dQ += dS K
//
// The rest is as in grad_queries_kernel.
template <class Config, bool kAltered>
__global__ void __launch_bounds__(32 * Config::kWarps, Config::kCtasPerSm)
    wide_grad_queries_kernel(const __grid_constant__ GradQueriesArguments args) {
  using Traits = WideGradQueriesTraits<Config>;
  using Element = typename Traits::Element;
  using Keys = typename Traits::Keys;
  using Queries = typename Traits::Queries;
  using Half = HalfColumns<Keys>;
  extern __shared__ __align__(128) uint8_t shared[];
  auto& storage = *reinterpret_cast<typename Traits::Storage*>(shared);
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  wait_for_earlier_kernels();
  let_next_kernel_start();
  if (args.sequences != nullptr && warp == Traits::kWarps - 1) write_gaps<false>(args, lane);
  WorkItem item;
  int first_row;
  if (!find_part<Traits>(args, item, first_row)) return;
  const KeyStream<Traits, kAltered> stream(args, storage, item,
                                           key_end_of_tile<true>(args, item, first_row + Traits::kTileM));
  if (stream.stages == 0) {
    write_empty_rows<Traits, false>(args, item, first_row);
    return;
  }
  load_rows<Traits>(args, item, args.q, first_row, storage.keys[0]);
  load_rows<Traits>(args, item, args.grad_out, first_row, storage.values[0]);
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  const int pair = warp % Traits::kPairs, matrix_row = 16 * pair, row = first_row + matrix_row;
  const int half = warp / Traits::kPairs;  // of the columns
  const bool weighs = half == 0;
  uint32_t held[Traits::kHeadDim / 16][4];
  hold_rows(PatchReader<Queries>(shared_address(weighs ? storage.keys[0] : storage.values[0]), lane), matrix_row, held);
  stream.begin([] {});
  if (weighs) open_strip<Traits>(args, storage, item, 0, row, matrix_row, kAltered);
  const RowStatistics statistics = RowStatistics::load<true>(args, item, row, lane);
  Accumulator<Traits::kHeadDim / 2> grads[1];
  cute::clear(grads[0]);

#pragma unroll 1
  for (int stage = 0; stage < stream.stages; ++stage) {
    stream.wait_pair(stage);
    const uint32_t keys = stream.keys_of(stage), values = stream.values_of(stage);
    const PatchReader<Keys, Operand::kByRows> rows(weighs ? keys : values, lane);
    Accumulator<Traits::kTileN> products;
    multiply_held<Element>(products, held, rows, [](auto...) {});
    uint32_t operands[Traits::kGranules][1][4];
    if (weighs) {
      weigh<kAltered>(stream, 0, matrix_row, stage, statistics, products);
      CUTE_UNROLL
      for (int i = 0; i < Traits::kGranules; ++i) {
        leave_granule(storage.weights[pair][i], granule_of(products, i), lane);
      }
      reach_partner(1 + pair);
      meet_partner(1 + Traits::kPairs + pair);
      CUTE_UNROLL
      for (int i = 0; i < Traits::kGranules; ++i) {
        const uint4 words = storage.operands[pair][i][lane];
        operands[i][0][0] = words.x;
        operands[i][0][1] = words.y;
        operands[i][0][2] = words.z;
        operands[i][0][3] = words.w;
      }
    } else {
      meet_partner(1 + pair);
      CUTE_UNROLL
      for (int i = 0; i < Traits::kGranules; ++i) {
        Accumulator<kGranule> weights;
        get_granule(storage.weights[pair][i], weights, lane);
        differentiate<kAltered>(weights, statistics, granule_of(products, i));
        uint32_t (&words)[4] = operands[i][0];
        to_operand<Element>(products, i, words);
        storage.operands[pair][i][lane] = make_uint4(words[0], words[1], words[2], words[3]);
      }
      reach_partner(1 + Traits::kPairs + pair);
    }
    PatchReader<Half, Operand::kByColumns> transposed_keys(keys, lane);
    transposed_keys.address ^= half * Half::kHalfBytes;
    CUTE_UNROLL
    for (int i = 0; i < Traits::kGranules; ++i) multiply_step<Element>(grads, operands[i], transposed_keys, i);
  }

  CUTE_UNROLL
  for (int i = 0; i < cute::size(grads[0]); ++i) {
    grads[0](i) = statistics.lse[(i >> 1) & 1] == INFINITY ? 0.f : args.scale * grads[0](i);  // as there
  }
  __syncthreads();
  leave_strip<Queries, 2>(storage.keys[0], matrix_row, grads[0], lane, half);
  meet_partner(1 + pair);
  store_strip<Queries>(storage.keys[0], matrix_row, args.out_columns, lane, [&](int in_strip) -> Element* {
    if (in_strip / 8 != half) return nullptr;
    const RowPlace place = place_row<true>(args, item, row + in_strip);
    return place.count > 0 ? out_of_row<Element>(args, item, place) : nullptr;
  });
}

}  // namespace hbsattn::sm80
