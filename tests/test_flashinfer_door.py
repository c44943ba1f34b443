"""FlashInfer's wrappers beside what they do: each query block attends to the keys of its list, gathered."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hbsattn.compat.flashinfer import BlockSparseAttentionWrapper, VariableBlockSparseAttentionWrapper

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HEADS, HEADS_K, DIM = 4, 2, 32
# Length of queries and of keys, and sizes of blocks.
SHAPES = {
    "square": (128, 192, 32, 48),
    "odd": (150, 210, 32, 70),
    "short": (5, 12, 2, 3),
    "tokens": (7, 9, 1, 1),
    "wide": (100, 400, 100, 16),
    "ragged": (50, 100, 16, 32),
}
KINDS = ("plain", "mask", "packed", "causal")
# Causality counts the keys of listed blocks, which then are all of a size.
SHAPES_AND_KINDS = [(x, kind) for x in SHAPES for kind in KINDS if (x, kind) != ("ragged", "causal")]


def draw(m: int, n: int, device: str) -> tuple[list[Tensor], torch.dtype]:
    """q, k and v (length, heads, head_dim)."""
    generator = torch.Generator().manual_seed(m + n)
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    shapes = ((m, HEADS, DIM), (n, HEADS_K, DIM), (n, HEADS_K, DIM))
    return [torch.randn(x, generator=generator, dtype=torch.float64).to(device, dtype) for x in shapes], dtype


def draw_rows(rows: int, cols: int) -> list[list[int]]:
    """Lists in no order, one of them empty."""
    generator = torch.Generator().manual_seed(rows * cols)
    lists = [
        torch.randperm(cols, generator=generator)[: int(torch.randint(1, cols + 1, (), generator=generator))].tolist()
        for _ in range(rows)
    ]
    lists[rows // 2] = []
    return lists


def to_csr(lists: list[list[int]], device: str) -> tuple[Tensor, Tensor]:
    indptr = torch.tensor([0, *(len(x) for x in lists)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return indptr.to(device), torch.tensor([x for some in lists for x in some], dtype=torch.int32, device=device)


def attend(q: Tensor, k: Tensor, v: Tensor, on: Tensor, scale: float, softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    """Of one head: q (queries, head_dim), gathered k and v, and on (queries, keys). lse to base 2."""
    scores = q @ k.T * scale
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    scores = scores.masked_fill(~on, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp()
    return weights @ v, lse / math.log(2)


def close(device: str) -> dict[str, float]:
    # A pair too many or too few is off by more; how exact kernels are is tested elsewhere.
    return {"rtol": 1e-9, "atol": 1e-10} if device == "cpu" else {"rtol": 4e-2, "atol": 4e-2}


class Rows:
    """A matrix of blocks, with a mask in each, and what FlashInfer computes by it."""

    def __init__(self, shape: str) -> None:
        self.m, self.n, self.r, self.c = SHAPES[shape]
        self.rows, self.cols = math.ceil(self.m / self.r), math.ceil(self.n / self.c)
        self.lists = draw_rows(self.rows, self.cols)
        entries = sum(len(x) for x in self.lists)
        self.mask = torch.rand((entries, self.r, self.c), generator=torch.Generator().manual_seed(1)) < 0.5

    def pairs(self, row: int, kind: str) -> tuple[Tensor, Tensor]:
        """The gathered keys of a query block, and bool (queries, keys)."""
        first = sum(len(x) for x in self.lists[:row])
        blocks = self.lists[row]
        keys = torch.cat([torch.arange(x * self.c, (x + 1) * self.c) for x in [0, *blocks]])[self.c :]
        queries = min(self.r, self.m - row * self.r)
        on = torch.ones((queries, keys.shape[0]), dtype=torch.bool)
        if kind in ("mask", "packed"):
            on = torch.cat([on[:, :0], *self.mask[first : first + len(blocks), :queries]], dim=1)
        elif kind == "causal":
            on = on.tril(keys.shape[0] - queries)
        return keys[keys < self.n], on[:, keys < self.n]

    def packed(self) -> Tensor:
        """As segment_packbits makes it."""
        octets = []
        for row in range(self.rows):
            first, count = sum(len(x) for x in self.lists[:row]), len(self.lists[row])
            queries = min(self.r, self.m - row * self.r)
            bits = self.mask[first : first + count].transpose(0, 1)[:queries].reshape(-1).to(torch.int64)
            bits = torch.nn.functional.pad(bits, (0, -bits.shape[0] % 8)).view(-1, 8)
            octets.append((bits << torch.arange(8)).sum(-1))
        return torch.cat(octets).to(torch.uint8)

    def expected(
        self, tensors: list[Tensor], kind: str, scale: float, softcap: float, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        q, k, v = tensors
        outs, lses = [], []
        for row in range(self.rows):
            keys, on = self.pairs(row, kind)
            if valid is not None:
                on = on & (keys % self.c < valid[keys // self.c])
            own = q[row * self.r : (row + 1) * self.r]
            results = [attend(own[:, h], k[keys, h // 2], v[keys, h // 2], on, scale, softcap) for h in range(HEADS)]
            outs.append(torch.stack([x for x, _ in results], dim=1))
            lses.append(torch.stack([x for _, x in results], dim=1))
        return torch.cat(outs), torch.cat(lses)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("shape", "kind"), SHAPES_AND_KINDS)
def test_rows(shape: str, kind: str, device: str):
    """Results, log-sum-exp and gradients of lists in any order."""
    rows = Rows(shape)
    tensors, dtype = draw(rows.m, rows.n, device)
    leaves = [x.requires_grad_() for x in tensors]
    options = {
        "plain": {},
        "mask": {"mask": rows.mask.to(device)},
        "packed": {"packed_mask": rows.packed().to(device)},
        "causal": {"causal": True},
    }[kind]
    wrapper = BlockSparseAttentionWrapper(torch.empty(1, device=device))
    sizes = (rows.m, rows.n, rows.r, rows.c, HEADS, HEADS_K, DIM)
    plan = (*to_csr(rows.lists, device), *sizes)
    dtypes = {"q_data_type": dtype, "o_data_type": dtype}
    wrapper.plan(*plan, sm_scale=0.3, logits_soft_cap=4.0, **options, **dtypes)
    out, lse = wrapper.run(*leaves, return_lse=True)
    assert lse.shape == (rows.m, HEADS)
    precise = [x.detach().cpu().double().requires_grad_() for x in leaves]
    want, want_lse = rows.expected(precise, kind, 0.3, 4.0)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    grads = torch.autograd.grad(out, leaves, grad.to(device, dtype))
    want_grads = torch.autograd.grad(want, precise, grad)
    for x, y in zip((out, lse, *grads), (want, want_lse, *want_grads), strict=True):
        torch.testing.assert_close(x.cpu().double(), y, **close(device))
    # Again, with the default scale and no cap, into tensors.
    wrapper.begin_forward(*plan, **options, **dtypes)
    with torch.no_grad():
        given = torch.empty_like(out), torch.empty_like(lse)
        again = wrapper.run(*leaves, out=given[0], lse=given[1], return_lse=True)
        assert all(x is y for x, y in zip(again, given, strict=True))
        want, want_lse = rows.expected(precise, kind, DIM**-0.5, 0.0)
        torch.testing.assert_close(given[0].cpu().double(), want, **close(device))
        torch.testing.assert_close(given[1].cpu().double(), want_lse, **close(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["block_mask", "block_mask_k", "q2k", "q2k_num"])
def test_heads(form: str, device: str):
    """Masks of each query head, or each key head, and valid keys of blocks."""
    generator = torch.Generator().manual_seed(5)
    heads = HEADS_K if form == "block_mask_k" else HEADS
    base = torch.rand((heads, 3, 4), generator=generator) < 0.6
    options: dict[str, Any] = {"block_mask": base}
    if form.startswith("q2k"):
        order = torch.rand((heads, 3, 4), generator=generator).argsort(-1)
        counts = (
            torch.randint(0, 5, (heads, 3), generator=generator) if form == "q2k_num" else torch.full((heads, 3), 4)
        )
        base = torch.zeros_like(base)
        for h in range(heads):
            for row in range(3):
                base[h, row, order[h, row, : counts[h, row]]] = True
        options = {"q2k_indices": order, **({"q2k_num": counts} if form == "q2k_num" else {})}
    valid = torch.tensor([16, 3, 0, 9])
    options = {name: x.to(device) for name, x in {**options, "kv_block_lens": valid}.items()}
    (q, k, v), dtype = draw(45, 64, device)
    wrapper = BlockSparseAttentionWrapper(torch.empty(1, device=device), backend="cake")
    dtypes = {"q_data_type": dtype, "o_data_type": dtype}
    wrapper.plan(None, None, 45, 64, 16, 16, HEADS, HEADS_K, DIM, **options, **dtypes)
    out, lse = wrapper.run(q, k, v, return_lse=True)
    key = torch.arange(64)
    for h in range(HEADS):
        on = base[h * heads // HEADS].repeat_interleave(16, 0)[:45].repeat_interleave(16, 1)
        on = on & (key % 16 < valid[key // 16])
        precise = (x.cpu().double() for x in (q[:, h], k[:, h // 2], v[:, h // 2]))
        for x, y in zip((out[:, h], lse[:, h]), attend(*precise, on, DIM**-0.5), strict=True):
            torch.testing.assert_close(x.cpu().double(), y, **close(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("numbers", [False, True])
def test_variable(numbers: bool, causal: bool, device: str):
    """Blocks of their own sizes, of each key head, some of no tokens."""
    generator = torch.Generator().manual_seed(9)
    base = torch.rand((HEADS_K, 4, 5), generator=generator) < 0.5
    base[0, 1] = False
    rows = torch.tensor([[30, 0, 41, 29], [10, 70, 3, 17]], dtype=torch.int32)
    cols = torch.tensor([[0, 60, 50, 1, 19], [40, 40, 30, 20, 0]], dtype=torch.int32)
    tensors, dtype = draw(100, 130, device)
    leaves = [x.transpose(0, 1).contiguous().requires_grad_() for x in tensors]
    wrapper = VariableBlockSparseAttentionWrapper(torch.empty(1, device=device))
    given = [x.to(device) for x in (base.int() if numbers else base, rows, cols)]
    wrapper.plan(*given, HEADS, HEADS_K, DIM, causal=causal, q_data_type=dtype)
    out, lse = wrapper.run(*leaves, return_lse=True)
    precise = [x.detach().cpu().double().requires_grad_() for x in leaves]
    q, k, v = precise
    outs, lses = [], []
    for h in range(HEADS):
        own = h // 2
        ends_q, ends_k = (x[own].cumsum(0).tolist() for x in (rows, cols))
        parts = []
        for row, size in enumerate(rows[own].tolist()):
            listed = base[own, row].nonzero().flatten().tolist()
            keys = [torch.arange(ends_k[x] - int(cols[own, x]), ends_k[x]) for x in listed]
            keys = torch.cat([torch.arange(0), *keys])
            on = torch.ones((size, keys.shape[0]), dtype=torch.bool)
            on = on.tril(keys.shape[0] - size) if causal else on
            queries = q[h, ends_q[row] - size : ends_q[row]]
            parts.append(attend(queries, k[own, keys], v[own, keys], on, DIM**-0.5))
        outs.append(torch.cat([x for x, _ in parts]))
        lses.append(torch.cat([x for _, x in parts]))
    want, want_lse = torch.stack(outs), torch.stack(lses)
    grad = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad(out, leaves, grad.to(device, dtype))
    want_grads = torch.autograd.grad(want, precise, grad)
    for x, y in zip((out, lse, *grads), (want, want_lse, *want_grads), strict=True):
        torch.testing.assert_close(x.cpu().double(), y, **close(device))


def test_types():
    """The result has o_data_type, by default float16, as FlashInfer has it."""
    rows = Rows("square")
    wrapper = BlockSparseAttentionWrapper(torch.empty(1))
    sizes = (rows.m, rows.n, rows.r, rows.c, HEADS, HEADS_K, DIM)
    q, k, v = (x.bfloat16() for x in draw(rows.m, rows.n, "cpu")[0])
    for options, dtype in (({}, torch.float16), ({"o_data_type": torch.bfloat16}, torch.bfloat16)):
        wrapper.plan(*to_csr(rows.lists, "cpu"), *sizes, q_data_type="bfloat16", **options)
        assert wrapper.run(q, k, v).dtype == dtype
    with pytest.raises(TypeError, match="q has dtype torch.float32; expected torch.bfloat16, the q_data_type of plan"):
        wrapper.run(q.float(), k.float(), v.float())


def test_example():
    """That of FlashInfer's documentation."""
    wrapper = BlockSparseAttentionWrapper(torch.empty(1, dtype=torch.uint8))
    indptr, indices = torch.tensor([0, 1, 3, 5]), torch.tensor([2, 0, 2, 1, 2])
    with pytest.raises(RuntimeError, match="run is called before plan"):
        wrapper.run(*torch.randn(3, 3, 4, 16))
    wrapper.plan(indptr, indices, 3, 3, 1, 1, 8, 2, 16, q_data_type="float32", o_data_type="float32")
    q, k, v = torch.randn(3, 8, 16), torch.randn(3, 2, 16), torch.randn(3, 2, 16)
    mask = torch.tensor([[0, 0, 1], [1, 0, 1], [0, 1, 1]], dtype=torch.bool)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, *(x.repeat_interleave(4, 1) for x in (k, v)))), attn_mask=mask
    ).transpose(0, 1)
    torch.testing.assert_close(wrapper.run(q, k, v), want)
    wrapper.end_forward()


