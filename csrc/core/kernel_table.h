#pragma once

// The kernels of this build: what selection chooses from, what dispatch calls and what build_info reports.

#include <utility>

#include "kernels/instances.h"
#include "kernels/sm80/config.h"
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

// Both generated, from kernels/sm90/instances.txt and kernels/sm80/instances.txt.
#if HBSATTN_SM90
#include "instances/sm90_kernels.h"
#else
namespace hbsattn {
using Sm90ForwardKernels = KernelTable<>;
using Sm90GradQueriesKernels = KernelTable<>;
using Sm90BackwardQueriesKernels = KernelTable<>;
using Sm90BackwardKeysKernels = KernelTable<>;
}  // namespace hbsattn
#endif
#if HBSATTN_SM80
#include "instances/sm80_kernels.h"
#else
namespace hbsattn {
using Sm80ForwardKernels = KernelTable<>;
using Sm80GradQueriesKernels = KernelTable<>;
using Sm80BackwardKeysKernels = KernelTable<>;
}  // namespace hbsattn
#endif

namespace hbsattn {

// What tells the kernels of a table apart that have one dtype and head dim.
struct KernelTiles {
  int rows;  // queries of a tile; keys of one in the backward pass by keys
  bool pairs = false;
  bool altered = false;  // of calls that are altered (is_altered)
  bool short_values = false;

  constexpr bool operator==(const KernelTiles& other) const {
    return rows == other.rows && pairs == other.pairs && altered == other.altered && short_values == other.short_values;
  }
};

// What kernels compute. A family has a table of each kind.
enum class KernelKind { kForward, kBackwardKeys, kBackwardQueries, kGradQueries };

// What holds for all kernels of a family.
template <KernelKind kind>
struct Sm90Kernels {
  static constexpr const char* kFamily = "sm90";
  static constexpr const char* kArch = "sm_90a";
  static constexpr bool kAlteredApart = true;  // calls that are altered have kernels of their own

  template <class Config>
  static constexpr KernelTiles tiles() {
    return {Config::kTileRows, Config::kPairs, Config::kAltered, Config::kShortValues};
  }
  template <class Config>
  static constexpr int value_dim() {
    return Config::kValueDim;
  }
  // Of keys and of values; by keys, of queries and of output gradients.
  template <class Config>
  static constexpr std::pair<int, int> stages() {
    if constexpr (kind == KernelKind::kBackwardKeys) {
      return {Config::kStages, Config::kStages};
    } else {
      return {Config::kKeyStages, Config::kValueStages};
    }
  }
};

template <KernelKind kind>
struct Sm80Kernels {
  static constexpr const char* kFamily = "sm80";
  static constexpr const char* kArch = HBSATTN_PTX80 ? "sm_80" : "sm_90a";  // the oldest that a build has code for
  static constexpr bool kAlteredApart = false;

  template <class Config>
  static constexpr KernelTiles tiles() {
    return {Config::kTileRows};
  }
  template <class Config>
  static constexpr int value_dim() {
    return Config::kHeadDim;
  }
  template <class Config>
  static constexpr std::pair<int, int> stages() {
    return {Config::kStages, Config::kStages};
  }
};

// A family's kernels of one kind: their table, what launches one, and the shared memory of its CTAs.
template <KernelFamily family, KernelKind kind>
struct KernelsOf;

template <>
struct KernelsOf<KernelFamily::kSm90, KernelKind::kForward> : Sm90Kernels<KernelKind::kForward> {
  using Table = Sm90ForwardKernels;
  template <class Config>
  static Status run(const ForwardParams& params, Stream stream) {
    return kernels::run_forward<Config>(params, stream);
  }
  template <class Config>
  static int shared_bytes() {
    return kernels::forward_shared_bytes<Config>();
  }
};

template <>
struct KernelsOf<KernelFamily::kSm90, KernelKind::kBackwardKeys> : Sm90Kernels<KernelKind::kBackwardKeys> {
  using Table = Sm90BackwardKeysKernels;
  template <class Config>
  static Status run(const BackwardParams& params, Stream stream) {
    return kernels::run_backward_keys<Config>(params, stream);
  }
  template <class Config>
  static int shared_bytes() {
    return kernels::backward_keys_shared_bytes<Config>();
  }
};

template <>
struct KernelsOf<KernelFamily::kSm90, KernelKind::kBackwardQueries> : Sm90Kernels<KernelKind::kBackwardQueries> {
  using Table = Sm90BackwardQueriesKernels;
  template <class Config>
  static Status run(const BackwardParams& params, Stream stream) {
    return kernels::run_backward_queries<Config>(params, stream);
  }
  template <class Config>
  static int shared_bytes() {
    return kernels::backward_queries_shared_bytes<Config>();
  }
};

template <>
struct KernelsOf<KernelFamily::kSm90, KernelKind::kGradQueries> : Sm90Kernels<KernelKind::kGradQueries> {
  using Table = Sm90GradQueriesKernels;
  template <class Config>
  static Status run(const BackwardParams& params, Stream stream) {
    return kernels::run_grad_queries<Config>(params, stream);
  }
  template <class Config>
  static int shared_bytes() {
    return kernels::grad_queries_shared_bytes<Config>();
  }
};

template <>
struct KernelsOf<KernelFamily::kSm80, KernelKind::kForward> : Sm80Kernels<KernelKind::kForward> {
  using Table = Sm80ForwardKernels;
  template <class Config>
  static Status run(const ForwardParams& params, Stream stream) {
    return kernels::run_sm80_forward<Config>(params, stream);
  }
  template <class Config>
  static int shared_bytes() {
    return kernels::sm80_forward_shared_bytes<Config>();
  }
};

template <>
struct KernelsOf<KernelFamily::kSm80, KernelKind::kBackwardKeys> : Sm80Kernels<KernelKind::kBackwardKeys> {
  using Table = Sm80BackwardKeysKernels;
  template <class Config>
  static Status run(const BackwardParams& params, Stream stream) {
    return kernels::run_sm80_backward_keys<Config>(params, stream);
  }
  template <class Config>
  static int shared_bytes() {
    return kernels::sm80_backward_keys_shared_bytes<Config>();
  }
};

template <>
struct KernelsOf<KernelFamily::kSm80, KernelKind::kGradQueries> : Sm80Kernels<KernelKind::kGradQueries> {
  using Table = Sm80GradQueriesKernels;
  template <class Config>
  static Status run(const BackwardParams& params, Stream stream) {
    return kernels::run_sm80_grad_queries<Config>(params, stream);
  }
  template <class Config>
  static int shared_bytes() {
    return kernels::sm80_grad_queries_shared_bytes<Config>();
  }
};

template <>
struct KernelsOf<KernelFamily::kSm80, KernelKind::kBackwardQueries> : Sm80Kernels<KernelKind::kBackwardQueries> {
  using Table = KernelTable<>;
  template <class Config>
  static int shared_bytes() {
    return 0;  // of no kernel
  }
};

// Calls use(KernelsOf<family, kind>{}).
template <KernelKind kind, class Use>
auto with_kernels(KernelFamily family, Use&& use) {
  return family == KernelFamily::kSm80 ? use(KernelsOf<KernelFamily::kSm80, kind>{})
                                       : use(KernelsOf<KernelFamily::kSm90, kind>{});
}

}  // namespace hbsattn
