"""Values, devices and layouts of arguments: what stands for an integer is taken, and what does not fit has a name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import cases
import hbsattn
from cases import Case, case
from gradients import differentiate, judge_gradients
from hbsattn import BlockMask
from hbsattn._checks import check_number
from hbsattn.utils import calculate_blocks
from problems import build_mask, cu_seqlens, judge, make_problem, same

INDEX = "expected an int"
BLOCK, LENGTH = r"expected 1 to 1073741823$", r"expected 0 to 2147483647$"


def dense(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def integers(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def packed() -> dict[str, Any]:
    return {"cu_seqlens_q": cu_seqlens((100, 37), "cpu"), "cu_seqlens_k": cu_seqlens((100, 50), "cpu")}


def refused(kind: type[Exception], pattern: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=pattern):
        call()


# One call for each argument that is an integer, by its name.
TAKERS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "q_block_size": (lambda x: BlockMask.from_dense(dense(1, 1, 4, 4), x, 32), 32),
    "k_block_size": (lambda x: BlockMask.from_indices(integers(1, 1, 4), integers(1, 1, 4, 1), 32, x, seqlen_k=64), 32),
    "seqlen_q": (lambda x: BlockMask.from_csr(integers(1, 5), integers(0), 32, 32, seqlen_q=x, seqlen_k=64), 128),
    "seqlen_k": (lambda x: BlockMask.from_dense(dense(1, 1, 4, 4), 32, 32, seqlen_k=x), 128),
    "batch_size": (lambda x: BlockMask.from_dense(dense(1, 1, 4, 4), 32, 32, batch_size=x), 3),
    "max_seqlen_q": (lambda x: BlockMask.from_dense(dense(1, 6, 6), 32, 32, **packed(), max_seqlen_q=x), 100),
    "max_seqlen_k": (lambda x: BlockMask.from_dense(dense(1, 6, 6), 32, 32, **packed(), max_seqlen_k=x), 100),
    "block_size": (lambda x: calculate_blocks(cu_seqlens((100, 37), "cpu"), x), 32),
    "head_dim": (lambda x: BlockMask.from_dense(dense(1, 1, 4, 4), 32, 32).flops(x, 1), 64),
    "value_dim": (lambda x: BlockMask.from_dense(dense(1, 1, 4, 4), 32, 32).flops(64, 1, x), 64),
    "num_heads": (lambda x: BlockMask.from_dense(dense(1, 1, 4, 4), 32, 32).flops(64, x), 2),
}


@pytest.mark.parametrize("name", TAKERS)
def test_integers(name: str):
    """Numpy's and those of tensors give what an int gives, in the types of an int."""
    call, value = TAKERS[name]
    want = call(value)
    for kind in (np.int64, np.uint16, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)):
        got = call(kind(value))
        assert repr(got) == repr(want)
        if isinstance(got, BlockMask):
            fields = (getattr(got, field.name) for field in dataclasses.fields(got))
            assert all(type(x) in (int, bool, str, tuple, Tensor, type(None)) for x in fields)


@pytest.mark.parametrize("name", TAKERS)
def test_no_integers(name: str):
    call, value = TAKERS[name]
    for wrong in (True, np.True_, float(value), np.float32(value), str(value), [value], Fraction(value)):
        refused(TypeError, f"^{name} is {re.escape(repr(wrong))}; {INDEX}", lambda wrong=wrong: call(wrong))
    for wrong, what in (
        (torch.tensor([value]), r"\(1,\) of torch.int64 on cpu"),
        (torch.tensor(float(value)), r"\(\) of torch.float32 on cpu"),
        (torch.tensor(True), r"\(\) of torch.bool on cpu"),
        (torch.tensor(value, device="meta"), r"\(\) of torch.int64 on meta"),
    ):
        refused(TypeError, f"^{name} is a Tensor {what}; {INDEX}", lambda wrong=wrong: call(wrong))
    limits = BLOCK if "block" in name else LENGTH
    for wrong in (-1, 2**31, 2**70, np.int64(2**40)):
        refused(ValueError, f"^{name} is {wrong}; {limits}", lambda wrong=wrong: call(wrong))


@pytest.mark.parametrize("name", ["q_block_size", "k_block_size", "block_size"])
def test_none_where_an_integer_is_due(name: str):
    refused(TypeError, f"^{name} is None; {INDEX}", lambda: TAKERS[name][0](None))


