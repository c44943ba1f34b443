#pragma once

#include "kernels/sm80/backward_keys/traits.cuh"
#include "kernels/sm80/query_tiles/stream.cuh"

// What a tile keeps, and what leaves it.

namespace hbsattn::sm80 {

__device__ __forceinline__ int key_head_of(const KeyTiles& args, const KeyItem& item) {
  return item.query_set / args.sets_per_key_head;
}

// Starts copies of the keys or the values of a tile, from `first_row` on; rows that do not exist are zeros.
template <class Traits>
__device__ __forceinline__ void load_keys(const BackwardKeysArguments& args, const KeyItem& item, int first_row,
                                          const TensorRows& tensor, typename Traits::Element* matrix) {
  const RowLoader<typename Traits::Keys, Traits::kThreads> loader(threadIdx.x);
  const uint8_t* first = tensor.head_of(item.sequence, key_head_of(args, item), item.k_begin + item.first_key);
  CUTE_UNROLL
  for (int pass = 0; pass < loader.kPasses; ++pass) {
    const int in_tile = first_row + pass * loader.kPassRows + loader.row;
    const bool exists = in_tile < item.keys;
    const int copied = exists ? in_tile : 0;
    loader.load(shared_address(matrix), pass, first + int64_t{copied} * tensor.row_stride, exists, tensor.columns);
  }
}

// Leaves what a warp has of the gradients of 16 keys where their keys, or values, were.
template <class Traits, class Sum>
__device__ __forceinline__ void leave_keys(typename Traits::Element* matrix, int first_row, int half, float scale,
                                           const Sum& sum, int lane) {
  using Keys = typename Traits::Keys;
  constexpr int kChunkGroups = Keys::kChunkVectors * Keys::kVectorColumns / 8;  // of 8 columns
  constexpr int kGroups = kChunkGroups / Traits::kShare;                        // of them, that a warp has
  CUTE_UNROLL
  for (int i = 0; i < cute::size(sum); i += 2) {
    const int row = first_row + lane / 4 + (i >> 1 & 1) * 8, in_warp = i / 4;
    const int group = in_warp / kGroups * kChunkGroups + half * kGroups + in_warp % kGroups;
    store_pair<typename Keys::Element>(reinterpret_cast<uint8_t*>(matrix) + Keys::offset_of_pair(row, group, lane),
                                       scale * sum(i), scale * sum(i + 1));
  }
}

// A warp stores what was left of the gradients of 16 keys, of which the first is row `first_in_tile` of the tile.
template <class Traits>
__device__ __forceinline__ void store_keys(const BackwardKeysArguments& args, const KeyItem& item,
                                           const typename Traits::Element* matrix, int first_row, int first_in_tile,
                                           void* out, int64_t batch_stride, int64_t row_stride, int64_t head_stride,
                                           int columns, int lane) {
  using Element = typename Traits::Element;
  if (out == nullptr) return;  // not needed
  Element* first = static_cast<Element*>(out) + item.sequence * batch_stride + key_head_of(args, item) * head_stride;
  store_strip<typename Traits::Keys>(matrix, first_row, columns, lane, [&](int in_strip) -> Element* {
    const int in_tile = first_in_tile + in_strip;
    if (in_tile >= item.keys) return nullptr;
    return first + (int64_t{item.k_begin} + item.first_key + in_tile) * row_stride;
  });
}

}  // namespace hbsattn::sm80
