#pragma once

#include "hbsattn/params.h"
#include "hbsattn/status.h"
#include "plan/workspace.h"

// What precedes and follows the backward's kernels, a pass over all rows each. core/ calls the first two.

namespace hbsattn::kernels {

// Fills the workspace: what is to be 0, and statistics of all rows, padding included.
Status prepare_rows(const BackwardParams& params, const BackwardWorkspace& workspace, Stream stream);

// Adds up the gradient of each head's sink out of the statistics of its rows. In the same order in every run.
Status sum_sinks(const BackwardParams& params, const BackwardWorkspace& workspace, Stream stream);

// Turns the accumulated gradient of the queries, which is that of unscaled scores, into rows of grad_q.
Status finish_rows(const BackwardParams& params, const BackwardWorkspace& workspace, int padded_head_dim,
                   Stream stream);

// Turns sums of gradients that several tiles of the same keys have added up into rows of grad_k and grad_v.
Status finish_keys(const BackwardParams& params, const BackwardWorkspace& workspace, int padded_head_dim,
                   Stream stream);

}  // namespace hbsattn::kernels
