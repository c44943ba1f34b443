#pragma once

// The kernels of this build, as one list: what selection chooses from, what dispatch calls and what build_info reports.

#include "kernels/config.h"
#include "kernels/instances.h"

namespace hbsattn {

// The build says with 0 or 1 which kernels it compiles.
template <bool kCompiled_, class Config_>
struct KernelEntry {
  static constexpr bool kCompiled = kCompiled_;
  using Config = Config_;
};

template <class... Entries>
struct KernelTable {
  // Calls visit(Config{}) for every compiled kernel, in order, until one returns true. Whether one did.
  template <class Visitor>
  static bool any(Visitor&& visit) {
    return (visit_entry<Entries>(visit) || ...);
  }

 private:
  template <class Entry, class Visitor>
  static bool visit_entry(Visitor&& visit) {
    if constexpr (Entry::kCompiled) {
      return visit(typename Entry::Config{});
    } else {
      return false;
    }
  }
};

// Head dims ascend for each dtype: the first that is large enough is the cheapest.
template <bool kCompiled, DType kDType, int kHeadDim, int kTileM>
using Sm90Entry = KernelEntry<HBSATTN_SM90 && kCompiled, Sm90Forward<kDType, kHeadDim, kTileM>>;

using Sm90ForwardKernels =
    KernelTable<Sm90Entry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_64, DType::kBFloat16, 64, 64>,
                Sm90Entry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_64, DType::kBFloat16, 64, 128>,
                Sm90Entry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_64, DType::kBFloat16, 64, 192>,
                Sm90Entry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_96, DType::kBFloat16, 96, 64>,
                Sm90Entry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_96, DType::kBFloat16, 96, 128>,
                Sm90Entry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_96, DType::kBFloat16, 96, 192>,
                Sm90Entry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_128, DType::kBFloat16, 128, 64>,
                Sm90Entry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_128, DType::kBFloat16, 128, 128>,
                Sm90Entry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_128, DType::kBFloat16, 128, 192>,
                Sm90Entry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_192, DType::kBFloat16, 192, 128>,
                Sm90Entry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_256, DType::kBFloat16, 256, 128>,
                Sm90Entry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_64, DType::kFloat16, 64, 64>,
                Sm90Entry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_64, DType::kFloat16, 64, 128>,
                Sm90Entry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_64, DType::kFloat16, 64, 192>,
                Sm90Entry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_96, DType::kFloat16, 96, 64>,
                Sm90Entry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_96, DType::kFloat16, 96, 128>,
                Sm90Entry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_96, DType::kFloat16, 96, 192>,
                Sm90Entry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_128, DType::kFloat16, 128, 64>,
                Sm90Entry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_128, DType::kFloat16, 128, 128>,
                Sm90Entry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_128, DType::kFloat16, 128, 192>,
                Sm90Entry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_192, DType::kFloat16, 192, 128>,
                Sm90Entry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_256, DType::kFloat16, 256, 128>>;

template <bool kCompiled, DType kDType, int kHeadDim, int kTileN>
using Sm90BackwardEntry = KernelEntry<HBSATTN_SM90 && kCompiled, Sm90Backward<kDType, kHeadDim, kTileN>>;

using Sm90BackwardKernels =
    KernelTable<Sm90BackwardEntry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_64, DType::kBFloat16, 64, 64>,
                Sm90BackwardEntry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_64, DType::kBFloat16, 64, 128>,
                Sm90BackwardEntry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_96, DType::kBFloat16, 96, 64>,
                Sm90BackwardEntry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_96, DType::kBFloat16, 96, 128>,
                Sm90BackwardEntry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_128, DType::kBFloat16, 128, 64>,
                Sm90BackwardEntry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_128, DType::kBFloat16, 128, 128>,
                Sm90BackwardEntry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_192, DType::kBFloat16, 192, 64>,
                Sm90BackwardEntry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_256, DType::kBFloat16, 256, 64>,
                Sm90BackwardEntry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_64, DType::kFloat16, 64, 64>,
                Sm90BackwardEntry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_64, DType::kFloat16, 64, 128>,
                Sm90BackwardEntry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_96, DType::kFloat16, 96, 64>,
                Sm90BackwardEntry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_96, DType::kFloat16, 96, 128>,
                Sm90BackwardEntry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_128, DType::kFloat16, 128, 64>,
                Sm90BackwardEntry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_128, DType::kFloat16, 128, 128>,
                Sm90BackwardEntry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_192, DType::kFloat16, 192, 64>,
                Sm90BackwardEntry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_256, DType::kFloat16, 256, 64>>;

template <bool kCompiled, DType kDType, int kHeadDim, int kTileM>
using Sm90GradQueriesEntry = KernelEntry<HBSATTN_SM90 && kCompiled, Sm90GradQueries<kDType, kHeadDim, kTileM>>;

using Sm90GradQueriesKernels =
    KernelTable<Sm90GradQueriesEntry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_64, DType::kBFloat16, 64, 64>,
                Sm90GradQueriesEntry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_64, DType::kBFloat16, 64, 128>,
                Sm90GradQueriesEntry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_96, DType::kBFloat16, 96, 64>,
                Sm90GradQueriesEntry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_96, DType::kBFloat16, 96, 128>,
                Sm90GradQueriesEntry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_128, DType::kBFloat16, 128, 64>,
                Sm90GradQueriesEntry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_128, DType::kBFloat16, 128, 128>,
                Sm90GradQueriesEntry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_192, DType::kBFloat16, 192, 128>,
                Sm90GradQueriesEntry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_256, DType::kBFloat16, 256, 128>,
                Sm90GradQueriesEntry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_64, DType::kFloat16, 64, 64>,
                Sm90GradQueriesEntry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_64, DType::kFloat16, 64, 128>,
                Sm90GradQueriesEntry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_96, DType::kFloat16, 96, 64>,
                Sm90GradQueriesEntry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_96, DType::kFloat16, 96, 128>,
                Sm90GradQueriesEntry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_128, DType::kFloat16, 128, 64>,
                Sm90GradQueriesEntry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_128, DType::kFloat16, 128, 128>,
                Sm90GradQueriesEntry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_192, DType::kFloat16, 192, 128>,
                Sm90GradQueriesEntry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_256, DType::kFloat16, 256, 128>>;

template <bool kCompiled, DType kDType, int kHeadDim>
using Sm90QueryBackwardEntry = KernelEntry<HBSATTN_SM90 && kCompiled, Sm90QueryBackward<kDType, kHeadDim>>;

using Sm90QueryBackwardKernels =
    KernelTable<Sm90QueryBackwardEntry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_64, DType::kBFloat16, 64>,
                Sm90QueryBackwardEntry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_96, DType::kBFloat16, 96>,
                Sm90QueryBackwardEntry<HBSATTN_DTYPE_BF16 && HBSATTN_HEAD_DIM_128, DType::kBFloat16, 128>,
                Sm90QueryBackwardEntry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_64, DType::kFloat16, 64>,
                Sm90QueryBackwardEntry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_96, DType::kFloat16, 96>,
                Sm90QueryBackwardEntry<HBSATTN_DTYPE_FP16 && HBSATTN_HEAD_DIM_128, DType::kFloat16, 128>>;

}  // namespace hbsattn
