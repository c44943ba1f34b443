"""Dropout beside the dense formula with the same weights dropped, and the random numbers that choose them."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import cases
import hbsattn
from cases import BACKWARD_METHODS, DEVICE_DTYPES, DEVICES, TOKENS, WINDOWS, Case, case
from gradients import (
    attend,
    call_and_differentiate,
    differentiate,
    inputs,
    judge_everything,
    judge_frozen,
    judge_gradients,
    leaves,
    upstream,
)
from hbsattn import _dropout
from oracle import dropout
from problems import judge, make_dropout_seed, make_problem, same

SPECS = [
    case("128x128", q_block=128, k_block=128, lens_q=(300, 90), lens_k=(700, 90), head_dim=128, dropout_p=0.1),
    case("128x128_causal", q_block=128, k_block=128, lens_q=(300, 90), head_dim=64, causal=True, dropout_p=0.5),
    case("64x64", head_dim=64, causal=True, dropout_p=0.17),
    case("64x128", k_block=128, head_dim=128, lens_k=(500, 37, 200), dropout_p=0.1),
    case("128x64", q_block=128, head_dim=96, packed=False, lens_q=(150, 150), lens_k=(210, 210), dropout_p=0.5),
    case("16x16", q_block=16, k_block=16, heads_q=8, mask_heads=2, causal=True, dropout_p=0.75),
    case("192x192", q_block=192, k_block=192, lens_q=(400, 191, 5), lens_k=(300, 190, 60), head_dim=128, dropout_p=0.1),
    case("192x48", q_block=192, k_block=48, lens_q=(400, 191), lens_k=(300, 190), head_dim=96, dropout_p=0.17),
    case("128x32", q_block=128, k_block=32, lens_q=(300, 20), head_dim=128, causal=True, dropout_p=0.1),
    case("100x100", q_block=100, k_block=100, lens_q=(230, 40), head_dim=128, causal=True, dropout_p=0.17),
    case("48x80", q_block=48, k_block=80, head_dim=16, dropout_p=0.5),
    case("18x20", q_block=18, k_block=20, packed=False, lens_q=(90, 90), lens_k=(95, 95), causal=True, dropout_p=0.1),
    case("7x128", q_block=7, k_block=128, heads_q=8, mask_heads=2, head_dim=72, dropout_p=0.75),
    case("128x7", q_block=128, k_block=7, head_dim=64, causal=True, dropout_p=0.17),
    case("100x1", q_block=100, k_block=1, lens_q=(130,), density=0.2, dropout_p=0.5),
    case("tokens", **TOKENS, lens_q=(70, 5), head_dim=128, causal=True, dropout_p=0.1),
    case("tokens_of_key_heads", **TOKENS | {"heads_k": 2, "mask_heads": 2}, lens_q=(50, 9), k_block=33, dropout_p=0.5),
    case("tokens_alike", **TOKENS, pattern="alike", lens_q=(40,), k_block=16, head_dim=128, dropout_p=0.17),
    case("stacks", q_block=6, heads_q=24, heads_k=1, mask_heads=1, k_block=48, head_dim=96, dropout_p=0.1),
    case("group", q_block=112, k_block=96, heads_q=8, heads_k=1, mask_heads=1, lens_q=(111, 113), dropout_p=0.5),
    case("wide_192", q_block=64, k_block=64, head_dim=192, causal=True, dropout_p=0.1),
    case("wide_192_ragged", q_block=20, k_block=24, head_dim=192, lens_q=(90, 30), dropout_p=0.75),
    case("wide_256", q_block=128, k_block=48, head_dim=256, lens_q=(150, 37), lens_k=(300, 37), dropout_p=0.17),
    case("windows", causal=True, windows=WINDOWS, k_block=16, dropout_p=0.1),
    case("windows_and_sinks", windows=WINDOWS, q_block=128, k_block=128, sinks=True, dropout_p=0.5),
    case("sinks", q_block=16, k_block=80, heads_q=8, heads_k=2, mask_heads=2, sinks=True, dropout_p=0.17),
    case("alike", pattern="alike", heads_q=8, mask_heads=8, k_block=16, lens_q=(300,), head_dim=128, dropout_p=0.1),
    case("united", pattern="alike", q_block=16, k_block=16, lens_q=(300, 70, 5), density=0.3, dropout_p=0.5),
    case("zero_length", lens_q=(0, 70, 0, 50, 33, 0), lens_k=(40, 70, 0, 0, 90, 0), causal=True, dropout_p=0.1),
    case("q_longer", lens_q=(200, 130, 64), lens_k=(90, 129, 10), causal=True, density=0.7, dropout_p=0.17),
    case("empty_rows", pattern="empty_rows", q_block=16, head_dim=128, dropout_p=0.1),
    case("nearly_all", q_block=128, k_block=128, lens_q=(200,), lens_k=(900,), density=1.0, dropout_p=0.98),
    case("padded", head_dim=20, layout="padded", causal=True, dropout_p=0.1),
    case("odd_strides", layout="odd", lens_q=(90, 90), packed=False, dropout_p=0.1),
]
RATES = (0.1, 0.5, 0.17, 0.75, 0.98)


def by_name(spec: Case) -> str:
    return spec.name


def dtype_of(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


# The random numbers


@pytest.mark.parametrize("philox", [dropout.philox4x32, _dropout._philox], ids=["oracle", "hbsattn"])
@pytest.mark.parametrize(
    "counter,key,words",
    [
        ((0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: str, philox: Callable[..., tuple]):
    """Those of Random123, whose authors made Philox."""
    if philox is _dropout._philox:
        counter, key = (tuple(torch.tensor(x) for x in numbers) for numbers in (counter, key))
    assert " ".join(f"{int(word):08x}" for word in philox(counter, key, 10)) == words


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("p", [*RATES, 2.0**-15, 0.99999])
def test_the_definition(p: float, device: str):
    """Pairs of a small mask, and single ones far out."""
    rng = random.Random(0)
    for seed, offset in ((0, 0), (-1, -(2**63)), (rng.getrandbits(63), 2**63 - 1), (2**32, 7)):
        numbers = torch.tensor([seed, offset], device=device)
        kept = hbsattn.dropout_mask(p, numbers, 2, 3, 37, 41)
        assert kept.shape == (2, 3, 37, 41) and kept.dtype == torch.bool and kept.device == numbers.device
        kept = kept.cpu()
        for _ in range(200):
            b, head, query, key = (rng.randrange(n) for n in kept.shape)
            assert bool(kept[b, head, query, key]) == dropout.is_kept(p, seed, offset, 3 * b + head, query, key)
        for _ in range(20):
            place = rng.getrandbits(40), rng.getrandbits(31), rng.getrandbits(31)
            tensors = (torch.tensor(x, device=device).view(1, 1, 1) for x in place)
            assert bool(_dropout.keeps(p, numbers, *tensors)) == dropout.is_kept(p, seed, offset, *place)


def test_every_place_of_a_patch():
    """All 16 bytes of the four words, beside each of their neighbours'."""
    seed, offset = 5, 11
    words = dropout.stream_words(seed, offset, 1)
    drawn = torch.tensor([[dropout.draw(words, query, key) for key in range(40)] for query in range(40)])
    assert drawn.unique().numel() > 1500 and int(drawn.min()) >= 0 and int(drawn.max()) < 2**15
    for p in RATES:
        dropped = round(p * 2**15)
        want = drawn >= dropped if p <= 0.5 else drawn < 2**15 - dropped
        assert torch.equal(hbsattn.dropout_mask(p, torch.tensor([seed, offset]), 1, 2, 40, 40)[0, 1], want)


