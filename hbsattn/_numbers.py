"""Numbers of which each mask head may have its own: an int, a sequence of ints, or an int tensor (heads)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hbsattn._checks import LENGTH_LIMIT, check_index, check_same_device, check_tensor
from hbsattn._contents import can_read

Numbers = int | Sequence[int] | Tensor


def numbers_of_heads(name: str, value: Numbers, device: torch.device, whose: str, least: int = 0) -> Tensor:
    """int64 (heads, 1), or (1, 1) for one number; at least `least`, where they can be read."""
    if isinstance(value, Tensor):
        check_tensor(name, value, (1,), (torch.int32, torch.int64))
        check_same_device(name, value, device, whose)
        if can_read(value) and value.numel() and int(value.min()) < least:
            raise ValueError(f"{name} holds {int(value.min())}; expected {least} to {LENGTH_LIMIT - 1}")
        return value.to(torch.int64).unsqueeze(-1)
    if isinstance(value, (str, bytes)) or not (isinstance(value, Sequence) or hasattr(value, "__index__")):
        raise TypeError(f"{name} is {value!r}; expected an int, a sequence of ints, or an int Tensor (heads)")
    if not isinstance(value, Sequence):
        return torch.full((1, 1), check_index(name, value, least), dtype=torch.int64, device=device)
    numbers = torch.tensor([check_index(f"{name}[{i}]", x, least) for i, x in enumerate(value)], dtype=torch.int64)
    if device.type == "cuda" and not torch.compiler.is_compiling():  # from pageable memory, a copy would wait
        numbers = numbers.pin_memory()
    return numbers.to(device, non_blocking=True).unsqueeze(-1)


def broadcast_heads(numbers: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Numbers (heads, 1) or (1, 1), by name, as (heads, 1) each."""
    heads = common_heads({name: value.shape[0] for name, value in numbers.items()})
    return tuple(value.expand(heads, 1) for value in numbers.values())


def common_heads(heads: dict[str, int]) -> int:
    """As many as the most of them, of which each has 1 or as many."""
    most = max(heads.values())
    for name, count in heads.items():
        if count == 0:
            raise ValueError(f"{name} has 0 heads; expected 1 or more")
        if count not in (1, most):
            raise ValueError(f"{name} has {count} heads; expected 1 or {most}")
    return most
