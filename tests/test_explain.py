"""`explain` tells what a call does, as kernels and work lists have it."""

from __future__ import annotations

import pytest
import torch

import hbsattn
from cases import DEVICES, case
from gradients import any_order, leaves
from plans import plan_items
from problems import make_problem


def test_on_a_cpu():
    problem = make_problem(case("explained"), "cpu", torch.float32)
    told = hbsattn.explain(problem.q, problem.k, problem.v, problem.mask())
    assert told == {"forward": {"kernel": "cpu"}, "backward": {"kernel": "cpu"}}
    with pytest.raises(TypeError, match="mask is a NoneType"):
        hbsattn.explain(problem.q, problem.k, problem.v, None)


@pytest.mark.parametrize("device", DEVICES)
def test_what_does_not_fit(device: str):
    """As the call itself."""
    problem = make_problem(case("refused", head_dim=64), device, torch.float16)
    with pytest.raises(ValueError, match="v has"):
        hbsattn.explain(problem.q, problem.k, problem.v[:-1], problem.mask())
    with pytest.raises(TypeError, match="dtype"):
        hbsattn.explain(*(x.int() for x in (problem.q, problem.k, problem.v)), problem.mask())


@pytest.mark.parametrize("device", DEVICES)
def test_values_beside_lists(device: str, monkeypatch: pytest.MonkeyPatch):
    """Masks that stay lists have no bits to check a call with."""
    monkeypatch.setattr("hbsattn.mask.stays_lists", lambda *_: True)
    spec = case("lists", q_block=1, k_block=16, source="indices")
    problem = make_problem(spec, device, torch.float16)
    mask = problem.mask()
    assert hbsattn.explain(problem.q, problem.k, problem.v[..., :8], mask)["forward"]["kernel"]
    for wrong in (
        problem.v[:-1],
        problem.v[..., :0],
        problem.v.new_ones(()),
        problem.v.new_ones((*problem.v.shape[:2], 257)),
    ):
        with pytest.raises(ValueError, match="v has shape"):
            hbsattn.explain(problem.q, problem.k, wrong, mask)


@pytest.mark.gpu
@pytest.mark.sm90
@pytest.mark.parametrize(
    "q_block,k_block,deterministic,method,rows",
    [
        (128, 128, False, "by_keys", 128),
        (128, 16, False, "by_queries", 128),
        (128, 128, True, "by_keys_and_queries", 128),
        (64, 64, False, "by_keys_and_queries", 64),
    ],
)
def test_on_a_gpu(q_block: int, k_block: int, deterministic: bool, method: str, rows: int):
    spec = case("explained", q_block=q_block, k_block=k_block, head_dim=128, lens_q=(500, 300))
    problem = make_problem(spec, "cuda", torch.bfloat16)
    mask = problem.mask()
    with any_order():
        told = hbsattn.explain(*leaves(problem), mask, deterministic=deterministic)
    forward, backward = told["forward"], told["backward"]
    names = {kernel["name"] for kernel in hbsattn.build_info()["kernels"]}
    assert forward["kernel"] in names and backward["kernel"] in names
    assert backward["method"] == method and backward["tile_rows"] == rows
    assert bool(backward["queries_kernel"]) == (method == "by_keys_and_queries")
    live = int((plan_items(mask, spec.heads_q, spec.heads_k, 128, 2, True)[:, 0] >= 0).sum())
    assert live <= forward["num_items"]
    frozen = hbsattn.explain(problem.q.requires_grad_(), problem.k, problem.v, mask)["backward"]
    assert frozen["method"] == "queries_only"


@pytest.mark.parametrize("device", DEVICES)
def test_windows(device: str):
    problem = make_problem(case("explained", windows=((20, 0, 3),)), device, torch.float16)
    told = hbsattn.explain(problem.q, problem.k, problem.v, problem.mask())
    assert told.keys() == {"forward", "backward"} and told["forward"]["kernel"]


@pytest.mark.gpu
@pytest.mark.sm90
@pytest.mark.parametrize("options", [{"softcap": 50.0}, {"dropout_p": 0.1}], ids=["softcap", "dropout"])
def test_what_alters_weights(options: dict[str, float]):
    """Kernels of their own, none of tiles of 192 rows, nor by queries."""
    names = {kernel["name"] for kernel in hbsattn.build_info()["kernels"]}
    for q_block, k_block, rows, method in ((192, 128, 64, "by_keys"), (128, 16, 128, "by_keys_and_queries")):
        spec = case("explained", q_block=q_block, k_block=k_block, head_dim=128, lens_q=(500,))
        problem = make_problem(spec, "cuda", torch.bfloat16)
        with any_order():
            told = hbsattn.explain(problem.q, problem.k, problem.v, problem.mask(), **options)
        assert told["forward"]["kernel"] == f"sm90_forward_altered_bf16_hd128_m{rows}"
        assert told["backward"]["kernel"] in names and "altered" in told["backward"]["kernel"]
        assert told["backward"]["method"] == method


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_out_of_range(device: str):
    problem = make_problem(case("explained"), device, torch.float16)
    for options in ({"softcap": -1.0}, {"softcap": 1e-50}, {"dropout_p": 1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            hbsattn.explain(problem.q, problem.k, problem.v, problem.mask(), **options)
