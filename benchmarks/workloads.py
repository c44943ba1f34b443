"""What is timed: named problems, in groups. masks.py makes their block masks."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DROPOUT_SEED = (1, 2)  # a seed and an offset
LONGEST_DENSE = 131072  # beyond, dense attention takes seconds

# Block sizes that should run at the rate of 128 x 128, what smaller ones are compared with, and those whose rows share
# too few keys for that rate.
WIDE = ((128, 128), (128, 64), (128, 32), (128, 16), (256, 64), (192, 48), (128, 80))
BETWEEN = (40, 72, 80, 112, 160)  # head dims between the kernels' own
TILES = ((128, 128), (128, 64), (128, 32), (128, 16))
NARROW = ((64, 16), (64, 128), (80, 48), (112, 64), (32, 32), (32, 128), (16, 16), (16, 128))

HALF = (torch.float16, torch.bfloat16)  # what most other libraries are timed with

# Key blocks at the begin of a sequence that every row attends to, where a workload does not say otherwise.
USUAL_SINKS = {"local": 4}

Window = tuple[int, int, int]  # tokens to the left and to the right of a query's own, -1 for all; sink tokens
NO_WINDOW = (-1, -1, 0)


@dataclass(frozen=True)
class Workload:
    """Self-attention over `batch` sequences of `seqlen` under a block mask.

    density: each block is on with this probability, independently for every (sequence, mask head, query block), as are
        sinks and diagonal; a causal mask is cut at the diagonal. 1 is the all-true mask.
    per_row: instead of a density, this many blocks of each row, of those that causality leaves visible.
    pattern: "random"; "local", of `per_row` blocks the sinks and the last before the diagonal; "half-dense" and
        "half-streaming", random and local, but with every second head all true; or "top-k", for each row the share
        `density` of its visible blocks that score best (masks.py), besides sinks and diagonal.
    sinks: so many key blocks at the begin of its sequence every row attends to; None: 4 if local, else 1.
    diagonal: whether each row attends to its own keys, the blocks that share a token with its query block.
    lengths: of packed sequences, one after another in tensors of `seqlen` tokens, their sum; `batch` is 1.
    bounded: whether the mask of packed sequences is told the longest one.
    alike: so many neighbouring query blocks draw from one list; each keeps 90% of it and adds 10% of its own.
    shared: one mask head for each key head, for the whole group of query heads, rather than one for each query head.
    listed: the mask comes as lists of key blocks rather than as booleans.
    task: "forward"; "backward", the gradients of q, k and v alone; or "training", the forward and the backward.
    deterministic: gradients that are the same in every run.
    frozen: the letters of those of q, k and v whose gradients nobody asks for.
    windows: of mask heads in turns, left, right and sink: of the keys j that the blocks and causality leave to query i,
        those with j < sink or i - left <= j <= i + right, counted within the sequence. A left or right of -1 is
        unbounded. Blocks are drawn without regard to them.
    head_sinks: each query head has a score without a value, in the sum of all its weights (make_head_sinks).
    dropout: the probability with which a weight is dropped, by make_dropout_seed.
    softcap: where scores end; 0: nowhere.
    value_dim: the head dim of v; None: it is head_dim.
    """

    name: str
    seqlen: int
    q_block: int = 128
    k_block: int = 128
    density: float = 0.1
    causal: bool = False
    batch: int = 1
    heads: int = 32
    heads_k: int = 32
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    per_row: int | None = None
    pattern: str = "random"
    alike: int = 1
    shared: bool = False
    listed: bool = False
    task: str = "forward"
    deterministic: bool = False
    sinks: int | None = None
    diagonal: bool = False
    lengths: tuple[int, ...] = ()
    bounded: bool = True
    frozen: str = ""
    windows: tuple[Window, ...] = ()
    head_sinks: bool = False
    dropout: float = 0.0
    softcap: float = 0.0
    value_dim: int | None = None

    def __post_init__(self) -> None:
        if self.lengths and (self.batch != 1 or sum(self.lengths) != self.seqlen or self.listed):
            raise ValueError(
                f"workload {self.name!r} packs sequences of {self.seqlen} tokens; expected batch 1, "
                f"{sum(self.lengths)} tokens, and no lists"
            )

    @property
    def altered(self) -> bool:
        """Whether weights are altered, as hbsattn's ops of planning ask."""
        return self.dropout > 0 or self.softcap > 0

    @property
    def sequences(self) -> tuple[int, ...]:
        """The lengths of the sequences in one entry of the batch."""
        return self.lengths or (self.seqlen,)

    @property
    def blocks(self) -> tuple[int, int]:
        """Query blocks and key blocks of all sequences in one entry of the batch."""
        rows, cols = (sum(-(-n // block) for n in self.sequences) for block in (self.q_block, self.k_block))
        return rows, cols

    @property
    def sink_blocks(self) -> int:
        return USUAL_SINKS.get(self.pattern, 1) if self.sinks is None else self.sinks

    @property
    def mask_heads(self) -> int:
        return self.heads_k if self.shared else self.heads

    @property
    def head_windows(self) -> tuple[Window, ...]:
        """The window of each mask head."""
        windows = self.windows or (NO_WINDOW,)
        return tuple(windows[head % len(windows)] for head in range(self.mask_heads))

    @property
    def columns_of_v(self) -> int:
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def problem(self) -> tuple[int, int, int, int, int, int, torch.dtype]:
        """What decides the tensors q, k and v."""
        return self.batch, self.seqlen, self.heads, self.heads_k, self.head_dim, self.columns_of_v, self.dtype

    def mask_only(self) -> Workload:
        """What tasks on the same tensors and mask have in common: their forward, without a name."""
        return dataclasses.replace(self, name="", task="forward", deterministic=False, frozen="")

    def dense(self) -> Workload:
        """The same tensors and task without a mask: what dense attention computes. Packed sequences of one length are
        a batch of it.
        """
        batch, seqlen, packed = self.batch, self.seqlen, {"lengths": self.lengths}
        if len(set(self.lengths)) == 1:
            batch, seqlen, packed = len(self.lengths), self.lengths[0], {}
        workload = Workload(
            "",
            seqlen,
            density=1.0,
            causal=self.causal,
            batch=batch,
            heads=self.heads,
            heads_k=self.heads_k,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            dtype=self.dtype,
            task=self.task,
            frozen=self.frozen,
            **packed,
        )
        return _named("dense", workload)

    def describe(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "dtype": str(self.dtype).removeprefix("torch.")}


@dataclass(frozen=True)
class Group:
    """Workloads that are timed in turns, so that any two of their rates can be compared.

    Rivals that compute the block mask run on `compared` (on every workload if it is None), as each costs a compilation.
    Dense rivals run on `dense` (if it is None, on every shape of q, k and v but the longest); of them those that
    `dense_rivals` names (if it is None, all).
    brief: fewer samples of packing and planning, nothing back to back.
    """

    name: str
    workloads: tuple[Workload, ...]
    compared: frozenset[str] | None = None
    dense: tuple[Workload, ...] | None = None
    brief: bool = False
    dense_rivals: frozenset[str] | None = None

    def compares(self, workload: Workload) -> bool:
        return self.compared is None or workload.name in self.compared

    def compares_dense(self, rival: str) -> bool:
        return self.dense_rivals is None or rival in self.dense_rivals

    def dense_workloads(self) -> tuple[Workload, ...]:
        if self.dense is not None:
            return self.dense
        shapes = [workload.dense() for workload in self.workloads if workload.seqlen <= LONGEST_DENSE]
        return tuple({workload.name: workload for workload in shapes if not workload.lengths}.values())


def make_tensors(workload: Workload, device: torch.device | str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, (batch, seqlen, heads, head_dim), standard normal."""
    work = workload
    heads = (work.heads, work.head_dim), (work.heads_k, work.head_dim), (work.heads_k, work.columns_of_v)
    return _normal(workload, heads, device, seed)


def make_head_sinks(workload: Workload, device: torch.device | str) -> Tensor | None:
    """(heads), float32; None if there are none."""
    if not workload.head_sinks:
        return None
    return torch.randn(workload.heads, device=device, generator=torch.Generator(device).manual_seed(1))


def make_dropout_seed(workload: Workload, device: torch.device | str) -> Tensor | None:
    """int64 (2), None if nothing is dropped."""
    return torch.tensor(DROPOUT_SEED, device=device) if workload.dropout else None


def make_grad_out(workload: Workload, device: torch.device | str, seed: int) -> Tensor:
    """The gradient of the output, as that."""
    return _normal(workload, ((workload.heads, workload.columns_of_v),), device, seed)[0]


def _normal(
    workload: Workload, heads_and_dims: tuple[tuple[int, int], ...], device: torch.device | str, seed: int
) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*heads: int) -> Tensor:
        shape = (workload.batch, workload.seqlen, *heads)
        return torch.randn(shape, dtype=workload.dtype, device=device, generator=generator)

    return tuple(normal(*heads) for heads in heads_and_dims)


def _named(kind: str, workload: Workload, mask: str = "") -> Workload:
    """The workload with a name made of all that is not usual about it."""
    work = workload
    parts = [kind] if work.task == "forward" else [work.task, kind]
    parts += [f"batch{work.batch}"] if work.batch > 1 else []
    parts += [f"packed{_spell(work.lengths)}" if work.lengths else f"s{work.seqlen}"]
    parts += [f"heads{work.heads}"] if work.heads != 32 else []
    parts += [f"kv{work.heads_k}"] if work.heads_k != work.heads else []
    parts += [f"dim{work.head_dim}"] if work.head_dim != 128 else []
    parts += [str(work.dtype).removeprefix("torch.")] if work.dtype != torch.bfloat16 else []
    parts += [f"values{work.value_dim}"] if work.value_dim is not None else []
    parts += [mask] if mask else []
    parts += [f"sinks{work.sinks}"] if work.sinks is not None else []
    parts += ["diagonal"] if work.diagonal else []
    parts += ["shared"] if work.shared else []
    parts += [f"alike{work.alike}"] if work.alike > 1 else []
    parts += [f"window-{'+'.join(map(_spell_window, work.windows))}"] if work.windows else []
    parts += ["head-sinks"] if work.head_sinks else []
    parts += [f"dropout{work.dropout}"] if work.dropout else []
    parts += [f"softcap{work.softcap:g}"] if work.softcap else []
    parts += ["causal"] if work.causal else []
    parts += ["unbounded"] if not work.bounded else []
    parts += [f"frozen-{work.frozen}"] if work.frozen else []
    parts += ["deterministic"] if work.deterministic else []
    return dataclasses.replace(work, name="-".join(parts))


def _spell(lengths: tuple[int, ...]) -> str:
    """Lengths in a name: 16384+9000, and 32x1024 for 32 of one length."""
    runs = [(len(list(run)), length) for length, run in itertools.groupby(lengths)]
    return "+".join(f"{count}x{length}" if count > 1 else f"{length}" for count, length in runs)


def _spell_window(window: Window) -> str:
    """A window in a name: left255-sink64, and all for one that hides nothing."""
    sides = zip(("left", "right", "sink"), window, NO_WINDOW, strict=True)
    return "-".join(f"{side}{value}" for side, value, usual in sides if value != usual) or "all"


def _sparse(q_block: int, k_block: int, seqlen: int, density: float, causal: bool, **others: object) -> Workload:
    workload = Workload("", seqlen, q_block, k_block, density, causal, **others)
    return _named(f"{q_block}x{k_block}", workload, f"density{density:g}")


def _rows(q_block: int, k_block: int, seqlen: int, per_row: int, causal: bool, **others: object) -> Workload:
    """A mask with as many blocks in each row."""
    workload = Workload("", seqlen, q_block, k_block, causal=causal, per_row=per_row, **others)
    return _named(f"{q_block}x{k_block}", workload, f"{workload.pattern}{per_row}")


def _all_true(seqlen: int, causal: bool, **others: object) -> Workload:
    return _named("all-true", Workload("", seqlen, density=1.0, causal=causal, **others))


def _top(q_block: int, k_block: int, lengths: tuple[int, ...], keep: float, **others: object) -> Workload:
    """What scores best of pooled queries and keys, a mask for each of 8 key heads of 32 heads. One length is a batch of
    one, several are packed.
    """
    group = {"causal": True, "heads_k": 8, "shared": True, "diagonal": True, "pattern": "top-k"}
    packed = {"lengths": lengths} if len(lengths) > 1 else {}
    workload = Workload("", sum(lengths), q_block, k_block, keep, **group, **packed, **others)
    return _named(f"{q_block}x{k_block}", workload, f"top{keep:g}")


def _directions(make: Callable[..., Workload], *shape: object, **others: object) -> list[Workload]:
    """One mask forward, backward, and backward bitwise the same in every run."""
    tasks = ({}, {"task": "backward"}, {"task": "backward", "deterministic": True})
    return [make(*shape, **others, **task) for task in tasks]


def bar_groups() -> list[Group]:
    """The workloads of the bars (bars.py) and, with them, the figure's."""
    blocks = [_sparse(128, k_block, 32768, 0.1, False) for k_block in (128, 64, 32, 16, 48, 80)]
    causal = [_sparse(128, k_block, 32768, 0.1, True) for k_block in (128, 64, 32, 16, 48, 80)]
    batch = _sparse(128, 128, 1024, 0.1, True, batch=8)
    return [
        Group(
            "full", (*blocks, _all_true(8192, False)), frozenset(w.name for w in blocks if w.k_block not in (48, 80))
        ),
        Group("causal", (*causal, _all_true(8192, True)), frozenset({causal[0].name})),
        Group("batch", (batch,)),
    ]


def shape_groups() -> list[Group]:
    """The workloads of the bars on block sizes, head dims, skew and length; what their bars compare is in one group."""
    full = [_sparse(*size, 32768, 0.1, False) for size in [*WIDE, (64, 64)]]
    full += [_sparse(*size, 16384, 0.1, False) for size in [*TILES, *NARROW]]
    full += [
        _sparse(size, size, 16384, 0.1, False, heads_k=32 // group, shared=True)
        for size, group in ((64, 2), (32, 4), (16, 8))
    ]
    full += [_sparse(16, 16, 16384, 0.1, False, alike=alike) for alike in (4, 8)]
    full += [_sparse(64, 64, 32768, 0.1, False, alike=alike) for alike in (2, 4)]
    tokens = {"heads": 64, "heads_k": 4, "shared": True, "listed": True}
    full += [_rows(1, 128, 65536, 16, True, alike=alike, **tokens) for alike in (1, 16)]

    causal = [_sparse(*size, 32768, 0.1, True) for size in WIDE]
    causal += [_rows(128, 128, 32768, 4, True, pattern="half-dense")]
    causal += [_all_true(32768, True, heads=16, heads_k=16), _rows(128, 128, 32768, 4, True, heads=16, heads_k=16)]

    dims = (64, 96, 192, 256)
    long = [
        _rows(128, 128, seqlen, 64, True, heads=8, heads_k=8, pattern=pattern, listed=True)
        for seqlen in (65536, 1048576)
        for pattern in ("local", "random")
    ]
    dense = {is_causal: _all_true(8192, is_causal).dense() for is_causal in (False, True)}
    return [
        _brief("shapes", full, [dense[False]]),
        _brief("shapes-causal", causal, [dense[True]]),
        _brief(
            "head-dims",
            [_sparse(128, 128, 16384, 0.1, False, head_dim=dim) for dim in (*dims, 128, *BETWEEN)],
            [_all_true(8192, False, head_dim=dim).dense() for dim in dims],
        ),
        _brief("short", [_sparse(128, 128, 1024, 0.1, True, batch=8)], []),
        _brief("many", [_many(4096, 8)], []),
        _brief("long", long, []),
    ]


def _many(count: int, length: int) -> Workload:
    """Short packed sequences, a block each, whose mask is told no longest one."""
    shape = {"q_block": 128, "k_block": 32, "heads": 8, "heads_k": 8}
    workload = Workload("", count * length, density=1.0, lengths=(length,) * count, bounded=False, **shape)
    return _named("all-true", workload)


def backward_groups() -> list[Group]:
    """The workloads of the bars on gradients; what their bars compare is in one group."""
    groups = []
    for causal in (False, True):
        large, small = (_sparse(size, size, 32768, 0.1, causal, task="backward") for size in (128, 64))
        all_true = _all_true(8192, causal, task="backward")
        members = [large, small, all_true]
        if not causal:
            for others in ({"deterministic": True}, {"frozen": "kv"}, {"frozen": "q"}):
                members.append(_sparse(128, 128, 32768, 0.1, False, task="backward", **others))
        group = _brief("backward-causal" if causal else "backward", members, [all_true.dense()])
        groups.append(dataclasses.replace(group, compared=frozenset({large.name})))

    sizes = (*TILES, (64, 128), (32, 128), (64, 64))
    shapes = [_sparse(*size, 16384, 0.1, False, task="backward") for size in sizes]
    shapes += [_sparse(size, size, 16384, 0.1, False, heads_k=4, shared=True, task="backward") for size in (128, 64)]
    dims = (64, 96, 192, 256)
    head_dims = [_sparse(128, 128, 32768, 0.1, False, head_dim=dim, task="backward") for dim in dims]
    dense = [_all_true(8192, False, head_dim=dim, task="backward").dense() for dim in dims]
    return [
        *groups,
        _brief("backward-shapes", shapes, []),
        dataclasses.replace(_brief("backward-head-dims", head_dims, dense), dense_rivals=frozenset({"cudnn"})),
        *(_training(batch, seqlen, densities) for batch, seqlen, densities in TRAINING),
    ]


# MIT's grid of forward and backward, cut to what takes seconds: batch, length, and densities below 1.
TRAINING = ((1, 32768, (0.5, 0.1)), (1, 65536, (0.1,)), (8, 32768, (0.1,)))


def _training(batch: int, seqlen: int, densities: tuple[float, ...]) -> Group:
    """Forward and backward, all true and at some densities, beside dense FlashAttention-2."""
    kind = {"batch": batch, "task": "training"}
    all_true = _all_true(seqlen, True, **kind)
    members = [all_true, *(_sparse(128, 128, seqlen, density, True, **kind) for density in densities)]
    group = _brief(all_true.name.replace("all-true-", ""), members, [all_true.dense()])
    return dataclasses.replace(group, dense_rivals=frozenset({"fa2"}))


# Packed sequences of masks that people train with.
RAGGED = (16384, 9000, 4096, 2500, 777)
# Batch, length and heads of all-true masks.
ALL_TRUE = ((64, 512, 16), (8, 1024, 32), (32, 1024, 32), (8, 4096, 32), (2, 8192, 32))


def real_groups() -> list[Group]:
    """Masks that people train with, both directions of each: what changes of the backward are judged on."""
    return [_short_masks(), *_chosen_masks(), _sizes(), _token_rows(), *map(_dense_masks, ALL_TRUE), _training_step()]


def _short_masks() -> Group:
    """Batches of short sequences, 64 x 64: what a sink column, the diagonal, causality and groups cost, one by one."""
    batch, group = {"batch": 8}, {"batch": 8, "heads_k": 8, "shared": True}
    drawn = [
        ({"causal": False, "sinks": 0}, batch),
        ({"causal": True, "sinks": 0}, batch),
        ({"causal": True}, batch),
        ({"causal": True, "diagonal": True}, batch),
        ({"causal": False}, batch),
        ({"causal": False, "sinks": 0}, group),
        ({"causal": True, "sinks": 0}, group),
        ({"causal": True}, group),
    ]
    members = [w for mask, shape in drawn for w in _directions(_sparse, 64, 64, 4096, 0.2, **mask, **shape)]
    for shape in (batch, group):
        members += _directions(_sparse, 64, 64, 4096, 0.25, causal=True, diagonal=True, **shape)
    dense = [w.dense() for w in members[-6:] if not w.deterministic]
    return _beside_cudnn("real-short", members, dense)


def _chosen_masks() -> list[Group]:
    """Top-k of pooled scores, packed and long, and random masks with a diagonal that are as sparse."""
    packed = [_directions(_top, 128, 64, RAGGED, 0.1), _directions(_top, 128, 64, (1024,) * 32, 0.3)]
    group = {"heads_k": 8, "shared": True}
    long = [
        _directions(_top, 128, 64, (32768,), 0.1),
        _directions(_top, 128, 128, (32768,), 0.1),
        _directions(_sparse, 64, 64, 32768, 0.06, causal=True, diagonal=True, **group),
        _directions(_sparse, 128, 128, 32768, 0.05, causal=True, diagonal=True),
    ]
    even = packed[1]
    return [
        _beside_cudnn("real-packed", [w for one in packed for w in one], [w.dense() for w in even[:2]]),
        _brief("real-long", [w for one in long for w in one], []),
        _brief("real-longest", _directions(_top, 128, 128, (131072,), 0.05), []),
    ]


def _sizes() -> Group:
    """Block sizes, groups with a mask for each key head, and a sink block with local ones."""
    masks = [_directions(_sparse, *size, 32768, 0.1, False) for size in ((128, 128), (64, 64), (128, 64), (128, 16))]
    masks += [_directions(_sparse, 128, 128, 32768, 0.1, True)]
    masks += [_directions(_sparse, 128, 128, 32768, 0.1, False, heads_k=4, shared=True)]
    masks += [_directions(_rows, 128, 128, 32768, 9, True, pattern="local", sinks=1)]
    masks += [_directions(_sparse, *size, 16384, 0.1, False) for size in ((64, 16), (16, 16), (32, 32))]
    dense = [_all_true(8192, causal, task="backward").dense() for causal in (False, True)]
    return _beside_cudnn("real-sizes", [w for one in masks for w in one], dense)


def _token_rows() -> Group:
    """One query a block and a list for each key head, its own block and the first among them."""
    members = []
    for heads, heads_k, k_block, top in ((32, 2, 64, 64), (64, 4, 128, 16)):
        shape = {"heads": heads, "heads_k": heads_k, "shared": True, "listed": True, "diagonal": True}
        for alike in (1, 16):
            members += _directions(_rows, 1, k_block, 32768, top, True, alike=alike, **shape)
    return _brief("real-tokens", members, [])


def _dense_masks(shape: tuple[int, int, int]) -> Group:
    """All-true masks of short sequences, beside cuDNN without a mask."""
    batch, seqlen, heads = shape
    members = _directions(_all_true, seqlen, True, batch=batch, heads=heads, heads_k=heads)
    return _beside_cudnn(f"real-all-true-batch{batch}-s{seqlen}", members, [w.dense() for w in members[:2]])


def _training_step() -> Group:
    return dataclasses.replace(_training(1, 32768, (0.1,)), name="real-training", dense=())


def _beside_cudnn(name: str, members: list[Workload], dense: list[Workload]) -> Group:
    return dataclasses.replace(_brief(name, members, dense), dense_rivals=frozenset({"cudnn"}))


# Windows of heads that stream tokens, of those that alternate with dense ones, and of heads with 4096 local tokens.
STREAMING = ((255, -1, 64),)
HALF_STREAMING = (NO_WINDOW, *STREAMING)
SLIDING = ((4095, -1, 0),)


def head_groups() -> list[Group]:
    """Heads of every kind in one call, causal: beside the all-true mask of as many tokens."""
    sliding = {"windows": SLIDING}
    shorter, short, middle, long = (_mixes(seqlen) for seqlen in (8192, 32768, 65536, 131072))
    short += [_all_true(32768, True, windows=(NO_WINDOW,)), _all_true(32768, True, head_sinks=True)]
    short += [_all_true(32768, True, dropout=0.1), _all_true(32768, True, softcap=50.0)]
    middle += [_all_true(65536, True, windows=windows) for windows in (SLIDING, STREAMING)]
    backward = [_all_true(65536, True, task="backward", **windows) for windows in ({}, sliding)]
    additions = [
        _all_true(32768, True, task="backward", **other)
        for other in ({}, {"head_sinks": True}, {"dropout": 0.1}, {"softcap": 50.0})
    ]
    values = [
        _all_true(16384, True, head_dim=192, value_dim=value_dim, **other)
        for other in ({}, {"task": "backward"})
        for value_dim in (None, 128)
    ]
    tokens = [
        _all_true(8192, True, windows=STREAMING),
        _all_true(1048576, True, heads=8, heads_k=8, windows=STREAMING),
    ]
    return [
        _brief("heads-s8192", shorter, []),
        _brief("heads-s32768", short, []),
        _brief("heads-s65536", middle, []),
        _brief("heads-s131072", long, []),
        _brief("heads-backward", backward, []),
        _brief("heads-additions-backward", additions, []),
        _brief("heads-values", values, []),
        _brief("heads-training", _mixes(65536, task="training"), []),
        _brief("heads-streaming", tokens, []),
    ]


def _mixes(seqlen: int, **others: object) -> list[Workload]:
    """All true, and two masks of which every second head is: the others stream tokens, or 1 sink and 3 local blocks."""
    return [
        _all_true(seqlen, True, **others),
        _all_true(seqlen, True, windows=HALF_STREAMING, **others),
        _rows(128, 128, seqlen, 4, True, pattern="half-streaming", **others),
    ]


def float32_groups() -> list[Group]:
    """All true, and sparse, in float32, both directions."""
    groups = []
    for head_dim in (64, 128):
        kind = {"head_dim": head_dim, "heads": 16, "heads_k": 16, "dtype": torch.float32}
        members = [
            make(task=task)
            for task in ("forward", "backward")
            for make in (
                functools.partial(_all_true, 8192, False, **kind),
                functools.partial(_sparse, 128, 128, 8192, 0.1, False, **kind),
            )
        ]
        dense = [work.dense() for work in members[::2]]
        groups.append(_brief(f"float32-dim{head_dim}", members, dense))
    return groups


def anchor_groups() -> list[Group]:
    """Dense, sparse and small-block problems on which other libraries have been measured."""
    dense = [_all_true(8192, causal, head_dim=dim) for dim in (64, 96, 128, 192, 256) for causal in (False, True)]
    dense += [_all_true(32768, causal) for causal in (False, True)]
    dense += [_all_true(1024, causal, batch=8) for causal in (False, True)]
    sparse = [_sparse(128, 128, 32768, 0.1, causal) for causal in (False, True)]
    sparse += [_sparse(128, 128, 8192, 0.5, True), _sparse(64, 64, 32768, 0.1, False)]
    sparse += [_sparse(128, 128, 1024, 0.1, causal, batch=8) for causal in (False, True)]
    sizes = [(64, 64), (128, 64), (128, 32), (128, 16), (256, 64), (64, 16)]
    sizes += [(80, 48), (32, 128), (32, 32), (16, 128), (16, 16)]
    sparse += [_sparse(*size, 16384, 0.1, causal) for size in sizes for causal in (False, True)]
    return _grouped([*dense, *sparse])


def predecessor_groups() -> list[Group]:
    """The grid on which the Triton implementation of hbsattn was published."""
    lengths = [128 * 2**i for i in range(10)]
    return _grouped(
        [
            _sparse(128, 128, seqlen, density, causal, batch=8)
            for seqlen in lengths
            for causal in (False, True)
            for density in (0.3, 0.1)
        ]
    )


def named_groups(names: list[str]) -> list[Group]:
    """The workloads with these names, grouped; raises ValueError for a name that none has."""
    known = all_workloads()
    for name in names:
        if name not in known:
            raise ValueError(f"no workload is called {name!r}; --list prints the names")
    return _grouped([known[name] for name in names])


def matching(groups: list[Group], text: str) -> list[Group]:
    """The groups with only those workloads whose names contain the text."""
    kept = [(group, tuple(w for w in group.workloads if text in w.name)) for group in groups]
    return [dataclasses.replace(group, workloads=members) for group, members in kept if members]


def all_workloads() -> dict[str, Workload]:
    groups = [group for make in (*SETS.values(), *GRIDS.values()) for group in make()]
    return {workload.name: workload for group in groups for workload in group.workloads}


# Groups by the names of the sets of bars, and of the grids.
SETS = {
    "basics": bar_groups,
    "shapes": shape_groups,
    "backward": backward_groups,
    "real": real_groups,
    "heads": head_groups,
    "float32": float32_groups,
}
GRIDS = {"anchors": anchor_groups, "predecessor": predecessor_groups}


def _brief(name: str, members: list[Workload], dense: list[Workload]) -> Group:
    """A group without rivals that compute the mask."""
    return Group(name, tuple(members), frozenset(), tuple(dense), brief=True)


def _grouped(workloads: list[Workload]) -> list[Group]:
    """Workloads that share q, k, v and causality go together, so that dense attention runs once for them."""
    groups: dict[str, list[Workload]] = {}
    for workload in workloads:
        groups.setdefault(workload.mask_only().dense().name.replace("dense-", ""), []).append(workload)
    return [Group(name, tuple(members)) for name, members in groups.items()]
