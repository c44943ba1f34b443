"""Checks of single arguments: what is no value of the right kind is refused by name, with what is accepted."""

import numbers
import operator

import torch
from torch import Tensor

BLOCK_LIMIT = 1 << 30  # block sizes are below
LEAST_SOFTCAP, MOST_SOFTCAP = 0.01, 1e6
LENGTH_LIMIT = 1 << 31  # lengths and batches are below
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def type_name(value: object) -> str:
    """The name of a value's type; with its module where that of hbsattn has the same name."""
    kind = type(value)
    return f"{kind.__module__}.{kind.__name__}" if kind.__name__ == "BlockMask" else kind.__name__


def check_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; expected True or False")
    return value


def check_index(name: str, value: object, least: int = 0, limit: int = LENGTH_LIMIT) -> int:
    """Returns an int for whatever has `__index__`, but for a bool: also numpy's integers, and integer tensors without
    dimensions on a CPU. It is at least `least` and less than `limit`.
    """
    if type(value) is not int:
        if isinstance(value, torch.SymInt):
            return value  # has no value yet: the op checks it
        if isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; expected an int")
        if isinstance(value, Tensor) and not _is_host_scalar(value):
            raise TypeError(f"{name} is {_describe(value)}; expected an int, or an integer Tensor () on the CPU")
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name} is {value!r}; expected an int") from None
    if torch.compiler.is_compiling():
        return value  # may be symbolic, where a comparison would become a guard
    if not least <= value < limit:
        raise ValueError(f"{name} is {value}; expected {least} to {limit - 1}")
    return value


def check_number(name: str, value: object) -> float:
    """Returns a float for a real number, which is no bool, or a real tensor of one element on the CPU."""
    if isinstance(value, float | torch.SymFloat):
        return value
    accepted = "a real number"
    if isinstance(value, Tensor):
        real = not (value.dtype == torch.bool or value.dtype.is_complex)
        if value.numel() != 1 or not real or value.device.type != "cpu":
            raise TypeError(f"{name} is {_describe(value)}; expected {accepted}, or a real Tensor of one on the CPU")
        return float(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}; expected {accepted}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is {value}; expected {accepted} in the range of a float") from None


def check_softcap(value: object) -> float:
    softcap = check_number("softcap", value)
    if not (softcap == 0 or LEAST_SOFTCAP <= softcap <= MOST_SOFTCAP):
        raise ValueError(f"softcap is {softcap}; expected 0, or a number from {LEAST_SOFTCAP} to 1e6")
    return softcap


def hint_at_flex(value: object) -> str:
    """What to do with a mask of FlexAttention, for the end of a message; nothing if `value` is none."""
    if not type_name(value).startswith("torch.nn.attention.flex_attention."):
        return ""
    return ": hbsattn.BlockMask.from_flex(mask) makes one of the same pairs"


def check_block_sizes(q_block_size: object, k_block_size: object) -> tuple[int, int]:
    q_block_size = check_index("q_block_size", q_block_size, 1, BLOCK_LIMIT)
    return q_block_size, check_index("k_block_size", k_block_size, 1, BLOCK_LIMIT)


def check_is_tensor(name: str, value: object, accepted: str = "a Tensor") -> None:
    """Refuses what is no tensor, or has no strides."""
    if _is_dense(value):
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type_name(value)}; expected {accepted}")
    kind = "nested" if value.is_nested else f"of layout {value.layout}"
    raise TypeError(f"{name} is {kind}; expected {accepted} that is dense, of layout torch.strided")


def _is_dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested


def _join(accepted: tuple[object, ...]) -> str:
    return " or ".join(map(str, accepted))


def check_tensor(name: str, tensor: object, dims: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if not _is_dense(tensor):
        check_is_tensor(name, tensor, f"a Tensor of {_join(dtypes)}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected {_join(dtypes)}")
    if tensor.dim() not in dims:
        raise ValueError(f"{name} has {tensor.dim()} dimensions, shape {tuple(tensor.shape)}; expected {_join(dims)}")


def check_dims(name: str, shape: torch.Size, dims: int, form: str) -> None:
    """Refuses a tensor of another form than the mask is for."""
    if len(shape) != dims:
        raise ValueError(
            f"{name} has {len(shape)} dimensions, shape {tuple(shape)}; expected {dims}, as mask was built for {form} "
            "tensors"
        )


def check_batched(name: str, shape: torch.Size, seqlen: int, block_size: int) -> None:
    """Refuses a tensor that is not (batch, seqlen, heads, head_dim)."""
    if len(shape) == 4 and shape[1] == seqlen:
        return
    check_dims(name, shape, 4, "batched")
    length = shape[1]
    hint = ""
    if shape[2] == seqlen:
        hint = ": heads come after the length, (batch, length, heads, head_dim)"
    elif -(-length // block_size) == -(-seqlen // block_size):
        hint = f": for this one, build the mask with seqlen_{name}={length}"
    raise ValueError(f"{name} has length {length}; expected {seqlen}, the seqlen_{name} that mask has{hint}")


def check_same_device(name: str, tensor: Tensor, device: torch.device, whose: str) -> None:
    """Refuses a tensor on another device than `whose`. The ops do, too, but for meta tensors: with one of those an op
    only tells shapes.
    """
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; expected {device}, where {whose} is")


def check_device(device: object) -> torch.device:
    if isinstance(device, bool) or not isinstance(device, torch.device | str | int):
        raise TypeError(f"device is {device!r}; expected a torch.device, a str or an int")
    try:
        return torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}; expected one that torch.device knows, such as cpu or cuda:0") from None


def _is_host_scalar(tensor: Tensor) -> bool:
    kind = tensor.dtype
    is_integer = not (kind.is_floating_point or kind.is_complex or kind == torch.bool)
    return tensor.dim() == 0 and tensor.device.type == "cpu" and is_integer


def _describe(tensor: Tensor) -> str:
    # Not its repr: on another device that would wait.
    return f"a Tensor {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
