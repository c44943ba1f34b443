#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "kernels/common/ptx.cuh"
#include "kernels/common/query_dropout.cuh"
#include "kernels/common/softcap.cuh"
#include "kernels/common/softmax.cuh"
#include "kernels/sm90/altered.cuh"
#include "kernels/sm90/operand.cuh"
#include "kernels/sm90/query_tiles/limits.cuh"
#include "kernels/sm90/query_tiles/traits.cuh"
#include "kernels/sm90/turn.cuh"
#include "plan/pairs.h"

// What one consumer warpgroup does with the stages of a tile: scores of 64 query rows against a stage of keys, softmax,
// and the product with the values of the stage before, which overlaps the softmax, or its maxima alone (kAhead).

namespace hbsattn::sm90 {

// Where one unit of a pair is in a ring of stages. It goes from one of its own stages to the next, and those of the
// other alone lie between. The stages of an owner that pass through a place of the ring have a barrier that tells when
// they are full (QueryTileTraits::kOwners): its phases are those of the unit's own stages, one after another.
template <int kStages>
struct PairPosition {
  int index = 0;        // in the ring
  int full = 0;         // the barrier
  uint32_t parity = 0;  // of the phase that it waits for
  uint32_t phases;      // of each barrier, a bit that tells the parity of its next phase
  static_assert(3 * kStages <= 32);

  __device__ __forceinline__ explicit PairPosition(uint32_t first_phases) : phases(first_phases) {}

  __device__ __forceinline__ void move(int owner, int to) {
    index = to;
    full = owner * kStages + to;
    parity = phases >> full & 1;
    phases ^= 1u << full;
  }
};

template <class Traits, bool kGeneral>
struct ForwardMainloop {
  using Element = typename Traits::Element;
  using Storage = typename Traits::Storage;
  using MmaQK = typename Traits::MmaQK;
  using MmaPV = typename Traits::MmaPV;
  using Limits = KeyLimits<kGeneral, Traits::kPairs>;

  static constexpr int kValueSteps = Traits::kTileN / 16;
  static constexpr bool kPaced = Traits::kHeadDim <= 64;  // exponentials take as long as products
  // Registers hold the scores of two stages beside such a short output. No turns then: no warpgroup waits for its
  // scores.
  static constexpr bool kAhead = kPaced && Traits::kUnits == 2 && !Traits::kPairs && !Traits::kAltered;
  // Nor for pairs, whose warpgroups have unequal numbers of stages: in those of both, turns bring nothing.
  static constexpr bool kTakesTurns = !kAhead && !Traits::kPairs;

  using Scores =
      decltype(cute::partition_fragment_C(MmaQK{}, cute::Shape<cute::Int<kUnitRows>, cute::Int<Traits::kTileN>>{}));
  using Output =
      decltype(cute::partition_fragment_C(MmaPV{}, cute::Shape<cute::Int<kUnitRows>, cute::Int<Traits::kValueDim>>{}));
  // The scores' registers, in order, are those of the second product's first operand.
  using Probabilities = decltype(cute::make_tensor<Element>(
      cute::Shape<cute::Shape<cute::_2, cute::_2, cute::_2>, cute::_1, cute::Int<kValueSteps>>{}));

  const QueryTileArguments& args;
  Storage& storage;
  const int unit;  // which consumer warpgroup
  const int lane;
  const Turn<kTakesTurns ? Traits::kUnits : 1> turn;
  // The stages' barriers, which begin with `unread`. Opaque: recomputing the address in the loop costs issue slots and
  // moves the wait for the second product to a worse place.
  const uint32_t barriers;
  template <int kStages>
  using Position = std::conditional_t<Traits::kPairs, PairPosition<kStages>, RingPosition<kStages>>;
  Position<Traits::kKeyStages> key_stage{0};
  Position<Traits::kValueStages> value_stage{0};

  Output output;
  OnlineSoftmax softmax;
  // Where weights are dropped: the codes of the granules of the last stage whose scores are there, one in each lane.
  int granule_code;
  PartialLimits<Traits> partial;  // where the mask has partial blocks

  __device__ __forceinline__ ForwardMainloop(const QueryTileArguments& args, Storage& storage, int unit, int lane)
      : args(args),
        storage(storage),
        unit(unit),
        lane(lane),
        turn(unit),
        barriers(opaque(shared_address(&storage.unread))) {}

