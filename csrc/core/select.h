#pragma once

#include "hbsattn/params.h"
#include "hbsattn/status.h"

namespace hbsattn {

// Which compiled kernel runs a problem.
struct KernelKey {
  DType dtype;
  int head_dim;  // that it is compiled for
  int tile_rows;
};

// Whether this build has device code for the current device.
Status check_device();

// Chooses the kernel of a valid problem.
Status select_forward(const ForwardParams& params, KernelKey* key);

// Whether the kernels can address the tensors of a problem.
Status check_addressable(const ForwardParams& params);

const char* name_of(DType dtype);

}  // namespace hbsattn
