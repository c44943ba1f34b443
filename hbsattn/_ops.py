"""Loads the compiled extension, which declares the ops, and adds what PyTorch needs beside their kernels.

The schemas are in csrc/torch/schemas.cpp, with the CUDA kernels and the autograd rules beside them; the CPU kernels are
in _cpu. Here are the fake kernels, which tell shapes while a program is traced, and the formulas of the flop counter.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

try:
    import hbsattn._C as _C
except ImportError as error:
    raise ImportError(
        f"hbsattn._C, the compiled extension, does not load ({error}); build it with the PyTorch you run "
        f"(torch {torch.__version__}), in a checkout of hbsattn: "
        "`pip install --no-build-isolation --config-settings editable_mode=compat -e .`"
    ) from error

from hbsattn import _cpu  # noqa: F401  (registers the CPU kernels)
from hbsattn._layout import (
    ITEM_INTS,
    SEQUENCE_INTS,
    Call,
    CallShape,
    MaskLayout,
    ceil_div,
    count_backward_plan,
    count_items,
    takes_call,
)
from hbsattn._partial import Partial, count_attending

build_info = _C.build_info
kernel_family, set_kernel_family = _C.kernel_family, _C.set_kernel_family
limit_shared_memory, shared_memory_limit = _C.limit_shared_memory, _C.shared_memory_limit
kernel_choice = _C.kernel_choice
ops = torch.ops.hbsattn


def _check_devices(**arguments: object) -> torch.device:
    """Refuses tensors of different devices. Real calls come here if one of their tensors is on the meta device."""
    given = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    first, *others = given
    device = given[first].device
    for name in others:
        if given[name].device != device:
            raise ValueError(f"{name} is on {given[name].device}; expected {device}, where {first} is")
    return device


@torch.library.register_fake("hbsattn::make_sequences")
def _(
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    device: torch.device,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    row_stride: int,
    q_block_size: int,
    k_block_size: int,
) -> Tensor:
    sequences = torch.empty((batch, SEQUENCE_INTS), dtype=torch.int32, device=device)
    _check_devices(sequences=sequences, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    return sequences


def _fake_bits(like: Tensor, heads: int, rows: int, *layout: int) -> Tensor:
    return like.new_empty((heads, rows, ceil_div(MaskLayout(*layout).cols, 32)), dtype=torch.int32)


@torch.library.register_fake("hbsattn::pack_dense")
def _(block_mask: Tensor, sequences: Tensor, flat: bool, rows: int, *layout: int) -> Tensor:
    _check_devices(block_mask=block_mask, sequences=sequences)
    return _fake_bits(block_mask, block_mask.shape[0 if flat else 1], rows, *layout)


@torch.library.register_fake("hbsattn::make_dense")
def _(
    block_mask: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    row_stride: int,
    rows: int,
    *layout: int,
) -> tuple[Tensor, Tensor]:
    device = _check_devices(block_mask=block_mask, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if device.type == "meta":  # a real call: make_sequences refuses the device itself
        raise ValueError("block_mask is on meta; expected cpu or cuda")
    sequences = block_mask.new_empty((batch, SEQUENCE_INTS), dtype=torch.int32)
    return _fake_bits(block_mask, block_mask.shape[-3], rows, *layout), sequences


@torch.library.register_fake("hbsattn::pack_indices")
def _(counts: Tensor, indices: Tensor, sequences: Tensor, flat: bool, rows: int, *layout: int) -> Tensor:
    _check_devices(counts=counts, indices=indices, sequences=sequences)
    return _fake_bits(counts, counts.shape[0 if flat else 1], rows, *layout)


@torch.library.register_fake("hbsattn::pack_csr")
def _(indptr: Tensor, indices: Tensor, sequences: Tensor, rows: int, *layout: int) -> Tensor:
    _check_devices(indptr=indptr, indices=indices, sequences=sequences)
    return _fake_bits(indptr, indptr.shape[0], rows, *layout)


@torch.library.register_fake("hbsattn::plan_items")
def _(
    bits: Tensor,
    sequences: Tensor,
    rules: Tensor | None,
    layout: Sequence[int],
    heads: Sequence[int],
    for_backward: bool = False,
) -> Tensor:
    _check_devices(bits=bits, sequences=sequences, rules=rules)
    return bits.new_empty((count_items(bits.shape, MaskLayout(*layout), CallShape(*heads)), ITEM_INTS))


@torch.library.register_fake("hbsattn::plan_backward")
def _(
    bits: Tensor,
    sequences: Tensor,
    rules: Tensor | None,
    layout: Sequence[int],
    heads: Sequence[int],
    rows_k: int,
    packed: bool,
    deterministic: bool,
    needs: Sequence[bool],
    altered: bool = False,
) -> Tensor:
    _check_devices(bits=bits, sequences=sequences, rules=rules)
    shape = (bits.shape, sequences.shape[0], MaskLayout(*layout), CallShape(*heads))
    return bits.new_empty((count_backward_plan(*shape, rows_k, packed),))


@torch.library.register_fake("hbsattn::check_mask")
@torch.library.register_fake("hbsattn::check_forward")
@torch.library.register_fake("hbsattn::check_backward")
def _(*args: object) -> None:
    return None


@torch.library.register_fake("hbsattn::forward")
@takes_call
def _(
    call: Call, items: Tensor | None, backward_plan: Tensor | None, deterministic: bool = False
) -> tuple[Tensor, Tensor]:
    _check_devices(**call._asdict(), items=items, backward_plan=backward_plan)
    return _fake_results(call)


def _fake_results(call: Call) -> tuple[Tensor, Tensor]:
    q = call.q
    *batch, rows, heads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty((*batch, rows, heads, call.v.shape[-1]))
    return out, q.new_empty((*batch, heads, rows), dtype=lse_dtype)


@torch.library.register_fake("hbsattn::plan_and_forward")
@takes_call
def _(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices(**call._asdict())
    q, bits = call.q, call.bits
    head_dim = max(q.shape[-1], call.v.shape[-1])
    shape = CallShape(q.shape[-2], call.k.shape[-2], head_dim, q.element_size(), call.pack_heads)
    items = bits.new_empty((count_items(bits.shape, MaskLayout(*call.layout), shape), ITEM_INTS))
    return (*_fake_results(call), items)


@torch.library.register_fake("hbsattn::backward")
@takes_call
def _(
    call: Call,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    plan: Tensor | None,
    deterministic: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_devices(**call._asdict(), grad_out=grad_out, grad_lse=grad_lse, out=out, lse=lse, plan=plan)
    tensors = zip((call.q, call.k, call.v, lse if call.sinks is None else call.sinks), needs, strict=True)
    return tuple([x.new_empty(x.shape if needed else (0,)) for x, needed in tensors])


def _count_flops(call: Call, of_q: int, of_v: int) -> int:
    """2 for each column of so many products of q's head dim, and of v's, and each pair of a query and a key that
    attend. A mask without values, as in a traced program, is counted as one of all blocks.
    """
    partial = None if call.partial is None else Partial(call.partial, call.matrices, call.elements)
    pairs = count_attending(call.bits, call.sequences, MaskLayout(*call.layout), call.rules, partial)
    columns = of_q * call.q.shape[-1] + of_v * call.v.shape[-1]
    return 2 * columns * pairs * (call.q.shape[-2] // max(call.bits.shape[0], 1))


@register_flop_formula(ops.forward, get_raw=True)
@register_flop_formula(ops.plan_and_forward, get_raw=True)
@takes_call
def _(call: Call, *own: object, **kwargs: object) -> int:
    return _count_flops(call, 1, 1)


@register_flop_formula(ops.backward, get_raw=True)
@takes_call
def _(call: Call, *own: object, **kwargs: object) -> int:
    return _count_flops(call, 3, 2)
