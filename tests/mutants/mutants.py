"""Faults that somebody could make, each with the tests that must see it.

All are tried with kernels for float16 and head dim 128 alone, so the tests named here ask for no others. Texts are
exact, and must be found once in exactly one of the files; `run.py --check` tells.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutant:
    """`find` becomes `replace` in the one file among `files` (a glob under csrc/) that has it."""

    name: str
    files: str
    find: str
    replace: str
    tests: tuple[str, ...]  # arguments of pytest
    tool: str = "pytest"  # or racecheck: compute-sanitizer on cases of sanitize_cases.py, which `tests` then names
    unseen: str = ""  # why no test can see it: it changes no result


FORWARD = "kernels/sm90/forward/*.cuh"
QUERY_TILES = "kernels/sm90/query_tiles/*.cuh"
COMMON = "kernels/common/*.cuh"
QUERY_LISTS = "kernels/common/query_tiles*.cuh"
KEY_TILES = "kernels/common/key_tiles*.cuh"
BACKWARD_KEYS = "kernels/sm90/backward_keys/*.cuh"
BACKWARD_QUERIES = "kernels/sm90/backward_queries/*.cuh"

HALF = "cuda-float16"
CAUSAL = ("tests/test_forward.py", "-k", f"test_cases and causal and {HALF} and not head_dim_ and not wide")
CASES = (
    "tests/test_forward.py",
    "-k",
    f"test_cases and {HALF} and (packed or tails or density or gqa or alike) and not wide",
)
GRADIENTS = ("tests/test_backward.py", "-k", f"test_cases and {HALF} and (packed or tails or zero_length or gqa)")
HALVES = ("tests/test_backward.py", "-k", f"test_cases and {HALF} and (halves or stages_of)")
HOSTILE = ("tests/test_hostile.py", "-k", "lengths_are_cut and not wide")
PAIRS = ("tests/test_pairs.py", "-k", "test_kinds and cuda")
SETS = ("tests/test_head_sets.py", "-k", "test_sets_of_heads and dtype1 and (shared or own_masks or two_key_heads)")
WINDOWS = ("tests/test_head_sets.py", "-k", "test_windows_of_queries and dtype1 and tokens")
RULES = ("tests/test_windows.py", "-k", f"test_cases and {HALF} and (batched or longer or of_heads or of_key_heads)")

PARTIAL = ("tests/test_partial.py", "-k", f"test_cases and {HALF} and (packed or batched or groups or windows)")
SINKS = ("tests/test_sinks.py", "-k", f"test_cases and {HALF} and (groups or alike or stacks or empty_rows)")
DROPOUT = ("tests/test_dropout.py", "-k", f"test_cases and {HALF} and (128x128 or 100x100 or 7x128 or tokens)")
SOFTCAP = (
    "tests/test_softcap.py",
    "-k",
    f"{HALF} and (every_size or 128x128 or 100x100 or tokens or dropout) and not wide",
)

VALUE_DIM = ("tests/test_value_dim.py", "-k", f"(test_forward or test_backward) and {HALF} and (128-64 or 64-128)")

MUTANTS = [
    Mutant(
        "partial_blocks_of_a_word_share_a_matrix",
        COMMON,
        "first + __popc(bits & (bit - 1))",
        "first",
        PARTIAL,
    ),
    Mutant(
        "partial_blocks_are_whole",
        COMMON,
        "if (!(bits & bit)) return kWhole;",
        "if (bits & bit) return kWhole;",
        PARTIAL,
    ),
    Mutant(
        "values_as_wide_as_the_kernel",
        "kernels/sm90/*.cpp",
        "static_cast<cuuint64_t>(tensor.chunks(chunk))",
        "static_cast<cuuint64_t>(chunks)",
        VALUE_DIM,
    ),
    Mutant(
        "gradients_of_values_as_wide_as_keys",
        KEY_TILES,
        "args.grad_v_columns = view_of(problem, params.grad_v).columns;",
        "args.grad_v_columns = view_of(problem, params.grad_k).columns;",
        VALUE_DIM,
    ),
    Mutant(
        "outputs_as_wide_as_queries",
        QUERY_LISTS,
        "args.out_columns = view_of(params, params.out).columns;",
        "args.out_columns = view_of(params, params.q).columns;",
        VALUE_DIM,
    ),
    Mutant(
        "dropout_of_a_group_s_first_head",
        COMMON,
        "DropoutStream::open(args.dropout, item.sequence, args.heads_q, place.head)",
        "DropoutStream::open(args.dropout, item.sequence, args.heads_q, item.head)",
        DROPOUT,
    ),
    Mutant(
        "odd_keys_draw_as_even_ones",
        "kernels/common/*.cuh",
        "odd_key ? words.word[0] ^ words.word[2] : words.word[1] ^ words.word[3]",
        "words.word[1] ^ words.word[3]",
        DROPOUT,
    ),
    Mutant(
        "dropped_where_they_are_kept",
        "kernels/common/*.cuh",
        "(number < dropout.limit) != dropout.below_are_kept",
        "number < dropout.limit",
        DROPOUT,
    ),
    Mutant(
        "dropped_weights_have_gradients",
        BACKWARD_KEYS,
        "weights(i) * (dropped ? delta[i] : grads(i) - delta[i])",
        "weights(i) * (dropped ? delta[i] - grads(i) : grads(i) - delta[i])",
        DROPOUT,
    ),
    Mutant(
        "values_of_dropout_not_scaled",
        BACKWARD_KEYS,
        "value_scale = Traits::kAltered ? args.dropout.scale : 1.f;",
        "value_scale = 1.f;",
        DROPOUT,
    ),
    Mutant(
        "caps_without_a_polynomial_near_0",
        "plan/*.h",
        "kNearCap = 0.25",
        "kNearCap = 0.",
        SOFTCAP,
    ),
    Mutant(
        "slope_of_a_cap_squared_twice",
        "kernels/common/*.cuh",
        "fmaxf(1.f - x * x, 0.f)",
        "fmaxf(1.f - x * x * x * x, 0.f)",
        SOFTCAP,
    ),
    Mutant(
        "dropped_weights_have_no_slope",
        "kernels/common/*.cuh",
        "log2_approx(fabsf(weight))",
        "log2_approx(weight)",
        SOFTCAP,
    ),
    Mutant(
        "queries_forget_the_slope_of_a_cap",
        "kernels/sm90/grad_queries/*.cuh",
        "weight * (1.f - scores(i) * scores(i))",
        "weight",
        SOFTCAP,
    ),
    Mutant(
        "sinks_are_capped",
        FORWARD,
        "softmax.add_sink(row, sink_of_head(args, place.head) *",
        "softmax.add_sink(row, (args.cap.scale > 0.f ? args.scale * tanhf(sink_of_head(args, place.head) / args.scale)"
        " : sink_of_head(args, place.head)) *",
        SOFTCAP,
    ),
    Mutant(
        "sink_of_a_group_s_first_head",
        FORWARD,
        "softmax.add_sink(row, sink_of_head(args, place.head)",
        "softmax.add_sink(row, sink_of_head(args, item.head)",
        SINKS,
    ),
    Mutant(
        "no_sink_where_nothing_attends",
        QUERY_TILES,
        "*lse_of_row(args, item, place) = sink_of_head(args, place.head);",
        "*lse_of_row(args, item, place) = -INFINITY;",
        SINKS,
    ),
    Mutant(
        "sinks_add_up_rows_of_other_heads",
        "kernels/rows/*.cu",
        "if (!place.exists || place.head != head % heads) continue;",
        "if (!place.exists) continue;",
        SINKS,
    ),
    Mutant(
        "masked_stages_one_short",
        QUERY_LISTS,
        "min(tile.stages, max(1, masked))",
        "min(tile.stages, max(1, masked - 1))",
        CAUSAL,
    ),
    Mutant(
        "a_unit_computes_what_the_other_block_attends_to",
        FORWARD,
        "const int own = kOfFirst + unit;",
        "const int own = kOfSecond - unit;",
        PAIRS,
    ),
    Mutant(
        "limits_of_a_stack_in_queries",
        COMMON,
        "(max(query, 0) << args.chunks.stack.rows_log2)",
        "max(query, 0)",
        WINDOWS,
    ),
    Mutant(
        "tail_of_a_rule_not_masked",
        QUERY_LISTS,
        "tile.clean_end = max(tile.stages - tail, tile.masked);",
        "tile.clean_end = tile.stages;",
        RULES,
    ),
    Mutant(
        "window_begins_a_key_late",
        COMMON,
        "key >= first && key <= limit; });",
        "key > first && key <= limit; });",
        RULES,
    ),
    Mutant(
        "sink_a_key_short",
        COMMON,
        "return key < sink ? key <= sink_limit",
        "return key + 1 < sink ? key <= sink_limit",
        RULES,
    ),
    Mutant(
        "window_of_a_key_ends_early",
        COMMON,
        "if (left < most - place) end = place + left + 1;",
        "if (left < most - place) end = place + left;",
        RULES,
    ),
    Mutant(
        "rule_of_the_first_head",
        KEY_TILES,
        "const int head = kStacked ? stack * args.chunks.stack.heads : stack;",
        "const int head = 0 * stack;",
        RULES,
    ),
    Mutant(
        "sink_hidden_where_a_stage_is_clean",
        "plan/rule.h",
        "return first <= head.sink ? 0 : first;",
        "return 0;",
        RULES,
    ),
    Mutant(
        "windows_leave_out_a_block",
        "plan/*.h",
        "smaller(begin + sets.window_blocks, rows.end)",
        "smaller(begin + sets.window_blocks - 1, rows.end)",
        WINDOWS,
    ),
    Mutant(
        "statistics_of_a_stack_s_first_head",
        COMMON,
        "args.chunks.row_of_query(place.row, place.head)",
        "args.chunks.row_of_query(place.row, 0)",
        WINDOWS,
    ),
    Mutant(
        "the_kernel_of_single_blocks_goes_on_into_pairs",
        QUERY_TILES,
        "args.item_step < 0 && item.united > 1",
        "false",
        (),
        unseen="the kernel of pairs, which waits for that of single blocks, writes the same rows again: it costs time",
    ),
    Mutant(
        "dead_records_over_those_of_pairs",
        "kernels/mask/*.cuh",
        "place -= last_place.before;",
        "place -= 0;",
        ("tests/test_pairs.py", "-k", "test_plan"),
    ),
    Mutant(
        "masks_of_a_pair_s_second_block_for_both",
        QUERY_TILES,
        "clean_ends[owner == kOfSecond ? 1 : 0]",
        "clean_ends[1]",
        ("tests/test_pairs.py", "-k", "test_small_key_blocks"),
    ),
    Mutant(
        "keys_hidden_from_a_pair_s_first_block_arrive",
        QUERY_TILES,
        "end = tile.pair.first_end;",
        "end = tile.key_end;",
        ("tests/test_pairs.py", "-k", "test_keys_that_the_other_block_might_see"),
    ),
    Mutant(
        "slack_of_2_to_the_20",
        "kernels/common/softmax.cuh",
        "kSlack = 8.f",
        "kSlack = 20.f",
        ("tests/test_softmax.py", "-k", f"growing_maxima and {HALF}"),
    ),
    Mutant(
        "no_rescaling_of_outputs",
        "kernels/common/softmax.cuh",
        "output(i) *= rescale[(i >> 1) & 1];",
        "output(i) *= rescale[(i >> 1) & 1] > 0.f ? 1.f : 1.f;",
        ("tests/test_softmax.py", "-k", f"growing_maxima and {HALF}"),
    ),
    Mutant(
        "lse_off_by_5e-4",
        "kernels/common/softmax.cuh",
        "row_max[row] * scale + __logf(sum);",
        "row_max[row] * scale + __logf(sum) + 5e-4f;",
        CASES,
    ),
    Mutant(
        "keys_past_the_tensor",
        QUERY_LISTS,
        "item.k_len = clamp(item.k_len, 0, args.rows_k - item.k_begin);",
        "",
        HOSTILE,
    ),
    Mutant(
        "keys_past_the_tensor_in_gradients",
        KEY_TILES,
        "min(args.rows_k - item.k_begin - item.first_key, kTileN)",
        "kTileN",
        ("tests/test_hostile.py", "-k", "not wide"),
    ),
    Mutant(
        "queries_past_the_tensor",
        QUERY_LISTS,
        "item.q_len = clamp(item.q_len, 0, args.rows_q - item.q_begin);",
        "",
        ("tests/test_hostile.py", "-k", "not wide"),
    ),
    Mutant(
        "rows_past_the_last_sequence",
        "plan/rows.h",
        "clamp_gap(begin, last ? rows : sequences[index + 1].q_begin, rows)",
        "clamp_gap(begin, last ? 0 : sequences[index + 1].q_begin, rows)",
        ("tests/test_empty_rows.py", "-k", "past_the_last_sequence and not wide"),
    ),
    Mutant(
        "no_fence_before_outputs_leave",
        "kernels/sm90/query_tiles/store.cuh",
        "cutlass::arch::fence_view_async_shared();\n",
        "\n",
        (),
        unseen="the copy engine of an H200 saw what warps had written before in every run of the stress tests",
    ),
    Mutant(
        "no_syncwarp_between_rounds_of_bits",
        "kernels/common/bit_row.cuh",
        "    __syncwarp();  // lanes have read what is overwritten\n",
        "\n",
        ("many_columns",),
        tool="racecheck",
    ),
    Mutant(
        "sections_ignored",
        "kernels/mask/key_plan.cu",
        "return limit_section_items(std::max(",
        "return limit_section_items(num_items + 0 * std::max(",
        ("tests/test_key_plan.py", "-k", "several_sections"),
    ),
    Mutant(
        "statistics_of_padding",
        "kernels/rows/rows.cu",
        "args.lse[padding] = INFINITY;",
        "args.lse[padding] = -INFINITY;",
        GRADIENTS,
    ),
    Mutant(
        "statistics_of_empty_rows",
        "kernels/rows/rows.cu",
        "empty ? INFINITY : lse[of_cta] * static_cast<float>(M_LOG2E)",
        "lse[of_cta] * static_cast<float>(M_LOG2E)",
        ("tests/test_empty_rows.py", "tests/test_backward.py", "-k", f"test_cases and {HALF} and empty"),
    ),
    Mutant(
        "gradient_of_lse_forgotten",
        "kernels/rows/rows.cu",
        "args.kept * (delta - grad_lse[of_cta]);",
        "args.kept * delta;",
        GRADIENTS,
    ),
    Mutant(
        "sums_of_sets_by_plain_loads",
        BACKWARD_KEYS,
        "const float4 sum = __ldcg(theirs);\n        a += sum.x;",
        "const float4 sum = __ldg(theirs);\n        a += sum.x;",
        (),
        unseen="the acquire before it makes L1 forget what it had of the sums, on an H200 in every run",
    ),
    Mutant(
        "sets_do_not_wait",
        BACKWARD_KEYS,
        "for (uint32_t left = turn >> kLeftShift; left < before;)",
        "for (uint32_t left = turn >> kLeftShift; left > before;)",
        SETS,
    ),
    Mutant(
        "tile_wanted_a_stage_late",
        QUERY_TILES,
        "planned + stage == tile.stages - Traits::kTileLead - 1",
        "planned + stage == tile.stages - Traits::kTileLead",
        (),
        unseen="the next tile is only fetched later: it costs time",
    ),
    Mutant(
        "no_carry_between_rounds_of_sequences",
        "kernels/mask/sequences.cu",
        "carry = carry + sum;",
        "",
        ("tests/test_many.py", "-k", "many_sequences and cuda"),
    ),
    Mutant(
        "outputs_past_the_end_of_a_sequence",
        QUERY_TILES,
        "if (place.count >= args.box_rows) {",
        "if (place.count > 0) {",
        ("tests/test_neighbours.py", *CASES),
    ),
    Mutant(
        "gradients_past_the_end_of_a_sequence",
        BACKWARD_KEYS,
        "if (warp_key + kGranule <= uniform(item.keys)) {",
        "if (warp_key < uniform(item.keys)) {",
        GRADIENTS,
    ),
    Mutant(
        "diagonal_off_by_one",
        COMMON,
        "rule_of(args.mask, item).last_key(query, item.k_len);",
        "rule_of(args.mask, item).last_key(query + 1, item.k_len);",
        CAUSAL,
    ),
    Mutant(
        "diagonal_of_cut_lengths",
        QUERY_LISTS,
        "item.diagonal = clamp_diagonal(args.mask, item.diagonal, args.rows_q, args.rows_k);",
        "item.diagonal = item.k_len - item.q_len;",
        ("tests/test_hostile.py", "-k", "claimed_lengths and by_queries"),
    ),
    Mutant(
        "rows_that_do_not_exist_vote",
        FORWARD,
        "if (limits.value[0] <= limits.kNoRow) growth.by[0] = -INFINITY;",
        "",
        ("tests/test_neighbours.py", "-k", "values_of_neighbours and 20-64 and (cuda-64 or cuda-128)"),
    ),
    Mutant(
        "nan_of_unattended_keys",
        "kernels/sm90/backward_keys/mainloop.cuh",
        "grads(i) = weights(i) == 0.f ? 0.f : grads(i);",
        "grads(i) = weights(i) == 2.f ? 0.f : grads(i);",
        ("tests/test_backward.py", "-k", f"values_that_others_attend_to and 32-16-128 and {HALF}"),
    ),
    Mutant(
        "hidden_segments_are_one_more",
        BACKWARD_KEYS,
        "args.segments_per_block(row, count, query >> args.segment_log2);",
        "args.segments_per_block(row, count, (query >> args.segment_log2) + 1);",
        HALVES,
    ),
    Mutant(
        "half_a_tile_skips_what_it_sees",
        BACKWARD_KEYS,
        "skips = found && segments.per_stage_log2 == 0;",
        "skips = segments.per_stage_log2 == 0;",
        HALVES,
    ),
    Mutant(
        "a_skipped_stage_leaves_what_lay_there",
        BACKWARD_KEYS,
        "cute::clear(none);",
        "",
        HALVES,
    ),
    Mutant(
        "columns_past_the_head_dim",
        QUERY_TILES,
        "clear_tail<Traits, kChunks>(stages + to_clear.index * kStageBytes, tail, lane);",
        "",
        ("tests/test_forward.py", "-k", f"other_heads_stay_outside and {HALF} and (112 or 80)"),
    ),
    Mutant(
        "united_blocks_share_their_keys",
        QUERY_TILES,
        "key < 0 || !with ?",
        "key < 0 ?",
        ("tests/test_forward.py", "-k", f"test_cases and alike and {HALF} and not wide"),
    ),
    Mutant(
        "long_rows_of_lists_begin_anew",
        "kernels/mask/pack.cu",
        "const int64_t first_col = first_word * 32;",
        "const int64_t first_col = 0 * first_word;",
        ("tests/test_many.py", "-k", f"wide_rows and {HALF} and not dense"),
    ),
]
