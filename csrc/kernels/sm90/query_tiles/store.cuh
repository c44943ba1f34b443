#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/arch/copy_sm90.hpp>
#include <cute/atom/copy_traits_sm90.hpp>

#include "kernels/common/convert.cuh"
#include "kernels/sm90/query_tiles/producer.cuh"

// What leaves a tile: the normalized output, through the buffer that held the queries, and the log-sum-exp.

namespace hbsattn::sm90 {

// Converts the output of 64 rows, an accumulator of Mma, and leaves it where the buffer warp stores it from.
template <class Traits, class Mma, class Output>
__device__ __forceinline__ void leave_output(typename Traits::Storage& storage, const Output& output, int unit,
                                             int buffer, int warp, int lane) {
  using namespace cute;
  using Element = typename Traits::Element;
  auto converted = make_tensor<Element>(output.layout());
  auto registers = recast<uint32_t>(converted);
  CUTE_UNROLL
  for (int i = 0; i < size(registers); ++i) {
    registers(i) = pack_pair<Element>(output(2 * i), output(2 * i + 1));
  }

  // Every warp must be past its last use of the queries before any writes output over them.
  cutlass::arch::NamedBarrier::sync(128, kUnit0 + unit);
  auto tiled_copy = make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, Element>{}, Mma{});
  auto thread_copy = tiled_copy.get_thread_slice(warp * 32 + lane);
  constexpr auto kColumns = Int<2 * decltype(size(output))::value>{};
  constexpr auto kLayout = tile_to_shape(typename Traits::AtomK{}, make_shape(Int<kUnitRows>{}, kColumns));
  Tensor sO = make_tensor(make_smem_ptr(&storage.queries[buffer][unit][0]), kLayout);
  copy(tiled_copy, thread_copy.retile_S(converted), thread_copy.partition_D(sO));
  cutlass::arch::fence_view_async_shared();
  mbarrier_arrive_warp(&storage.output_full[buffer][unit], lane);
}

// A tile with nothing to attend: output 0, log-sum-exp that of a sink alone, straight to global memory. It holds no
// query buffer.
template <class Traits, bool kGeneral>
__device__ __forceinline__ void write_empty_tile(const QueryTileArguments& args, const WorkItem& item, int unit,
                                                 int warp, int lane) {
  const int vectors = args.out_columns / 8;  // of 16 bytes
  for (int i = lane; i < 16 * vectors; i += 32) {
    const int row = i / vectors, vector = i - row * vectors;
    const RowPlace place = place_row<kSeveralBlocks<Traits, kGeneral>>(args, item, unit * kUnitRows + warp * 16 + row);
    if (place.count <= 0) continue;
    *reinterpret_cast<uint4*>(out_of_row<typename Traits::Element>(args, item, place) + vector * 8) =
        make_uint4(0, 0, 0, 0);
    if constexpr (!Traits::kForGradients) {
      if (vector == 0) *lse_of_row(args, item, place) = sink_of_head(args, place.head);
    }
  }
}

}  // namespace hbsattn::sm90
