#pragma once

#include "core/kernel_table.h"
#include "hbsattn/params.h"
#include "hbsattn/status.h"
#include "plan/workspace.h"

namespace hbsattn {

// Which compiled kernel runs a problem.
struct KernelKey {
  KernelFamily family;
  DType dtype;
  int head_dim;  // that it is compiled for
  KernelTiles tiles;
};

// The name that a family is told by: "sm90" or "sm80".
const char* name_of(KernelFamily family);

// Whether this build has device code of a policy's family for the current device.
Status check_device(const DevicePolicy& policy);

// Chooses the kernel of a valid problem.
Status select_forward(const ForwardParams& params, KernelKey* key);
Status select_pairs(const ForwardParams& params, KernelKey* key);  // of a call that takes pairs, beside the other
Status select_backward(const BackwardParams& params, KernelKey* key);
Status select_grad_queries(const BackwardParams& params, KernelKey* key);  // of kByKeysAndQueries, beside the other

// Whether a backward has anything to compute, or tiles to compute; gradients of sinks alone take a pass over rows.
inline bool needs_tiles(const BackwardParams& params) { return params.needs_q || params.needs_k || params.needs_v; }
inline bool needs_any(const BackwardParams& params) { return needs_tiles(params) || params.grad_sinks != nullptr; }

// The head dim that the backward kernel of a problem is compiled for, on whatever device; 0: there is none.
int choose_backward_head_dim(const BackwardParams& params);

// Whether the kernels can address the tensors of a problem.
Status check_addressable(const ForwardParams& params);
Status check_addressable(const BackwardParams& params);

const char* name_of(DType dtype);

}  // namespace hbsattn
