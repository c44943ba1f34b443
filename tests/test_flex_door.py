"""`hbsattn.flex_attention` beside torch's own, which it has the arguments of."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask

from hbsattn import BlockMask, flex
from hbsattn.flex import flex_attention

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def sliding(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) & (q - k <= 70)


def prefix(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (k < 40 + 30 * b) | (q >= k)


def by_head(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q - k).abs() <= 20 * (h + 1)


def nothing_first(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= 33) & (q > k)


def documents(length: int, device: str) -> MaskMod:
    number = torch.arange(length, device=device) * 5 // length

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (number[q] == number[k]) & (q >= k)

    return mask_mod


MODS = {
    "causal": (causal, None, None),
    "sliding": (sliding, 1, None),
    "prefix": (prefix, 2, None),
    "by_head": (by_head, None, 4),
    "empty_rows": (nothing_first, None, 1),
    "documents": (None, None, None),
}


def tensors(q_len: int, k_len: int, device: str, heads_k: int = 4, value_dim: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(q_len + k_len)
    shapes = ((2, 4, q_len, 32), (2, heads_k, k_len, 32), (2, heads_k, k_len, value_dim))
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    return [torch.randn(x, generator=generator, dtype=torch.float64).to(device, dtype) for x in shapes]


def make_mask(name: str, q_len: int, k_len: int, device: str, size: Any = 128) -> torch_flex.BlockMask:
    mask_mod, batch, heads = MODS[name]
    mask_mod = mask_mod or documents(max(q_len, k_len), device)
    return create_block_mask(mask_mod, batch, heads, q_len, k_len, device=device, BLOCK_SIZE=size)


def close(device: str) -> dict[str, float]:
    # A pair too many or too few is off by more; how exact kernels are is tested elsewhere.
    return {"rtol": 1e-9, "atol": 1e-10} if device == "cpu" else {"rtol": 3e-2, "atol": 3e-2}


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch):
    """Torch's own without its compiler."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [128, (64, 32), (16, 144)], ids=str)
@pytest.mark.parametrize("lengths", [(256, 256), (300, 217), (70, 333)], ids=str)
@pytest.mark.parametrize("name", MODS)
def test_masks(name: str, lengths: tuple[int, int], size: Any, device: str):
    """Results and log-sum-exp as torch's, whose unfused formula runs on the same tensors."""
    q, k, v = tensors(*lengths, device)
    mask = make_mask(name, *lengths, device, size)
    want = torch_flex.flex_attention(q, k, v, block_mask=mask, return_aux=AuxRequest(lse=True))
    out, aux = flex_attention(q, k, v, block_mask=mask, return_aux=AuxRequest(lse=True))
    assert type(aux) is type(want[1]) and aux.max_scores is None
    torch.testing.assert_close(out, want[0], **close(device))
    torch.testing.assert_close(aux.lse, want[1].lse.to(aux.lse.dtype), **close(device))
    assert torch.equal(flex_attention(q, k, v, None, mask), out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["sliding", "by_head"])
def test_grouped(name: str, device: str):
    """Two query heads for each key head, another head dim of values, a scale."""
    q, k, v = tensors(200, 260, device, heads_k=2, value_dim=48)
    mask = make_mask(name, 200, 260, device)
    options = {"scale": 0.3, "enable_gqa": True}
    out, lse = flex_attention(q, k, v, block_mask=mask, return_lse=True, **options)
    want, want_lse = torch_flex.flex_attention(q, k, v, block_mask=mask, return_lse=True, **options)
    assert out.shape == (2, 4, 200, 48)
    torch.testing.assert_close(out, want, **close(device))
    torch.testing.assert_close(lse, want_lse.to(lse.dtype), **close(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["prefix", "documents"])
def test_gradients(name: str, device: str):
    """Of both results, beside the formula: torch's own has none on a CPU."""
    leaves = [x.requires_grad_() for x in tensors(150, 150, device)]
    mask = make_mask(name, 150, 150, device)
    on = torch_flex.create_mask(mask.mask_mod, 2, 4, 150, 150, device=device)
    precise = [x.detach().double().requires_grad_() for x in leaves]
    q, k, v = precise
    scores = (q @ k.mT / 32**0.5).masked_fill(~on, -torch.inf)
    want = (scores.softmax(-1) @ v, scores.logsumexp(-1))
    got = flex_attention(*leaves, block_mask=mask, return_lse=True)
    factors = [torch.randn(x.shape, device=device, dtype=torch.float64) for x in want]
    grads = torch.autograd.grad(got, leaves, [f.to(x.dtype) for f, x in zip(factors, got, strict=True)])
    want_grads = torch.autograd.grad(want, precise, factors)
    limits = {"rtol": 1e-8, "atol": 1e-9} if device == "cpu" else {"rtol": 6e-2, "atol": 6e-2}
    for x, expected in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(x.double(), expected, **limits)


@pytest.mark.parametrize("device", DEVICES)
def test_without_a_mask(device: str):
    q, k, v = tensors(130, 260, device)
    want = torch_flex.flex_attention(q, k, v)
    torch.testing.assert_close(flex_attention(q, k, v), want, **close(device))
    torch.testing.assert_close(flex_attention(q, k, v, torch_flex._identity), want, **close(device))
    torch.testing.assert_close(flex_attention(q, k, v, lambda score, b, h, i, j: score), want, **close(device))
    unlimited = torch_flex._create_empty_block_mask(q, k)
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=unlimited), want, **close(device))
    assert flex._dense_mask(2, 130, 260, q.device) is flex._dense_mask(2, 130, 260, q.device)


