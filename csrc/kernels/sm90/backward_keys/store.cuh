#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/tensor.hpp>

#include "kernels/common/convert.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/sm90/backward_keys/set_sum.cuh"

// What leaves a tile: gradients of its keys and values.

namespace hbsattn::sm90 {

// Writes the gradients of a thread's two keys of one key head, from a column on.
template <class Traits, class GradKeys>
__device__ __forceinline__ void store_keys(const BackwardKeysArguments& args, const KeyItem& item, const GradKeys& grad,
                                           int first_column, float scale, void* out, int64_t batch_stride,
                                           int64_t row_stride, int64_t head_stride, int columns, int head, int warp_key,
                                           int lane) {
  using Element = typename Traits::Element;
  if (out == nullptr) return;  // not needed
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int in_tile = warp_key + lane / 4 + 8 * row;
    const int64_t key = int64_t{item.k_begin} + item.first_key + in_tile;
    Element* destination =
        static_cast<Element*>(out) + item.sequence * batch_stride + key * row_stride + head * head_stride;
#pragma unroll
    for (int group = 0; group < decltype(cute::size(grad))::value / 4; group += 4) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pairs[i] =
            pack_pair<Element>(scale * grad(4 * (group + i) + 2 * row), scale * grad(4 * (group + i) + 2 * row + 1));
      }
      transpose_quad(pairs, lane);
      const int column = first_column + (group + (lane & 3)) * 8;
      if (in_tile < item.keys && column < columns) {
        *reinterpret_cast<uint4*>(destination + column) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
      }
    }
  }
}

// Writes a warp's 16 rows of gradients, which all exist, by the copy engine out of a buffer of the warp's: its lane 0
// starts that.
template <class Traits, class GradKeys>
__device__ __forceinline__ void send_keys(const BackwardKeysArguments& args, const GradKeys& grad, float scale,
                                          const CUtensorMap& map, int columns, int row, int head, float* buffer,
                                          int lane) {
  using Element = typename Traits::Element;
  constexpr int kVectors = Traits::kChunkColumns / 8;  // of 16 bytes, in a row of a chunk
  auto* vectors = reinterpret_cast<cute::uint128_t*>(buffer);
  const int row_to = lane & 15;  // of a matrix of 8 x 8; four of them at a time are 16 rows of two groups of columns
  const int swizzle = kVectors == 8 ? row_to % 8 : row_to / 2 % 4;
#pragma unroll
  for (int group = 0; group < Traits::kHeadDim / 8; group += 2) {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int first = 4 * (group + i / 2) + 2 * (i & 1);
      pairs[i] = pack_pair<Element>(scale * grad(first), scale * grad(first + 1));
    }
    const int vector = (group % kVectors + lane / 16) ^ swizzle;
    cute::SM90_U32x4_STSM_N::copy(pairs[0], pairs[1], pairs[2], pairs[3],
                                  vectors[(group / kVectors * kGranule + row_to) * kVectors + vector]);
  }
  cutlass::arch::fence_view_async_shared();
  __syncwarp();
  if (lane == 0) {
#pragma unroll
    for (int chunk = 0; chunk < Traits::kChunks; ++chunk) {
      if (chunk * Traits::kChunkColumns < columns) {
        cute::SM90_TMA_STORE_3D::copy(&map, vectors + chunk * (kGranule * kVectors), chunk * Traits::kChunkColumns, row,
                                      head);
      }
    }
    cute::tma_store_arrive();
  }
}

