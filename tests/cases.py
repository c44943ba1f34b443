"""Named shapes and masks to test with, the nasty ones included. problems.py makes tensors of them."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DEVICE_DTYPES = [
    pytest.param("cpu", torch.float32, id="cpu-float32"),
    pytest.param("cuda", torch.bfloat16, id="cuda-bfloat16", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, id="cuda-float16", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float32, id="cuda-float32", marks=[pytest.mark.gpu, pytest.mark.float32]),
]
# Arguments of cases: queries that each are a block, of heads that share their mask; and a window and sink for each of
# four heads.
TOKENS = {"q_block": 1, "heads_q": 16, "heads_k": 1, "mask_heads": 1}
WINDOWS = ((0, 0, 5), (-1, -1, 0), (40, 9, 0), (7, -1, 70))
BLOCK_SIZES = [16, 32, 48, 64, 80, 96, 112, 128, 192, 256]
HEAD_DIMS = [8, 16, 40, 64, 72, 96, 128, 136, 192, 256]


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem. `lens_k` defaults to `lens_q`; batched cases have equal lengths."""

    name: str
    lens_q: tuple[int, ...] = (100, 37, 200)
    lens_k: tuple[int, ...] | None = None
    heads_q: int = 4
    heads_k: int = 2
    mask_heads: int = 4
    head_dim: int = 64
    q_block: int = 64
    k_block: int = 64
    causal: bool = False
    packed: bool = True
    pattern: str = "random"  # see problems.block_masks
    density: float = 0.4
    layout: str = "contiguous"  # see problems.arrange
    form: str = "flat"  # of the mask: flat, batched, or shared (batched with a batch dimension of 1)
    source: str = "dense"  # dense, indices or csr
    values: str = "normal"  # normal, negative (very negative logits) or hidden (masked-out logits of +1e4)
    scale: float | None = None
    windows: tuple[tuple[int, int, int], ...] = ()  # left, right and sink of each mask head, or of all
    sinks: bool = False  # each query head has a sink
    softcap: float = 0.0
    dropout_p: float = 0.0
    value_dim: int | None = None  # head dim of v, where it is another

    @property
    def keys(self) -> tuple[int, ...]:
        return self.lens_q if self.lens_k is None else self.lens_k

    @property
    def columns_of_v(self) -> int:
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def mask_form(self) -> str:
        return self.form if self.packed or self.form != "flat" else "batched"

    def blocks(self, b: int) -> tuple[int, int]:
        return -(-self.lens_q[b] // self.q_block), -(-self.keys[b] // self.k_block)

    @property
    def max_blocks(self) -> tuple[int, int]:
        sizes = [self.blocks(b) for b in range(len(self.lens_q))]
        return max((s[0] for s in sizes), default=0), max((s[1] for s in sizes), default=0)


def case(name: str, **changes) -> Case:
    return Case(name, **changes)


CASES = [
    case("packed"),
    case("packed_causal", causal=True),
    case("batched", lens_q=(150, 150), lens_k=(130, 130), packed=False),
    case("batched_causal", lens_q=(150, 150), lens_k=(210, 210), packed=False, causal=True),
    case("batched_shared_mask", lens_q=(96, 96, 96), packed=False, form="shared"),
    case("packed_batched_mask", lens_q=(90, 200, 1), lens_k=(200, 64, 100), form="batched"),
    case("packed_shared_mask", lens_q=(90, 200, 1), lens_k=(200, 64, 100), form="shared"),
    case("zero_length", lens_q=(0, 70, 0, 50, 33, 0), lens_k=(40, 70, 0, 0, 90, 0)),
    case("zero_length_causal", lens_q=(0, 70, 0, 50, 33, 0), lens_k=(40, 70, 0, 0, 90, 0), causal=True),
    case("all_zero_length", lens_q=(0, 0, 0)),
    case("long_blocks", lens_q=(17, 200), lens_k=(40, 150), q_block=4096, k_block=4096, density=0.8),
    case("long_odd_blocks_causal", lens_q=(17, 200), lens_k=(40, 150), q_block=999, k_block=5001, causal=True),
    case("no_sequences", lens_q=()),
    case("batched_no_keys", lens_q=(40, 40), lens_k=(0, 0), packed=False),
    case("batched_no_queries", lens_q=(0, 0), lens_k=(40, 40), packed=False),
    case("empty_rows", pattern="empty_rows", q_block=16),
    case("empty_heads", pattern="empty_heads"),
    case("empty_heads_packed_group", pattern="empty_heads", mask_heads=2, heads_q=8),
    case("empty_mask", pattern="none"),
    case("density_0.05", density=0.05, lens_q=(300, 257), q_block=32, k_block=16),
    case("density_1", density=1.0, lens_q=(129, 255)),
    case("density_1_causal", density=1.0, lens_q=(129, 255), causal=True),
    case("q_longer_causal", lens_q=(200, 130, 64), lens_k=(90, 129, 10), causal=True, density=0.7),
    case("k_longer_causal", lens_q=(1, 17, 64), lens_k=(200, 130, 300), causal=True, density=0.7),
    case("one_token", lens_q=(1, 1), lens_k=(1, 1), density=1.0, causal=True),
    case("single_block", lens_q=(50, 64, 3), q_block=64, k_block=64, density=1.0),
    case("blocks_larger_than_sequences", lens_q=(50, 100), q_block=256, k_block=192, density=1.0, causal=True),
    case("tails", lens_q=(127, 129, 65), lens_k=(63, 255, 131), q_block=128, k_block=48),
    case("diagonal", pattern="diagonal", causal=True, lens_q=(300, 100), q_block=48, k_block=48),
    case("one_column", pattern="one_column", lens_q=(300, 100), q_block=16, k_block=80),
    case("last_column", pattern="last_column", lens_q=(300, 100), q_block=32, k_block=16, causal=True),
    case("many_columns", lens_q=(40, 20), lens_k=(1100, 530), k_block=16, q_block=32, density=0.3),
    case("33_columns", lens_q=(40,), lens_k=(16 * 33,), k_block=16, q_block=16, density=0.5),
    case("32_columns", lens_q=(40,), lens_k=(16 * 32,), k_block=16, q_block=16, density=0.5),
    case("one_head", heads_q=1, heads_k=1, mask_heads=1),
    case("gqa_4_shared", heads_q=8, heads_k=2, mask_heads=1, q_block=48, causal=True),
    case("gqa_4_group", heads_q=8, heads_k=2, mask_heads=2, q_block=16),
    case("gqa_4_query", heads_q=8, heads_k=2, mask_heads=8, causal=True),
    case("gqa_8_group", heads_q=16, heads_k=2, mask_heads=2, q_block=16, k_block=32, causal=True),
    case("gqa_8_tails", heads_q=8, heads_k=1, mask_heads=1, q_block=112, k_block=96, lens_q=(111, 113)),
    case("gqa_3", heads_q=6, heads_k=2, mask_heads=2, q_block=80, k_block=112, causal=True),
    case("gqa_2_unequal", heads_q=4, heads_k=2, mask_heads=2, q_block=96, k_block=16),
    case("qkv_packed", layout="qkv", heads_q=2, heads_k=2, mask_heads=2),
    case("qkv_packed_gqa_batched", layout="qkv", lens_q=(90, 90), packed=False, causal=True),
    case("heads_first", layout="heads_first"),
    case("heads_first_batched", layout="heads_first", lens_q=(90, 90), packed=False),
    case("padded", layout="padded"),
    case("padded_batched", layout="padded", lens_q=(90, 90), lens_k=(70, 70), packed=False, causal=True),
    case("rows_first", layout="rows_first", lens_q=(150,) * 3, lens_k=(130,) * 3, packed=False, causal=True),
    case(
        "rows_first_shared_boxes",
        layout="rows_first",
        lens_q=(90, 90),
        packed=False,
        heads_q=8,
        mask_heads=2,
        q_block=8,
    ),
    case("rows_first_small_keys", layout="rows_first", lens_q=(130, 130), packed=False, q_block=128, k_block=16),
    case("rows_first_one_head", layout="rows_first", lens_q=(90, 90), packed=False, heads_q=1, heads_k=1, mask_heads=1),
    case("odd_strides", layout="odd"),
    case("odd_strides_batched", layout="odd", lens_q=(90, 90), packed=False),
    case("odd_offset", layout="offset"),
    case("expanded_heads", layout="expanded_heads", mask_heads=4),
    case("expanded_batch", layout="expanded_batch", lens_q=(90, 90, 90), packed=False),
    case("negative_logits", values="negative", scale=1.0),
    case("negative_logits_causal", values="negative", scale=1.0, causal=True, lens_q=(128, 64)),
    case("hidden_logits_causal", values="hidden", scale=1.0, causal=True, density=1.0),
    case("hidden_logits_batched", values="hidden", scale=1.0, causal=True, lens_q=(200, 200), packed=False),
    case("indices_packed", source="indices", causal=True, k_block=16),
    case("indices_packed_batched_mask", source="indices", form="batched", lens_q=(90, 20), lens_k=(20, 300)),
    case("indices_batched", source="indices", lens_q=(150, 150), packed=False),
    case("csr_packed", source="csr", causal=True, k_block=16),
    case("csr_batched", source="csr", lens_q=(150, 150), packed=False),
    case("large_scale", scale=2.0, lens_q=(100, 200)),
    case("small_scale", scale=1e-3),
]
CASES += [case(f"head_dim_{d}", head_dim=d, causal=d % 16 == 0, q_block=32, k_block=48) for d in HEAD_DIMS]

CASES += [case(f"head_dim_{d}", head_dim=d, causal=True, layout="padded") for d in (1, 20, 100, 250)]


# Tiles of 192 rows: of one head, of the heads of a group, more than one to a block.
CASES += [
    case("192_rows", q_block=192, k_block=48, lens_q=(400, 191, 5), lens_k=(300, 190, 60), causal=True, head_dim=128),
    case("190_rows", q_block=190, k_block=64, lens_q=(400, 380), lens_k=(333, 500), packed=True, head_dim=96),
    case("144_rows_batched", q_block=144, k_block=16, packed=False, lens_q=(300, 300), lens_k=(350, 350), causal=True),
    case("192_rows_of_3_heads", heads_q=6, mask_heads=2, k_block=32, causal=True, head_dim=128),
    case("192_rows_of_12_heads", heads_q=12, heads_k=1, mask_heads=1, q_block=16, k_block=16, head_dim=96, causal=True),
    case("two_tiles_of_192", q_block=384, k_block=32, lens_q=(400, 200), causal=True),
    case("three_tiles_of_192", q_block=576, k_block=80, lens_q=(700, 570), lens_k=(640, 300), causal=True),
    case("192_rows_from_inside_a_head", heads_q=7, heads_k=1, mask_heads=1, q_block=80, lens_q=(95, 190), causal=True),
    case("192_rows_of_a_padded_head", q_block=192, k_block=128, lens_q=(300,), head_dim=100),
]

# By causality, 64 rows of a tile, or of a stage, see nothing of a block that the others see a part of.
HALVES = {"causal": True, "density": 1.0, "head_dim": 128, "q_block": 128}
CASES += [
    case("halves_of_keys", **HALVES, k_block=128, lens_q=(256, 128, 300, 60)),
    case("halves_of_keys_that_begin_later", **HALVES, k_block=128, lens_q=(256, 130), lens_k=(384, 321)),
    case("halves_of_keys_that_end_later", **HALVES, k_block=128, lens_q=(500, 390), lens_k=(372, 129)),
    case("halves_of_keys_of_a_group", **HALVES, k_block=128, lens_q=(300, 256), heads_q=8, mask_heads=2),
    case("halves_of_a_diagonal", **(HALVES | {"q_block": 64}), k_block=128, lens_q=(300, 256), pattern="diagonal"),
    case("halves_of_head_dim_64", **(HALVES | {"head_dim": 64}), k_block=128, lens_q=(384, 200)),
    case("halves_of_head_dim_96", **(HALVES | {"head_dim": 96}), k_block=128, lens_q=(384, 200)),
    case("stages_of_64_keys", **HALVES, lens_q=(256, 300), lens_k=(256, 340)),
    case("stages_of_a_long_block", **(HALVES | {"q_block": 320}), lens_q=(700, 310), lens_k=(700, 290)),
    case("stages_of_a_window", **HALVES, lens_q=(300,), heads_q=2, mask_heads=2, windows=((100, 0, 0), (30, -1, 70))),
    case("stages_of_wide_rows", **(HALVES | {"head_dim": 192}), k_block=128, lens_q=(256, 200)),
    case("stages_of_united_blocks", **(HALVES | {"q_block": 192}), k_block=32, lens_q=(400, 230), lens_k=(420, 230)),
]

# Blocks off the fast path: rows of several heads in one box, blocks that end inside a granule.
CASES += [
    case("token_rows", q_block=1, k_block=128, heads_q=16, heads_k=1, mask_heads=1, lens_q=(70, 33), causal=True),
    case("token_rows_two_groups", q_block=1, k_block=64, heads_q=8, heads_k=2, mask_heads=2, head_dim=128, density=0.3),
    case("token_rows_own_masks", q_block=1, k_block=16, heads_q=4, heads_k=2, mask_heads=4, lens_q=(40,)),
    case("seven_rows_of_eight_heads", q_block=7, k_block=13, heads_q=8, heads_k=1, mask_heads=1, causal=True),
    case("thirteen_rows_of_four_heads", q_block=13, k_block=7, heads_q=8, heads_k=2, mask_heads=2, head_dim=96),
    case("odd_rows_of_one_head", q_block=37, k_block=100, heads_q=4, heads_k=2, mask_heads=2, causal=True),
    case("hundred_by_one", q_block=100, k_block=1, heads_q=2, heads_k=2, mask_heads=1, lens_q=(130,), density=0.2),
    case("wide_odd_blocks", q_block=200, k_block=333, lens_q=(450, 40), head_dim=256, causal=True),
    # Neighbours whose tiles are united: 4 or 2 to 64 rows, 8 to 128 rows above head dim 128.
    case("alike_16", pattern="alike", q_block=16, k_block=16, lens_q=(300, 70, 5), density=0.3),
    case("alike_16_causal", pattern="alike", q_block=16, k_block=80, lens_q=(300, 70, 5), causal=True, head_dim=128),
    case("alike_32_odd", pattern="alike", q_block=32, k_block=24, lens_q=(300, 70), causal=True, head_dim=96),
    case("alike_8x2_wide", pattern="alike", q_block=8, k_block=32, heads_q=4, mask_heads=2, head_dim=256),
    case("alike_batched", pattern="alike", q_block=16, packed=False, lens_q=(150, 150), lens_k=(310, 310), causal=True),
    case("alike_tokens", pattern="alike", q_block=1, heads_q=32, heads_k=2, mask_heads=2, head_dim=128, causal=True),
    case("alike_tokens_odd", pattern="alike", q_block=1, k_block=17, heads_q=32, heads_k=1, mask_heads=1, density=0.2),
    case("batched_odd", q_block=20, k_block=24, packed=False, lens_q=(90, 90), lens_k=(95, 95), head_dim=192),
]

# Heads that tiles of keys stream as one, with and without rows of padding.
CASES += [
    case("stack_of_16", q_block=1, heads_q=32, heads_k=2, mask_heads=2, head_dim=128, causal=True, density=0.3),
    case(
        "stack_of_16_batched",
        q_block=1,
        k_block=128,
        heads_q=16,
        heads_k=1,
        mask_heads=1,
        head_dim=128,
        packed=False,
        lens_q=(70, 70),
        lens_k=(300, 300),
        causal=True,
    ),
    case("stack_of_8", q_block=2, k_block=32, heads_q=16, heads_k=2, mask_heads=2, layout="heads_first"),
    case("stacks_of_8_of_24", q_block=6, k_block=48, heads_q=24, heads_k=1, mask_heads=1, head_dim=96, causal=True),
    case("stack_of_2", q_block=1, heads_q=8, heads_k=4, mask_heads=4, head_dim=128, causal=True, layout="padded"),
    case("stack_of_4", q_block=6, k_block=128, heads_q=8, heads_k=2, mask_heads=2, head_dim=128, causal=True),
    case("stack_of_8_batched", q_block=3, heads_q=8, heads_k=1, mask_heads=1, packed=False, lens_q=(50, 50)),
    case("stack_of_24", q_block=1, heads_q=24, heads_k=1, mask_heads=1, head_dim=128, lens_q=(40, 1, 9)),
    case("stack_of_one_mask", q_block=4, heads_q=32, heads_k=2, mask_heads=1, head_dim=72, causal=True),
    case(
        "stack_of_long_blocks",
        q_block=100,
        k_block=128,
        heads_q=8,
        heads_k=1,
        mask_heads=1,
        head_dim=128,
        lens_q=(250, 103),
        lens_k=(300, 120),
        causal=True,
    ),
    case("stack_of_128", q_block=1, k_block=64, heads_q=128, heads_k=1, mask_heads=1, lens_q=(30, 9), head_dim=40),
    case("stack_by_queries", q_block=100, k_block=16, heads_q=8, heads_k=1, mask_heads=1, head_dim=128, causal=True),
    case("stack_wide", q_block=3, k_block=100, heads_q=16, heads_k=1, mask_heads=1, head_dim=256, causal=True),
    case(
        "stack_of_zero_length",
        q_block=1,
        heads_q=16,
        heads_k=1,
        mask_heads=1,
        lens_q=(0, 70, 0, 50, 33, 0),
        lens_k=(40, 70, 0, 0, 90, 0),
        causal=True,
        layout="padded",
    ),
    case(
        "stack_in_parts",
        q_block=1,
        heads_q=16,
        heads_k=1,
        mask_heads=1,
        lens_q=(1500,),
        lens_k=(400,),
        pattern="one_column",
        head_dim=64,
    ),
]


def block_size_pairs() -> list[Case]:
    """Every q block beside every k block; the other properties take turns."""
    cases = []
    for i, q_block in enumerate(BLOCK_SIZES):
        for j, k_block in enumerate(BLOCK_SIZES):
            n = 10 * i + j
            group = (1, 2, 4, 8)[n % 4]
            heads_k = 1 if group == 8 else 2
            heads_q = group * heads_k
            cases.append(
                case(
                    f"blocks_{q_block}x{k_block}",
                    q_block=q_block,
                    k_block=k_block,
                    lens_q=(q_block + 17, 3 * q_block, 5),
                    lens_k=(2 * k_block + 1, 300 + n, k_block),
                    heads_q=heads_q,
                    heads_k=heads_k,
                    mask_heads=(1, heads_k, heads_q)[n % 3],
                    head_dim=HEAD_DIMS[n % len(HEAD_DIMS)],
                    causal=n % 2 == (i % 2),
                    density=(0.3, 0.6, 0.9)[(i + j) % 3],
                )
            )
    return cases


def random_case(seed: int, *, any_block_size: bool, max_len: int, windowed: bool = False) -> Case:
    """A case drawn at random; `any_block_size` allows block sizes off the fast path, `windowed` adds windows."""
    rng = random.Random(seed)
    packed = rng.random() < 0.7
    batch = rng.randint(1, 4)
    heads_k = rng.choice([1, 2, 3])
    heads_q = heads_k * rng.choice([1, 2, 3, 4, 8])
    if packed:
        lens_q = tuple(rng.choice([0, 1, rng.randint(1, max_len)]) for _ in range(batch))
        lens_k = tuple(rng.choice([0, 1, n, rng.randint(1, max_len)]) for n in lens_q)
    else:
        lens_q = (rng.randint(1, max_len),) * batch
        lens_k = (rng.randint(1, max_len),) * batch
    sizes = [1, 7, 13, 100, *BLOCK_SIZES] if any_block_size else BLOCK_SIZES
    dims = [1, 18, 24, 32, 48, 56, 80, 88, 101, 104, 112, 120, *HEAD_DIMS]
    source = rng.choice(["dense", "dense", "indices", "csr"])
    forms = {True: ["flat"] if source == "csr" else ["flat", "batched"], False: ["batched", "shared"]}[packed]
    spec = Case(
        f"random_{seed}",
        lens_q=lens_q,
        lens_k=lens_k,
        heads_q=heads_q,
        heads_k=heads_k,
        mask_heads=rng.choice([1, heads_k, heads_q]),
        head_dim=rng.choice(dims),
        q_block=rng.choice(sizes),
        k_block=rng.choice(sizes),
        causal=rng.random() < 0.5,
        packed=packed,
        pattern=rng.choice(["random", "random", "random", "empty_rows", "diagonal", "one_column"]),
        density=rng.choice([0.0, 0.05, 0.3, 0.6, 1.0]),
        layout=rng.choice(["contiguous", "heads_first", "rows_first", "padded", "odd", "offset"]),
        form="batched" if source == "csr" and not packed else rng.choice(forms),
        source=source,
        values=rng.choice(["normal", "normal", "hidden"]),
        scale=rng.choice([None, 0.3]),
    )
    if not windowed:
        return spec
    reach = [-1, -1, 0, 1, rng.randint(0, 40), rng.randint(0, max_len), 2 * max_len]
    sink = [0, 0, 1, rng.randint(0, 40), spec.k_block, rng.randint(0, 2 * max_len)]
    windows = [(rng.choice(reach), rng.choice(reach), rng.choice(sink)) for _ in range(spec.mask_heads)]
    return dataclasses.replace(spec, windows=tuple(windows[: rng.choice([1, spec.mask_heads])]))


# Lengths that lie about tensors of HOSTILE_ROWS rows: what cumulative lengths claim.
HOSTILE_ROWS = 300
HOSTILE_LENGTHS = {
    "past_the_end": (0, 10**6),
    "below_zero": (-5, 300),
    "far_below_zero": (-(2**31), 300),
    "int_max": (0, 2**31 - 1),
    "whole_range": (-(2**31), 2**31 - 1),
    "beyond": (10**6, 2 * 10**6),
    "decreasing": (300, 0),
    "second_past_the_end": (0, 100, 10**6),
    "first_past_the_end": (0, 10**6, 300),
    "overlapping": (0, 300, 0, 10**6),
}

# A problem for each way in which gradients are computed on CUDA: `deterministic` is an option of the call.
BACKWARD_METHODS = [
    case("by_keys", q_block=128, k_block=128, head_dim=128),
    case("by_keys_of_64", q_block=64, k_block=64),
    case("by_keys_wide", q_block=64, k_block=48, head_dim=256),
    case("by_keys_of_sets", q_block=8192, k_block=128, heads_q=8, heads_k=1, mask_heads=1, head_dim=128),
    case("by_keys_of_stacks", q_block=1, k_block=64, heads_q=16, heads_k=1, mask_heads=1, head_dim=128),
    case("by_keys_of_windows", q_block=296, k_block=128, heads_q=64, heads_k=1, mask_heads=1, head_dim=128),
    case("by_queries", q_block=128, k_block=16, head_dim=128),
    case("by_queries_of_odd_blocks", q_block=100, k_block=7),
    case("united", q_block=16, k_block=64, mask_heads=2, pattern="alike"),
    # Some query blocks go in pairs in the forward, others do not.
    case(
        "by_keys_pairs",
        q_block=64,
        k_block=16,
        head_dim=128,
        heads_q=24,
        heads_k=8,
        mask_heads=24,
        lens_k=(500, 37, 700),
        density=0.9,
    ),
]
