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

int64_t num_items(const MaskShape& shape, int32_t heads_q, int32_t heads_k, int32_t head_dim, bool pack_heads) {
  if (heads_k < 1 || heads_q < heads_k || shape.q_block_size < 1) return 0;
  const TileShape tiles = shape_tiles(shape, heads_q, heads_k, head_dim, pack_heads);
  return heads_q / tiles.packed_heads * shape.rows * tiles.tiles;
}

Status plan_items(const PlanParams& params, Stream stream) {
  HBSATTN_RETURN_IF_ERROR(check_device());
  HBSATTN_RETURN_IF_ERROR(validate_plan(params));
  HBSATTN_RETURN_IF_ERROR(check_pointers(params));
  const int64_t items =
      num_items(params.mask.shape, params.heads_q, params.heads_k, params.head_dim, params.pack_heads);
  return kernels::plan_items(params, items, stream);
}

size_t plan_scratch_size(int64_t num_items) { return 3 * sizeof(int32_t) * static_cast<size_t>(num_items); }

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

BuildInfo build_info() {
  BuildInfo info{HBSATTN_WITH_CUDA != 0, HBSATTN_CUDA_VERSION, HBSATTN_CUTLASS_VERSION, {}};
  Sm90ForwardKernels::any([&](auto config) {
    using Config = decltype(config);
    const std::string dtype = Config::kDType == DType::kBFloat16 ? "bf16" : "fp16";
    const std::string name =
        "sm90_forward_" + dtype + "_hd" + std::to_string(Config::kHeadDim) + "_m" + std::to_string(Config::kTileM);
    info.kernels.push_back({name, "sm_90a", Config::kDType, Config::kHeadDim, Config::kTileM, Config::kTileN,
                            Config::kKeyStages, Config::kValueStages, kernels::forward_shared_bytes<Config>()});
    return false;
  });
  return info;
}

}  // namespace hbsattn
