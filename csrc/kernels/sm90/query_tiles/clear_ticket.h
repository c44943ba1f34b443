#pragma once

#include "hbsattn/params.h"
#include "hbsattn/status.h"

namespace hbsattn::kernels {

// Clears the ticket of a persistent kernel that no other kernel of its call precedes: by a kernel, as the next one may
// start while it runs, which it may not behind a memset.
Status clear_ticket(int* ticket, Stream stream);

}  // namespace hbsattn::kernels
