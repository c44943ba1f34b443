#pragma once

#include "kernels/sm90/grad_queries/traits.cuh"

namespace hbsattn::sm90 {

// Those of the kernel for the gradient of the queries, and what the gradients of keys and values need: weights and
// gradients of scores of all queries of the tile, as both consumer warpgroups leave them, for two stages.
template <class Config>
struct BackwardQueriesTraits : GradQueriesTraits<Config> {
  using Base = GradQueriesTraits<Config>;
  using Base::kHeadDim;
  using Base::kQueryBuffers;
  using Base::kTileM;
  using Base::kTileN;
  using Base::kUnits;
  using typename Base::AtomMN;
  using typename Base::Element;
  static constexpr bool kAddsKeys = true;
  static constexpr int kSharedBuffers = 2;

  // A row for each query, with the stage's keys; and the same bytes transposed.
  using SmemLayoutShared =
      decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<Element>{},
                                   cute::Shape<cute::Int<kTileM>, cute::Int<kTileN>, cute::Int<kSharedBuffers>>{}));
  using SmemLayoutSharedTransposed =
      decltype(cute::tile_to_shape(cute::GMMA::Layout_MN_SW128_Atom<Element>{},
                                   cute::Shape<cute::Int<kTileN>, cute::Int<kTileM>, cute::Int<kSharedBuffers>>{}));
  // Columns x rows of queries, or of output gradients.
  using SmemLayoutQt = decltype(cute::tile_to_shape(
      AtomMN{}, cute::Shape<cute::Int<kHeadDim>, cute::Int<kUnitRows>, cute::Int<kUnits * kQueryBuffers>>{},
      cute::Step<cute::_2, cute::_1, cute::_3>{}));

  // Keys x columns, over queries: gradients of keys and values.
  using MmaKeys = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 cute::Shape<cute::Int<kTileN>, cute::Int<kHeadDim>, cute::Int<kTileM>>,
                                 cute::GMMA::Major::MN, cute::GMMA::Major::MN>()));

  struct Storage : Base::Storage {
    alignas(1024) Element weights[kSharedBuffers][kTileM * kTileN];
    Element grad_scores[kSharedBuffers][kTileM * kTileN];
    uint64_t shared_full[kSharedBuffers], shared_empty[kSharedBuffers];
  };
  static_assert(sizeof(Storage) <= sm90_shared_limit(Config::kCtasPerSm), "a CTA's shared memory");
  static_assert(kTileN == 64 && kUnits == 2, "a row of scores is one swizzle pattern; a warpgroup has one gradient");
};

// Gradients of keys and values are added up in float32: (heads_k, all_rows_k, head dim of the kernel).
struct BackwardQueriesArguments : GradQueriesArguments {
  float *key_sums, *value_sums;
  int64_t all_rows_k;  // over the batch
  int sum_batch_rows;  // between batch entries; 0 when packed
};

}  // namespace hbsattn::sm90
