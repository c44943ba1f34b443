#pragma once

#include "hbsattn/params.h"
#include "hbsattn/status.h"

// The checks that the public header does not have.

namespace hbsattn {

Status validate_sequences(const SequencesParams& params);
Status validate_pack(const PackParams& params);
Status validate_transpose(const TransposeParams& params);

// What decides the work list of a backward by keys.
KeyPlanParams key_plan_of(const BackwardParams& params);

// What is behind the sizes of a valid problem; a forward call needs it only where there are queries, a backward call
// where there are also keys.
Status check_pointers(const PlanParams& params);
Status check_pointers(const KeyPlanParams& params);
Status check_pointers(const ForwardParams& params);
Status check_pointers(const BackwardParams& params);

}  // namespace hbsattn
