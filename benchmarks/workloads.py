"""What is timed: named problems, their random block masks, and the exact count of the work in them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Workload:
    """Self-attention over `batch` sequences of `seqlen` under a random block mask.

    Each block is on with probability `density`, independently for every (sequence, head, query block), and the first
    key block always is; a causal mask is cut at the diagonal. `density` 1 is the all-true mask.
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

    @property
    def blocks(self) -> tuple[int, int]:
        """Query blocks and key blocks of a sequence."""
        return -(-self.seqlen // self.q_block), -(-self.seqlen // self.k_block)

    @property
    def problem(self) -> tuple[int, int, int, int, int, torch.dtype]:
        """What decides the tensors q, k and v."""
        return self.batch, self.seqlen, self.heads, self.heads_k, self.head_dim, self.dtype

    def dense(self) -> Workload:
        """The same tensors without a mask: what dense attention computes."""
        return dataclasses.replace(
            self,
            name=_name("dense", self.batch, self.seqlen, self.head_dim, self.causal),
            q_block=128,
            k_block=128,
            density=1.0,
        )

    def describe(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "dtype": str(self.dtype).removeprefix("torch.")}


@dataclass(frozen=True)
class Group:
    """Workloads that are timed in turns, so that any two of their rates can be compared.

    Rivals that compute the block mask run on `compared` (on every workload if it is None), as each costs a compilation;
    dense rivals run on every shape of q, k and v.
    """

    name: str
    workloads: tuple[Workload, ...]
    compared: frozenset[str] | None = None

    def compares(self, workload: Workload) -> bool:
        return self.compared is None or workload.name in self.compared


def make_tensors(workload: Workload, device: torch.device | str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, (batch, seqlen, heads, head_dim), standard normal."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(heads: int) -> Tensor:
        shape = (workload.batch, workload.seqlen, heads, workload.head_dim)
        return torch.randn(shape, dtype=workload.dtype, device=device, generator=generator)

    return normal(workload.heads), normal(workload.heads_k), normal(workload.heads_k)


def make_mask(workload: Workload, device: torch.device | str, seed: int) -> Tensor:
    """The block mask: bool (batch, heads, query blocks, key blocks), not cut at the diagonal."""
    shape = (workload.batch, workload.heads, *workload.blocks)
    if workload.density >= 1:
        return torch.ones(shape, dtype=torch.bool, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    mask = torch.empty(shape, dtype=torch.bool, device=device)
    for sequence in mask:  # one at a time: the random numbers need four times the mask's memory
        torch.lt(torch.rand(shape[1:], device=device, generator=generator), workload.density, out=sequence)
    mask[..., 0] = True
    return mask


def visible_blocks(workload: Workload, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Which blocks hold a pair that attends, and which hold no other: bool (query blocks, key blocks) twice."""
    q_blocks, k_blocks = workload.blocks
    first_query = torch.arange(q_blocks, device=device)[:, None] * workload.q_block
    first_key = torch.arange(k_blocks, device=device)[None] * workload.k_block
    if not workload.causal:
        visible = torch.ones(q_blocks, k_blocks, dtype=torch.bool, device=device)
        return visible, visible
    last_query = (first_query + workload.q_block).clamp(max=workload.seqlen) - 1
    last_key = (first_key + workload.k_block).clamp(max=workload.seqlen) - 1
    return first_key <= last_query, last_key <= first_query


def count_pairs(workload: Workload, mask: Tensor) -> int:
    """Pairs of a query and a key that attend, over all heads and sequences."""
    q_blocks, k_blocks = workload.blocks
    query = torch.arange(q_blocks, device=mask.device)[:, None] * workload.q_block
    end = (query + workload.q_block).clamp(max=workload.seqlen)
    key = torch.arange(k_blocks, device=mask.device)[None] * workload.k_block
    width = (key + workload.k_block).clamp(max=workload.seqlen) - key
    # Query i attends to the first i + 1 - key of the block's keys, if causal; else to all.
    pairs = _sum_to(end - key, width) - _sum_to(query - key, width) if workload.causal else (end - query) * width
    active = mask.sum((0, 1), dtype=torch.int64)
    return int((active * pairs).sum()) * (workload.heads // mask.shape[1]) * (workload.batch // mask.shape[0])


def count_flops(workload: Workload, pairs: int) -> int:
    """Floating-point operations of the forward: two products of a multiplication and an addition for each pair."""
    return 4 * workload.head_dim * pairs


def _sum_to(end: Tensor, width: Tensor) -> Tensor:
    """The sum of min(max(t, 0), width) over all t <= end."""
    rising = end.clamp(min=0).minimum(width)
    return rising * (rising + 1) // 2 + (end - width).clamp(min=0) * width


def _name(kind: str, batch: int, seqlen: int, head_dim: int, causal: bool, density: float | None = None) -> str:
    name = kind + (f"-batch{batch}" if batch > 1 else "") + f"-s{seqlen}"
    if head_dim != 128:
        name += f"-dim{head_dim}"
    if density is not None:
        name += f"-density{density:g}"
    return name + ("-causal" if causal else "")


def _sparse(q_block: int, k_block: int, seqlen: int, density: float, causal: bool, batch: int = 1) -> Workload:
    name = _name(f"{q_block}x{k_block}", batch, seqlen, 128, causal, density)
    return Workload(name, seqlen, q_block, k_block, density, causal, batch)


def _all_true(seqlen: int, causal: bool, batch: int = 1, head_dim: int = 128) -> Workload:
    name = _name("all-true", batch, seqlen, head_dim, causal)
    return Workload(name, seqlen, density=1.0, causal=causal, batch=batch, head_dim=head_dim)


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
    groups = [*bar_groups(), *anchor_groups(), *predecessor_groups()]
    return {workload.name: workload for group in groups for workload in group.workloads}


def _grouped(workloads: list[Workload]) -> list[Group]:
    """Workloads that share q, k, v and causality go together, so that dense attention runs once for them."""
    groups: dict[str, list[Workload]] = {}
    for workload in workloads:
        groups.setdefault(workload.dense().name.removeprefix("dense-"), []).append(workload)
    return [Group(name, tuple(members)) for name, members in groups.items()]