// Leaves a part's gradients in the workspace. For the part of a tile that does so last, they become the sum of all, in
// the order of parts, so that it is the same in every run. Whether this is that part.
template <class Traits, class GradKeys, class GradValues>
__device__ __forceinline__ bool add_parts(const BackwardKeysArguments& args, typename Traits::Storage& storage,
                                          const KeyItem& item, int unit, int warp, int lane, GradKeys& grad_keys,
                                          GradValues& grad_values) {
  constexpr int kVectors = decltype(cute::size(grad_keys))::value / 4;
  static_assert(decltype(cute::size(grad_values))::value <= decltype(cute::size(grad_keys))::value,
                "room in the slots");
  constexpr int kSlotVectors = 2 * kVectors * 128;  // of one warpgroup
  const auto sums = [&](int part) {
    return args.part_sums + (int64_t{item.slot} + part) * (Traits::kUnits * kSlotVectors) + unit * kSlotVectors +
           warp * 32 + lane;
  };
  float4* mine = sums(item.part);
  const auto leave = [&](const auto& grad, int first) {
#pragma unroll
    for (int i = 0; i < decltype(cute::size(grad))::value / 4; ++i) {
      mine[(first + i) * 128] = make_float4(grad(4 * i), grad(4 * i + 1), grad(4 * i + 2), grad(4 * i + 3));
    }
  };
  leave(grad_keys, 0);
  leave(grad_values, kVectors);
  __threadfence();
  cutlass::arch::NamedBarrier::sync(128, kParts0 + unit);
  if (warp == 0 && lane == 0) {
    storage.parts_before[unit] = atomicAdd(args.parts_done + item.slot * Traits::kUnits + unit, 1);
    __threadfence();  // what others left is read after this
  }
  cutlass::arch::NamedBarrier::sync(128, kParts0 + unit);
  if (storage.parts_before[unit] != item.parts - 1) return false;
  cute::clear(grad_keys);
  cute::clear(grad_values);
#pragma unroll 1
  for (int part = 0; part < item.parts; ++part) {
    const float4* theirs = sums(part);
    const auto add = [&](auto& grad, int first) {
#pragma unroll
      for (int i = 0; i < decltype(cute::size(grad))::value / 4; ++i) {
        const float4 sum = __ldcg(theirs + (first + i) * 128);
        grad(4 * i) += sum.x;
        grad(4 * i + 1) += sum.y;
        grad(4 * i + 2) += sum.z;
        grad(4 * i + 3) += sum.w;
      }
    };
    add(grad_keys, 0);
    add(grad_values, kVectors);
  }
  return true;
}

// What becomes of the gradients of a tile: they are passed on to the next set of queries, or written.
template <class Traits, class GradKeys, class GradValues>
__device__ __forceinline__ void leave_keys(const BackwardKeysArguments& args, typename Traits::Storage& storage,
                                           const KeyItem& item, int unit, int warp, int lane, GradKeys& grad_keys,
                                           GradValues& grad_values) {
  // Made from these anew for each tile, addresses do not take registers from the mainloop.
  lane = static_cast<int>(opaque(lane));
  warp = uniform(static_cast<int>(opaque(warp)));
  const int warp_key = first_key_of_warp<Traits>(unit, warp);
  const int first_column = Traits::kWide ? unit * Traits::kGradColumns : 0;
  const int first_value_column = Traits::kWide ? unit * (Traits::kValueDim / 2) : 0;
  if (args.sets_per_key_head > 1) {
    const SetSum<Traits> sum(args, item, unit, warp_key);
    if (!sum.add(lane, grad_keys, grad_values)) return;
  }
  const int head = item.query_set / args.sets_per_key_head;
  const float value_scale = Traits::kAltered ? args.dropout.scale : 1.f;
  if constexpr (Traits::kSendsKeys) {
    // The copy engine would overwrite rows of the next sequence.
    if (warp_key + kGranule <= uniform(item.keys)) {
      const int row = item.k_begin + item.first_key + warp_key;
      float* buffer = storage.grad_queries[unit * 4 + warp];
      if (args.grad_v != nullptr) {
        bulk_wait_read(lane);
        send_keys<Traits>(args, grad_values, value_scale, args.map_grad_v, args.grad_v_columns,
                          row + item.sequence * args.grad_v_batch_rows, head + item.sequence * args.grad_v_batch_heads,
                          buffer, lane);
      }
      if (args.grad_k != nullptr) {
        bulk_wait_read(lane);
        send_keys<Traits>(args, grad_keys, args.scale, args.map_grad_k, args.grad_k_columns,
                          row + item.sequence * args.grad_k_batch_rows, head + item.sequence * args.grad_k_batch_heads,
                          buffer, lane);
      }
      return;
    }
  }
  store_keys<Traits>(args, item, grad_keys, first_column, args.scale, args.grad_k, args.grad_k_batch_stride,
                     args.grad_k_row_stride, args.grad_k_head_stride, args.grad_k_columns, head, warp_key, lane);
  store_keys<Traits>(args, item, grad_values, first_value_column, value_scale, args.grad_v, args.grad_v_batch_stride,
                     args.grad_v_row_stride, args.grad_v_head_stride, args.grad_v_columns, head, warp_key, lane);
}

}  // namespace hbsattn::sm90
