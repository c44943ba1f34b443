"""What the benchmarks time: masks are what their workloads say, and each bar reads something that its set times.

A process of its own does the work, as this file run as a script: benchmarks/ has modules with names that tests/ has.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import hbsattn

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
PACKED = (300, 37, 64, 5)
WINDOWS = ((-1, -1, 0), (40, -1, 9), (70, 20, 0), (-1, 0, 3), (0, 130, 200))  # each with an end inside of blocks


def check_names() -> None:
    """A name means one workload, and both directions of a mask are timed in turns."""
    import workloads

    named: dict[str, workloads.Workload] = {}
    for make in (*workloads.SETS.values(), *workloads.GRIDS.values()):
        for group in make():
            for work in group.workloads:
                assert named.setdefault(work.name, work) == work, work.name
    kinds = {"heads": 3, "heads_k": 3, "windows": ((-1, -1, 0), (255, -1, 64))}
    work = workloads._all_true(300, True, **kinds)
    assert work.name == "all-true-s300-heads3-window-all+left255-sink64-causal"
    assert work.head_windows == (*kinds["windows"], (-1, -1, 0))
    assert work.describe()["windows"] == kinds["windows"] and work.mask_only().windows == kinds["windows"]
    assert not work.dense().windows
    for group in workloads.real_groups():
        names = [work.name for work in group.workloads]
        for work in group.workloads:
            if work.task == "forward":
                at = names.index(work.name)
                assert names[at + 1 : at + 3] == [f"backward-{work.name}", f"backward-{work.name}-deterministic"]
                assert len({other.mask_only() for other in group.workloads[at : at + 3]}) == 1
            else:
                assert work.task == "training" or work.name.removesuffix("-deterministic")[9:] in names


def check_bars() -> None:
    """All that a bar compares is timed in its set."""
    import bars
    import workloads

    assert list(bars.SETS) == list(workloads.SETS)
    for name, make in workloads.SETS.items():
        timed = {work.name: work for group in make() for work in (*group.workloads, *group.dense_workloads())}
        for bar in bars.SETS[name]:
            for read in filter(None, (bar.ours, bar.reference, bar.beside)):
                wanted = [read.workload] if isinstance(read, bars.Quantity) else getattr(read, "workloads", ())
                assert set(wanted) <= set(timed), (name, bar.what, wanted)


def check_worst() -> None:
    """The worst mask decides, and one that has no time is no success."""
    import bars

    def row(ms: float | None, deterministic: bool, problem: str | None = None) -> dict[str, object]:
        shape = {"task": "backward", "deterministic": deterministic, "frozen": ""}
        return {"shape": shape, "problem": problem} | ({} if ms is None else {"ms": ms})

    rows = {
        (name + end, "hbsattn"): row(ms, bool(end))
        for name, *times in (("backward-a", 1.0, 2.0), ("backward-b", 3.0, 2.0), ("backward-c", 1.0, 1.0))
        for end, ms in zip(("", "-deterministic"), times, strict=True)
    }
    beside = bars.REAL[0]
    assert (beside.measure(rows), beside.ours.where(rows), beside.ours.problem(rows)) == (1.5, "backward-b", None)
    assert bars.REAL[1].measure(rows) == 2.0
    assert bars.evaluate("real", rows)[0]["met"] is False
    rows["backward-b", "hbsattn"]["ms"] = 2.0
    assert bars.evaluate("real", rows)[0]["met"] is True
    rows["backward-d", "hbsattn"] = row(None, False, "out of memory")
    result = bars.evaluate("real", rows)[0]
    assert (result["met"], result["problem"]) == (False, "out of memory")
    assert "out of memory" in bars.table([result])[1][2]


def check_blocks() -> None:
    """Each sequence is cut from its own start."""
    import masks
    import workloads

    work = workloads.Workload("", sum(PACKED), 128, 64, lengths=PACKED)
    assert work.blocks == (3 + 1 + 1 + 1, 5 + 1 + 1 + 1)
    blocks = masks.cut(work, 128, "cpu")
    assert blocks.begin.tolist() == [0, 128, 256, 300, 337, 401]
    assert blocks.end.tolist() == [128, 256, 300, 337, 401, 406]
    assert blocks.sequence.tolist() == [0, 0, 0, 1, 2, 3]
    assert blocks.number.tolist() == [0, 1, 2, 0, 0, 0]
    assert masks.block_of_token(work, 128, "cpu").bincount().tolist() == [128, 128, 44, 37, 64, 5]
    with pytest.raises(ValueError, match="expected batch 1"):
        dataclasses.replace(work, seqlen=405)


def check_pairs() -> None:
    """Pairs and visible blocks, token by token."""
    import masks
    import workloads

    for lengths, causal, windows in itertools.product(((), PACKED), (False, True), ((), WINDOWS)):
        kinds = {"density": 0.3, "causal": causal, "batch": 1, "heads": 8, "heads_k": 2, "lengths": lengths}
        work = workloads.Workload("", sum(PACKED), 96, 64, windows=windows, **kinds)
        mask = masks.make_mask(work, "cpu", 3)
        rows, cols = (masks.block_of_token(work, size, "cpu") for size in (96, 64))
        seen = torch.stack([_attending(work, *window) for window in work.head_windows])
        assert masks.count_pairs(work, mask) == int((mask[0][:, rows][:, :, cols] & seen).sum())
        if not windows:
            assert masks.count_visible_pairs(work) == int(seen.sum())
        for window, attends in zip(work.head_windows[: len(windows) or 1], seen, strict=False):
            visible, whole = masks.visible_blocks(work, "cpu", window)
            for row in range(work.blocks[0]):
                for col in range(work.blocks[1]):
                    pairs = attends[rows == row][:, cols == col]
                    assert (visible[row, col], whole[row, col]) == (pairs.any(), pairs.all())


def _attending(work: object, left: int, right: int, sink: int) -> torch.Tensor:
    """What causality and a window allow, from their definition: bool (seqlen, seqlen)."""
    sequences = []
    for length in work.sequences:
        i, j = torch.arange(length)[:, None], torch.arange(length)
        near = (j >= i - (length if left < 0 else left)) & (j <= i + (length if right < 0 else right))
        sequences.append(((j < sink) | near) & ((j <= i) | (not work.causal)))
    return torch.block_diag(*sequences).bool()


def check_masks() -> None:
    """Sinks, the diagonal, densities and counts of small copies of the masks that people train with."""
    import masks
    import workloads

    def draw(**others: object) -> tuple[torch.Tensor, ...]:
        work = workloads.Workload("", **({"seqlen": 1600, "q_block": 64, "k_block": 32, "heads_k": 8} | others))
        mask = masks.make_mask(work, "cpu", 4)
        assert mask.shape == (work.batch, work.mask_heads, *work.blocks)
        q, k = (masks.cut(work, size, "cpu") for size in (work.q_block, work.k_block))
        own = (k.begin < q.end[:, None]) & (k.end > q.begin[:, None])
        visible, _ = masks.visible_blocks(work, "cpu")
        return mask, visible, own, k.number == 0, k.number

    def density(mask: torch.Tensor, where: torch.Tensor) -> float:
        return float(mask[:, :, where].float().mean())

    kinds = {"density": 0.2, "batch": 8}
    mask, visible, own, first, _ = draw(sinks=0, **kinds)
    assert mask.dtype == torch.bool and 0.18 < density(mask, visible) < 0.22 and density(mask, first & visible) < 0.25
    mask, visible, own, first, _ = draw(**kinds)
    assert density(mask, visible & first) == 1 and 0.18 < density(mask, visible & ~first) < 0.22
    mask, visible, own, first, _ = draw(diagonal=True, causal=True, shared=True, **kinds)
    assert mask.shape[1] == 8 and density(mask, own) == 1 and density(mask, visible & first) == 1
    assert 0.18 < density(mask, visible & ~own & ~first) < 0.22

    for lengths in ((), (1000, 400, 200)):
        top = {"pattern": "top-k", "diagonal": True, "causal": True, "shared": True, "lengths": lengths}
        mask, visible, own, first, _ = draw(density=0.2, **top)
        always = (own | first) & visible
        assert density(mask, always) == 1 and not mask[:, :, ~visible].any()
        best = torch.ceil(0.2 * visible.sum(1))
        assert (mask.sum(-1) >= torch.maximum(best, always.sum(1))).all()
        assert (mask.sum(-1) <= (best + always.sum(1)).minimum(visible.sum(1))).all()
        # Blocks of one topic attract each other: neighbours choose alike more often than chance would have them.
        chosen = (mask & ~always)[:, :, -8:].float()
        assert (chosen[..., 1:, :] * chosen[..., :-1, :]).mean() > 1.5 * chosen.mean() ** 2

    rows = {"q_block": 1, "k_block": 64, "per_row": 6, "causal": True, "diagonal": True, "shared": True}
    for alike in (1, 16):
        mask, visible, own, first, _ = draw(alike=alike, listed=True, **rows)
        assert (mask.sum(-1) == visible.sum(1).clamp(max=6)).all() and not mask[:, :, ~visible].any()
        assert density(mask, own) == 1 and density(mask, visible & first) == 1
        common = (mask[:, :, -15:] & mask[:, :, -16:-1]).sum(-1).float().mean()  # of 6; the last 16 rows draw alike
        assert (common > 4.5) == (alike > 1), common

    mask, visible, own, first, number = draw(pattern="local", per_row=5, sinks=1, causal=True, q_block=32)
    row = torch.arange(50)[:, None]
    streaming = visible & (first | (number > row - 4))
    assert (mask == streaming).all()
    mask, *_ = draw(pattern="half-streaming", per_row=5, causal=True, q_block=32)
    assert mask[:, ::2].all() and (mask[:, 1::2] == streaming).all()


def check_densities() -> None:
    """Top-k masks are as dense as the figures they are compared with, which name it."""
    import masks
    import workloads

    named = workloads.all_workloads()
    for name, low, high in (
        ("128x64-packed32x1024-kv8-top0.3-diagonal-shared-causal", 0.44, 0.48),
        ("128x64-packed16384+9000+4096+2500+777-kv8-top0.1-diagonal-shared-causal", 0.105, 0.125),
    ):
        work = dataclasses.replace(named[name], heads=8, heads_k=2)
        visible, _ = masks.visible_blocks(work, "cpu")
        density = float(masks.make_mask(work, "cpu", 1)[:, :, visible].float().mean())
        assert low < density < high, (name, density)


def check_gate() -> None:
    """Packed sequences, frozen inputs, and rows without keys: right results pass, wrong ones do not."""
    import gate
    import gradients
    import masks
    import workloads
    from ours import length_keywords

    sparse = {"density": 0.3, "causal": True, "heads": 4, "heads_k": 2, "head_dim": 32}
    for lengths, sinks in ((PACKED, None), ((), 0)):
        work = workloads.Workload("gate", sum(PACKED), 64, 32, sinks=sinks, lengths=lengths, task="backward", **sparse)
        tensors = workloads.make_tensors(work, "cpu", 1)
        block_mask = masks.make_mask(work, "cpu", 2)
        visible, _ = masks.visible_blocks(work, "cpu")
        assert (sinks is None) == bool((block_mask & visible).any(-1).all())
        blocks = block_mask[0] if lengths else block_mask
        mask = hbsattn.BlockMask.from_dense(blocks, 64, 32, causal=True, **length_keywords(work, "cpu"))
        assert mask.flops(32, 4) == 4 * 32 * masks.count_pairs(work, block_mask)

        def attend(qkv: tuple[torch.Tensor, ...], mask=mask, packed=bool(lengths)) -> tuple[torch.Tensor, torch.Tensor]:
            inputs = [x[0] for x in qkv] if packed else qkv
            results = hbsattn.block_sparse_attention(*inputs, mask, return_lse=True)
            return tuple(x[None] for x in results) if packed else results

        out, lse = attend(tensors)
        assert gate.check(work, *tensors, block_mask, out, lse).passed
        for row in (0, work.seqlen - 1):
            wrong = out.clone()
            wrong[0, row] += 1
            assert not gate.check(work, *tensors, block_mask, wrong, lse).passed
        assert not gate.check(work, *tensors, block_mask, out, lse + 0.1).passed

        grad_out = workloads.make_grad_out(work, "cpu", 3)
        judge = gate.Gradients(work, *tensors, grad_out, block_mask)
        for frozen in ("", "kv", "q"):
            task = dataclasses.replace(work, frozen=frozen)
            qkv = gradients.leaves(task, tensors)
            grads = gradients.make_launch(task, lambda qkv=qkv: attend(qkv)[0], qkv, grad_out)()
            assert len(grads) == 3 - len(frozen) and judge.check(grads, frozen).passed
            for i in range(len(grads)):
                wrong = [grad.clone() for grad in grads]
                wrong[i][0, -1] += 1  # the last token
                assert not judge.check(tuple(wrong), frozen).passed
            with pytest.raises(ValueError, match="gradients have shapes"):
                judge.check(grads, "k" if frozen == "" else "")


def check_windows() -> None:
    """Ours computes what a workload says of windows, and the gate lets nothing else pass: no side that is off by one,
    no head that has the window of its neighbour.
    """
    import gate
    import gradients
    import masks
    import workloads
    from ours import Ours

    class OnHost(Ours):
        def plan(self) -> None:
            """Work lists are of CUDA alone."""

    windows = ((-1, -1, 0), (6, -1, 3), (4, 2, 0))
    moved = [windows[1:] + windows[:1]]
    moved += [(windows[0], (6 + left, -1, 3 + sink), windows[2]) for left, sink in ((1, 0), (-1, 0), (0, 1), (0, -1))]
    right = [(*windows[:2], (4, 3, 0)), (*windows[:2], (4, 1, 0))]
    for lengths, causal in itertools.product(((), PACKED), (False, True)):
        kinds = {"causal": causal, "heads": 6, "heads_k": 3, "head_dim": 32, "lengths": lengths, "task": "backward"}
        work = workloads.Workload("", sum(PACKED), 64, 32, 0.6, windows=windows, diagonal=True, **kinds)
        tensors = workloads.make_tensors(work, "cpu", 1)
        block_mask = masks.make_mask(work, "cpu", 2)
        grad_out = workloads.make_grad_out(work, "cpu", 3)
        judge = gate.Gradients(work, *tensors, grad_out, block_mask)

        def results(task: workloads.Workload, tensors=tensors, block_mask=block_mask, grad_out=grad_out) -> tuple:
            qkv = gradients.leaves(task, tensors)
            ours = OnHost(task, *qkv, block_mask)
            assert ours.flops() == masks.count_flops(task, masks.count_pairs(task, block_mask))
            with torch.no_grad():
                forward = ours.attend_with_lse()
            return forward, gradients.make_launch(task, ours.attend, qkv, grad_out)()

        forward, grads = results(work)
        assert gate.check(work, *tensors, block_mask, *forward).passed and judge.check(grads).passed
        for others in moved if causal else moved + right:  # causality leaves nothing to the right
            forward, grads = results(dataclasses.replace(work, windows=others))
            assert not gate.check(work, *tensors, block_mask, *forward).passed, others
            assert not judge.check(grads).passed, others


def check_rivals() -> None:
    """FlexAttention has windows, in blocks and within them; a library that has none says so."""
    import baselines
    import masks
    import run
    import workloads
    from baselines.flex import _windowed

    for causal in (False, True):
        kinds = {"causal": causal, "heads": 10, "heads_k": 5, "shared": True, "windows": WINDOWS}
        work = workloads.Workload("", 300, 96, 64, 0.6, **kinds)
        block_mask = masks.make_mask(work, "cpu", 2).repeat_interleave(2, 1)
        partial, full = baselines.split_blocks(work, block_mask)
        assert not (partial & full).any() and not ((partial | full) & ~block_mask).any()
        rows, cols = (masks.block_of_token(work, size, "cpu") for size in (96, 64))
        token, head = torch.arange(300), torch.arange(10)[:, None, None]
        inside = _windowed(work, torch.device("cpu"))(torch.tensor(0), head, token[:, None], token)
        seen = torch.stack([_attending(work, *window) for window in WINDOWS]).repeat_interleave(2, 0)
        assert torch.equal(inside, seen)
        of_tokens = [blocks[0][:, rows][:, :, cols] for blocks in (partial, full, block_mask)]
        assert torch.equal(of_tokens[0] & seen | of_tokens[1], of_tokens[2] & seen)

    class Rival:
        name, label, dense, differentiable, windowed = "rival", "Rival", False, True, False
        dtypes = workloads.HALF

        def refusal(self, workload: workloads.Workload) -> None:
            """Covers all, but for what others see before."""

    problem = types.SimpleNamespace(workload=work, flops=0)
    assert run.Bench._prepare_rival(None, Rival(), problem).problem == "not supported: windows of tokens"
    problem.workload = dataclasses.replace(work, dtype=torch.float32)
    assert run.Bench._prepare_rival(None, Rival(), problem) is None


def check_gallery() -> None:
    """A picture's opacity is the square root of what attends there; the one that is kept shows all masks."""
    import zlib

    import gallery

    head = torch.zeros(128, 128, dtype=torch.bool)
    head[:2, :2] = True  # a pixel
    head[2, 2] = True  # a quarter of one
    png = gallery.picture(head)
    at = png.index(b"IDAT")
    rows = zlib.decompress(png[at + 4 : at + 4 + int.from_bytes(png[at - 4 : at], "big")])
    assert len(rows) == 64 * (1 + 32) and rows[:2] == b"\0\xf0" and rows[33:35] == b"\0\x08"
    assert sum(rows) == 0xF0 + 0x08
    for work in gallery.gallery():
        if work.seqlen <= 4096:
            share = gallery.density(work, gallery.draw_head(work))
            assert share == 1 if work.density >= 1 else work.density <= share + 0.01 <= 1.5 * work.density, work.name
    assert len({gallery.recipe(work) for work in gallery.gallery()}) > 15
    kept = (BENCHMARKS / "results" / "gallery.svg").read_text()
    assert kept.count("<image") == len(gallery.gallery())


CHECKS = [check for name, check in globals().items() if name.startswith("check_")]


@pytest.mark.slow
def test_workloads():
    environment = {**os.environ, "PYTHONPATH": str(Path(hbsattn.__file__).parents[1])}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    sys.path.insert(0, str(BENCHMARKS))
    for check in CHECKS:
        check()
