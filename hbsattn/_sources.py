"""The forms in which a mask is given, each with its checks and the op that packs it into bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hbsattn._checks import check_same_device, check_tensor, hint_at_flex, type_name
from hbsattn._layout import ceil_div
from hbsattn._ops import ops
from hbsattn._placement import Lengths, Place, make_sequences

INTEGERS = (torch.int32, torch.int64)
Layout = tuple[int, int, int, int]  # a MaskLayout, without partial blocks


class _Form:
    """`main` is the tensor whose shape tells where blocks lie: `lead`, as `place_blocks` takes it."""

    names: tuple[str, ...]  # of the arguments

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.names)

    @property
    def main(self) -> Tensor:
        return getattr(self, self.names[0])

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.main.shape)

    @property
    def heads(self) -> int:
        return self.lead[-2]

    def make(self, lengths: Lengths, place: Place, causal: bool) -> tuple[Tensor, Tensor]:
        """Returns the bits and the table of sequences of a new mask."""
        sequences = make_sequences(lengths, place, self.main.device)
        return self.pack(sequences, place.rows, place.layout(causal)), sequences


@dataclass(eq=False)
class Dense(_Form):
    """Bool (heads, query blocks, key blocks) of all sequences, or (batch or 1, heads, query blocks, key blocks)."""

    block_mask: Tensor

    form = "dense"
    names = ("block_mask",)

    @classmethod
    def check(cls, block_mask: object) -> Dense:
        hint = "" if isinstance(block_mask, Tensor) else hint_at_flex(block_mask)
        if hint:
            raise TypeError(f"block_mask is a {type_name(block_mask)}; expected a Tensor of torch.bool{hint}")
        check_tensor("block_mask", block_mask, (3, 4), (torch.bool,))
        return cls(block_mask)

    @property
    def tensors(self) -> tuple[Tensor]:
        return (self.block_mask,)

    @property
    def main(self) -> Tensor:
        return self.block_mask

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.block_mask.shape[:-1])

    @property
    def heads(self) -> int:
        return self.block_mask.shape[-3]

    @property
    def cols(self) -> int:
        return self.block_mask.shape[-1]

    def make(self, lengths: Lengths, place: Place, causal: bool) -> tuple[Tensor, Tensor]:
        # One op instead of two: a new mask for each call is the common way to use this form.
        seqlens = (0, 0) if place.packed else (place.seqlen_q, place.seqlen_k)
        shape = (place.batch, *seqlens, place.row_stride, place.rows)
        return ops.make_dense.default(self.block_mask, *lengths[:2], *shape, *place.layout(causal))

    def pack(self, sequences: Tensor, rows: int, layout: Layout) -> Tensor:
        """Returns the bits, int32 (heads, rows, ceil(cols / 32)); so do the others."""
        flat = self.block_mask.dim() == 3
        return ops.pack_dense.default(self.block_mask, sequences, flat, rows, *layout)


@dataclass(eq=False)
class Lists(_Form):
    """int32 counts (heads, rows) of all sequences, or (batch or 1, heads, query blocks), and indices, of a dimension
    more."""

    counts: Tensor
    indices: Tensor

    form = "indices"
    names = ("counts", "indices")
    cols = None

    @classmethod
    def check(cls, counts: object, indices: object) -> Lists:
        check_tensor("counts", counts, (2, 3), INTEGERS)
        check_tensor("indices", indices, (counts.dim() + 1,), INTEGERS)
        if indices.shape[:-1] != counts.shape:
            raise ValueError(
                f"indices has shape {tuple(indices.shape)}; expected that of counts, {tuple(counts.shape)}, and one "
                "more dimension"
            )
        check_same_device("indices", indices, counts.device, "counts")
        return cls(_to_int32(counts), _to_int32(indices))

    def pack(self, sequences: Tensor, rows: int, layout: Layout) -> Tensor:
        flat = self.counts.dim() == 2
        return ops.pack_indices.default(self.counts, self.indices, sequences, flat, rows, *layout)

    def cut(self, begin: int, end: int) -> Lists:
        """The lists of some rows, of each batch entry if they are batched."""
        return Lists(self.counts[..., begin:end].contiguous(), self.indices[..., begin:end, :].contiguous())

    def clone(self) -> Lists:
        return Lists(self.counts.clone(), self.indices.clone())


@dataclass(eq=False)
class Rows(_Form):
    """Compressed sparse rows: int32 indptr (heads, rows + 1) and indices (entries)."""

    indptr: Tensor
    indices: Tensor

    form = "csr"
    names = ("indptr", "indices")
    cols = None

    @classmethod
    def check(cls, indptr: object, indices: object) -> Rows:
        check_tensor("indptr", indptr, (2,), INTEGERS)
        check_tensor("indices", indices, (1,), INTEGERS)
        check_same_device("indices", indices, indptr.device, "indptr")
        return cls(_to_int32(indptr), _to_int32(indices))

    @property
    def lead(self) -> tuple[int, ...]:
        return self.indptr.shape[0], self.indptr.shape[1] - 1

    def lead_of_batch(self, lengths: Lengths, q_block_size: int) -> tuple[int, int, int]:
        """(batch, heads, query blocks) for batched tensors."""
        heads, rows = self.lead
        if lengths.seqlen_q is None:
            raise ValueError("seqlen_q is None; expected the length of the batched queries of a mask from_csr")
        blocks = ceil_div(lengths.seqlen_q, q_block_size)
        batch = lengths.batch_size
        if batch is None:
            batch = rows // blocks if blocks else 0
        if batch * blocks != rows:
            raise ValueError(
                f"indptr has shape {tuple(self.indptr.shape)}; expected (heads, rows + 1) with {blocks} rows, the "
                f"query blocks of length seqlen_q = {lengths.seqlen_q}, for each sequence of the batch"
            )
        return batch, heads, blocks

    def pack(self, sequences: Tensor, rows: int, layout: Layout) -> Tensor:
        return ops.pack_csr.default(self.indptr, self.indices, sequences, rows, *layout)


Source = Dense | Lists | Rows
FORMS: dict[str, type[Dense] | type[Lists] | type[Rows]] = {kind.form: kind for kind in (Dense, Lists, Rows)}


def _to_int32(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.int64:
        # Clamped first: a large value must stay out of range.
        tensor = tensor.clamp(-1, torch.iinfo(torch.int32).max).to(torch.int32)
    return tensor.contiguous()