@pytest.mark.parametrize("p", RATES)
def test_rate(p: float):
    length = 2**12 if p == RATES[0] else 2**10
    kept = hbsattn.dropout_mask(p, make_dropout_seed(1), 1, 1, length, length)
    assert_rate(int(kept.sum()), kept.numel(), p)


@pytest.mark.gpu
@pytest.mark.slow
def test_rate_of_many():
    """10^9 pairs, and of each rate as many in all."""
    for number, p in enumerate(RATES):
        kept = total = 0
        while total < 10**9:
            mask = hbsattn.dropout_mask(p, make_dropout_seed(100 * number + total).cuda(), 2, 4, 5000, 6400)
            kept, total = kept + int(mask.sum()), total + mask.numel()
        assert_rate(kept, total, p)


def assert_rate(kept: int, total: int, p: float) -> None:
    """Within four standard deviations."""
    share = 1 - round(p * 2**15) / 2**15
    deviations = (kept - share * total) / math.sqrt(total * share * (1 - share))
    assert abs(deviations) < 4, f"{kept} of {total} are kept, {deviations:.1f} standard deviations off {share:.5f}"


@pytest.mark.parametrize("p", [0.1, 0.5, 0.98])
def test_neighbours_are_independent(p: float):
    """Pairs at a distance; also heads, sequences, seeds and offsets."""
    seed = torch.tensor([12, 34])
    kept = hbsattn.dropout_mask(p, seed, 2, 2, 512, 640)
    some = kept[0, 0]
    shifts = [
        (1, 0),
        (0, 1),
        (1, 1),
        (2, 0),
        (0, 2),
        (8, 0),
        (0, 8),
        (8, 8),
        (9, 9),
        (1, 8),
        (16, 0),
        (0, 16),
        (16, 16),
    ]
    for rows, cols in shifts:
        assert_uncorrelated(some[: 512 - rows, : 640 - cols], some[rows:, cols:], p)
    for other in (kept[0, 1], kept[1, 0], kept[1, 1], some.flip(0), some.flip(1)):
        assert_uncorrelated(some, other, p)
    for change in ((1, 0), (0, 1), (2**32, 0), (0, 2**32)):
        other = hbsattn.dropout_mask(p, seed + torch.tensor(change), 1, 1, 512, 640)[0, 0]
        assert_uncorrelated(some, other, p)


