#pragma once

#include "kernels/sm90/query_tiles/traits.cuh"
#include "plan/rows.h"

namespace hbsattn::sm90 {

// The forward's, with output gradients beside the queries; both operands of a product that were one's are here the
// other's, too.
template <class Config>
struct GradQueriesTraits : QueryTileTraits<Config> {
  using Forward = QueryTileTraits<Config>;
  using Forward::kHeadDim;
  using Forward::kKeyStages;
  using Forward::kQueryBuffers;
  using Forward::kTileN;
  using Forward::kUnits;
  using Forward::kValueDim;
  using Forward::kValueStages;
  using typename Forward::AtomK;
  using typename Forward::AtomMN;
  using typename Forward::Element;
  static constexpr bool kForGradients = true;

  // Output gradients, as queries lie; values as an operand of the gradients of the weights, and keys as one of those of
  // the queries.
  using SmemLayoutGradOut = decltype(cute::tile_to_shape(
      AtomK{}, cute::Shape<cute::Int<kUnitRows>, cute::Int<kValueDim>, cute::Int<kUnits * kQueryBuffers>>{}));
  using SmemLayoutV = decltype(cute::tile_to_shape(
      AtomK{}, cute::Shape<cute::Int<kTileN>, cute::Int<kValueDim>, cute::Int<kValueStages>>{},
      cute::Step<cute::_2, cute::_1, cute::_3>{}));
  using SmemLayoutKt = decltype(cute::tile_to_shape(
      AtomMN{}, cute::Shape<cute::Int<kHeadDim>, cute::Int<kTileN>, cute::Int<kKeyStages>>{},
      cute::Step<cute::_1, cute::_2, cute::_3>{}));

  using MmaQueries = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float,
                                 cute::Shape<cute::Int<kUnitRows>, cute::Int<kHeadDim>, cute::Int<kTileN>>,
                                 cute::GMMA::Major::K, cute::GMMA::Major::MN>()));

  struct Storage : Forward::Storage {
    alignas(1024) Element grad_out[kQueryBuffers][kUnits][kUnitRows * kValueDim];
  };
  static_assert(sizeof(Storage) <= sm90_shared_limit(Config::kCtasPerSm), "a CTA's shared memory");
};

// `out` is the gradient of the queries, and a query box has one of output gradients with it.
struct GradQueriesArguments : QueryTileArguments {
  CUtensorMap map_grad_out, map_grad_out_clipped;  // as map_q and map_q_clipped
  int grad_out_batch_rows, grad_out_batch_heads;

  // Of all rows, in the chunks of the workspace: (stacks, chunks, 16).
  const float* statistics_lse;  // times log2(e); +inf: the row attends to nothing
  const float* delta;           // what each row of P o dP sums to
  QueryChunks chunks;
  // Whether CTAs start while the last ones of the kernel before, that of gradients of keys, still run. They read
  // nothing that it writes, and what it waited for is complete when it lets them start; they end when it has.
  bool beside_keys;
};

}  // namespace hbsattn::sm90
