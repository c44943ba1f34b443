"""Tensors and masks made from a case, and the rule that judges a result.

The accuracy rule is the contract's. The largest error against float64 is at most twice that of the same formula in
PyTorch at the input dtype, plus 1e-5 (1e-9 for float64, where that formula is the reference). The root mean square of
the errors of a row, which is a query of a head, is at most 1.3 times the formula's of that row, plus what
`luck_of_rows` in oracle/dense.py derives. The log-sum-exp is within 2e-5 + 4e-6 of its size, for float32 within 1e-5.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import torch
from torch import Tensor

import hbsattn
from cases import Case
from oracle import dense

OUT_SLACK = {torch.float16: 1e-5, torch.bfloat16: 1e-5, torch.float32: 1e-5, torch.float64: 1e-9}
# Absolute, and relative to the value.
LSE_SLACK = {
    torch.float16: (2e-5, 4e-6),
    torch.bfloat16: (2e-5, 4e-6),
    torch.float32: (1e-5, 5e-7),
    torch.float64: (1e-12, 1e-13),
}


def block_masks(spec: Case, seed: int) -> list[Tensor]:
    """Per sequence, bool (mask heads, q blocks, k blocks) on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    masks = []
    for b in range(len(spec.lens_q)):
        if spec.form == "shared" and masks:
            masks.append(masks[0])
            continue
        rows, cols = spec.max_blocks if spec.form == "shared" else spec.blocks(b)
        shape = (spec.mask_heads, rows, cols)
        mask = torch.rand(shape, generator=generator) < spec.density
        if spec.pattern == "empty_rows":
            mask[:, ::2] = False
        elif spec.pattern == "empty_heads":
            mask[0] = False
        elif spec.pattern == "none":
            mask[:] = False
        elif spec.pattern == "diagonal":
            mask = torch.eye(rows, cols, dtype=torch.bool).expand(shape).clone()
        elif spec.pattern == "alike":
            # Eight neighbours draw from one list; each keeps most of it and adds some of its own.
            shared = mask[:, ::8].repeat_interleave(8, 1)[:, : mask.shape[1]]
            keeps, adds = (torch.rand(shape, generator=generator) < share for share in (0.9, 0.1 * spec.density))
            mask = shared & keeps | adds
        elif spec.pattern in ("one_column", "last_column"):
            mask[:] = False
            if cols:
                mask[:, :, 0 if spec.pattern == "one_column" else cols - 1] = True
        else:
            assert spec.pattern == "random", spec.pattern
        masks.append(mask)
    if spec.form == "shared":
        return [m[:, : spec.blocks(b)[0], : spec.blocks(b)[1]] for b, m in enumerate(masks)]
    return masks


def arrange(x: Tensor, layout: str) -> Tensor:
    """The same values in another layout; what lies between them is NaN."""
    if layout == "heads_first":
        return x.transpose(-2, -3).contiguous().transpose(-2, -3)
    if layout == "rows_first":  # batch entries between rows
        return x.transpose(0, -3).contiguous().transpose(0, -3)
    if layout in ("padded", "odd"):
        grown = [n if i < x.dim() - 3 else n + 1 for i, n in enumerate(x.shape)]
        grown[-1] = x.shape[-1] + (8 if layout == "padded" else 1)
        buffer = torch.full(grown, math.nan, dtype=x.dtype, device=x.device)
        view = buffer[tuple(slice(0, n) for n in x.shape)]
        view.copy_(x)
        return view
    if layout == "offset":
        buffer = torch.full((x.numel() + 1,), math.nan, dtype=x.dtype, device=x.device)
        view = buffer[1:].view(x.shape)
        view.copy_(x)
        return view
    return x