  // Address of barrier `index` of an array of barriers that lies `offset` bytes into Storage.
  __device__ __forceinline__ uint32_t barrier(size_t offset, int index) const {
    return barriers + static_cast<uint32_t>(offset - offsetof(Storage, unread)) + index * sizeof(uint64_t);
  }
  template <class Position>
  static __device__ __forceinline__ int full_index(const Position& position) {
    if constexpr (Traits::kPairs) {
      return position.full;
    } else {
      return position.index;
    }
  }
  __device__ __forceinline__ uint32_t keys_full() const {
    return barrier(offsetof(Storage, keys_full), full_index(key_stage));
  }
  __device__ __forceinline__ uint32_t keys_empty() const {
    return barrier(offsetof(Storage, keys_empty), key_stage.index);
  }
  __device__ __forceinline__ uint32_t values_full() const {
    return barrier(offsetof(Storage, values_full), full_index(value_stage));
  }
  __device__ __forceinline__ uint32_t values_empty() const {
    return barrier(offsetof(Storage, values_empty), value_stage.index);
  }

  // scores = Q K^T for the current key stage; asynchronous.
  __device__ __forceinline__ void issue_scores(Scores& scores, int query_index) const {
    using namespace cute;
    MmaQK mma;
    auto thread_mma = mma.get_thread_slice(_0{});
    // The descriptors of eight and more steps do not fit the uniform registers. Made anew each time, they are not kept
    // elsewhere.
    if constexpr (Traits::kHeadDim >= 128) query_index = uniform(opaque(query_index));
    Tensor sQ = make_tensor(make_smem_ptr(&storage.queries[0][0][0]), typename Traits::SmemLayoutQ{});
    Tensor sK = make_tensor(make_smem_ptr(&storage.keys[0][0]), typename Traits::SmemLayoutK{});
    Tensor rQ = thread_mma.partition_fragment_A(sQ);
    Tensor rK = thread_mma.partition_fragment_B(sK);
    warpgroup_fence_operand(scores);
    warpgroup_arrive();
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    CUTE_UNROLL
    for (int step = 0; step < size<2>(rQ); ++step) {
      cute::gemm(mma, rQ(_, _, step, query_index), rK(_, _, step, key_stage.index), scores);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    warpgroup_fence_operand(scores);
  }

  // output (+)= P V for the current value stage; asynchronous.
  __device__ __forceinline__ void issue_values(Probabilities& probabilities, bool accumulate) {
    using namespace cute;
    MmaPV mma;
    auto thread_mma = mma.get_thread_slice(_0{});
    Tensor sVt = make_tensor(make_smem_ptr(&storage.values[0][0]), typename Traits::SmemLayoutVt{});
    Tensor rV = thread_mma.partition_fragment_B(sVt);
    warpgroup_fence_operand(output);
    fence_operand(probabilities);
    warpgroup_arrive();
    mma.accumulate_ = accumulate ? GMMA::ScaleOut::One : GMMA::ScaleOut::Zero;
    CUTE_UNROLL
    for (int step = 0; step < kValueSteps; ++step) {
      cute::gemm(mma, probabilities(_, _, step), rV(_, _, step, value_stage.index), output);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    warpgroup_fence_operand(output);
    fence_operand(probabilities);
  }

  // Behind the issue of the current stage's products.
  __device__ __forceinline__ void read_partial(const Limits& limits) {
    if constexpr (Traits::kPartial) partial.read(args, storage, key_stage.index, limits, lane);
  }

  // `masked`: whether the stage needs it. Where weights are altered, others come here, too.
  __device__ __forceinline__ void mask(Scores& scores, const Limits& limits, bool masked) {
    if (caps_scores<Traits>(args)) cap_scores(scores, args.cap);
    if (masked) mask_scores<Traits>(args, scores, storage, key_stage.index, limits, lane);
    if constexpr (Traits::kPartial) partial.mask(scores, lane);
    if (!drops_weights<Traits>(args)) return;
    granule_code = storage.granules[key_stage.index][(limits.granules * Traits::kGranules + lane) % 32];
    __syncwarp();  // lane 0 lets the producer overwrite them
  }

  __device__ __forceinline__ void release_keys() {
    if (lane == 0) mbarrier_arrive(keys_empty());
    if constexpr (!Traits::kPairs) key_stage.advance();
  }

  __device__ __forceinline__ void release_values() {
    if (lane == 0) mbarrier_arrive(values_empty());
    if constexpr (!Traits::kPairs) value_stage.advance();
  }

  // Maxima of scores that have come, while the product behind them still runs, and what new ones ask for.
  template <bool kMasked>
  __device__ __forceinline__ void grow(Scores& scores, Probabilities& probabilities, const Limits& limits,
                                       bool masked = true) {
    if constexpr (kMasked) mask(scores, limits, masked);
    release_keys();
    OnlineSoftmax::Growth growth = softmax.find_growth(scores, args.scale_log2);
    hold_back_waits(growth.by[0] + growth.by[1], barriers);
    finish_values(probabilities);
    if constexpr (kGeneral) {
      // Rows that do not exist have no say in when the others are rescaled, or results would differ from run to run.
      if (limits.value[0] <= limits.kNoRow) growth.by[0] = -INFINITY;
      if (limits.value[1] <= limits.kNoRow) growth.by[1] = -INFINITY;
    }
    softmax.grow(growth, args.scale_log2, output);
  }

  __device__ __forceinline__ void weigh(Scores& scores, Probabilities& probabilities) {
    softmax.exponentiate<kPaced>(scores, args.scale_log2, args.zero);
    if (drops_weights<Traits>(args)) {
      const DropoutRow* rows = &storage.dropout_rows[unit * kUnitRows + threadIdx.x % 128 / 32 * 16];
      drop_weights<DropAs::kZero>(args.dropout, rows, scores, lane,
                                  [&](int i) { return __shfl_sync(0xffffffffu, granule_code, i); });
    }
    convert_scores(scores, probabilities);
  }

  // Waits for the product with values that is on its way.
  __device__ __forceinline__ void finish_values(Probabilities& probabilities) {
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(output);
    fence_operand(probabilities);
    release_values();
  }

  // Scores of the next stage while the tensor cores also multiply the last one's probabilities with its values.
  template <bool kMasked>
  __device__ __forceinline__ void step(Scores& scores, Probabilities& probabilities, const Limits& limits,
                                       int query_index, bool accumulate, bool masked = true) {
    mbarrier_wait(keys_full(), key_stage.parity);
    turn.take();
    issue_scores(scores, query_index);
    mbarrier_wait(values_full(), value_stage.parity);
    issue_values(probabilities, accumulate);
    turn.pass();
    read_partial(limits);

    cute::warpgroup_wait<1>();
    cute::warpgroup_fence_operand(scores);
    grow<kMasked>(scores, probabilities, limits, masked);
    weigh(scores, probabilities);
  }

  // Probabilities of a stage whose maxima are known, while the tensor cores compute the next scores; then its product
  // with its values, while those scores' maxima are found.
  template <bool kMasked>
  __device__ __forceinline__ void step_ahead(Scores& scores, Scores& next, Probabilities& probabilities,
                                             const Limits& limits, int query_index, bool accumulate,
                                             bool masked = true) {
    mbarrier_wait(keys_full(), key_stage.parity);
    issue_scores(next, query_index);
    weigh(scores, probabilities);
    mbarrier_wait(values_full(), value_stage.parity);
    issue_values(probabilities, accumulate);

    cute::warpgroup_wait<1>();
    cute::warpgroup_fence_operand(next);
    grow<kMasked>(next, probabilities, limits, masked);
  }

  // Sinks of the rows' heads, where heads have them.
  __device__ __forceinline__ void add_sinks(const WorkItem& item) {
    if (args.sinks == nullptr) return;
    constexpr bool kSeveral = kSeveralBlocks<Traits, kGeneral>;
    const int first_row = unit * kUnitRows + threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const RowPlace place = place_row<kSeveral>(args, item, first_row + 8 * row);
      if (place.count <= 0) continue;
      softmax.add_sink(row, sink_of_head(args, place.head) * static_cast<float>(M_LOG2E), args.scale_log2,
                       (lane & 3) == 0);
    }
  }

  // The first scores of a tile, and their maxima.
  __device__ __forceinline__ void begin(Scores& scores, const Limits& limits, const WorkItem& item, int query_index) {
    mbarrier_wait(keys_full(), key_stage.parity);
    issue_scores(scores, query_index);
    read_partial(limits);
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(scores);
    mask(scores, limits, true);
    release_keys();
    softmax.begin(scores, args.scale_log2);
    add_sinks(item);
  }

  __device__ __forceinline__ void finish(Probabilities& probabilities, bool accumulate) {
    mbarrier_wait(values_full(), value_stage.parity);
    issue_values(probabilities, accumulate);
    finish_values(probabilities);
  }

  // All stages of a tile. Masked stages come first, and the loop after them has no mask code; those from `clean_end` on
  // are masked again. Where weights are altered, one loop takes all.
  __device__ __forceinline__ void run(const Limits& limits, const WorkItem& item, int stages, int masked_stages,
                                      int clean_end, int query_index) {
    Scores scores;
    Probabilities probabilities;
    begin(scores, limits, item, query_index);
    bool accumulate = false;
    int stage = 1;
    if constexpr (kAhead) {
      // Two stages a round, as the next scores have registers of their own: of an odd number, one comes before.
      const int singly = masked_stages + ((clean_end - masked_stages) & 1);
      const auto step_singly = [&](bool masked) {
        Scores next;
        step_ahead<true>(scores, next, probabilities, limits, query_index, accumulate, masked);
        cute::copy(next, scores);
        accumulate = true;
      };
#pragma unroll 1
      for (; stage < singly; ++stage) step_singly(stage < masked_stages);
#pragma unroll 1
      for (; stage < clean_end; stage += 2) {
        Scores next;
        step_ahead<false>(scores, next, probabilities, limits, query_index, accumulate);
        step_ahead<false>(next, scores, probabilities, limits, query_index, true);
        accumulate = true;
      }
#pragma unroll 1
      for (; stage < stages; ++stage) step_singly(true);
      weigh(scores, probabilities);
    } else if constexpr (Traits::kAltered) {
      weigh(scores, probabilities);
#pragma unroll 1
      for (; stage < stages; ++stage) {
        const bool masked = stage < masked_stages || stage >= clean_end;
        step<true>(scores, probabilities, limits, query_index, accumulate, masked);
        accumulate = true;
      }
    } else {
      weigh(scores, probabilities);
#pragma unroll 1
      for (; stage < masked_stages; ++stage) {
        step<true>(scores, probabilities, limits, query_index, accumulate);
        accumulate = true;
      }
#pragma unroll 1
      for (; stage < clean_end; ++stage) {
        step<false>(scores, probabilities, limits, query_index, accumulate);
        accumulate = true;
      }
#pragma unroll 1
      for (; stage < stages; ++stage) {
        step<true>(scores, probabilities, limits, query_index, accumulate);
        accumulate = true;
      }
    }
    finish(probabilities, accumulate);
  }

  // All stages of a tile that are this unit's block's: those that both attend to, then its own. Of each kind, masked
  // stages come first. `ring_begin`: the place in the rings of the tile's first stage.
  __device__ __forceinline__ void run_pair(const Limits& limits, const WorkItem& item, const PairStages& pair,
                                           int ring_begin, int query_index) {
    static_assert(Traits::kKeyStages == Traits::kValueStages);
    const int own = kOfFirst + unit;
    int owner = pair.order.both > 0 ? int{kOfBoth} : own;
    // Values of a stage lie in their ring as its keys do, and their barriers have the same phases.
    const auto move_to = [&](int stage) {
      value_stage = key_stage;
      key_stage.move(owner, static_cast<uint32_t>(ring_begin + pair.order.place_of(owner, stage)) % Traits::kKeyStages);
    };
    if (pair.order.stages_of(owner) == 0) {
      clear(item);
      return;
    }
    Scores scores;
    Probabilities probabilities;
    move_to(0);
    begin(scores, limits, item, query_index);
    weigh(scores, probabilities);
    bool accumulate = false;
    int stage = 1;
#pragma unroll 1
    while (true) {
      const int stages = pair.order.stages_of(owner), masked = pair.masked_of(owner);
#pragma unroll 1
      for (; stage < masked; ++stage) {
        move_to(stage);
        step<true>(scores, probabilities, limits, query_index, accumulate);
        accumulate = true;
      }
#pragma unroll 1
      for (; stage < stages; ++stage) {
        move_to(stage);
        step<false>(scores, probabilities, limits, query_index, accumulate);
        accumulate = true;
      }
      if (owner == own) break;
      owner = own;
      stage = 0;
    }
    value_stage = key_stage;
    finish(probabilities, accumulate);
  }

  // What is left of no stage.
  __device__ __forceinline__ void clear(const WorkItem& item) {
    cute::clear(output);
    softmax.clear();
    add_sinks(item);
  }
};

}  // namespace hbsattn::sm90
