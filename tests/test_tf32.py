"""Products of float32 on CUDA as single ones of TF32: whether PyTorch allows them, and what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from hbsattn import BlockMask
from hbsattn.attention import allows_tf32
from hbsattn.attention import block_sparse_attention as attend
from problems import same

MATMUL = torch.backends.cuda.matmul
LENGTH, HEADS, BLOCK = 500, 2, 64


def forbid() -> None:
    torch.set_float32_matmul_precision("highest")
    if hasattr(MATMUL, "fp32_precision"):
        MATMUL.fp32_precision = "none"


@pytest.fixture(autouse=True)
def by_default() -> Iterator[None]:
    forbid()
    yield
    forbid()


def allow() -> None:
    torch.set_float32_matmul_precision("high")


def set_precision(value: str) -> None:
    if not hasattr(MATMUL, "fp32_precision"):
        pytest.skip("this PyTorch has the older setting alone")
    MATMUL.fp32_precision = value


def set_flag(value: bool) -> None:
    MATMUL.allow_tf32 = value


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        (lambda: None, False),
        (allow, True),
        (lambda: torch.set_float32_matmul_precision("medium"), True),
        (lambda: set_flag(True), True),
        (lambda: set_precision("tf32"), True),
        (lambda: set_precision("ieee"), False),
        (lambda: (set_flag(True), set_precision("ieee")), False),  # the older one must not be asked then
        (lambda: (set_precision("ieee"), set_flag(True)), True),
    ],
    ids=["default", "high", "medium", "flag", "tf32", "ieee", "flag_ieee", "ieee_flag"],
)
def test_setting(change: Callable[[], object], allowed: bool):
    change()
    assert allows_tf32() is allowed


def test_compiled_programs_are_guarded():
    compiled = torch.compile(lambda x: x + allows_tf32(), backend="eager", fullgraph=True)
    for change, allowed in ((forbid, 0), (allow, 1), (forbid, 0), (allow, 1)):
        change()
        assert int(compiled(torch.zeros(()))) == allowed


def test_not_on_a_cpu():
    q = torch.randn(1, 64, 1, 32)
    mask = BlockMask.from_dense(torch.ones(1, 1, 2, 2, dtype=torch.bool), 32, 32, seqlen_q=64, seqlen_k=64)
    want = attend(q, q, q, mask)
    allow()
    assert same(attend(q, q, q, mask), want)


def draw(head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], BlockMask, Tensor]:
    """q, k, v and a gradient of out, a mask, and whether each query attends to each key."""
    generator = torch.Generator("cuda").manual_seed(head_dim)
    shape = (1, LENGTH, HEADS, head_dim)
    tensors = [torch.randn(shape, generator=generator, device="cuda", dtype=dtype) for _ in range(4)]
    blocks = -(-LENGTH // BLOCK)
    dense = torch.rand(1, HEADS, blocks, blocks, generator=generator, device="cuda") < 0.6
    dense |= torch.eye(blocks, dtype=torch.bool, device="cuda")
    mask = BlockMask.from_dense(dense, BLOCK, BLOCK, seqlen_q=LENGTH, seqlen_k=LENGTH)
    attends = dense.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[..., :LENGTH, :LENGTH]
    return tensors, mask, attends


def differentiate(call: Callable[..., Tensor], tensors: list[Tensor], between: Callable[[], None] = lambda: None):
    *inputs, grad_out = tensors
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = call(*inputs)
    between()
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]


def formula(attends: Tensor) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~attends, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2)

    return call


@pytest.mark.gpu
@pytest.mark.float32
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_error(head_dim: int, deterministic: bool):
    """At most twice that of the formula in TF32, and no less than products of three have."""
    tensors, mask, attends = draw(head_dim)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, mask, deterministic=deterministic)

    exact = differentiate(formula(attends), [x.double() for x in tensors])
    of_three = differentiate(call, tensors)
    allow()
    got = differentiate(call, tensors)
    like = differentiate(formula(attends), tensors)
    for result, other, alike, want in zip(got, of_three, like, exact, strict=True):
        error, of_others, of_formula = ((x - want).square().mean().sqrt().item() for x in (result, other, alike))
        assert error <= 2 * of_formula
        assert of_others < error / 30
        assert (result - want).abs().max() <= 2 * (alike - want).abs().max()


@pytest.mark.gpu
@pytest.mark.float32
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_backward_goes_by_what_the_call_found(head_dim: int):
    tensors, mask, _ = draw(head_dim)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, mask, deterministic=True)

    of_three = differentiate(call, tensors)
    assert all(same(x, y) for x, y in zip(differentiate(call, tensors, between=allow), of_three, strict=True))
    of_one = differentiate(call, tensors)  # allowed by now
    assert not any(same(x, y) for x, y in zip(of_one, of_three, strict=True))
    assert all(same(x, y) for x, y in zip(differentiate(call, tensors, between=forbid), of_one, strict=True))


@pytest.mark.gpu
@pytest.mark.float32
def test_compiled():
    tensors, mask, _ = draw(64)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, mask, deterministic=True)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for change in (forbid, allow, forbid):
        change()
        got, want = differentiate(compiled, tensors), differentiate(call, tensors)
        assert all(same(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.gpu
def test_other_dtypes_do_not_read_it():
    tensors, mask, _ = draw(64, torch.bfloat16)
    want = attend(*tensors[:3], mask)
    allow()
    assert same(attend(*tensors[:3], mask), want)


@pytest.mark.gpu
@pytest.mark.float32
def test_not_a_number():
    """Rounding leaves NaN and infinity what they are."""
    (q, k, v, _), mask, attends = draw(64)
    allow()
    for value in (torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32).item(), float("inf")):
        spoilt = v.clone()
        spoilt[0, 3] = value
        out = attend(q, k, spoilt, mask)
        reached = attends[0, :, :, 3]
        assert not out[0].transpose(0, 1)[reached].isfinite().any()
