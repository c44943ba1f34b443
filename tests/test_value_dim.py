"""Values whose head dim is another than that of queries and keys."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import cases
import hbsattn
from cases import DEVICE_DTYPES, DEVICES, TOKENS, Case, case
from gradients import attend, differentiate, judge_gradients, leaves
from problems import judge, make_problem, same

HALF = [p for p in DEVICE_DTYPES if p.id != "cpu-float32"]
MLA = {"head_dim": 192, "value_dim": 128}  # has kernels of its own, as has all that is up to so much
SPECS = [
    case("mla", **MLA, q_block=128, k_block=128, lens_q=(300, 90), lens_k=(700, 90)),
    case("mla_causal", **MLA, q_block=128, k_block=128, lens_q=(700, 90), causal=True),
    case("mla_64", **MLA, causal=True),
    case("mla_of_16_keys", **MLA, q_block=128, k_block=16, lens_q=(300, 20), lens_k=(500, 90), causal=True),
    case("mla_ragged", **MLA, q_block=100, k_block=100, lens_q=(230, 40), causal=True),
    case("mla_small", **MLA, q_block=7, k_block=48, heads_q=8, mask_heads=2, causal=True),
    case("mla_tokens", **MLA, **TOKENS, lens_q=(70, 5), causal=True),
    case("mla_tokens_alike", **MLA, **TOKENS, pattern="alike", lens_q=(40,), k_block=16),
    case("mla_alike", **MLA, pattern="alike", q_block=16, heads_q=8, mask_heads=8, k_block=32, lens_q=(300,)),
    case("mla_batched", **MLA, q_block=128, packed=False, lens_q=(150, 150), lens_k=(210, 210), layout="heads_first"),
    case("mla_rows_first", **MLA, layout="rows_first", lens_q=(150,) * 3, packed=False, causal=True),
    case("mla_empty_rows", **MLA, pattern="empty_rows", q_block=128, lens_q=(0, 700, 0, 50), lens_k=(40, 300, 0, 0)),
    case("mla_one_column", **MLA, pattern="one_column", q_block=128, k_block=128, lens_q=(1500,), lens_k=(400,)),
    case("mla_sets", **MLA, q_block=8208, k_block=64, heads_q=8, heads_k=1, mask_heads=1, lens_q=(130,)),
    case("mla_windows", **MLA, q_block=128, lens_q=(700, 90), causal=True, windows=((100, 0, 5),)),
    case("mla_sinks", **MLA, q_block=128, causal=True, sinks=True),
    case("mla_dropout", **MLA, q_block=128, causal=True, dropout_p=0.2),
    case("mla_shorter", head_dim=184, value_dim=120, q_block=128, causal=True, layout="padded"),
    case("mla_uneven", head_dim=150, value_dim=90, q_block=128, causal=True),
    case("mla_shortest", head_dim=136, value_dim=8, q_block=128, k_block=128, layout="padded"),
    case("longer_keys", head_dim=128, value_dim=64, q_block=128, causal=True),
    case("longer_values", head_dim=64, value_dim=128, q_block=128, causal=True),
    case("much_longer_values", head_dim=16, value_dim=256, q_block=64, k_block=48),
    case("much_longer_keys", head_dim=256, value_dim=16, q_block=128, causal=True),
    case("by_queries", head_dim=128, value_dim=40, q_block=128, k_block=16, lens_k=(500, 37, 200), causal=True),
    case("by_queries_longer_values", head_dim=40, value_dim=96, q_block=128, k_block=32, lens_k=(500, 37, 200)),
    case("192_rows", head_dim=96, value_dim=128, q_block=192, k_block=48, lens_q=(400, 191, 5), causal=True),
    case("pairs", head_dim=128, value_dim=96, lens_q=(1100, 70), lens_k=(1100, 600), density=0.9),
    case("pairs_longer_values", head_dim=64, value_dim=96, lens_q=(1100,), density=0.9, causal=True),
    case("padded", head_dim=128, value_dim=64, q_block=128, k_block=128, layout="padded", causal=True),
    case("tails", head_dim=40, value_dim=72, q_block=112, k_block=96, lens_q=(111, 113), layout="padded"),
    case("tails_of_values", head_dim=72, value_dim=40, q_block=64, k_block=64, layout="padded", causal=True),
    case("odd", head_dim=101, value_dim=18, causal=True, layout="odd"),
    case("odd_values", head_dim=64, value_dim=33, causal=True),
    case("odd_keys", head_dim=33, value_dim=64, causal=True),
    case("one_column_of_values", head_dim=80, value_dim=1, q_block=32, k_block=48),
    case("tokens", **TOKENS, head_dim=128, value_dim=64, lens_q=(70, 5), causal=True, density=0.3),
    case("stacks", q_block=6, heads_q=24, heads_k=1, mask_heads=1, k_block=48, head_dim=64, value_dim=96),
    case(
        "sets", heads_q=8, heads_k=1, mask_heads=1, q_block=8208, k_block=128, lens_q=(130,), head_dim=64, value_dim=128
    ),
    case("dropout", head_dim=128, value_dim=64, q_block=128, k_block=128, causal=True, dropout_p=0.2),
]
METHODS = [dataclasses.replace(s, value_dim=d) for s in cases.BACKWARD_METHODS for d in (s.head_dim // 2, 72, 192)]


def by_name(spec: Case) -> str:
    return f"{spec.name}-{spec.head_dim}-{spec.value_dim}"


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_forward(spec: Case, device: str, dtype: torch.dtype):
    problem = make_problem(spec, device, dtype)
    judge(problem, *problem.run())


@pytest.mark.parametrize("deterministic", [False, True], ids=["any_order", "deterministic"])
@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=by_name)
def test_backward(spec: Case, device: str, dtype: torch.dtype, deterministic: bool):
    if device == "cpu" and deterministic:
        pytest.skip("always so on a CPU")
    problem = make_problem(spec, device, dtype)
    judge_gradients(problem, differentiate(problem, deterministic=deterministic))


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
@pytest.mark.parametrize("spec", METHODS, ids=by_name)
def test_each_method(spec: Case, device: str, dtype: torch.dtype):
    problem = make_problem(spec, device, dtype)
    judge(problem, *problem.run())
    judge_gradients(problem, differentiate(problem))


@pytest.mark.parametrize("head_dim,value_dim", [(128, 64), (64, 128), (192, 136), (256, 8)])
@pytest.mark.parametrize("k_block", [16, 64, 128])
@pytest.mark.parametrize("device,dtype", HALF)
def test_zeros_in_the_last_columns_change_nothing(
    head_dim: int, value_dim: int, k_block: int, device: str, dtype: torch.dtype
):
    """Where the greater head dim chooses the kernel, a call with as many columns of zeros more has the same results."""
    spec = case("zeros", head_dim=head_dim, value_dim=value_dim, q_block=128, k_block=k_block, causal=True, scale=0.1)
    problem = make_problem(spec, device, dtype)
    out, lse = problem.run()
    widest = max(head_dim, value_dim)
    widened = [torch.nn.functional.pad(x, (0, widest - x.shape[-1])) for x in (problem.q, problem.k, problem.v)]
    wide_out, wide_lse = hbsattn.block_sparse_attention(
        *widened, problem.mask(), softmax_scale=spec.scale, return_lse=True
    )
    torch.testing.assert_close(out, wide_out[..., :value_dim])
    torch.testing.assert_close(lse, wide_lse, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("spec", SPECS[:3], ids=by_name)
@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)], ids=["q", "k", "v"]
)
@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_frozen(spec: Case, needs: tuple[bool, bool, bool], device: str, dtype: torch.dtype):
    problem = make_problem(spec, device, dtype)
    want = differentiate(problem, with_lse=False, deterministic=True)
    tensors = [x.detach().requires_grad_(needed) for x, needed in zip(leaves(problem), needs, strict=True)]
    out = attend(*tensors, problem.mask(), deterministic=True)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(dtype).to(device)
    (got,) = torch.autograd.grad(out, [x for x, needed in zip(tensors, needs, strict=True) if needed], grad_out)
    assert same(got, want[needs.index(True)])


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_rows_of_nobody(device: str, dtype: torch.dtype):
    """Rows behind the last sequence have zeros, in results and in gradients."""
    spec = case("gaps", **MLA, q_block=128, lens_q=(200, 90), lens_k=(150, 80), causal=True)
    problem = make_problem(spec, device, dtype)
    mask = problem.mask(source="indices")
    q, k, v = (torch.cat([x, torch.ones_like(x[:70])]).requires_grad_() for x in (problem.q, problem.k, problem.v))
    out = attend(q, k, v, mask)
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert out.shape == (*q.shape[:-1], v.shape[-1])
    for x, rows in zip((out, *grads), (290, 290, 230, 230), strict=True):
        assert bool((x[rows:] == 0).all()) and bool((x[:rows] != 0).any())


@pytest.mark.parametrize("device,dtype", DEVICE_DTYPES)
def test_lists_that_stay_lists(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hbsattn._chunks.CHUNK_BYTES", 64)
    spec = case(
        "lists", q_block=1, k_block=16, head_dim=64, value_dim=24, lens_q=(120, 33), source="indices", density=0.1
    )
    problem = make_problem(spec, device, dtype)
    judge(problem, *problem.run())


@pytest.mark.parametrize("device", DEVICES)
def test_flops(device: str):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    spec = case("flops", head_dim=48, value_dim=16, density=1.0, lens_q=(128,), heads_q=2, mask_heads=1)
    problem = make_problem(spec, device, dtype)
    tensors = leaves(problem)
    with FlopCounterMode(display=False) as counter:
        out = hbsattn.block_sparse_attention(*tensors, problem.mask())
    assert counter.get_total_flops() == 2 * 128 * 128 * 2 * (48 + 16)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 128 * 128 * 2 * (3 * 48 + 2 * 16)


@pytest.mark.parametrize("device", DEVICES)
def test_compile(device: str):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    problem = make_problem(SPECS[0], device, dtype)
    mask = problem.mask()

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return hbsattn.block_sparse_attention(q, k, v, mask, deterministic=True) * 2

    results = []
    for function in (run, torch.compile(run, fullgraph=True)):
        tensors = leaves(problem)
        out = function(*tensors)
        results.append((out, *torch.autograd.grad(out, tensors, torch.ones_like(out))))
    for eager, compiled in zip(*results, strict=True):
        assert same(eager.detach(), compiled.detach())


@pytest.mark.gpu
@pytest.mark.sm90
@pytest.mark.parametrize(
    "changes,kernel,queries_kernel",
    [
        ({}, "short_values", "short_values"),
        ({"head_dim": 136, "value_dim": 8}, "short_values", "short_values"),
        ({"value_dim": 136}, "bf16_hd192", "bf16_hd192"),
        ({"head_dim": 200}, "bf16_hd256", "bf16_hd256"),
        ({"head_dim": 128, "value_dim": 192}, "bf16_hd192", "bf16_hd192"),
        ({"head_dim": 128, "value_dim": 64}, "bf16_hd128", "bf16_hd128"),
        ({"k_block": 100}, "bf16_hd192", "short_values"),  # the forward has no general kernel for short values
    ],
)
def test_which_kernel(changes: dict[str, int], kernel: str, queries_kernel: str):
    spec = case("chosen", **{**MLA, "q_block": 128, "k_block": 128, **changes})
    problem = make_problem(spec, "cuda", torch.bfloat16)
    plan = hbsattn.explain(problem.q, problem.k, problem.v, problem.mask(), deterministic=True)
    assert kernel in plan["forward"]["kernel"]
    assert queries_kernel in plan["backward"]["kernel"]
    assert queries_kernel in plan["backward"]["queries_kernel"]