def tensors(spec: Case, device: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, drawn on the CPU so that they are the same on every device."""
    generator = torch.Generator().manual_seed(seed + 1)
    if spec.packed:
        lead_q, lead_k = (sum(spec.lens_q),), (sum(spec.keys),)
    else:
        lead_q, lead_k = (len(spec.lens_q), spec.lens_q[0]), (len(spec.keys), spec.keys[0])
    q = torch.randn((*lead_q, spec.heads_q, spec.head_dim), generator=generator)
    k = torch.randn((*lead_k, spec.heads_k, spec.head_dim), generator=generator)
    v = torch.randn((*lead_k, spec.heads_k, spec.columns_of_v), generator=generator)
    if spec.values == "negative":
        # Every logit lies near this value, below what a finite sentinel for "masked" would be.
        logit = -3e4 if dtype == torch.float16 else -131072.0
        q[..., 0], k[..., 0] = 256.0, logit / 256.0
    elif spec.values == "hidden":
        # Logits grow with the key's position, so what causality hides exceeds what it shows, by up to 1e4.
        position = torch.arange(lead_k[-1]) / max(lead_k[-1], 1)
        q[..., 0], k[..., 0] = 100.0, (100.0 * position)[:, None]
        if spec.scale is not None:
            k[..., 0] /= spec.scale
    q, k, v = (x.to(device=device, dtype=dtype) for x in (q, k, v))
    if spec.layout == "qkv":
        joint = torch.cat([q, k, v], dim=-2)
        return joint.split([spec.heads_q, spec.heads_k, spec.heads_k], dim=-2)
    if spec.layout == "expanded_heads":
        return q, k[..., :1, :].expand(k.shape), v[..., :1, :].expand(v.shape)
    if spec.layout == "expanded_batch":
        return q[:1].expand(q.shape), k[:1].expand(k.shape), v[:1].expand(v.shape)
    return tuple(arrange(x, spec.layout) for x in (q, k, v))


@dataclasses.dataclass
class Problem:
    """The tensors of a case. `block_masks` is per sequence, bool (mask heads, q blocks, k blocks), on the CPU."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    block_masks: list[Tensor]
    sinks: Tensor | None = None  # float32 (query heads)
    dropout_seed: Tensor | None = None  # int64 (2)

    def oracle(self, compute_dtype: torch.dtype | None = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        """out, lse and luck, see `dense.attention`."""
        spec = self.case
        return dense.attention(
            self.q,
            self.k,
            self.v,
            self.block_masks,
            spec.q_block,
            spec.k_block,
            lens_q=spec.lens_q,
            lens_k=spec.keys,
            causal=spec.causal,
            windows=spec.windows,
            scale=spec.scale,
            sinks=self.sinks,
            kept=self.kept(),
            dropout_p=round(spec.dropout_p * 2**15) / 2**15,
            softcap=spec.softcap,
            compute_dtype=compute_dtype,
        )

    def kept(self) -> Tensor | None:
        """Which weights dropout keeps, bool (sequences, query heads, queries, keys)."""
        spec = self.case
        if self.dropout_seed is None:
            return None
        longest = (max(lens, default=0) for lens in (spec.lens_q, spec.keys))
        return hbsattn.dropout_mask(spec.dropout_p, self.dropout_seed, len(spec.lens_q), spec.heads_q, *longest)

    def mask(self, *, form: str | None = None, source: str | None = None, seed: int = 0) -> hbsattn.BlockMask:
        return build_mask(self.case, self.block_masks, str(self.q.device), form=form, source=source, seed=seed)

    def run(self, mask: hbsattn.BlockMask | None = None) -> tuple[Tensor, Tensor]:
        mask = self.mask() if mask is None else mask
        return hbsattn.block_sparse_attention(self.q, self.k, self.v, mask, return_lse=True, **self.options())

    def options(self) -> dict[str, Any]:
        """Of a call, beside its mask."""
        dropout = {"dropout_p": self.case.dropout_p, "dropout_seed": self.dropout_seed}
        return {"softmax_scale": self.case.scale, "sinks": self.sinks, "softcap": self.case.softcap, **dropout}


def make_problem(spec: Case, device: str, dtype: torch.dtype, seed: int = 0) -> Problem:
    q, k, v = tensors(spec, device, dtype, seed)
    sinks = make_sinks(spec, seed).to(device) if spec.sinks else None
    dropout_seed = make_dropout_seed(seed).to(device) if spec.dropout_p else None
    return Problem(spec, q, k, v, block_masks(spec, seed), sinks, dropout_seed)


def make_dropout_seed(seed: int) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (2,), generator=torch.Generator().manual_seed(seed + 5))


def make_sinks(spec: Case, seed: int) -> Tensor:
    """About as large as log-sum-exps; the second head has none, the third one that outweighs all keys."""
    sinks = 2.0 + 2.0 * torch.randn(spec.heads_q, generator=torch.Generator().manual_seed(seed + 4))
    sinks[1:2], sinks[2:3] = -math.inf, 40.0
    return sinks


def cu_seqlens(lens: tuple[int, ...], device: str) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32, device=device)


