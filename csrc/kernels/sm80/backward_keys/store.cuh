#pragma once

#include "kernels/common/seen_keys.cuh"
#include "kernels/sm80/backward_keys/traits.cuh"
#include "kernels/sm80/query_tiles/stream.cuh"

// What a tile keeps, and what leaves it.

namespace hbsattn::sm80 {

__device__ __forceinline__ int key_head_of(const KeyTiles& args, const KeyItem& item) {
  return item.query_set / args.sets_per_key_head;
}

// Starts copies of the keys or the values of a tile, from `first_row` on; rows that do not exist are zeros.
template <class Rows, int kThreads>
__device__ __forceinline__ void load_key_rows(const BackwardKeysArguments& args, const KeyItem& item, int first_row,
                                              const TensorRows& tensor, uint32_t matrix) {
  const RowLoader<Rows, kThreads> loader(threadIdx.x);
  const uint8_t* first = tensor.head_of(item.sequence, key_head_of(args, item), item.k_begin + item.first_key);
  CUTE_UNROLL
  for (int pass = 0; pass < loader.kPasses; ++pass) {
    const int in_tile = first_row + pass * loader.kPassRows + loader.row;
    const bool exists = in_tile < item.keys;
    const int copied = exists ? in_tile : 0;
    loader.load(matrix, pass, first + int64_t{copied} * tensor.row_stride, exists, tensor.columns);
  }
}

template <class Traits>
__device__ __forceinline__ void load_keys(const BackwardKeysArguments& args, const KeyItem& item, int first_row,
                                          const TensorRows& tensor, typename Traits::Element* matrix) {
  load_key_rows<typename Traits::Keys, Traits::kThreads>(args, item, first_row, tensor, shared_address(matrix));
}

// A warp leaves, of each united block, how many keys of the tile there are up to the last one that some query sees.
__device__ __forceinline__ void leave_seen_keys(const BackwardKeysArguments& args, const KeyItem& item, int* seen,
                                                int lane) {
  for (int block = 0; block < item.united; ++block) {
    const int count = count_seen_keys(args, item, block, lane);
    if (lane == 0) seen[block] = count;
  }
}

// Starts copies of a tile's keys, from `first_row` on. Those that no query sees are zeros: gradients of scores that are
// 0 do not silence a NaN in a product over keys.
template <class Traits>
__device__ __forceinline__ void load_seen_keys(const BackwardKeysArguments& args, const KeyItem& item, int first_row,
                                               const int* seen, typename Traits::Element* matrix) {
  const RowLoader<typename Traits::Keys, Traits::kThreads> loader(threadIdx.x);
  const uint8_t* first = args.k.head_of(item.sequence, key_head_of(args, item), item.k_begin + item.first_key);
  CUTE_UNROLL
  for (int pass = 0; pass < loader.kPasses; ++pass) {
    const int row = first_row + pass * loader.kPassRows + loader.row;
    const int block = item.united > 1 ? min(row / args.mask.k_block_size, item.united - 1) : 0;
    const bool exists = row < seen[block];
    const int copied = exists ? row : 0;
    loader.load(shared_address(matrix), pass, first + int64_t{copied} * args.k.row_stride, exists, args.k.columns);
  }
}

// Leaves what a warp has of the gradients of 16 keys where their keys, or values, were.
template <class Traits, int kShare = 1, class Sum>
__device__ __forceinline__ void leave_keys(typename Traits::Element* matrix, int first_row, float scale, Sum& sum,
                                           int lane, int half = 0) {
  CUTE_UNROLL
  for (int i = 0; i < cute::size(sum); ++i) sum(i) *= scale;
  leave_strip<typename Traits::Keys, kShare>(matrix, first_row, sum, lane, half);
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
