#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "core/select.h"
#include "core/validate.h"
#include "hbsattn/hbsattn.h"
#include "plan/lists.h"

// The one path of a call: validate, select, dispatch.

namespace hbsattn {
namespace {

constexpr size_t kWorkspaceBytes = 16;
static_assert(kForwardTickets * sizeof(int32_t) <= kWorkspaceBytes);

// Calls run(KernelsOf<...>{}, Config{}) for the kernel of a key.
template <KernelKind kind, class Run>
Status dispatch(const KernelKey& key, Run&& run) {
  return with_kernels<kind>(key.family, [&](auto kernels) {
    using Kernels = decltype(kernels);
    Status status = Status::NotSupported(std::string("this build of hbsattn has no ") + Kernels::kFamily +
                                         (kind == KernelKind::kForward ? " forward" : " backward") + " kernel for " +
                                         name_of(key.dtype) + " and head_dim " + std::to_string(key.head_dim));
    Kernels::Table::any([&](auto config) {
      using Config = decltype(config);
      const bool chosen = Config::kDType == key.dtype && Config::kHeadDim == key.head_dim &&
                          Kernels::template tiles<Config>() == key.tiles;
      if (chosen) status = run(kernels, config);
      return chosen;
    });
    return status;
  });
}

// Launches the kernel of a key.
template <KernelKind kind, class Params>
Status run(const KernelKey& key, const Params& params, Stream stream) {
  return dispatch<kind>(key, [&](auto kernels, auto config) {
    return decltype(kernels)::template run<decltype(config)>(params, stream);
  });
}

const char* name_of(KernelKind kind) {
  switch (kind) {
    case KernelKind::kForward:
      return "forward";
    case KernelKind::kBackwardKeys:
      return "backward_keys";
    case KernelKind::kBackwardQueries:
      return "backward_queries";
    case KernelKind::kGradQueries:
      return "grad_queries";
  }
  return "unknown";
}

template <KernelKind kind, class Kernels, class Config>
std::string name_kernel(Kernels, Config) {
  constexpr KernelTiles kTiles = Kernels::template tiles<Config>();
  return std::string(Kernels::kFamily) + "_" + name_of(kind) +
         (kTiles.pairs          ? "_pairs"
          : kTiles.altered      ? "_altered"
          : kTiles.short_values ? "_short_values"
                                : "") +
         (Config::kDType == DType::kBFloat16  ? "_bf16"
          : Config::kDType == DType::kFloat32 ? "_fp32"
                                              : "_fp16") +
         "_hd" + std::to_string(Config::kHeadDim) + (kind == KernelKind::kBackwardKeys ? "_n" : "_m") +
         std::to_string(kTiles.rows);
}

// Tells the kernel of a key, and rows of what it streams.
template <KernelKind kind>
Status explain_kernel(const KernelKey& key, std::string* name, int32_t* stage_rows = nullptr) {
  return dispatch<kind>(key, [&](auto kernels, auto config) {
    using Config = decltype(config);
    *name = name_kernel<kind>(kernels, config);
    if (stage_rows != nullptr) *stage_rows = kind == KernelKind::kBackwardKeys ? Config::kTileM : Config::kTileN;
    return Status::Ok();
  });
}

template <KernelKind kind, class Kernels, class Config>
KernelInfo describe_kernel(Kernels kernels, Config config) {
  const auto [key_stages, value_stages] = Kernels::template stages<Config>();
  return {name_kernel<kind>(kernels, config),
          Kernels::kArch,
          Config::kDType,
          Config::kHeadDim,
          Kernels::template value_dim<Config>(),
          Config::kTileM,
          Config::kTileN,
          key_stages,
          value_stages,
          Kernels::template shared_bytes<Config>()};
}

// Adds a family's kernels of a kind to those of build_info.
template <KernelKind kind>
void list_kernels(KernelFamily family, [[maybe_unused]] std::vector<KernelInfo>& infos) {
  with_kernels<kind>(family, [&](auto kernels) {
    return decltype(kernels)::Table::any([&](auto config) {
      infos.push_back(describe_kernel<kind>(kernels, config));
      return false;
    });
  });
}

const char* name_of(BackwardMethod method) {
  switch (method) {
    case BackwardMethod::kByKeys:
      return "by_keys";
    case BackwardMethod::kByQueries:
      return "by_queries";
    case BackwardMethod::kByKeysAndQueries:
      return "by_keys_and_queries";
    case BackwardMethod::kKeysOnly:
      return "keys_only";
    case BackwardMethod::kQueriesOnly:
      return "queries_only";
  }
  return "unknown";
}

// Whether a forward call looks for pairs of query blocks.
bool takes_pairs(const ForwardParams& problem) {
  return shape_tiles(problem.mask.shape, problem.heads_q, problem.heads_k, problem.head_dim, problem.pack_heads,
                     takes_gradient_tiles(problem, kernels::current_policy(problem)))
      .pairs;
}

// The parts of an explanation about tiles of queries, and about those of keys.
void explain_queries(const ForwardParams& problem, bool for_backward, Explanation* explanation) {
  const MaskShape& shape = problem.mask.shape;
  const TileShape tiles =
      shape_tiles(shape, problem.heads_q, problem.heads_k, problem.head_dim, problem.pack_heads, for_backward);
  explanation->general =
      kernels::current_policy(problem).family == KernelFamily::kSm90 && needs_general_kernel(problem, tiles);
  explanation->tile_rows = tiles.tile_rows;
  explanation->tile_heads = tiles.packed_heads;
  explanation->num_items = num_items(shape, problem.heads_q, problem.heads_k, problem.head_dim, problem.pack_heads,
                                     for_backward, element_size_of(problem.dtype));
}

void explain_keys(const BackwardParams& params, Explanation* explanation) {
  const ForwardParams& problem = params.problem;
  const KeyPlanParams plan = key_plan_of(params);
  explanation->tile_rows = shape_key_tiles(problem.mask.shape, problem.head_dim).tile_keys;
  explanation->tile_heads = count_tile_heads(problem.mask.shape, problem.heads_q, problem.heads_k, problem.head_dim,
                                             plan.element_size, params.deterministic, kernels::current_policy(params));
  explanation->num_key_items = num_key_items(plan);
}

}  // namespace

Status make_sequences(const SequencesParams& params, Stream stream) {
  HBSATTN_RETURN_IF_ERROR(check_device(kernels::current_policy()));
  HBSATTN_RETURN_IF_ERROR(validate_sequences(params));
  return kernels::make_sequences(params, stream);
}

Status make_sequences_on_host(const SequencesParams& params) {
  HBSATTN_RETURN_IF_ERROR(validate_sequences(params));
  kernels::make_sequences_on_host(params);
  return Status::Ok();
}

Status pack_mask(const PackParams& params, Stream stream) {
  HBSATTN_RETURN_IF_ERROR(check_device(kernels::current_policy()));
  HBSATTN_RETURN_IF_ERROR(validate_pack(params));
  return kernels::pack_mask(params, stream);
}

int64_t num_items(const MaskShape& shape, int32_t heads_q, int32_t heads_k, int32_t head_dim, bool pack_heads,
                  bool for_backward, int32_t element_size) {
  if (heads_k < 1 || heads_q < heads_k || shape.q_block_size < 1) return 0;
  return count_query_items(shape, heads_q, heads_k, head_dim, pack_heads,
                           for_backward || takes_gradient_tiles(shape, kernels::current_policy(element_size)));
}

int64_t item_capacity(const MaskShape& shape, int32_t heads_q, int32_t heads_k, bool pack_heads) {
  if (heads_k < 1 || heads_q < heads_k || shape.q_block_size < 1) return 0;
  return max_items(shape, heads_q, heads_k, pack_heads);
}

int64_t key_item_capacity(const MaskShape& shape, int32_t heads_q, int64_t rows_k, bool packed) {
  if (heads_q < 1 || shape.k_block_size < 1) return 0;
  return max_key_items(shape, heads_q, rows_k, packed);
}

Status plan_items(const PlanParams& params, Stream stream) {
  HBSATTN_RETURN_IF_ERROR(check_device(kernels::current_policy(params)));
  HBSATTN_RETURN_IF_ERROR(validate_plan(params));
  HBSATTN_RETURN_IF_ERROR(check_pointers(params));
  PlanParams plan = params;
  plan.for_backward = plan.for_backward || takes_gradient_tiles(params.mask.shape, kernels::current_policy(params));
  return kernels::plan_items(plan, stream);
}

size_t plan_scratch_size(int64_t num_items) { return 5 * sizeof(int32_t) * static_cast<size_t>(num_items); }

Status transpose_mask(const TransposeParams& params, Stream stream) {
  HBSATTN_RETURN_IF_ERROR(check_device(kernels::current_policy()));
  HBSATTN_RETURN_IF_ERROR(validate_transpose(params));
  return kernels::transpose_mask(params, stream);
}

int64_t num_key_items(const KeyPlanParams& params) {
  const MaskShape& shape = params.mask.shape;
  const bool some = params.heads_k > 0 && params.heads_q >= params.heads_k && params.head_dim > 0;
  if (!some || shape.batch < 1 || shape.cols < 1 || shape.k_block_size < 1 || shape.q_block_size < 1) return 0;
  return size_key_list(shape, params.heads_q, params.heads_k, params.head_dim, params.element_size,
                       params.deterministic, params.rows_k, params.packed, kernels::current_policy(params))
      .items();
}

Status plan_keys(const KeyPlanParams& params, Stream stream) {
  HBSATTN_RETURN_IF_ERROR(check_device(kernels::current_policy(params)));
  HBSATTN_RETURN_IF_ERROR(validate_key_plan(params));
  HBSATTN_RETURN_IF_ERROR(check_pointers(params));
  return kernels::plan_keys(params, stream);
}

size_t key_plan_scratch_size(int64_t num_key_items) {
  return 64 + 7 * sizeof(int32_t) * static_cast<size_t>(num_key_items);
}

size_t forward_workspace_size() { return kWorkspaceBytes; }

Status supported(const ForwardParams& params) {
  HBSATTN_RETURN_IF_ERROR(validate_forward(params));
  KernelKey key;
  return select_forward(params, &key);
}

Status forward(const ForwardParams& params, Stream stream) {
  HBSATTN_RETURN_IF_ERROR(validate_forward(params));
  KernelKey key;
  HBSATTN_RETURN_IF_ERROR(select_forward(params, &key));
  if (params.mask.shape.batch == 0 || params.rows_q == 0) return Status::Ok();
  HBSATTN_RETURN_IF_ERROR(check_pointers(params));
  HBSATTN_RETURN_IF_ERROR(check_addressable(params));
  HBSATTN_RETURN_IF_ERROR(run<KernelKind::kForward>(key, params, stream));
  if (!takes_pairs(params)) return Status::Ok();
  HBSATTN_RETURN_IF_ERROR(select_pairs(params, &key));
  return run<KernelKind::kForward>(key, params, stream);
}

BackwardLists backward_lists(const BackwardParams& params) {
  if (!needs_tiles(params)) return {false, false};
  const BackwardMethod method = choose_backward_method(params, kernels::current_policy(params));
  const bool both = method == BackwardMethod::kByKeysAndQueries;
  return {both || method == BackwardMethod::kByQueries || method == BackwardMethod::kQueriesOnly,
          both || method == BackwardMethod::kByKeys || method == BackwardMethod::kKeysOnly};
}

size_t backward_workspace_size(const BackwardParams& params) {
  const ForwardParams& problem = params.problem;
  const MaskShape& shape = problem.mask.shape;
  if (problem.heads_k < 1 || problem.heads_q < problem.heads_k || shape.q_block_size < 1 || shape.k_block_size < 1) {
    return 0;
  }
  const int padded_head_dim = choose_backward_head_dim(params);
  if (padded_head_dim == 0 || !needs_any(params)) return 0;
  const DevicePolicy policy = kernels::current_policy(params);
  return static_cast<size_t>(
      lay_out_backward(params, padded_head_dim, choose_backward_method(params, policy), policy).bytes);
}

Status supported(const BackwardParams& params) {
  HBSATTN_RETURN_IF_ERROR(validate_backward(params));
  KernelKey key;
  HBSATTN_RETURN_IF_ERROR(select_backward(params, &key));
  const bool both =
      choose_backward_method(params, kernels::current_policy(params)) == BackwardMethod::kByKeysAndQueries;
  return both ? select_grad_queries(params, &key) : Status::Ok();
}

namespace {

// The tiles of a backward, behind a pass over rows that fills the workspace.
Status run_backward_tiles(const BackwardParams& params, BackwardMethod method, const KernelKey& key,
                          KernelKey queries_key, Stream stream) {
  if (method == BackwardMethod::kByQueries) return run<KernelKind::kBackwardQueries>(key, params, stream);
  if (method == BackwardMethod::kQueriesOnly) {
    queries_key = key;
  } else {
    HBSATTN_RETURN_IF_ERROR(run<KernelKind::kBackwardKeys>(key, params, stream));
  }
  if (method == BackwardMethod::kByKeys || method == BackwardMethod::kKeysOnly) return Status::Ok();
  return run<KernelKind::kGradQueries>(queries_key, params, stream);
}

}  // namespace

Status backward(const BackwardParams& params, Stream stream) {
  HBSATTN_RETURN_IF_ERROR(validate_backward(params));
  const DevicePolicy policy = kernels::current_policy(params);
  const BackwardMethod method = choose_backward_method(params, policy);
  KernelKey key;
  KernelKey queries_key;
  HBSATTN_RETURN_IF_ERROR(select_backward(params, &key));
  if (method == BackwardMethod::kByKeysAndQueries) HBSATTN_RETURN_IF_ERROR(select_grad_queries(params, &queries_key));
  const ForwardParams& problem = params.problem;
  const bool empty = problem.mask.shape.batch == 0 || problem.rows_q == 0 || problem.rows_k == 0;
  if (empty || !needs_any(params)) return Status::Ok();
  HBSATTN_RETURN_IF_ERROR(check_pointers(params));
  HBSATTN_RETURN_IF_ERROR(check_addressable(params));
  const BackwardWorkspace workspace = lay_out_backward(params, choose_backward_head_dim(params), method, policy);
  HBSATTN_RETURN_IF_ERROR(needs_tiles(params) ? run_backward_tiles(params, method, key, queries_key, stream)
                                              : kernels::prepare_rows(params, workspace, stream));
  return params.grad_sinks == nullptr ? Status::Ok() : kernels::sum_sinks(params, workspace, stream);
}

Status explain(const ForwardParams& params, Explanation* explanation) {
  *explanation = {};
  HBSATTN_RETURN_IF_ERROR(validate_forward(params));
  KernelKey key;
  HBSATTN_RETURN_IF_ERROR(select_forward(params, &key));
  explanation->method = "forward";
  explain_queries(params, takes_gradient_tiles(params, kernels::current_policy(params)), explanation);
  HBSATTN_RETURN_IF_ERROR(explain_kernel<KernelKind::kForward>(key, &explanation->kernel, &explanation->stage_rows));
  if (!takes_pairs(params)) return Status::Ok();
  HBSATTN_RETURN_IF_ERROR(select_pairs(params, &key));
  return explain_kernel<KernelKind::kForward>(key, &explanation->pairs_kernel);
}

Status explain(const BackwardParams& params, Explanation* explanation) {
  *explanation = {};
  HBSATTN_RETURN_IF_ERROR(supported(params));
  explanation->method = "none";
  if (!needs_tiles(params)) return Status::Ok();
  const BackwardMethod method = choose_backward_method(params, kernels::current_policy(params));
  const BackwardLists lists = backward_lists(params);
  explanation->method = name_of(method);
  if (lists.items) explain_queries(params.problem, true, explanation);
  if (lists.keys) explain_keys(params, explanation);
  KernelKey key;
  HBSATTN_RETURN_IF_ERROR(select_backward(params, &key));
  std::string* name = &explanation->kernel;
  int32_t* stage_rows = &explanation->stage_rows;
  if (method == BackwardMethod::kByQueries) return explain_kernel<KernelKind::kBackwardQueries>(key, name, stage_rows);
  if (method == BackwardMethod::kQueriesOnly) return explain_kernel<KernelKind::kGradQueries>(key, name, stage_rows);
  HBSATTN_RETURN_IF_ERROR(explain_kernel<KernelKind::kBackwardKeys>(key, name, stage_rows));
  if (method == BackwardMethod::kByKeys && key.family == KernelFamily::kSm80) {
    *stage_rows = sm80_by_keys_stage_rows(key.head_dim, key.tiles.rows);
  }
  if (method != BackwardMethod::kByKeysAndQueries) return Status::Ok();
  HBSATTN_RETURN_IF_ERROR(select_grad_queries(params, &key));
  return explain_kernel<KernelKind::kGradQueries>(key, &explanation->queries_kernel);
}

BuildInfo build_info() {
  BuildInfo info{HBSATTN_WITH_CUDA != 0, HBSATTN_CUDA_VERSION, HBSATTN_CUTLASS_VERSION, {}};
  for (KernelFamily family : {KernelFamily::kSm90, KernelFamily::kSm80}) {
    list_kernels<KernelKind::kForward>(family, info.kernels);
    list_kernels<KernelKind::kBackwardKeys>(family, info.kernels);
    list_kernels<KernelKind::kBackwardQueries>(family, info.kernels);
    list_kernels<KernelKind::kGradQueries>(family, info.kernels);
  }
  return info;
}

}  // namespace hbsattn
