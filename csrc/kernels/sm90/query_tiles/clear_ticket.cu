#include "kernels/common/launch.cuh"
#include "kernels/sm90/query_tiles/clear_ticket.h"

namespace hbsattn::kernels {
namespace {

__global__ void clear_ticket_kernel(int* ticket) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  if (threadIdx.x == 0) *ticket = 0;
}

}  // namespace

Status clear_ticket(int* ticket, Stream stream) {
  return launch("the launch of clear_ticket", clear_ticket_kernel, 1, 32, 0, stream, ticket);
}

}  // namespace hbsattn::kernels
