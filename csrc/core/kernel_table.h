#pragma once

// The kernels of this build: what selection chooses from, what dispatch calls and what build_info reports.

#include "kernels/instances.h"
#include "kernels/sm90/config.h"

namespace hbsattn {

// Head dims ascend for each dtype: the first that is large enough is the cheapest.
template <class... Configs>
struct KernelTable {
  // Calls visit(Config{}) for every compiled kernel, in order, until one returns true. Whether one did.
  template <class Visitor>
  static bool any(Visitor&& visit) {
    return (visit(Configs{}) || ...);
  }
};

}  // namespace hbsattn

#if HBSATTN_SM90
#include "instances/sm90_kernels.h"  // generated from kernels/sm90/instances.txt
#else
namespace hbsattn {
using Sm90ForwardKernels = KernelTable<>;
using Sm90GradQueriesKernels = KernelTable<>;
using Sm90BackwardQueriesKernels = KernelTable<>;
using Sm90BackwardKeysKernels = KernelTable<>;
}  // namespace hbsattn
#endif