def assert_uncorrelated(some: Tensor, other: Tensor, p: float) -> None:
    share = 1 - round(p * 2**15) / 2**15
    products = (some.double() - share) * (other.double() - share)
    deviations = float(products.mean()) / (share * (1 - share)) * math.sqrt(products.numel())
    assert abs(deviations) < 4.5, f"{deviations:.1f} standard deviations"


@pytest.mark.gpu
def test_the_same_on_every_device():
    for p in RATES:
        seed = make_dropout_seed(3)
        want = hbsattn.dropout_mask(p, seed, 2, 3, 333, 444)
        assert torch.equal(hbsattn.dropout_mask(p, seed.cuda(), 2, 3, 333, 444).cpu(), want)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)])
def test_masks_of_nothing(shape: tuple[int, int, int, int]):
    assert hbsattn.dropout_mask(0.3, torch.tensor([1, 2]), *shape).shape == shape
    assert bool(hbsattn.dropout_mask(0.0, torch.tensor([1, 2]), 1, 2, 3, 4).all())


# Results and gradients


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_cases(spec: Case, device: str, dtype: torch.dtype):
    judge_everything(make_problem(spec, device, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("method", BACKWARD_METHODS, ids=by_name)
def test_backward_methods(method: Case, deterministic: bool):
    """Every way in which gradients are computed without dropout."""
    spec = dataclasses.replace(method, causal=True, density=0.9, dropout_p=0.3)
    problem = make_problem(spec, "cuda", torch.float16)
    mask = problem.mask()
    judge(problem, *problem.run(mask))
    judge_gradients(problem, differentiate(problem, mask=mask, deterministic=deterministic))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_random(seed: int, device: str, dtype: torch.dtype):
    spec = cases.random_case(900 + seed, any_block_size=seed % 2 == 0, max_len=200, windowed=seed % 4 == 0)
    # One key alone has no gradient, which the formula finds exactly, and rounded results do not.
    lens_k = tuple(n + 8 if n else 0 for n in spec.lens_k)
    spec = dataclasses.replace(
        spec, lens_k=lens_k, scale=None, values="normal", sinks=seed % 3 == 0, dropout_p=RATES[seed % 4]
    )
    problem = make_problem(spec, device, dtype, seed)
    judge(problem, *problem.run())
    judge_gradients(problem, differentiate(problem))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("names", ["q", "k", "v", "kv", "s"])
@pytest.mark.parametrize("k_block", [16, 64])
def test_frozen(k_block: int, names: str, device: str):
    spec = case("frozen", causal=True, sinks=True, q_block=128, k_block=k_block, head_dim=128, dropout_p=0.3)
    judge_frozen(make_problem(spec, device, dtype_of(device)), names)


def test_gradients_in_float64():
    """Finite differences."""
    spec = case("check", lens_q=(9, 5), q_block=4, k_block=3, head_dim=3, density=0.7, sinks=True, dropout_p=0.4)
    problem = make_problem(spec, "cpu", torch.float64)
    mask, options = problem.mask(), problem.options() | {"return_lse": True}
    sinks = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
        return hbsattn.block_sparse_attention(q, k, v, mask, **options | {"sinks": sinks})

    assert torch.autograd.gradcheck(call, (*leaves(problem)[:3], sinks))


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_blocks_do_not_matter(device: str, dtype: torch.dtype):
    """One function of the places of queries and keys, whatever the blocks of a mask without holes."""
    spec = case("whole", heads_q=8, heads_k=2, mask_heads=1, density=1.0, causal=True, dropout_p=0.3)
    results = []
    for q_block, k_block in ((64, 64), (128, 128), (16, 48), (192, 16), (100, 7), (1, 128), (4096, 4096)):
        problem = make_problem(dataclasses.replace(spec, q_block=q_block, k_block=k_block), device, dtype)
        out, lse = problem.run()
        results.append((out, lse, *differentiate(problem)))
    judge(problem, out, lse)
    for result in results[:-1]:
        for got, want in zip(result, results[-1], strict=True):
            torch.testing.assert_close(got, want, atol=1e-5 if device == "cpu" else 4e-2, rtol=2e-2)


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_no_dropout(device: str, dtype: torch.dtype):
    """Rates of 0, or that round to it; a seed changes nothing then."""
    problem = make_problem(case("none", causal=True), device, dtype)
    mask, tensors = problem.mask(), leaves(problem)
    plain = call_and_differentiate(tensors, mask)
    seed = torch.tensor([1, 2], device=device)
    state = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    for options in ({"dropout_p": 0}, {"dropout_p": 0.0, "dropout_seed": seed}, {"dropout_p": 2.0**-17}):
        got = call_and_differentiate(tensors, mask, **options)
        assert all(same(x, y) for x, y in zip(got, plain, strict=True))
    assert torch.equal(state, torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state())


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_with_and_without_gradients(device: str, dtype: torch.dtype):
    """The same weights are dropped, by the first call of a mask and by later ones, in every mode."""
    problem = make_problem(case("modes", q_block=192, causal=True, dropout_p=0.3), device, dtype)
    options = problem.options()
    want = attend(*leaves(problem), problem.mask(), **options).detach()
    mask = problem.mask()
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            assert same(problem.run(mask)[0], want)
    # A mask that serves both kinds of calls.
    plain = dataclasses.replace(problem, case=dataclasses.replace(problem.case, dropout_p=0.0), dropout_seed=None)
    judge(plain, *plain.run(mask))
    judge_gradients(plain, differentiate(plain, mask=mask))
    judge_gradients(problem, differentiate(problem, mask=mask))
    assert same(problem.run(mask)[0], want)


@pytest.mark.parametrize("device", DEVICES)
def test_the_first_sequence(device: str):
    """Alone, or before others. Weights of others depend on their number."""
    spec = case("neighbours", lens_q=(37, 100), causal=True, dropout_p=0.3)
    problem = make_problem(spec, device, dtype_of(device))
    out, lse = problem.run()
    parts = {name: getattr(problem, name)[:37] for name in "qkv"}
    one = dataclasses.replace(
        problem, case=dataclasses.replace(spec, lens_q=(37,)), block_masks=problem.block_masks[:1], **parts
    )
    torch.testing.assert_close(one.run()[0], out[:37])
    torch.testing.assert_close(one.run()[1], lse[:, :37])


@pytest.mark.parametrize("device", DEVICES)
def test_masks_that_stay_lists(device: str, monkeypatch: pytest.MonkeyPatch):
    """They make all bits."""
    spec = case("lists", q_block=1, k_block=16, lens_q=(90, 40), source="indices", causal=True, dropout_p=0.3)
    problem = make_problem(spec, device, dtype_of(device))
    plain = problem.run()
    monkeypatch.setattr("hbsattn._chunks.CHUNK_BYTES", 4096)
    monkeypatch.setattr("hbsattn.mask.stays_lists", lambda *_: True)
    mask = problem.mask()
    assert mask._lists is not None
    assert all(same(x, y) for x, y in zip(problem.run(mask), plain, strict=True))


# Where seeds come from


@pytest.mark.parametrize("device", DEVICES)
def test_the_generator(device: str):
    """Seeds are the next numbers of PyTorch's generator."""
    problem = make_problem(case("generator", causal=True), device, dtype_of(device))
    mask, tensors = problem.mask(), inputs(problem)
    torch.manual_seed(3)
    first, second = (hbsattn.block_sparse_attention(*tensors, mask, dropout_p=0.3) for _ in range(2))
    torch.manual_seed(3)
    again = hbsattn.block_sparse_attention(*tensors, mask, dropout_p=0.3)
    assert same(first, again) and not torch.equal(first, second)
    torch.manual_seed(3)
    seeds = [torch.randint(2**63 - 1, (2,), device=device) for _ in range(2)]
    for seed, want in zip(seeds, (first, second), strict=True):
        assert same(hbsattn.block_sparse_attention(*tensors, mask, dropout_p=0.3, dropout_seed=seed), want)
    strided = torch.stack([seeds[0], seeds[0]], dim=1)[:, 0]
    assert same(hbsattn.block_sparse_attention(*tensors, mask, dropout_p=0.3, dropout_seed=strided), first)


@pytest.mark.parametrize("device", DEVICES)
def test_checkpointing(device: str):
    """What is computed again has the same weights dropped."""
    problem = make_problem(case("checkpoint", causal=True), device, dtype_of(device))
    mask, tensors = problem.mask(), leaves(problem)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, mask, dropout_p=0.3, deterministic=True)

    results = []
    for call in (layer, lambda *x: checkpoint(layer, *x, use_reentrant=False)):
        torch.manual_seed(7)
        out = call(*tensors)
        results.append((out.detach(), *torch.autograd.grad(out.float().square().sum(), tensors)))
    assert all(same(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_compiled(device: str):
    """With a seed, results are those of the same seed; without one, each call has its own."""
    torch._dynamo.reset()
    spec = case("compiled", lens_q=(128, 128), packed=False, causal=True, dropout_p=0.3)
    problem = make_problem(spec, device, dtype_of(device))
    mask, tensors = problem.mask(), leaves(problem)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(q: Tensor, k: Tensor, v: Tensor, p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        return attend(q, k, v, mask, dropout_p=p, dropout_seed=seed, return_lse=True)

    out, lse = call(*tensors, 0.3, problem.dropout_seed)
    judge(problem, out.detach(), lse.detach())
    judge_gradients(problem, torch.autograd.grad((out, lse), tensors, upstream(problem, lse.detach(), 7)))
    for p in (0.5, 0.2, 0.0):
        other = dataclasses.replace(problem, case=dataclasses.replace(spec, dropout_p=p))
        judge(other, *(x.detach() for x in call(*tensors, p, problem.dropout_seed)))
    first, second = (call(*tensors, 0.3, None)[0] for _ in range(2))
    assert not torch.equal(first, second)
    torch.autograd.grad(second.sum(), tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("trains", [False, True])
def test_replays_of_a_graph(trains: bool):
    """Each has weights of its own, or those of a seed that was rewritten."""
    problem = make_problem(case("graph", causal=True, dropout_p=0.3), "cuda", torch.bfloat16)
    mask = problem.mask()
    grads = upstream(problem, problem.run(mask)[1], 7)

    def call(seed: Tensor | None) -> tuple[Tensor, ...]:
        tensors = leaves(problem) if trains else inputs(problem)
        results = attend(*tensors, mask, dropout_p=0.3, dropout_seed=seed, return_lse=True)
        gradients = torch.autograd.grad(results, tensors, grads) if trains else ()
        return *(x.detach() for x in results), *gradients

    for seed in (problem.dropout_seed, None):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call(seed)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse, *gradients = call(seed)
        outs = []
        for number in range(3):
            if seed is not None:
                seed.copy_(make_dropout_seed(number))
            graph.replay()
            torch.cuda.synchronize()
            outs.append(out.clone())
            if seed is not None:
                judge(problem, out, lse)
                if trains:
                    judge_gradients(problem, tuple(gradients))
        assert not any(torch.equal(x, y) for x, y in ((outs[0], outs[1]), (outs[1], outs[2]), (outs[0], outs[2])))


# What is refused


@pytest.mark.parametrize(
    "options,error,words",
    [
        ({"dropout_p": 1.0}, ValueError, r"dropout_p is 1.0; expected at least 0 and less than 1"),
        ({"dropout_p": 1}, ValueError, r"dropout_p is 1.0; expected at least 0"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p is -0.1; expected at least 0"),
        ({"dropout_p": math.nan}, ValueError, r"dropout_p is nan; expected at least 0"),
        ({"dropout_p": math.inf}, ValueError, r"dropout_p is inf; expected at least 0"),
        ({"dropout_p": True}, TypeError, r"dropout_p is True; expected a real number"),
        ({"dropout_p": False}, TypeError, r"dropout_p is False; expected a real number"),
        ({"dropout_p": "0.1"}, TypeError, r"dropout_p is '0.1'; expected a real number"),
        ({"dropout_p": None}, TypeError, r"dropout_p is None; expected a real number"),
        ({"dropout_seed": 5}, TypeError, r"dropout_seed is a int; expected a Tensor of torch.int64"),
        ({"dropout_seed": (5, 6)}, TypeError, r"dropout_seed is a tuple; expected a Tensor of torch.int64"),
        ({"dropout_seed": torch.zeros(2)}, TypeError, r"dropout_seed has dtype torch.float32; expected torch.int64"),
        ({"dropout_seed": torch.zeros(3, dtype=torch.int64)}, ValueError, r"dropout_seed has shape \(3,\); expected"),
        ({"dropout_seed": torch.zeros((), dtype=torch.int64)}, ValueError, r"dropout_seed has 0 dimensions"),
    ],
)
def test_refused(options: dict[str, object], error: type[Exception], words: str):
    problem = make_problem(case("refused"), "cpu", torch.float32)
    for p in (0.0, 0.3):
        with pytest.raises(error, match=words):
            hbsattn.block_sparse_attention(*inputs(problem), problem.mask(), **{"dropout_p": p} | options)
    with pytest.raises(error, match=words):
        seed = torch.zeros(2, dtype=torch.int64)
        hbsattn.dropout_mask(*({"dropout_p": 0.1, "dropout_seed": seed} | options).values(), 1, 1, 1, 1)


def test_sizes_that_are_none():
    seed = torch.zeros(2, dtype=torch.int64)
    for place, name in enumerate(("batch", "heads_q", "seqlen_q", "seqlen_k")):
        sizes = [1, 1, 1, 1]
        sizes[place] = -1
        with pytest.raises(ValueError, match=f"{name} is -1; expected 0 to"):
            hbsattn.dropout_mask(0.1, seed, *sizes)


@pytest.mark.gpu
def test_a_seed_on_another_device():
    problem = make_problem(case("device"), "cuda", torch.bfloat16)
    for p in (0.0, 0.3):
        with pytest.raises(ValueError, match=r"dropout_seed is on cpu; expected cuda:0, where q is"):
            hbsattn.block_sparse_attention(
                *inputs(problem), problem.mask(), dropout_p=p, dropout_seed=torch.zeros(2, dtype=torch.int64)
            )


@pytest.mark.parametrize("device", DEVICES)
def test_no_second_derivative(device: str):
    problem = make_problem(case("twice", dropout_p=0.3), device, dtype_of(device))
    q, k, v = leaves(problem)
    out = attend(q, k, v, problem.mask(), **problem.options())
    (grad,) = torch.autograd.grad(out.float().square().sum(), (q,), create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()
