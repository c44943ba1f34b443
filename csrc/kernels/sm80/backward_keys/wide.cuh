#pragma once

#include "kernels/sm80/backward_keys/kernel.cuh"
#include "kernels/sm80/pairs.cuh"

// The gradients of keys and values whose rows are so wide that a warp has registers for one of the sums.

namespace hbsattn::sm80 {

template <class Config_>
struct WideBackwardKeysTraits {
  using Config = Config_;
  using Element = ElementOf<Config::kDType>;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kTileRows = Config::kTileRows;
  static constexpr int kTileN = Config::kTileN;
  static constexpr int kCtasOfTile = kTileRows / kTileN;
  static constexpr int kTileM = Config::kTileM;
  static constexpr int kTileMLog2 = cutlass::log2_down<kTileM>::value;
  static constexpr int kStages = Config::kStages;
  static constexpr int kWarps = Config::kWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kPairs = kWarps / 2;  // of warps that share 16 keys
  static constexpr int kGranules = kTileM / kGranule;
  static constexpr int kColumnEntries = 128;
  using Blocks = BitRow<2, kColumnEntries>;
  static constexpr int kListWarp = 0, kListed = kTileM > 32 ? 4 : 8, kInfos = 2 * kListed;  // as in BackwardKeysTraits

  using Keys = SharedRows<Element, kTileN, kHeadDim>;
  using Queries = SharedRows<Element, kTileM, kHeadDim>;
  // Of rows of keys, and of values, what registers hold, and what is read from shared memory for each stage.
  static constexpr int kHeldColumns = Config::kHeldColumns, kReadColumns = kHeadDim - kHeldColumns;
  using Held = SharedRows<Element, kTileN, kHeldColumns>;
  using Read = SharedRows<Element, kTileN, kReadColumns == 0 ? 64 : kReadColumns>;
  static_assert(kTileN == 16 * kPairs && kHeldColumns % 64 == 0 && kReadColumns % 64 == 0);
  static_assert(kStages >= 2 && kStages * kTileM >= kTileN, "tiles come and leave through stages");
  static_assert(kInfos >= kListed + 2 * kStages - 1 && kTileM / 2 <= kThreads);