@pytest.mark.parametrize("value", [None, 0, 2, "yes", np.True_, torch.tensor(True)])
def test_causal(value: object):
    lists, rows = (integers(1, 1, 4), integers(1, 1, 4, 1)), (integers(1, 5), integers(0))
    for call in (
        lambda: BlockMask.from_dense(dense(1, 1, 4, 4), 32, 32, causal=value),
        lambda: BlockMask.from_indices(*lists, 32, 32, seqlen_k=64, causal=value),
        lambda: BlockMask.from_csr(*rows, 32, 32, seqlen_q=128, seqlen_k=64, causal=value),
    ):
        refused(TypeError, rf"^causal is {re.escape(repr(value))}; expected True or False", call)


def test_numbers():
    for value in (0.5, np.float32(0.5), np.float64(0.5), Fraction(1, 2), torch.tensor(0.5), torch.tensor([[0.5]])):
        assert check_number("x", value) == 0.5
    for value in (2, np.int32(2), torch.tensor(2)):
        assert check_number("x", value) == 2.0
    for wrong in (True, np.True_, "1", b"1", [1.0], 1j, np.complex64(1), None):
        refused(
            TypeError, rf"^x is {re.escape(repr(wrong))}; expected a real", lambda wrong=wrong: check_number("x", wrong)
        )
    for wrong in (torch.ones(2), torch.tensor(1j), torch.tensor(True), torch.tensor(1.0, device="meta")):
        pattern = rf"^x is a Tensor {re.escape(str(tuple(wrong.shape)))} of {wrong.dtype} on {wrong.device}; expected"
        refused(TypeError, pattern, lambda wrong=wrong: check_number("x", wrong))
    refused(ValueError, "^x is 10+; expected a real number in the range of a float", lambda: check_number("x", 10**400))


# Devices and layouts


def on_meta(x: Tensor) -> Tensor:
    return x.to("meta")


def attend_on_meta() -> Tensor:
    mask = BlockMask.from_dense(dense(1, 1, 1, 1), 32, 32)
    return hbsattn.block_sparse_attention(on_meta(torch.zeros(1, 32, 1, 8)), *torch.zeros(2, 1, 32, 1, 8), mask)


DEVICES: dict[str, tuple[Callable[[], Any], str]] = {
    "cu_seqlens_q": (
        lambda: BlockMask.from_dense(dense(1, 6, 6), 32, 32, **packed() | {"cu_seqlens_q": on_meta(integers(3))}),
        "cu_seqlens_q is on meta; expected cpu, where block_mask is",
    ),
    "cu_seqlens_k": (
        lambda: BlockMask.from_indices(
            *(integers(1, 6), integers(1, 6, 1), 32, 32), **packed() | {"cu_seqlens_k": on_meta(integers(3))}
        ),
        "cu_seqlens_k is on meta; expected cpu, where counts is",
    ),
    "block_mask": (
        lambda: BlockMask.from_dense(on_meta(dense(1, 6, 6)), 32, 32, **packed()),
        "cu_seqlens_q is on cpu; expected meta, where block_mask is",
    ),
    "all of a dense mask": (
        lambda: BlockMask.from_dense(on_meta(dense(1, 1, 4, 4)), 32, 32),
        "block_mask is on meta; expected cpu or cuda",
    ),
    "all of a list": (
        lambda: BlockMask.from_indices(on_meta(integers(1, 1, 4)), on_meta(integers(1, 1, 4, 2)), 32, 32, seqlen_k=64),
        "device is meta; expected cpu or cuda",
    ),
    "q": (attend_on_meta, "q is on meta; expected cpu or cuda"),
    "indices": (
        lambda: BlockMask.from_indices(integers(1, 1, 4), on_meta(integers(1, 1, 4, 2)), 32, 32, seqlen_k=64),
        "indices is on meta; expected cpu, where counts is",
    ),
    "counts": (
        lambda: BlockMask.from_indices(on_meta(integers(1, 1, 4)), integers(1, 1, 4, 2), 32, 32, seqlen_k=64),
        "indices is on cpu; expected meta, where counts is",
    ),
    "csr": (
        lambda: BlockMask.from_csr(integers(1, 5), on_meta(integers(0)), 32, 32, seqlen_q=128, seqlen_k=64),
        "indices is on meta; expected cpu, where indptr is",
    ),
}


@pytest.mark.parametrize("name", DEVICES)
def test_meta_among_real(name: str):
    call, pattern = DEVICES[name]
    refused(ValueError, f"^{pattern}", call)