def test_workspaces():
    """As programs that use FlashInfer's of several versions set them; the device is that of the last one."""
    wrapper = VariableBlockSparseAttentionWrapper(torch.empty(1, device="meta"), backend="auto")
    assert wrapper.device.type == "meta"
    wrapper.reset_workspace_buffer(
        float_workspace_buffer=torch.empty(1),
        int_workspace_buffer=wrapper._int_workspace_buffer,
        vector_sparse_indices_buffer=torch.empty(8),
        vector_sparse_indptr_buffer=wrapper._vector_sparse_indptr_buffer,
    )
    wrapper.plan(**MAPS, q_data_type="float32")
    assert wrapper.run(torch.randn(4, 30, 8), *torch.randn(2, 2, 30, 8)).device.type == "cpu"
    with pytest.raises(TypeError, match="float_workspace_buffer is a int; expected a Tensor"):
        VariableBlockSparseAttentionWrapper(1)
    with pytest.raises(TypeError, match="backend is 3; expected a str"):
        VariableBlockSparseAttentionWrapper(torch.empty(1), 3)


SIZES = {"M": 32, "N": 48, "R": 16, "C": 16, "num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 8}
LISTS = {"indptr": torch.tensor([0, 2, 3]), "indices": torch.tensor([2, 0, 1])}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pos_encoding_mode": "ROPE_LLAMA"}, ["pos_encoding_mode is 'ROPE_LLAMA'", "'NONE'"]),
        ({"kv_splits": 2}, ["kv_splits is given", "None"]),
        ({"use_clc": True}, ["use_clc is given"]),
        ({"q_scale": torch.ones(1)}, ["q_scale is given"]),
        ({"num_qo_heads": 3}, ["num_qo_heads is 3", "multiple of num_kv_heads, 2"]),
        ({"R": 0}, ["R is 0"]),
        ({"sm_scale": -1.0}, ["sm_scale is -1.0", "above 0"]),
        ({"logits_soft_cap": "3"}, ["logits_soft_cap is '3'"]),
        ({"q_data_type": "float8_e4m3fn"}, ["q_data_type is 'float8_e4m3fn'"]),
        ({"kv_data_type": "bfloat16"}, ["kv_data_type is 'bfloat16'", "q_data_type"]),
        ({"causal": 1}, ["causal is 1"]),
        ({"indptr": None}, ["indptr or indices is None", "block_mask"]),
        ({"indptr": torch.tensor([0, 3])}, ["indptr has shape (2,)", "(3,)"]),
        ({"indptr": torch.tensor([0, 4, 3])}, ["indptr goes from 0 to 3", "do not decrease"]),
        ({"indptr": torch.tensor([0, 2, 4])}, ["indptr goes from 0 to 4", "from 0 to 3"]),
        ({"indices": torch.tensor([2, 3, 1])}, ["indices holds 3", "0 to 2"]),
        ({"indices": torch.tensor([2, 2, 1])}, ["indices names block 2 twice in row 0"]),
        ({"indices": torch.tensor([2.0, 0, 1])}, ["indices has dtype torch.float32"]),
        ({"mask": torch.ones(3, 16, 8) > 0}, ["mask has shape (3, 16, 8)", "(3, 16, 16)"]),
        ({"packed_mask": torch.ones(95, dtype=torch.uint8)}, ["packed_mask has 95 bytes", "expected 96"]),
        ({"N": 47, "causal": True}, ["N is 47", "multiple of 16"]),
        ({"block_mask": torch.ones(3, 2, 3) > 0}, ["block_mask has 3 heads", "4, num_qo_heads, or 2"]),
        ({"block_mask": torch.ones(2, 2, 3) > 0, "causal": True}, ["causal is given", "block_mask"]),
        ({"block_mask": torch.ones(2, 2, 3) > 0, "q2k_indices": torch.zeros(4, 2, 1).int()}, ["one of them"]),
        ({"q2k_indices": torch.zeros(4, 2, 1).int(), "q2k_num": torch.ones(4, 3).int()}, ["q2k_num has shape (4, 3)"]),
        ({"kv_block_lens": torch.tensor([16, 17, 3])}, ["k_valid holds 17", "0 to 16"]),
    ],
)
def test_errors(change: dict[str, Any], words: list[str]):
    wrapper = BlockSparseAttentionWrapper(torch.empty(1))
    with pytest.raises((ValueError, TypeError)) as raised:
        wrapper.plan(**{**LISTS, **SIZES, **change})
    for word in words:
        assert word in str(raised.value)


