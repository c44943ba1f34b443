#include "kernels/instances.h"
#include "plan/layout.h"

namespace hbsattn::kernels {

void make_sequences_on_host(const SequencesParams& params) {
  int64_t q_blocks = 0, k_blocks = 0;
  for (int64_t b = 0; b < params.shape.batch; ++b) {
    Sequence sequence = mask::read_lengths(params, b);
    mask::place_blocks(params, b, q_blocks, k_blocks, sequence);
    params.sequences[b] = sequence;
    q_blocks += mask::count_q_blocks(sequence, params.shape);
    k_blocks += mask::count_k_blocks(sequence, params.shape);
  }
}

}  // namespace hbsattn::kernels
