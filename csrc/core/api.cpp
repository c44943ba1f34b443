#include <algorithm>
#include <string>

#include "core/dispatch.h"
#include "core/select.h"
#include "core/validate.h"
#include "hbsattn/hbsattn.h"

// The one path of a call: validate, select, dispatch.

namespace hbsattn {
namespace {

constexpr size_t kWorkspaceBytes = 16;  // the ticket of the persistent CTAs

Status run_forward(const KernelKey& key, const ForwardParams& params, [[maybe_unused]] Stream stream) {
  Status status =
      Status::NotSupported("this build of hbsattn has no forward kernel for " + std::string(name_of(key.dtype)) +
                           " and head_dim " + std::to_string(params.head_dim));
  Sm90ForwardKernels::any([&](auto config) {
    using Config = decltype(config);
    const bool chosen =
        Config::kDType == key.dtype && Config::kHeadDim == key.head_dim && Config::kTileM == key.tile_rows;
    if (chosen) status = kernels::run_forward<Config>(params, stream);
    return chosen;
  });
  return status;
}

Status run_backward(const KernelKey& key, const BackwardParams& params, [[maybe_unused]] Stream stream) {
  Status status =
      Status::NotSupported("this build of hbsattn has no backward kernel for " + std::string(name_of(key.dtype)) +
                           " and head_dim " + std::to_string(params.problem.head_dim));
  if (choose_backward_method(params) == BackwardMethod::kByQueries) {
    Sm90QueryBackwardKernels::any([&](auto config) {
      using Config = decltype(config);
      const bool chosen =
          Config::kDType == key.dtype && Config::kHeadDim == key.head_dim && Config::kTileM == key.tile_rows;
      if (chosen) status = kernels::run_query_backward<Config>(params, stream);
      return chosen;
    });
    return status;
  }
  Sm90BackwardKernels::any([&](auto config) {
    using Config = decltype(config);
    const bool chosen =
        Config::kDType == key.dtype && Config::kHeadDim == key.head_dim && Config::kTileN == key.tile_rows;
    if (chosen) status = kernels::run_backward<Config>(params, stream);
    return chosen;
  });
  return status;
}

Status run_grad_queries(const KernelKey& key, const BackwardParams& params, [[maybe_unused]] Stream stream) {
  Status status = Status::NotSupported("this build of hbsattn has no deterministic backward kernel for " +
                                       std::string(name_of(key.dtype)) + " and head_dim " +
                                       std::to_string(params.problem.head_dim));
  Sm90GradQueriesKernels::any([&](auto config) {
    using Config = decltype(config);
    const bool chosen =
        Config::kDType == key.dtype && Config::kHeadDim == key.head_dim && Config::kTileM == key.tile_rows;
    if (chosen) status = kernels::run_grad_queries<Config>(params, stream);
    return chosen;
  });
  return status;
}

[[maybe_unused]] std::string kernel_name(const char* direction, DType dtype, int head_dim, const std::string& tile) {
  return std::string("sm90_") + direction + (dtype == DType::kBFloat16 ? "_bf16_hd" : "_fp16_hd") +
         std::to_string(head_dim) + "_" + tile;
}

}  // namespace

Status make_sequences(const SequencesParams& params, Stream stream) {
  HBSATTN_RETURN_IF_ERROR(check_device());
  HBSATTN_RETURN_IF_ERROR(validate_sequences(params));
  return kernels::make_sequences(params, stream);
}

Status make_sequences_on_host(const SequencesParams& params) {
  HBSATTN_RETURN_IF_ERROR(validate_sequences(params));
  kernels::make_sequences_on_host(params);
  return Status::Ok();
}

Status pack_mask(const PackParams& params, Stream stream) {
  HBSATTN_RETURN_IF_ERROR(check_device());
  HBSATTN_RETURN_IF_ERROR(validate_pack(params));
  return kernels::pack_mask(params, stream);
}

int64_t num_items(const MaskShape& shape, int32_t heads_q, int32_t heads_k, int32_t head_dim, bool pack_heads,
                  bool for_backward) {
  if (heads_k < 1 || heads_q < heads_k || shape.q_block_size < 1) return 0;
  const TileShape tiles = shape_tiles(shape, heads_q, heads_k, head_dim, pack_heads, for_backward);
  return heads_q / tiles.packed_heads * shape.rows * tiles.tiles;
}

Status plan_items(const PlanParams& params, Stream stream) {
  HBSATTN_RETURN_IF_ERROR(check_device());
  HBSATTN_RETURN_IF_ERROR(validate_plan(params));
  HBSATTN_RETURN_IF_ERROR(check_pointers(params));
  const int64_t items = num_items(params.mask.shape, params.heads_q, params.heads_k, params.head_dim, params.pack_heads,
                                  params.for_backward);
  return kernels::plan_items(params, items, stream);
}

size_t plan_scratch_size(int64_t num_items) { return 3 * sizeof(int32_t) * static_cast<size_t>(num_items); }

Status transpose_mask(const TransposeParams& params, Stream stream) {
  HBSATTN_RETURN_IF_ERROR(check_device());
  HBSATTN_RETURN_IF_ERROR(validate_transpose(params));
  return kernels::transpose_mask(params, stream);
}

int64_t num_key_items(const KeyPlanParams& params) {
  const MaskShape& shape = params.mask.shape;
  const bool some = params.heads_k > 0 && params.heads_q >= params.heads_k && params.head_dim > 0;
  if (!some || shape.batch < 1 || shape.cols < 1 || shape.k_block_size < 1 || shape.q_block_size < 1) return 0;
  const KeyTileShape shapes = shape_key_tiles(shape, params.head_dim);
  const int32_t tile_heads = count_tile_heads(shape, params.heads_q, params.heads_k, params.head_dim,
                                              params.element_size, params.deterministic);
  const int64_t pairs = int64_t{params.heads_q / tile_heads} * shape.batch, count = shapes.count(shape);
  const int64_t tiles = std::min(pairs, INT64_MAX / 2 / count) * count;  // sizes yet to be checked may be too many
  return tiles + count_part_slots(tiles, shapes.tile_keys, params.head_dim);
}

Status plan_keys(const KeyPlanParams& params, Stream stream) {
  HBSATTN_RETURN_IF_ERROR(check_device());
  HBSATTN_RETURN_IF_ERROR(validate_key_plan(params));
  HBSATTN_RETURN_IF_ERROR(check_pointers(params));
  return kernels::plan_keys(params, num_key_items(params), stream);
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
  return run_forward(key, params, stream);
}

bool backward_by_queries(const ForwardParams& problem, bool deterministic) {
  return choose_backward_method(problem.mask.shape, problem.heads_q, problem.heads_k, problem.head_dim,
                                problem.pack_heads, deterministic) == BackwardMethod::kByQueries;
}

size_t backward_workspace_size(const BackwardParams& params) {
  const ForwardParams& problem = params.problem;
  const MaskShape& shape = problem.mask.shape;
  if (problem.heads_k < 1 || problem.heads_q < problem.heads_k || shape.q_block_size < 1 || shape.k_block_size < 1) {
    return 0;
  }
  const int padded_head_dim = choose_backward_head_dim(params);
  if (padded_head_dim == 0) return 0;
  return static_cast<size_t>(lay_out_backward(problem, padded_head_dim, choose_backward_method(params)).bytes);
}

Status supported(const BackwardParams& params) {
  HBSATTN_RETURN_IF_ERROR(validate_backward(params));
  KernelKey key;
  HBSATTN_RETURN_IF_ERROR(select_backward(params, &key));
  return params.deterministic ? select_grad_queries(params, &key) : Status::Ok();
}

Status backward(const BackwardParams& params, Stream stream) {
  HBSATTN_RETURN_IF_ERROR(validate_backward(params));
  KernelKey key;
  KernelKey queries_key;
  HBSATTN_RETURN_IF_ERROR(select_backward(params, &key));
  if (params.deterministic) HBSATTN_RETURN_IF_ERROR(select_grad_queries(params, &queries_key));
  const ForwardParams& problem = params.problem;
  if (problem.mask.shape.batch == 0 || problem.rows_q == 0 || problem.rows_k == 0) return Status::Ok();
  HBSATTN_RETURN_IF_ERROR(check_pointers(params));
  HBSATTN_RETURN_IF_ERROR(check_addressable(params));
  HBSATTN_RETURN_IF_ERROR(run_backward(key, params, stream));
  return params.deterministic ? run_grad_queries(queries_key, params, stream) : Status::Ok();
}

BuildInfo build_info() {
  BuildInfo info{HBSATTN_WITH_CUDA != 0, HBSATTN_CUDA_VERSION, HBSATTN_CUTLASS_VERSION, {}};
  Sm90ForwardKernels::any([&](auto config) {
    using Config = decltype(config);
    const std::string name =
        kernel_name("forward", Config::kDType, Config::kHeadDim, "m" + std::to_string(Config::kTileM));
    info.kernels.push_back({name, "sm_90a", Config::kDType, Config::kHeadDim, Config::kTileM, Config::kTileN,
                            Config::kKeyStages, Config::kValueStages, kernels::forward_shared_bytes<Config>()});
    return false;
  });
  Sm90BackwardKernels::any([&](auto config) {
    using Config = decltype(config);
    const std::string name =
        kernel_name("backward", Config::kDType, Config::kHeadDim, "n" + std::to_string(Config::kTileN));
    info.kernels.push_back({name, "sm_90a", Config::kDType, Config::kHeadDim, Config::kTileM, Config::kTileN,
                            Config::kStages, Config::kStages, kernels::backward_shared_bytes<Config>()});
    return false;
  });
  Sm90QueryBackwardKernels::any([&](auto config) {
    using Config = decltype(config);
    const std::string name =
        kernel_name("query_backward", Config::kDType, Config::kHeadDim, "m" + std::to_string(Config::kTileM));
    info.kernels.push_back({name, "sm_90a", Config::kDType, Config::kHeadDim, Config::kTileM, Config::kTileN,
                            Config::kKeyStages, Config::kValueStages, kernels::query_backward_shared_bytes<Config>()});
    return false;
  });
  Sm90GradQueriesKernels::any([&](auto config) {
    using Config = decltype(config);
    const std::string name =
        kernel_name("grad_queries", Config::kDType, Config::kHeadDim, "m" + std::to_string(Config::kTileM));
    info.kernels.push_back({name, "sm_90a", Config::kDType, Config::kHeadDim, Config::kTileM, Config::kTileN,
                            Config::kKeyStages, Config::kValueStages, kernels::grad_queries_shared_bytes<Config>()});
    return false;
  });
  return info;
}

}  // namespace hbsattn
