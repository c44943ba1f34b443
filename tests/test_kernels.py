"""Families of kernels: which a build has, which a call uses, and that no call uses what was planned for another."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools
import torch
from torch._subclasses import FakeTensorMode

import hbsattn
from cases import case
from gradients import any_order, attend, judge_gradients, leaves, upstream
from hbsattn import attention
from hbsattn._ops import kernel_family, shared_memory_limit
from hbsattn._plans import Plans
from hbsattn.utils import use_kernels
from problems import judge, make_problem, same

ROOT = Path(__file__).resolve().parents[1]


# The choice


@pytest.fixture
def before() -> str:
    return kernel_family()


def test_unknown_names(before: str):
    for name in ("", "sm_80", "SM80", "cpu"):
        with pytest.raises(ValueError, match=f"name is {name}; expected auto, sm90 or sm80"), use_kernels(name):
            pass
    with pytest.raises(TypeError, match="name is a int"), use_kernels(80):
        pass
    assert kernel_family() == before


def test_auto_is_everywhere(before: str):
    with use_kernels("auto"):
        assert kernel_family() == "auto"
    assert kernel_family() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.parametrize("name", ["sm90", "sm80"])
def test_without_a_device(name: str):
    """Neither family can be forced, and the error says which was asked for."""
    with pytest.raises((ValueError, RuntimeError), match=f"name is {name}, but "), use_kernels(name):
        pass
    assert kernel_family() == "auto"


@pytest.mark.gpu
def test_what_the_device_cannot_run(before: str):
    if torch.cuda.get_device_capability() == (9, 0) and "sm_90a" in hbsattn.build_info()["archs"]:
        pytest.skip("this device runs both families")
    with pytest.raises(ValueError, match="name is sm90, but the device has compute capability"), use_kernels("sm90"):
        pass
    assert kernel_family() == before


@pytest.mark.gpu
def test_which_kernels_run(before: str):
    problem = make_problem(case("chosen", q_block=128, k_block=128), "cuda", torch.bfloat16)
    with use_kernels("sm80"), any_order(), pytest.raises(ArithmeticError):
        told = hbsattn.explain(problem.q, problem.k, problem.v, problem.mask())
        ordered = hbsattn.explain(problem.q, problem.k, problem.v, problem.mask(), deterministic=True)
        names = {kernel["name"]: kernel["arch"] for kernel in hbsattn.build_info()["kernels"]}
        assert told["forward"]["kernel"] == "sm80_forward_bf16_hd64_m128"
        assert told["backward"]["kernel"] == "sm80_backward_keys_bf16_hd64_n128"
        assert told["backward"]["method"] == "by_keys" and not told["backward"]["queries_kernel"]
        assert ordered["backward"]["queries_kernel"] == "sm80_grad_queries_bf16_hd64_m128"
        assert ordered["backward"]["method"] == "by_keys_and_queries"
        assert all(names[x] in ("sm_80", "sm_90a") for x in (told["forward"]["kernel"], told["backward"]["kernel"]))
        raise ArithmeticError
    assert kernel_family() == before, "an error in the block does not keep the choice"


# Shared memory

LEAST = 99  # KB that CTAs of 8.6, 8.9 and 12.0 have


@pytest.fixture
def limit_before() -> int:
    return shared_memory_limit()


def test_shared_kilobytes_that_are_none(limit_before: int):
    with (
        pytest.raises(ValueError, match="shared_kilobytes is -1; expected 0 to"),
        use_kernels("auto", shared_kilobytes=-1),
    ):
        pass
    with pytest.raises(TypeError, match="shared_kilobytes is '99'"), use_kernels("auto", shared_kilobytes="99"):
        pass
    assert shared_memory_limit() == limit_before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_shared_kilobytes_without_a_device(before: str):
    refused = pytest.raises((ValueError, RuntimeError), match="shared_kilobytes is 99, but ")
    with refused, use_kernels("auto", shared_kilobytes=LEAST):
        pass
    assert kernel_family() == before and shared_memory_limit() == 0


def test_kernels_for_80_fit_all_devices():
    for kernel in hbsattn.build_info()["kernels"]:
        wide = kernel["dtype"] == "float32" and kernel["head_dim"] > 128 and "forward" not in kernel["name"]
        if kernel["name"].startswith("sm80") and not wide:
            assert kernel["shared_bytes"] <= LEAST * 1024, kernel["name"]


@pytest.mark.gpu
def test_shared_kilobytes_that_no_device_or_not_this_one_has(limit_before: int):
    for kilobytes in (1, LEAST - 1, 1 << 20):
        expected = f"shared_kilobytes is {kilobytes}; expected {LEAST}, .* to [0-9]+, what this one has"
        with pytest.raises(ValueError, match=expected), use_kernels("sm80", shared_kilobytes=kilobytes):
            pass
        assert shared_memory_limit() == limit_before


@pytest.mark.gpu
@pytest.mark.sm90
def test_kernels_that_take_more_are_refused(limit_before: int):
    problem = make_problem(case("refused", head_dim=256), "cuda", torch.bfloat16)
    with use_kernels("sm90", shared_kilobytes=LEAST), pytest.raises(ValueError, match="shared_kilobytes leaves 101376"):
        problem.run()
    assert shared_memory_limit() == limit_before
    judge(problem, *problem.run())


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128, 160, 192, 232, 256])
def test_everything_runs_in_99_kilobytes(head_dim: int):
    spec = case("small", q_block=64, k_block=32, lens_q=(700, 300), head_dim=head_dim, causal=True)
    problem = make_problem(spec, "cuda", torch.bfloat16)
    with use_kernels("sm80", shared_kilobytes=LEAST), use_kernels("sm80"):
        assert shared_memory_limit() == LEAST
        judge(problem, *problem.run())
        for deterministic in (False, True):
            q, k, v = leaves(problem)
            out, lse = attend(q, k, v, problem.mask(), return_lse=True, deterministic=deterministic)
            grads = torch.autograd.grad((out, lse), (q, k, v), upstream(problem, lse.detach(), 7))
            judge_gradients(problem, grads)


# Plans


@pytest.mark.parametrize("trains", [False, True])
def test_keys_of_plans(trains: bool, monkeypatch: pytest.MonkeyPatch):
    """They say for which kernels a plan is, and nothing else tells two choices apart."""
    asked: list[Any] = []
    find = Plans.find

    def watch(plans: Plans, key: Any) -> Any:
        asked.append(key)
        return find(plans, key)

    monkeypatch.setattr(Plans, "find", watch)
    keys = []
    with FakeTensorMode():
        q = torch.empty(1, 256, 8, 64, device="cuda", dtype=torch.bfloat16, requires_grad=trains)
        block_mask = torch.empty(1, 2, 4, 4, device="cuda", dtype=torch.bool)
        mask = hbsattn.BlockMask.from_dense(block_mask, 64, 64, seqlen_q=256, seqlen_k=256)
        choices = [("sm90", 0), ("sm80", 0), ("sm80", LEAST)]
        for choice in choices:
            monkeypatch.setattr(attention, "kernel_choice", lambda choice=choice: choice)
            asked.clear()
            hbsattn.block_sparse_attention(q, q, q, mask)
            keys.append([key for key in asked if key[0] in ("items", "backward")])
    assert {key[0] for key in keys[0]} == ({"items", "backward"} if trains else {"items"})
    for of_choices in zip(*keys, strict=True):
        assert [key[1] for key in of_choices] == choices
        assert len({(key[0], *key[2:]) for key in of_choices}) == 1


def test_a_plan_is_made_again_for_its_own_kernels(monkeypatch: pytest.MonkeyPatch):
    """Whatever is chosen by then; graphs read it where it is."""
    mask = make_problem(case("again"), "cpu", torch.float32).mask()
    auto, small, sm90 = ("auto", 0), ("sm80", LEAST), ("sm90", 0)
    chosen, made = [auto], []

    class Choice:
        def __init__(self, name: str, *, shared_kilobytes: int) -> None:
            self.choice = (name, shared_kilobytes)

        def __enter__(self) -> None:
            chosen.append(self.choice)

        def __exit__(self, *_: object) -> None:
            chosen.pop()

    plan = SimpleNamespace(default=lambda *_: made.append(chosen[-1]))
    monkeypatch.setattr(attention, "ops", SimpleNamespace(plan_items=plan, plan_backward=plan))
    monkeypatch.setattr(attention, "kernel_choice", lambda: chosen[-1])
    monkeypatch.setattr(attention, "use_kernels", Choice)
    heads = (8, 2, 64, 2, True)
    for kernels in (auto, small, sm90, None):
        attention._plan_items(mask, kernels, heads, False)
        attention._plan_backward(mask, kernels, heads, 100, False, (True, True, True), False)
    assert made == [auto, auto, small, small, sm90, sm90, auto, auto] and chosen == [auto]


@pytest.mark.gpu
def test_one_mask_for_two_limits():
    """Gradients of tiles of 128 keys come by another method where shared memory is small, and so by another plan."""
    spec = case("limits", q_block=128, k_block=128, lens_q=(700, 300), head_dim=128)
    problem = make_problem(spec, "cuda", torch.bfloat16)
    mask, methods = problem.mask(), []
    for limit in (0, LEAST) * 2:
        with use_kernels("sm80", shared_kilobytes=limit), any_order():
            methods.append(hbsattn.explain(problem.q, problem.k, problem.v, mask)["backward"]["method"])
            q, k, v = leaves(problem)
            out, lse = attend(q, k, v, mask, return_lse=True)
            judge_gradients(problem, torch.autograd.grad((out, lse), (q, k, v), upstream(problem, lse.detach(), 7)))
    assert methods == ["by_keys", "by_keys_and_queries"] * 2
    with use_kernels("sm80"):
        out = attend(q, k, v, mask)
    with use_kernels("sm80", shared_kilobytes=LEAST), pytest.raises(ValueError, match="sm80 in 99 KB; expected sm80"):
        out.sum().backward()


@pytest.mark.gpu
def test_float32_has_one_family():
    """The same kernels, whatever suits the device; those for 9.0 alone have none."""
    problem = make_problem(case("float32", head_dim=128), "cuda", torch.float32)
    out, lse = problem.run()
    judge(problem, out, lse)
    with use_kernels("sm80"):
        assert all(same(x, y) for x, y in zip(problem.run(), (out, lse), strict=True))


@pytest.mark.gpu
@pytest.mark.sm90
def test_float32_has_no_kernels_for_90():
    problem = make_problem(case("float32"), "cuda", torch.float32)
    refused = pytest.raises(ValueError, match="dtype of q is float32; expected float16 or bfloat16 on CUDA")
    with use_kernels("sm90"), refused:
        problem.run()


@pytest.mark.gpu
def test_one_mask_for_both():
    """Calls of two choices in turn, a mask that is rewritten in between, and gradients under another choice."""
    spec = case("both", q_block=64, k_block=64, lens_q=(700, 300), head_dim=128)
    problem = make_problem(spec, "cuda", torch.bfloat16)
    mask = problem.mask()
    first = {}
    for name in ("auto", "sm80") * 2:
        with use_kernels(name):
            results = problem.run(mask)
            judge(problem, *results)
            q, k, v = leaves(problem)
            out, lse = attend(q, k, v, mask, return_lse=True)
            grads = torch.autograd.grad((out, lse), (q, k, v), upstream(problem, lse.detach(), 7))
        judge_gradients(problem, grads)
        assert all(same(x, y) for x, y in zip(first.setdefault(name, results), results, strict=True))
    with use_kernels("sm80"):
        out = attend(*leaves(problem), mask)
    with use_kernels("auto"), pytest.raises(ValueError, match="use_kernels is auto; expected sm80"):
        out.sum().backward()


# Builds


def generate(folder: Path, *options: str) -> list[Path]:
    command = [sys.executable, str(ROOT / "csrc/kernels/generate_instances.py"), str(folder), *options]
    return [Path(x) for x in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]


def test_sources_of_families(tmp_path: Path):
    """Each family's are those of its table; files of a family that is no longer wanted go."""
    both, sm80 = generate(tmp_path), generate(tmp_path, "--families=sm80")
    assert {path.name for path in sm80} == {path.name for path in both if path.name.startswith("sm80_")}
    assert {path.name for path in (tmp_path / "instances").glob("*.cu")} == {path.name for path in sm80}
    text = (tmp_path / "instances/sm80_forward_hd128_64.cu").read_text()
    assert '#include "kernels/sm80/forward/launch.cuh"' in text
    assert "template Status run_sm80_forward<Sm80Forward<DType::kBFloat16, 128, 64>>(const ForwardParams&" in text
    assert "template int sm80_forward_shared_bytes<Sm80Forward<DType::kFloat16, 128, 64>>();" in text
    lists = (tmp_path / "instances/sm80_kernels.h").read_text()
    for name in ("Sm80ForwardKernels", "Sm80GradQueriesKernels", "Sm80BackwardKeysKernels"):
        assert f"using {name} = KernelTable<" in lists
    few = generate(tmp_path, "--head-dims=64,256", "--dtypes=fp16")
    assert {path.name.split("_hd")[1].split("_")[0] for path in few} == {"64", "256"}
    assert not any("kBFloat16" in path.read_text() for path in few)


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py defines, without a build."""
    monkeypatch.setattr(sys, "argv", ["setup.py", "--version"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    "given,expected",
    [
        (None, ["9.0a"]),
        ("native", ["9.0a"]),
        ("9.0", ["9.0a"]),
        ("9.0a", ["9.0a"]),
        ("9.0+PTX", ["9.0a"]),
        ("Hopper", ["9.0a"]),
        ("8.0", ["8.0"]),
        ("8.6;8.9+PTX", ["8.0"]),
        ("Ampere Ada", ["8.0"]),
        ("10.0a, 12.0", ["8.0"]),
        ("7.5;8.0;9.0a;12.0", ["8.0", "9.0a"]),
        ("Blackwell;Hopper+PTX", ["8.0", "9.0a"]),
    ],
)
def test_architectures(given: str | None, expected: list[str], setup: dict, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if given is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    assert list(setup["choose_codes"]()) == expected
    assert all(code in setup["GENCODE"] for code in expected)


@pytest.mark.parametrize("given", ["7.5", "Volta", "7.0+PTX;7.5", "x"])
def test_old_architectures(given: str, setup: dict, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    with pytest.raises(SystemExit, match="expected 9.0a, 8.0 or newer in it"):
        setup["choose_codes"]()


@pytest.mark.parametrize("devices,expected", [([(8, 6)], ["8.0"]), ([(9, 0), (8, 0)], ["8.0", "9.0a"])])
def test_architectures_of_devices(
    devices: list[tuple[int, int]], expected: list[str], setup: dict, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: devices[i])
    assert list(setup["choose_codes"]()) == expected


def test_sources_for_hopper_alone(setup: dict):
    folder = "build/generated/instances"
    assert setup["is_for_hopper_alone"](f"{folder}/forward_hd128_128.cu")
    for source in (f"{folder}/sm80_forward_hd128_128.cu", "csrc/kernels/device.cu", "csrc/core/api.cpp"):
        assert not setup["is_for_hopper_alone"](source)