def test_many_lengths_without_a_mask():
    for length in range(1, 2 * flex.KEPT_DENSE):
        flex_attention(*torch.randn(3, 1, 1, length, 16))
    assert len(flex._dense) <= flex.KEPT_DENSE


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_copied(device: str, monkeypatch: pytest.MonkeyPatch):
    """Tensors of either order in memory; the result is a view."""
    seen = []
    attend = flex.block_sparse_attention
    monkeypatch.setattr(flex, "block_sparse_attention", lambda *a, **b: seen.append(a) or attend(*a, **b))
    q, k, v = tensors(100, 100, device)
    want = flex_attention(q, k, v)
    others = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(flex_attention(*others), want)
    for given, call in (((q, k, v), seen[0]), (others, seen[1])):
        assert [x.data_ptr() for x in given] == [x.data_ptr() for x in call[:3]]
    assert want.transpose(1, 2).is_contiguous()
    odd = [x.mT.contiguous().mT for x in (q, k, v)]
    assert odd[0].stride(-1) != 1
    assert torch.equal(flex_attention(*odd), want)


@pytest.mark.parametrize("device", DEVICES)
def test_keys_of_one_batch(device: str):
    """Torch's lets keys have a batch of 1 if the mask has that of queries."""
    q, k, v = tensors(90, 90, device)
    mask = make_mask("prefix", 90, 90, device)
    k, v = k[:1].requires_grad_(), v[:1].requires_grad_()
    want = torch_flex.flex_attention(q, k.detach(), v.detach(), block_mask=mask)
    out = flex_attention(q, k, v, block_mask=mask)
    torch.testing.assert_close(out, want, **close(device))
    assert [x.shape[0] for x in torch.autograd.grad(out.sum(), (k, v))] == [1, 1]


# The mask of a mask


def count_conversions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made = []
    convert = BlockMask.from_flex

    def counted(block_mask: Any, **options: Any) -> BlockMask:
        made.append(convert(block_mask, **options))
        return made[-1]

    monkeypatch.setattr(BlockMask, "from_flex", counted)
    return made


def test_a_mask_is_converted_once(monkeypatch: pytest.MonkeyPatch):
    """For each batch, and again after its lists were written."""
    made = count_conversions(monkeypatch)
    q, k, v = tensors(256, 256, "cpu")
    mask = make_mask("causal", 256, 256, "cpu")
    first = flex_attention(q, k, v, block_mask=mask)
    for _ in range(3):
        assert torch.equal(flex_attention(q, k, v, block_mask=mask), first)
    assert len(made) == 1
    flex_attention(q[:1], k[:1], v[:1], block_mask=mask)
    flex_attention(q, k, v, block_mask=mask)
    assert len(made) == 2
    mask.full_kv_num_blocks.zero_()
    changed = flex_attention(q, k, v, block_mask=mask)
    assert len(made) == 3 and not torch.equal(changed, first)
    torch.testing.assert_close(changed[:, :, :128], first[:, :, :128])
    assert len(flex._converted[id(mask)].masks) == 1  # what was made from the old lists is gone
    mask.mask_mod = sliding
    flex_attention(q, k, v, block_mask=mask)
    mask.kv_indices = mask.kv_indices.clone()
    flex_attention(q, k, v, block_mask=mask)
    assert len(made) == 5


def test_a_mask_dies_with_its_owner(monkeypatch: pytest.MonkeyPatch):
    q, k, v = tensors(128, 128, "cpu")
    gc.collect()
    before = len(flex._converted)
    for _ in range(5):
        mask = make_mask("causal", 128, 128, "cpu")
        flex_attention(q, k, v, block_mask=mask)
        assert id(mask) in flex._converted
    del mask
    gc.collect()
    assert len(flex._converted) == before


def test_own_masks():
    """Those of this library serve, too."""
    q, k, v = tensors(256, 256, "cpu")
    theirs = make_mask("causal", 256, 256, "cpu")
    ours = BlockMask.from_flex(theirs, batch_size=2)
    assert torch.equal(flex_attention(q, k, v, block_mask=ours), flex_attention(q, k, v, block_mask=theirs))