def dense_mask(spec: Case, masks: list[Tensor], form: str, seed: int = 0) -> Tensor:
    """A bool mask as users have it; what must be ignored in it is random."""
    generator = torch.Generator().manual_seed(seed + 2)
    if form == "flat":
        rows, cols = (sum(spec.blocks(b)[i] for b in range(len(masks))) for i in (0, 1))
        result = torch.rand((spec.mask_heads, rows, cols), generator=generator) < 0.5
        row = col = 0
        for mask in masks:
            result[:, row : row + mask.shape[1], col : col + mask.shape[2]] = mask
            row, col = row + mask.shape[1], col + mask.shape[2]
        return result
    rows, cols = spec.max_blocks
    result = torch.rand((len(masks), spec.mask_heads, rows, cols), generator=generator) < 0.5
    for b, mask in enumerate(masks):
        result[b, :, : mask.shape[1], : mask.shape[2]] = mask
    if form == "shared":
        result = torch.zeros((1, *result.shape[1:]), dtype=torch.bool)
        for mask in masks:
            result[0, :, : mask.shape[1], : mask.shape[2]] |= mask
    return result


def block_lists(mask: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Counts (..., rows) and indices (..., rows, width) of a bool (..., rows, cols), shuffled, with every list's first
    entry twice and garbage past the counts."""
    generator = torch.Generator().manual_seed(seed + 3)
    cols = mask.shape[-1]
    flat = mask.flatten(0, -2)
    counts = torch.zeros(flat.shape[0], dtype=torch.int32)
    indices = torch.randint(-(2**31), 2**31 - 1, (flat.shape[0], cols + 2), generator=generator, dtype=torch.int32)
    for row in range(flat.shape[0]):
        active = flat[row].nonzero().flatten()
        active = active[torch.randperm(active.numel(), generator=generator)]
        active = torch.cat([active, active[:1]])
        counts[row] = active.numel()
        indices[row, : active.numel()] = active.to(torch.int32)
    return counts.reshape(mask.shape[:-1]), indices.reshape(*mask.shape[:-1], cols + 2)


def csr_lists(mask: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """indptr (heads, rows + 1) and indices (nnz) of a bool (heads, rows, cols)."""
    if mask.numel() == 0:
        return torch.zeros((mask.shape[0], mask.shape[1] + 1), dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    counts, indices = block_lists(mask, seed)
    ends = counts.flatten().cumsum(0, dtype=torch.int32).reshape(counts.shape)
    begins = torch.nn.functional.pad(ends[:-1, -1:], (0, 0, 1, 0))
    return torch.cat([begins, ends], dim=1), indices[torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)]


def local_rows(spec: Case, masks: list[Tensor]) -> Tensor:
    """The mask with sequence-local columns: bool (heads, rows of all sequences, columns of the longest)."""
    cols = spec.max_blocks[1]
    parts = [torch.nn.functional.pad(mask, (0, cols - mask.shape[2])) for mask in masks]
    return torch.cat(parts, dim=1) if parts else torch.zeros((spec.mask_heads, 0, 0), dtype=torch.bool)


def mask_keywords(spec: Case, device: str, source: str) -> dict[str, Any]:
    keywords: dict[str, Any] = {"causal": spec.causal}
    if not spec.packed:
        return keywords | {
            "seqlen_q": spec.lens_q[0],
            "seqlen_k": spec.keys[0],
            "batch_size": len(spec.lens_q),
        }
    keywords |= {"cu_seqlens_q": cu_seqlens(spec.lens_q, device), "cu_seqlens_k": cu_seqlens(spec.keys, device)}
    if source != "dense":
        keywords |= {"max_seqlen_q": max(spec.lens_q, default=0), "max_seqlen_k": max(spec.keys, default=0)}
    return keywords


def build_mask(spec: Case, masks: list[Tensor], device: str, **choices: object) -> hbsattn.BlockMask:
    """What `build_blocks` makes, with the case's windows."""
    mask = build_blocks(spec, masks, device, **choices)
    if not spec.windows:
        return mask
    left, right, sink = (list(x) for x in zip(*spec.windows, strict=True))
    return mask.windowed(left, right, sink)


def build_blocks(
    spec: Case,
    masks: list[Tensor],
    device: str,
    *,
    form: str | None = None,
    source: str | None = None,
    seed: int = 0,
) -> hbsattn.BlockMask:
    """A BlockMask of the case's block masks, through the constructor that `source` names, without windows."""
    form, source = form or spec.mask_form, source or spec.source
    keywords = mask_keywords(spec, device, source)
    sizes = (spec.q_block, spec.k_block)
    if source == "dense":
        return hbsattn.BlockMask.from_dense(dense_mask(spec, masks, form, seed).to(device), *sizes, **keywords)
    if source == "csr":
        rows = local_rows(spec, masks)
        indptr, indices = csr_lists(rows, seed)
        return hbsattn.BlockMask.from_csr(indptr.to(device), indices.to(device), *sizes, **keywords)
    lists = local_rows(spec, masks) if form == "flat" else dense_mask(spec, masks, form, seed)
    counts, indices = block_lists(lists, seed)
    return hbsattn.BlockMask.from_indices(counts.to(device), indices.to(device), *sizes, **keywords)


def attended_keys(problem: Problem, *, blocks_alone: bool) -> list[Tensor]:
    """Per sequence, bool (keys, key heads): what at least one query attends to. `blocks_alone`: by the block mask and
    what is visible of it, so that the keys of an active block all count."""
    spec = problem.case
    result = []
    for mask, len_q, len_k in zip(problem.block_masks, spec.lens_q, spec.keys, strict=True):
        allowed = dense.element_mask(mask, len_q, len_k, spec.q_block, spec.k_block, spec.causal, spec.windows)
        keys = allowed.any(dim=1)
        if blocks_alone and len_k:
            block = torch.arange(len_k) // spec.k_block
            live = torch.zeros((keys.shape[0], int(block[-1]) + 1), dtype=torch.bool)
            for b in range(live.shape[1]):
                live[:, b] = keys[:, block == b].any(dim=1)
            keys = live[:, block]
        if keys.shape[0] == spec.heads_q:  # a mask of one head has as many as its windows
            keys = keys.unflatten(0, (spec.heads_k, -1)).any(dim=1)
        result.append(keys.expand(spec.heads_k, -1).T)
    return result


def same(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality, NaN included."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def judge(problem: Problem, out: Tensor, lse: Tensor | None) -> None:
    """Asserts that a result is what the contract promises."""
    reference, reference_lse, luck = problem.oracle()
    same_precision, same_precision_lse, _ = problem.oracle(compute_dtype=None)
    assert out.shape == (*problem.q.shape[:-1], problem.v.shape[-1])
    assert out.dtype == problem.q.dtype and out.device == problem.q.device
    # Logits of this size have a resolution in float32; a change of one moves the output by at most twice it, times v.
    logits = reference_lse[torch.isfinite(reference_lse)].abs()
    values = problem.v[torch.isfinite(problem.v)].abs()
    largest = logits.max().item() if logits.numel() and values.numel() else 0.0
    resolution = 2 * 2.0**-23 * largest * values.max().item() if largest > 64 and out.dtype != torch.float64 else 0.0
    # Sums of TF32 products leave logits no digit to spare.
    if out.dtype == torch.float32 and out.is_cuda and largest:
        resolution = max(resolution, 2.0**-23 * largest * values.square().mean().sqrt().item())
    compare(out, reference, same_precision, resolution)
    compare_rows(out, reference, same_precision, luck, resolution)
    if lse is not None:
        assert lse.shape == reference_lse.shape and lse.device == problem.q.device
        assert lse.dtype == (torch.float64 if out.dtype == torch.float64 else torch.float32)
        compare_lse(lse, reference_lse, same_precision_lse, out.dtype)
        empty = reference_lse == -math.inf
        assert bool((out.transpose(-2, -3)[empty] == 0).all()), "rows with nothing to attend must be exactly 0"


def compare(out: Tensor, reference: Tensor, same_precision: Tensor, resolution: float = 0.0) -> None:
    """The rule for the largest error."""
    assert bool(torch.isfinite(out).all()), f"{int((~torch.isfinite(out)).sum())} of {out.numel()} are not finite"
    if out.numel() == 0:
        return
    error = (out.to(reference.dtype) - reference).abs()
    unavoidable = (same_precision.to(reference.dtype) - reference).abs().max().item()
    bound = 2 * unavoidable + OUT_SLACK[out.dtype] + resolution
    assert error.max().item() <= bound, (
        f"error {error.max().item():.3e} at {_worst(error)} exceeds {bound:.3e} (2 x {unavoidable:.3e} + slack); "
        f"{int((error > bound).sum())} of {error.numel()} elements do"
    )


def compare_rows(out: Tensor, reference: Tensor, same_precision: Tensor, luck: Tensor, resolution: float = 0.0) -> None:
    """The rule for the rows of a result."""
    if out.numel() == 0 or out.dtype == torch.float64:
        return
    error, unavoidable = ((x.to(reference.dtype) - reference).square().mean(-1).sqrt() for x in (out, same_precision))
    numbers = torch.finfo(out.dtype)
    bound = 1.3 * unavoidable + numbers.eps / 2 * (luck + numbers.tiny) + resolution
    if out.dtype == torch.float32:
        bound += OUT_SLACK[out.dtype] / 10  # products are summed in another order
    excess = error - bound
    where = _worst(excess)
    assert excess.max().item() <= 0, (
        f"row {where} has an RMS error of {error[where]:.3e}, above {bound[where]:.3e}, of which 1.3 x "
        f"{unavoidable[where]:.3e} are the formula's; {int((excess > 0).sum())} of {error.numel()} rows do"
    )


def compare_lse(lse: Tensor, reference: Tensor, same_precision: Tensor, dtype: torch.dtype) -> None:
    """dtype: that of the call's tensors."""
    empty = reference == -math.inf
    assert torch.equal(lse == -math.inf, empty), "the log-sum-exp must be -inf exactly for rows with nothing to attend"
    if bool(empty.all()):
        return
    error = (lse.to(reference.dtype) - reference)[~empty].abs()
    absolute, relative = LSE_SLACK[dtype]
    bound = absolute + relative * reference[~empty].abs()
    if dtype == torch.float32:  # scores have as few digits as the result
        bound += 2 * (same_precision.to(reference.dtype) - reference)[~empty].abs().max()
    worst = int((error - bound).argmax())
    assert bool((error <= bound).all()), (
        f"log-sum-exp {reference[~empty][worst]:.6f} has an error of {error[worst]:.3e}, above {bound[worst]:.3e}; "
        f"{int((error > bound).sum())} of {error.numel()} do"
    )


def _worst(error: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(error.argmax().cpu(), error.shape))