  struct alignas(128) Storage {
    Element queries[kStages][kTileM * kHeadDim];   // keys that are held come through here, and their gradients leave
    Element grad_out[kStages][kTileM * kHeadDim];  // the same of values
    Element keys[kReadColumns == 0 ? 8 : kTileN * kReadColumns];
    Element values[kReadColumns == 0 ? 8 : kTileN * kReadColumns];
    float4 weights[kPairs][kGranules][2][32];  // from one warp of a pair to the other
    alignas(16) float lse[kStages][kTileM];    // as in BackwardKeysTraits
    alignas(16) float delta[kStages][kTileM];
    int32_t columns[kColumnEntries];
    typename Blocks::State blocks;
    StageInfo<kGranules> infos[kInfos];
    StageCursor cursor;
    KeyItem item;
  };
};

// Two warps share 16 keys: one computes weights and the gradient of values, the other gradients of weights and that of
// keys, which it needs the weights for.
//
//   P = exp(K Q^T - lse)    dV += P dO        dP = V dO^T    dS = P o (dP - delta)    dK += dS Q
//
// Either has first operands of 16 keys or values, of which registers hold Config::kHeldColumns, and sums all columns of
// one gradient. The rest is as in backward_keys_kernel.
template <class Config, bool kAltered>
__global__ void __launch_bounds__(32 * Config::kWarps, Config::kCtasPerSm)
    wide_backward_keys_kernel(const __grid_constant__ BackwardKeysArguments args) {
  using Traits = WideBackwardKeysTraits<Config>;
  using Element = typename Traits::Element;
  using Held = typename Traits::Held;
  using Queries = typename Traits::Queries;
  using Statistics = QueryStatistics<kGranule>;
  extern __shared__ __align__(128) uint8_t shared[];
  auto& storage = *reinterpret_cast<typename Traits::Storage*>(shared);
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  wait_for_earlier_kernels();
  let_next_kernel_start();
  if (warp == Traits::kWarps - 1) write_key_gaps(args, lane);
  const QueryStream<Traits> stream(args, storage);
  const KeyItem& item = storage.item;
  if (threadIdx.x == 0) {
    storage.item = read_key_item<Traits::kTileN>(args, static_cast<int>(blockIdx.x));
    stream.open();
  }
  __syncthreads();
  if (item.column < 0) return;
  using Read = typename Traits::Read;
  constexpr int kThreads = Traits::kThreads, kHeldColumns = Traits::kHeldColumns;
  load_key_rows<Held, kThreads>(args, item, 0, args.k, shared_address(storage.queries[0]));
  load_key_rows<Held, kThreads>(args, item, 0, args.v, shared_address(storage.grad_out[0]));
  if constexpr (Traits::kReadColumns > 0) {
    load_key_rows<Read, kThreads>(args, item, 0, args.k.from<Element>(kHeldColumns), shared_address(storage.keys));
    load_key_rows<Read, kThreads>(args, item, 0, args.v.from<Element>(kHeldColumns), shared_address(storage.values));
  }
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  const int pair = warp % Traits::kPairs, warp_key = 16 * pair;
  const bool of_values = warp < Traits::kPairs;  // whose gradient the warp sums
  uint32_t held[kHeldColumns / 16][4];
  hold_rows(PatchReader<Held>(shared_address(of_values ? storage.queries[0] : storage.grad_out[0]), lane), warp_key,
            held);
  __syncthreads();
  stream.begin();

  const PatchReader<Read> others(shared_address(of_values ? storage.keys : storage.values), lane);
  const QueryLimits limits(args, item, warp_key, lane);
  KeyDropout dropout;
  if constexpr (kAltered) dropout = KeyDropout(item, warp_key);
  Accumulator<Traits::kHeadDim> sum[1];
  cute::clear(sum[0]);

#pragma unroll 1
  for (int stage = 0; stream.next(stage); ++stage) {
    const int buffer = stage % Traits::kStages;
    const auto& info = stream.info_of(stage);
    const uint32_t queries = shared_address(storage.queries[buffer]),
                   grad_out = shared_address(storage.grad_out[buffer]);
    Accumulator<Traits::kTileM> products;
    multiply_held<Element>(products, held, PatchReader<Queries, Operand::kByRows>(of_values ? queries : grad_out, lane),
                           [&](int step, uint32_t (&words)[4]) { others.read(warp_key, step, words); });
    uint32_t operands[Traits::kGranules][1][4];
    if (of_values) {
      CUTE_UNROLL
      for (int i = 0; i < Traits::kGranules; ++i) {
        auto weights = granule_of(products, i);
        const Statistics lse(&storage.lse[buffer][kGranule * i], lane);
        weigh<kAltered>(args, item, info, i, limits, warp_key, dropout, lse, lane, weights);
        leave_granule(storage.weights[pair][i], weights, lane);
      }
      reach_partner(1 + pair);
      CUTE_UNROLL
      for (int i = 0; i < Traits::kGranules; ++i) round_operand<Element, kAltered>(products, i, operands[i][0]);
    } else {
      meet_partner(1 + pair);
      CUTE_UNROLL
      for (int i = 0; i < Traits::kGranules; ++i) {
        Accumulator<kGranule> weights;
        get_granule(storage.weights[pair][i], weights, lane);
        auto grads = granule_of(products, i);
        const Statistics lse(&storage.lse[buffer][kGranule * i], lane);
        const Statistics delta(&storage.delta[buffer][kGranule * i], lane);
        differentiate<kAltered>(args, info.masked, weights, lse, delta, grads);
        round_operand<Element, false>(products, i, operands[i][0]);
      }
    }
    const PatchReader<Queries, Operand::kByColumns> rows(of_values ? grad_out : queries, lane);
    CUTE_UNROLL
    for (int i = 0; i < Traits::kGranules; ++i) multiply_step<Element>(sum, operands[i], rows, i);
  }

  const float scale = of_values ? (kAltered ? args.dropout.scale : 1.f) : args.scale;
  Element* const left = of_values ? storage.grad_out[0] : storage.queries[0];
  leave_keys<Traits>(left, warp_key, scale, sum[0], lane);
  __syncwarp();
  if (of_values) {
    store_keys<Traits>(args, item, left, warp_key, warp_key, args.grad_v, args.grad_v_batch_stride,
                       args.grad_v_row_stride, args.grad_v_head_stride, args.grad_v_columns, lane);
  } else {
    store_keys<Traits>(args, item, left, warp_key, warp_key, args.grad_k, args.grad_k_batch_stride,
                       args.grad_k_row_stride, args.grad_k_head_stride, args.grad_k_columns, lane);
  }
}

}  // namespace hbsattn::sm80