def test_compiled():
    """A mask is converted outside of the compiled program, which breaks there."""
    q, k, v = tensors(128, 128, "cpu")
    mask = make_mask("causal", 128, 128, "cpu")
    want = flex_attention(q, k, v, block_mask=mask)
    compiled = torch.compile(flex_attention, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, block_mask=mask), want)
    torch.testing.assert_close(compiled(q, k, v, block_mask=mask), want)
    whole = torch.compile(flex_attention, backend="aot_eager", fullgraph=True)
    ours = BlockMask.from_flex(mask, batch_size=2)
    torch.testing.assert_close(whole(q, k, v, lambda score, b, h, i, j: score, ours), want)


def test_inference_mode():
    q, k, v = tensors(128, 128, "cpu")
    with torch.inference_mode():
        mask = make_mask("causal", 128, 128, "cpu")
        first = flex_attention(q, k, v, block_mask=mask)
    assert torch.equal(flex_attention(q.requires_grad_(), k, v, block_mask=mask), first)


# Arguments


def test_signature():
    ours, theirs = (inspect.signature(f).parameters for f in (flex_attention, torch_flex.flex_attention))
    assert {n: (p.kind, p.default) for n, p in ours.items()} == {n: (p.kind, p.default) for n, p in theirs.items()}


def halved(score: Tensor, *numbers: Tensor) -> Tensor:
    return score / 2


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"score_mod": halved}, NotImplementedError, ["score_mod is halved", "expected None"]),
        ({"score_mod": 3}, TypeError, ["score_mod is a int"]),
        ({"return_aux": AuxRequest(max_scores=True)}, NotImplementedError, ["return_aux", "max_scores"]),
        ({"return_aux": True}, TypeError, ["return_aux is a bool", "AuxRequest"]),
        ({"return_aux": AuxRequest(lse=True), "return_lse": True}, ValueError, ["return_lse is True and return_aux"]),
        ({"return_lse": 1}, TypeError, ["return_lse is 1"]),
        ({"enable_gqa": None}, TypeError, ["enable_gqa is None"]),
        ({"scale": 0}, ValueError, ["scale is 0", "above 0"]),
        ({"scale": "1"}, TypeError, ["scale is '1'"]),
        ({"kernel_options": 3}, TypeError, ["kernel_options is a int"]),
        ({"query": torch.randn(2, 4, 16)}, ValueError, ["query has 3 dimensions", "expected 4"]),
        ({"query": None}, TypeError, ["query is a NoneType"]),
        ({"key": torch.randn(2, 4, 96, 16).half()}, TypeError, ["key has dtype torch.float16", "query"]),
        ({"key": torch.randn(2, 4, 96, 8)}, ValueError, ["key has head dim 8", "16"]),
        ({"value": torch.randn(2, 4, 95, 16)}, ValueError, ["value has shape (2, 4, 95, 16)", "(2, 4, 96, 16)"]),
        ({"query": torch.randn(2, 8, 96, 16)}, ValueError, ["query has 8 heads and key 4", "enable_gqa=True"]),
        ({"query": torch.randn(2, 6, 96, 16), "enable_gqa": True}, ValueError, ["query has 6 heads", "multiple"]),
        ({"query": torch.randn(3, 4, 96, 16)}, ValueError, ["key has a batch of 2", "expected 3"]),
        ({"block_mask": torch.ones(1, dtype=torch.bool)}, TypeError, ["block_mask is a Tensor", "BlockMask"]),
        ({"block_mask": (96, 90)}, ValueError, ["block_mask was created for lengths (96, 90)", "(96, 96)"]),
        ({"block_mask": (96, 96, 3, 1)}, ValueError, ["block_mask has a batch of 3", "1 or 2"]),
        ({"block_mask": (96, 96, 1, 2)}, ValueError, ["block_mask has", "2 heads", "1 or 4"]),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], words: list[str]):
    q, k, v = torch.randn(3, 2, 4, 96, 16)
    change = dict(change)
    if isinstance(change.get("block_mask"), tuple):
        q_len, k_len, batch, heads = (*change["block_mask"], 1, 1)[:4]
        change["block_mask"] = create_block_mask(causal, batch, heads, q_len, k_len, device="cpu")
    with pytest.raises(error) as raised:
        flex_attention(**{"query": q, "key": k, "value": v, **change})
    for word in words:
        assert word in str(raised.value)


def test_sliced_mask():
    """Torch's has taken its mask_mod away, and says so."""
    mask = create_block_mask(causal, 2, None, 256, 256, device="cpu")[:, :, 0]
    with pytest.raises((RuntimeError, ValueError)):
        flex_attention(*torch.randn(3, 2, 4, 128, 16), block_mask=mask)