@pytest.mark.gpu
def test_lengths_on_cuda_for_a_mask_on_the_host():
    lens = {name: x.cuda() for name, x in packed().items()}
    pattern = "^cu_seqlens_q is on cuda:0; expected cpu, where block_mask is"
    refused(ValueError, pattern, lambda: BlockMask.from_dense(dense(1, 6, 6), 32, 32, **lens))


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "coo": (lambda x: x.to_sparse(), "of layout torch.sparse_coo"),
    "nested": (lambda x: torch.nested.nested_tensor([x[0], x[0]]), "nested"),
    "jagged": (lambda x: torch.nested.nested_tensor([x[0], x[0]], layout=torch.jagged), "nested"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_layouts(layout: str):
    change, what = LAYOUTS[layout]
    expected = f"is {what}; expected .* that is dense, of layout torch.strided"
    refused(
        TypeError, f"^block_mask {expected}", lambda: BlockMask.from_dense(change(dense(1, 6, 6)), 32, 32, **packed())
    )
    mask, x = BlockMask.from_dense(dense(1, 1, 4, 4), 32, 32), torch.randn(1, 128, 2, 8)
    for i, name in enumerate("qkv"):
        tensors = [change(x) if i == j else x for j in range(3)]
        refused(TypeError, f"^{name} {expected}", lambda t=tensors: hbsattn.block_sparse_attention(*t, mask))


# What a message tells beside what is wrong


@pytest.mark.parametrize("device", cases.DEVICES)
def test_heads_before_the_length(device: str):
    spec = case("order", lens_q=(96, 96), packed=False)
    problem = make_problem(spec, device, torch.float32 if device == "cpu" else torch.bfloat16)
    pattern = "has length {}; expected 96, the seqlen_{} that mask has: heads come after the length, "
    for name, heads in (("q", spec.heads_q), ("k", spec.heads_k)):
        tensors = {x: getattr(problem, x).transpose(1, 2) if x == name else getattr(problem, x) for x in "qkv"}
        text = f"^{name} {pattern.format(heads, name)}" + r"\(batch, length, heads, head_dim\)"
        refused(ValueError, text, lambda t=tensors: hbsattn.block_sparse_attention(**t, mask=problem.mask()))


def test_heads_before_the_length_of_packed():
    problem = make_problem(case("order"), "cpu", torch.float32)
    tensors = [x.transpose(0, 1) for x in (problem.q, problem.k, problem.v)]
    pattern = r"^q has 4 rows; expected at least 337, .*; heads come after the length: \(total, heads, head_dim\)"
    refused(ValueError, pattern, lambda: hbsattn.block_sparse_attention(*tensors, problem.mask()))


def test_length_that_nobody_passed():
    q, k = (torch.randn(1, n, 2, 8) for n in (1000, 1024))
    mask = BlockMask.from_indices(integers(1, 1, 8), integers(1, 1, 8, 2), 128, 64, seqlen_k=1024)
    text = "^q has length 1000; expected 1024, .* that mask has: for this one, build the mask with seqlen_q=1000$"
    refused(ValueError, text, lambda: hbsattn.block_sparse_attention(q, k, k, mask))
    text = "^q has length 3; expected 1024, the seqlen_q that mask has$"
    refused(ValueError, text, lambda: hbsattn.block_sparse_attention(q[:, :3], k, k, mask))


@pytest.mark.parametrize("device", cases.DEVICES)
def test_max_seqlen_k_below_the_keys(device: str):
    """The host cannot tell whose the keys are, only that no such sequences hold them."""
    lens = {name: cu_seqlens((150, 90), device) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    mask = BlockMask.from_dense(dense(1, 1, 3, 3).to(device), 64, 64, **lens, max_seqlen_k=150)
    x = torch.randn(400, 2, 64, device=device, dtype=torch.bfloat16)
    text = "^max_seqlen_k is 150; expected at least 200, as k has 400 rows in 2 sequences"
    refused(ValueError, text, lambda: hbsattn.block_sparse_attention(x[:240], x, x, mask))


def test_full_blocks_of_flex_attention():
    """The README's way to take its mask."""
    flex = create_block_mask(lambda b, h, i, j: (i // 128 + j // 128) % 3 == 0, 2, 1, 1024, 1024, device="cpu")
    assert not flex.kv_num_blocks.any()
    mask = BlockMask.from_indices(flex.full_kv_num_blocks, flex.full_kv_indices, *flex.BLOCK_SIZE, seqlen_k=1024)
    block = torch.arange(8)
    assert torch.equal(mask.to_dense(), ((block.view(-1, 1) + block) % 3 == 0).expand(2, 1, 8, 8))


def test_masks_of_others():
    x = torch.randn(1, 256, 2, 8)
    flex = create_block_mask(lambda b, h, i, j: i >= j, 1, 1, 256, 256, device="cpu")
    name = r"torch\.nn\.attention\.flex_attention\.BlockMask"
    text = rf"^mask is a {name}; expected a BlockMask of hbsattn: hbsattn\.BlockMask\.from_flex\(mask\) makes one"
    refused(TypeError, text, lambda: hbsattn.block_sparse_attention(x, x, x, flex))
    refused(
        TypeError,
        rf"^block_mask is a {name}; expected a Tensor of torch.bool: .*from_flex",
        lambda: BlockMask.from_dense(flex, 32, 32),
    )
    text = "^mask is a Tensor; expected a BlockMask of hbsattn: for booleans, BlockMask.from_dense makes one"
    refused(TypeError, text, lambda: hbsattn.block_sparse_attention(x, x, x, dense(1, 1, 4, 4)))


# Blocks far longer than the sequences, and rows that no sequence has


LONG_BLOCKS = [
    case("batched", lens_q=(17, 17), lens_k=(21, 21), packed=False, heads_q=4, heads_k=2, causal=True),
    case("packed_lists", lens_q=(17, 0, 9), lens_k=(5, 21, 40), source="indices", causal=True),
    case("packed_csr", lens_q=(17, 9), lens_k=(5, 21), source="csr"),
    case("packed_dense", lens_q=(17, 9), lens_k=(21, 5)),
    case("padded", lens_q=(17, 9), lens_k=(21, 5), form="batched"),
]


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("spec", LONG_BLOCKS, ids=lambda s: s.name)
def test_blocks_far_above_the_lengths(spec: Case, device: str):
    """The ops are told of blocks of the length, where it is known, and the mask of those that were given."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    long = dataclasses.replace(spec, q_block=4096, k_block=8192, density=1.0)
    problem = make_problem(long, device, dtype)
    mask = problem.mask()
    assert (mask.q_block_size, mask.k_block_size) == (4096, 8192)
    known = spec.source != "dense" or not spec.packed
    longest_q, longest_k = max(spec.lens_q), max(spec.keys)
    enough = tuple(32 if n <= 32 else 64 for n in (longest_q, longest_k))
    assert (mask._q_block, mask._k_block) == (enough if known else (4096, 8192))
    judge(problem, *problem.run(mask))
    judge_gradients(problem, differentiate(problem, mask=mask))
    short = build_mask(dataclasses.replace(long, q_block=enough[0], k_block=enough[1]), problem.block_masks, device)
    assert same(mask.to_dense(), short.to_dense()) and mask.flops(64, 4) == short.flops(64, 4)
    assert all(same(x, y) for x, y in zip(problem.run(mask), problem.run(short), strict=True)) or not known


def test_blocks_that_are_not_far_above_the_lengths():
    """Kernels like powers of two and multiples of 128: no block becomes another without need."""
    for block, length, want in ((128, 100, 128), (100, 97, 100), (192, 100, 128), (192, 150, 192), (1000, 600, 640)):
        mask = BlockMask.from_dense(dense(1, 1, 1, 1), block, block, seqlen_q=length, seqlen_k=length)
        assert (mask._q_block, mask._k_block) == (want, want)


@pytest.mark.parametrize("device", cases.DEVICES)
@pytest.mark.parametrize("debug", [False, True])
def test_padding_rows(debug: bool, device: str):
    """Rows past the last sequence are legal, whatever they hold, also where contents are checked."""
    hbsattn.set_debug(debug)
    problem = make_problem(case("padding", lens_q=(100, 37), causal=True), device, torch.bfloat16)
    mask, total = problem.mask(), len(problem.q)
    padded = [torch.cat([x, torch.full_like(x[:30], torch.nan)]) for x in (problem.q, problem.k, problem.v)]
    out, lse = hbsattn.block_sparse_attention(*padded, mask, return_lse=True)
    judge(problem, out[:total], lse[:, :total])
    assert not out[total:].any() and bool((lse[:, total:] == -torch.inf).all())