MAPS = {
    "block_mask_map": torch.ones((2, 2, 3), dtype=torch.bool),
    "block_row_sz": torch.tensor([[10, 20], [15, 15]]),
    "block_col_sz": torch.tensor([[10, 20, 0], [5, 15, 10]]),
    "num_qo_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_mask_map": torch.ones((4, 2, 3)) > 0}, ["block_mask_map has shape (4, 2, 3)", "(2, 2, 3)"]),
        ({"block_mask_map": torch.ones((2, 2, 3))}, ["block_mask_map has dtype torch.float32"]),
        ({"block_row_sz": torch.tensor([[10, 20]])}, ["block_row_sz has shape (1, 2)", "(2, 2)"]),
        ({"block_row_sz": torch.tensor([[10, 20], [15, 16]])}, ["q_sizes adds up to 31 in head 1"]),
        ({"block_col_sz": torch.tensor([[10, 20, -1], [5, 15, 9]])}, ["k_sizes holds -1"]),
        ({"pos_encoding_mode": "ALIBI"}, ["pos_encoding_mode is 'ALIBI'"]),
    ],
)
def test_variable_errors(change: dict[str, Any], words: list[str]):
    wrapper = VariableBlockSparseAttentionWrapper(torch.empty(1))
    with pytest.raises((ValueError, TypeError)) as raised:
        wrapper.plan(**{**MAPS, **change})
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.randn(30, 4, 8)}, ["q has shape (30, 4, 8)", "(4, 30, 8)"]),
        ({"v": torch.randn(2, 30, 4)}, ["v has shape (2, 30, 4)"]),
        ({"k": torch.randn(2, 30, 8).half()}, ["k has dtype torch.float16", "q_data_type"]),
        ({"out": torch.empty(4, 30, 9)}, ["out has shape (4, 30, 9)", "(4, 30, 8)"]),
        ({"lse": torch.empty(4, 30).half(), "return_lse": True}, ["lse has dtype torch.float16", "torch.float32"]),
        ({"return_lse": 1}, ["return_lse is 1"]),
    ],
)
def test_run_errors(change: dict[str, Any], words: list[str]):
    wrapper = VariableBlockSparseAttentionWrapper(torch.empty(1))
    wrapper.plan(**MAPS, q_data_type=torch.float32)
    tensors = {"q": torch.randn(4, 30, 8), "k": torch.randn(2, 30, 8), "v": torch.randn(2, 30, 8)}
    with pytest.raises((ValueError, TypeError)) as raised:
        wrapper.run(**{**tensors, **change})
    for word in words:
        assert word in str(raised.value)
