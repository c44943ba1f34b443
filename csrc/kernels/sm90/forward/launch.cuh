#pragma once

#include "kernels/sm90/forward/kernel.cuh"
#include "kernels/sm90/query_tiles/launch.cuh"
#include "plan/lists.h"
#include "plan/workspace.h"

namespace hbsattn::kernels {

template <class Config>
int forward_shared_bytes() {
  return static_cast<int>(sizeof(typename sm90::QueryTileTraits<Config>::Storage));
}

// Of a list that has pairs, the kernel of pairs, which runs last, takes the front, and that of other tiles the end.
template <class Config>
void choose_part(const ForwardParams& params, sm90::QueryTileArguments& args) {
  args.num_items = static_cast<int>(
      count_query_items(params.mask.shape, params.heads_q, params.heads_k, params.head_dim, params.pack_heads, false));
  if constexpr (Config::kPairs) {
    args.sequences = nullptr;  // the other writes rows of nobody
    ++args.ticket;
  } else {
    args.items += args.num_items - 1;
    args.item_step = -1;
  }
}

template <class Config>
Status run_forward(const ForwardParams& params, Stream stream) {
  using Traits = sm90::QueryTileTraits<Config>;
  sm90::QueryTileArguments args{};
  bool general = false;
  const bool for_backward = is_altered(params);  // takes_gradient_tiles() of this family
  HBSATTN_RETURN_IF_ERROR(set_arguments<Config>(params, for_backward, args, general));
  const TileShape tiles =
      shape_tiles(params.mask.shape, params.heads_q, params.heads_k, params.head_dim, params.pack_heads, for_backward);
  const bool pairs = tiles.pairs;
  if (pairs) choose_part<Config>(params, args);
  HBSATTN_RETURN_IF_ERROR(record_cycles_of(params, args));
  auto* kernel = sm90::forward_kernel<Config, Config::kAltered>;
  if constexpr (Config::kWithGeneral) {
    if (general) kernel = sm90::forward_kernel<Config, true>;
  } else if (general) {
    return Status::NotSupported("tiles of " + std::to_string(Config::kTileM) +
                                " rows were planned for blocks that their kernel cannot take");
  }
  int ctas = 0;
  HBSATTN_RETURN_IF_ERROR(count_ctas(args, Config::kCtasPerSm, &ctas));
  // By a memset: it costs less than a kernel of its own. Behind the kernels of a plan, it would keep this one from
  // starting before they end. It clears the ticket of pairs, too.
  if (!params.workspace_is_clear && !Config::kPairs && (pairs || args.num_items > ctas)) {
    HBSATTN_RETURN_IF_ERROR(
        cuda_status(cudaMemsetAsync(args.ticket, 0, kForwardTickets * sizeof(int), stream), "cudaMemsetAsync"));
  }
  return launch("the launch of the forward kernel", kernel, ctas, Traits::kThreads, forward_shared_bytes<Config>(),
                stream, args);
}

}  // namespace hbsattn::kernels
