#pragma once

// The border between core/ and the translation units that nvcc compiles: declarations only, so that host code never
// parses CuTe.

#include <optional>

#include "hbsattn/params.h"
#include "hbsattn/status.h"
#include "kernels/rows/rows.h"
#include "plan/policy.h"

namespace hbsattn::kernels {

// mask/
void make_sequences_on_host(const SequencesParams& params);  // in every build
Status make_sequences(const SequencesParams& params, Stream stream);
Status pack_mask(const PackParams& params, Stream stream);
Status plan_items(const PlanParams& params, Stream stream);

Status transpose_mask(const TransposeParams& params, Stream stream);
Status plan_keys(const KeyPlanParams& params, Stream stream);

// sm90/, instantiated for each kernel of sm90/instances.txt
template <class Config>
Status run_forward(const ForwardParams& params, Stream stream);

template <class Config>
int forward_shared_bytes();

template <class Config>
Status run_backward_keys(const BackwardParams& params, Stream stream);

template <class Config>
int backward_keys_shared_bytes();

template <class Config>
Status run_grad_queries(const BackwardParams& params, Stream stream);

template <class Config>
int grad_queries_shared_bytes();

template <class Config>
Status run_backward_queries(const BackwardParams& params, Stream stream);

template <class Config>
int backward_queries_shared_bytes();

// sm80/, likewise for each kernel of sm80/instances.txt
template <class Config>
Status run_sm80_forward(const ForwardParams& params, Stream stream);

template <class Config>
int sm80_forward_shared_bytes();

template <class Config>
Status run_sm80_backward_keys(const BackwardParams& params, Stream stream);

template <class Config>
int sm80_backward_keys_shared_bytes();

template <class Config>
Status run_sm80_grad_queries(const BackwardParams& params, Stream stream);

template <class Config>
int sm80_grad_queries_shared_bytes();

// Compute capability (major * 10 + minor) and multiprocessors of the current device.
Status current_device(int* compute_capability, int* multiprocessors);

// What planning knows of the current device, for tensors with elements of so many bytes; the defaults where there is no
// device. Its family suits both, unless one is forced.
DevicePolicy current_policy(int32_t element_size = 2);
inline DevicePolicy current_policy(const ForwardParams& params) {
  return current_policy(element_size_of(params.dtype));
}
inline DevicePolicy current_policy(const BackwardParams& params) { return current_policy(params.problem); }
inline DevicePolicy current_policy(const PlanParams& params) { return current_policy(params.element_size); }
inline DevicePolicy current_policy(const KeyPlanParams& params) { return current_policy(params.element_size); }

// Bytes of shared memory that a CTA may have on the current device, at most what a limit leaves; 0: there is none.
int block_shared_bytes();

// The limit, on whatever device, in the whole process; 0: there is none.
void limit_shared_bytes(int bytes);
int shared_bytes_limit();

// The family that current_policy names on whatever device, in the whole process; none: nothing is forced.
void force_family(std::optional<KernelFamily> family);
std::optional<KernelFamily> forced_family();

}  // namespace hbsattn::kernels
