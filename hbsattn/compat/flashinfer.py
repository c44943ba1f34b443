"""FlashInfer's wrappers of block-sparse attention, BlockSparseAttentionWrapper and VariableBlockSparseAttentionWrapper.

from hbsattn.compat.flashinfer import BlockSparseAttentionWrapper

`plan` makes a mask, and waits for the device, as FlashInfer's does; `run` computes with it, any number of times, on a
CPU, too, and gradients flow from its results. Workspace buffers only say which device it is, and options that choose
between FlashInfer's kernels are not read: `backend`, `use_fp16_qk_reduction`, `non_blocking`, `enable_pdl`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbsattn._checks import FLOATS, check_bool, check_index, check_is_tensor, check_number, check_tensor
from hbsattn._layout import ceil_div
from hbsattn._partial import Values
from hbsattn._sizes import pick, side_of, touched, within
from hbsattn._sources import INTEGERS
from hbsattn.attention import block_sparse_attention
from hbsattn.mask import BlockMask

BOOLS = (torch.bool, torch.uint8, torch.int8, *INTEGERS)  # of which all but 0 is True

Dtype = str | torch.dtype
Result = Tensor | tuple[Tensor, Tensor]


class Planned(NamedTuple):
    """What `plan` leaves for `run`."""

    mask: BlockMask
    heads: tuple[int, int]  # of q, and of k
    head_dim: int
    lengths: tuple[int, int]
    dtype: torch.dtype
    out_dtype: torch.dtype
    softcap: float
    scale: float | None


class _Wrapper:
    """What both have in common."""

    heads_first: bool  # whether tensors are (heads, length, head_dim) instead of (length, heads, head_dim)

    def __init__(self, float_workspace_buffer: Tensor, backend: str = "auto") -> None:
        if not isinstance(backend, str):
            raise TypeError(f"backend is {backend!r}; expected a str")
        self._planned: Planned | None = None
        self.reset_workspace_buffer(float_workspace_buffer)
        # Programs hand these to `reset_workspace_buffer` again.
        self._int_workspace_buffer = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._vector_sparse_indices_buffer = self._vector_sparse_indptr_buffer = self._int_workspace_buffer

    def reset_workspace_buffer(
        self,
        float_workspace_buffer: Tensor,
        int_workspace_buffer: Tensor | None = None,
        vector_sparse_indices_buffer: Tensor | None = None,
        vector_sparse_indptr_buffer: Tensor | None = None,
    ) -> None:
        """Takes the device of the first one."""
        check_is_tensor("float_workspace_buffer", float_workspace_buffer)
        self._float_workspace_buffer = float_workspace_buffer
        self.device = float_workspace_buffer.device

    def end_forward(self) -> None:
        """Does nothing, like FlashInfer's."""

    def _to_device(self, name: str, value: object, dims: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor:
        check_tensor(name, value, dims, dtypes)
        return value.to(self.device)

    def _run(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, lse: Tensor | None, return_lse: bool) -> Result:
        planned = self._planned
        if planned is None:
            raise RuntimeError("run is called before plan; expected plan first")
        check_bool("return_lse", return_lse)
        for name, x, side in (("q", q, 0), ("k", k, 1), ("v", v, 1)):
            heads, length = planned.heads[side], planned.lengths[side]
            check_tensor(name, x, (3,), FLOATS)
            shape = (heads, length, planned.head_dim) if self.heads_first else (length, heads, planned.head_dim)
            if tuple(x.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {shape}, as plan was told")
            if x.dtype != planned.dtype:
                raise TypeError(f"{name} has dtype {x.dtype}; expected {planned.dtype}, the q_data_type of plan")
        tensors = ((x.transpose(0, 1) if self.heads_first else x).unsqueeze(0) for x in (q, k, v))
        tensors = (x if x.stride(-1) == 1 else x.contiguous() for x in tensors)
        options = {"softmax_scale": planned.scale, "softcap": planned.softcap}
        if return_lse:
            got, got_lse = block_sparse_attention(*tensors, planned.mask, return_lse=True, **options)
            got_lse = got_lse[0] / math.log(2)
            got_lse = _write("lse", got_lse if self.heads_first else got_lse.transpose(0, 1), lse)
        else:
            got = block_sparse_attention(*tensors, planned.mask, **options)
        got = got[0].transpose(0, 1) if self.heads_first else got[0]
        got = _write("out", got.to(planned.out_dtype), out)
        return (got, got_lse) if return_lse else got


class BlockSparseAttentionWrapper(_Wrapper):
    """Attention whose mask is a matrix of blocks (R, C) in compressed sparse rows, the same for all heads, or of each
    head its own.
    """

    heads_first = False

    def plan(
        self,
        indptr: Tensor | None,
        indices: Tensor | None,
        M: int,
        N: int,
        R: int,
        C: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        mask: Tensor | None = None,
        packed_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Dtype = "float16",
        kv_data_type: Dtype | None = None,
        o_data_type: Dtype = "float16",
        non_blocking: bool = True,
        block_mask: Tensor | None = None,
        kv_block_lens: Tensor | None = None,
        q2k_indices: Tensor | None = None,
        q2k_num: Tensor | None = None,
        kv_splits: int | str | None = None,
        use_clc: bool | None = None,
        q_scale: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        """Plans for one of three forms of a mask. Tensors may be on another device than the workspace.

        Args:
            indptr: int32 or int64 (query blocks + 1), where the entries of each query block begin in `indices`.
            indices: int32 or int64 (entries), key blocks in any order, each once in a row.
            M, N: queries and keys. The last blocks may be short.
            R, C: queries and keys of a block.
            num_qo_heads: a multiple of num_kv_heads.
            mask: bool, or int of which all but 0 is True, (entries, R, C): the pairs of each block that attend.
            packed_mask: uint8, the same as bits, lowest first, in FlashInfer's order, in place of `mask`: of each query
                block, from a byte of its own on, (queries, keys of all its entries).
            causal: without a mask: of the queries and listed keys of a query block, in the order of their list, the
                last ones lie on the diagonal. Keys that are listed after others count as later, wherever they are.
            pos_encoding_mode: "NONE".
            logits_soft_cap: `softcap` of `block_sparse_attention`; None and 0 and less: none.
            sm_scale: above 0, 1 / sqrt(head_dim) by default.
            q_data_type, kv_data_type: of q, k and v, of which k and v have the same; `o_data_type` that of the result.
            block_mask: in place of `indptr` and `indices`, which then are not read: bool (num_qo_heads or num_kv_heads,
                query blocks, key blocks).
            q2k_indices, q2k_num: or so, int32 or int64 (num_qo_heads or num_kv_heads, query blocks, entries) and
                without the last dimension, how many entries count; None: all.
            kv_block_lens: int32 or int64 (key blocks), beside any form: the valid keys of each block, 0 to C.
            kv_splits, use_clc, q_scale, k_scale, v_scale: None.
        """
        none = {"kv_splits": kv_splits, "use_clc": use_clc, "q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
        _check_none(none, "plan")
        lengths = check_index("M", M), check_index("N", N)
        sizes = check_index("R", R, 1), check_index("C", C, 1)
        common = _check_options(num_qo_heads, num_kv_heads, head_dim, pos_encoding_mode, logits_soft_cap, sm_scale)
        dtypes = _check_dtypes(q_data_type, kv_data_type, o_data_type)
        check_bool("causal", causal)
        forms = {"block_mask": block_mask, "q2k_indices": q2k_indices}
        other = [name for name, x in forms.items() if x is not None]
        if other:
            _check_none({"mask": mask, "packed_mask": packed_mask, "causal": causal or None}, other[0])
            if len(other) > 1:
                raise ValueError("block_mask and q2k_indices are given; expected one of them")
            planned = self._by_heads(block_mask, q2k_indices, q2k_num, lengths, sizes, common[0])
        else:
            if indptr is None or indices is None:
                raise ValueError("indptr or indices is None; expected both, or block_mask or q2k_indices")
            planned = self._by_rows(indptr, indices, lengths, sizes, mask, packed_mask, causal)
        if kv_block_lens is not None:
            planned = planned.padded(k_valid=self._to_device("kv_block_lens", kv_block_lens, (1,), INTEGERS))
        self._planned = Planned(planned, common[0], common[1], lengths, *dtypes, *common[2:])

    begin_forward = plan

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale_q: Tensor | None = None,
        scale_k: Tensor | None = None,
        scale_v: Tensor | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
    ) -> Result:
        """Computes attention by the plan.

        Args:
            q: (M, num_qo_heads, head_dim).
            k, v: (N, num_kv_heads, head_dim).
            scale_q, scale_k, scale_v: None.
            out, lse: what the results are written to, of their shapes and dtypes.

        Returns:
            out (M, num_qo_heads, head_dim), or with `return_lse` (out, lse). lse is (M, num_qo_heads), to base 2,
            float32 (float64 for float64). A query with nothing to attend gets 0 and -inf.
        """
        _check_none({"scale_q": scale_q, "scale_k": scale_k, "scale_v": scale_v}, "run")
        return self._run(q, k, v, out, lse, return_lse)

    def _by_heads(
        self,
        block_mask: Tensor | None,
        q2k_indices: Tensor | None,
        q2k_num: Tensor | None,
        lengths: tuple[int, int],
        sizes: tuple[int, int],
        heads: tuple[int, int],
    ) -> BlockMask:
        named = {"seqlen_q": lengths[0], "seqlen_k": lengths[1]}
        if block_mask is not None:
            block_mask = self._to_device("block_mask", block_mask, (3,), BOOLS) != 0
            _check_heads("block_mask", block_mask, heads)
            return BlockMask.from_dense(block_mask.unsqueeze(0), *sizes, **named)
        q2k_indices = self._to_device("q2k_indices", q2k_indices, (3,), INTEGERS)
        _check_heads("q2k_indices", q2k_indices, heads)
        if q2k_num is None:
            q2k_num = torch.full(q2k_indices.shape[:2], q2k_indices.shape[2], dtype=torch.int32, device=self.device)
        q2k_num = self._to_device("q2k_num", q2k_num, (2,), INTEGERS)
        if q2k_num.shape != q2k_indices.shape[:2]:
            raise ValueError(f"q2k_num has shape {tuple(q2k_num.shape)}; expected {tuple(q2k_indices.shape[:2])}")
        return BlockMask.from_indices(q2k_num.unsqueeze(0), q2k_indices.unsqueeze(0), *sizes, **named)

    def _by_rows(
        self,
        indptr: Tensor,
        indices: Tensor,
        lengths: tuple[int, int],
        sizes: tuple[int, int],
        mask: Tensor | None,
        packed_mask: Tensor | None,
        causal: bool,
    ) -> BlockMask:
        indptr = self._to_device("indptr", indptr, (1,), INTEGERS).to(torch.int64)
        indices = self._to_device("indices", indices, (1,), INTEGERS).to(torch.int64)
        rows = _Rows.check(indptr, indices, lengths, sizes)
        made = BlockMask.from_csr(indptr.unsqueeze(0), indices, *sizes, seqlen_q=lengths[0], seqlen_k=lengths[1])
        if packed_mask is not None:
            return within(made, rows.of_bits(self._to_device("packed_mask", packed_mask, (1,), (torch.uint8,))))
        if mask is not None:
            return within(made, rows.of_mask(self._to_device("mask", mask, (3,), BOOLS)))
        if not causal:
            return made
        late = BlockMask.from_csr(*rows.late(indices), *sizes, seqlen_q=lengths[0], seqlen_k=lengths[1])
        return within(made, rows.of_order(), late.bits)


class VariableBlockSparseAttentionWrapper(_Wrapper):
    """Attention whose blocks have sizes of their own, for each key head."""

    heads_first = True

    def plan(
        self,
        block_mask_map: Tensor,
        block_row_sz: Tensor,
        block_col_sz: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        q_data_type: Dtype = "float16",
        kv_data_type: Dtype | None = None,
    ) -> None:
        """Plans. Tensors may be on another device than the workspace.

        Args:
            block_mask_map: bool, or int of which all but 0 is True, (num_kv_heads, query blocks, key blocks).
            block_row_sz, block_col_sz: int32 or int64 (num_kv_heads, blocks), the queries, or keys, of each block, 0 or
                more. They add up to the same in all heads.
            num_qo_heads, head_dim, causal, pos_encoding_mode, logits_soft_cap, sm_scale, q_data_type, kv_data_type: as
                in `BlockSparseAttentionWrapper.plan`; the keys of a query block are in the order of their blocks.
        """
        common = _check_options(num_qo_heads, num_kv_heads, head_dim, pos_encoding_mode, logits_soft_cap, sm_scale)
        dtypes = _check_dtypes(q_data_type, kv_data_type, q_data_type)
        check_bool("causal", causal)
        block_map = self._to_device("block_mask_map", block_mask_map, (3,), BOOLS) != 0
        sizes = [
            self._to_device(name, x, (2,), INTEGERS)
            for name, x in (("block_row_sz", block_row_sz), ("block_col_sz", block_col_sz))
        ]
        for name, x, shape in (
            ("block_mask_map", block_map, (num_kv_heads, sizes[0].shape[1], sizes[1].shape[1])),
            ("block_row_sz", sizes[0], (num_kv_heads, sizes[0].shape[1])),
            ("block_col_sz", sizes[1], (num_kv_heads, sizes[1].shape[1])),
        ):
            if tuple(x.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {shape}")
        mask = BlockMask.from_sizes(block_map, *sizes)
        lengths = mask.seqlen_q, mask.seqlen_k
        if causal:
            mask = _in_order(mask, block_map, sizes)
        self._planned = Planned(mask, common[0], common[1], lengths, *dtypes, *common[2:])

    begin_forward = plan

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
    ) -> Result:
        """Computes attention by the plan.

        Args:
            q: (num_qo_heads, queries, head_dim).
            k, v: (num_kv_heads, keys, head_dim).
            out, lse: what the results are written to, of their shapes and dtypes.

        Returns:
            out (num_qo_heads, queries, head_dim), or with `return_lse` (out, lse). lse is (num_qo_heads, queries), to
            base 2, float32 (float64 for float64). A query with nothing to attend gets 0 and -inf.
        """
        return self._run(q, k, v, out, lse, return_lse)


# Pairs inside blocks


class _Rows(NamedTuple):
    """Compressed sparse rows of blocks, and where to find the entry of a block."""

    indptr: Tensor  # int64 (rows + 1)
    codes: Tensor  # int64 (entries), row and column in one number, in order
    entries: Tensor  # int64, their places in `indices`
    lengths: tuple[int, int]
    sizes: tuple[int, int]
    cols: int

    @classmethod
    def check(cls, indptr: Tensor, indices: Tensor, lengths: tuple[int, int], sizes: tuple[int, int]) -> _Rows:
        rows, cols = (ceil_div(length, size) for length, size in zip(lengths, sizes, strict=True))
        ends = indptr.tolist()
        if len(ends) != rows + 1:
            raise ValueError(f"indptr has shape ({len(ends)},); expected ({rows + 1},), for {rows} query blocks")
        if ends[0] != 0 or ends[-1] != indices.shape[0] or ends != sorted(ends):
            raise ValueError(
                f"indptr goes from {ends[0]} to {ends[-1]}; expected rows that do not decrease, from 0 to "
                f"{indices.shape[0]}, the entries of indices"
            )
        if indices.numel():
            least, most = (int(x) for x in indices.aminmax())
            if least < 0 or most >= cols:
                raise ValueError(f"indices holds {least if least < 0 else most}; expected 0 to {cols - 1}")
        row = torch.repeat_interleave(torch.arange(rows, device=indptr.device), indptr.diff())
        codes, entries = (row * cols + indices).sort()
        twice = codes[1:] == codes[:-1]
        if bool(twice.any()):
            code = int(codes[1:][twice][0])
            raise ValueError(f"indices names block {code % cols} twice in row {code // cols}; expected each once")
        return cls(indptr, codes, entries, lengths, sizes, cols)

    def of_mask(self, mask: Tensor) -> Values:
        shape = (self.entries.shape[0], *self.sizes)
        if tuple(mask.shape) != shape:
            raise ValueError(f"mask has shape {tuple(mask.shape)}; expected {shape}, for the entries of indices")

        def values(head: Tensor, sequence: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return mask[self._entry(query, key), query % self.sizes[0], key % self.sizes[1]] != 0

        return values

    def of_bits(self, bits: Tensor) -> Values:
        keys = self.indptr.diff() * self.sizes[1]
        octets = (self._queries() * keys + 7).div(8, rounding_mode="floor")
        begins = torch.nn.functional.pad(octets.cumsum(0), (1, 0))
        if bits.shape[0] != int(begins[-1]):
            raise ValueError(
                f"packed_mask has {bits.shape[0]} bytes; expected {int(begins[-1])}, in which each query block begins "
                "with a byte of its own"
            )

        def values(head: Tensor, sequence: Tensor, query: Tensor, key: Tensor) -> Tensor:
            row = self._row(query)
            bit = query % self.sizes[0] * keys[row] + self._place(query, key)
            octet = begins[row] + torch.div(bit, 8, rounding_mode="floor")
            return (bits[octet].to(torch.int64) >> bit % 8) & 1 == 1

        return values

    def of_order(self) -> Values:
        if self.lengths[1] % self.sizes[1]:
            raise ValueError(
                f"N is {self.lengths[1]}; expected a multiple of {self.sizes[1]}, C, as causal counts the keys of "
                "listed blocks"
            )
        ahead = self.indptr.diff() * self.sizes[1] - self._queries()

        def values(head: Tensor, sequence: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return self._place(query, key) <= query % self.sizes[0] + ahead[self._row(query)]

        return values

    def late(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the blocks that causality may cut: those of as many keys, the last of their row, as queries."""
        number = self.indptr.diff().clamp(max=ceil_div(self.sizes[0], self.sizes[1]))
        ends = torch.nn.functional.pad(number.cumsum(0), (1, 0))
        row = torch.repeat_interleave(torch.arange(number.shape[0], device=ends.device), number)
        place = torch.arange(row.shape[0], device=ends.device) - ends[row] + self.indptr[row + 1] - number[row]
        return ends.unsqueeze(0), indices[place]

    def _queries(self) -> Tensor:
        """Of each row."""
        first = torch.arange(self.indptr.shape[0] - 1, device=self.indptr.device) * self.sizes[0]
        return (self.lengths[0] - first).clamp(max=self.sizes[0])

    def _row(self, query: Tensor) -> Tensor:
        return torch.div(query, self.sizes[0], rounding_mode="floor")

    def _entry(self, query: Tensor, key: Tensor) -> Tensor:
        """Where the block of a pair is in `indices`; of blocks that are on alone."""
        code = self._row(query) * self.cols + torch.div(key, self.sizes[1], rounding_mode="floor")
        place = torch.searchsorted(self.codes, code.contiguous())
        return self.entries[place.clamp(max=self.entries.shape[0] - 1)]

    def _place(self, query: Tensor, key: Tensor) -> Tensor:
        """Which of the listed keys of its row a key is."""
        return (self._entry(query, key) - self.indptr[self._row(query)]) * self.sizes[1] + key % self.sizes[1]


def _in_order(mask: BlockMask, block_map: Tensor, sizes: list[Tensor]) -> BlockMask:
    """The mask of blocks of their own sizes with causality over the keys of the blocks that are on, in their order."""
    q_sizes, k_sizes = (x.to(torch.int64).unsqueeze(0) for x in sizes)
    sides = side_of(q_sizes, mask.seqlen_q), side_of(k_sizes, mask.seqlen_k)
    begins = [x.cumsum(-1) - x for x in (q_sizes, k_sizes)]
    own = block_map * k_sizes.unsqueeze(2)
    ends = own.cumsum(-1)
    # From the number of a key to what it is among those that are on, and from that of a query to its last one.
    places = ends - own - begins[1].unsqueeze(2)
    total = ends[..., -1] if ends.shape[-1] else torch.zeros_like(q_sizes)
    ahead = total - q_sizes - begins[0]

    def values(head: Tensor, sequence: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row, col = (side.find(sequence, head, token) for side, token in zip(sides, (query, key), strict=True))
        return key + pick(places, sequence, head, row, col) <= query + pick(ahead, sequence, head, row)

    late = block_map & (ends > (total - q_sizes).unsqueeze(-1))
    return within(mask, values, touched(mask, late, sides))


# Arguments


def _check_none(values: dict[str, object], where: str) -> None:
    for name, value in values.items():
        if value is not None:
            raise ValueError(f"{name} is given; expected None: {where} does not support it here")


def _check_options(
    num_qo_heads: int, num_kv_heads: int, head_dim: int, pos_encoding_mode: str, logits_soft_cap: Any, sm_scale: Any
) -> tuple[tuple[int, int], int, float, float | None]:
    heads = check_index("num_qo_heads", num_qo_heads, 1), check_index("num_kv_heads", num_kv_heads, 1)
    if heads[0] % heads[1]:
        raise ValueError(f"num_qo_heads is {heads[0]}; expected a multiple of num_kv_heads, {heads[1]}")
    if pos_encoding_mode != "NONE":
        raise ValueError(f"pos_encoding_mode is {pos_encoding_mode!r}; expected 'NONE'")
    softcap = 0.0 if logits_soft_cap is None else max(check_number("logits_soft_cap", logits_soft_cap), 0.0)
    scale = None if sm_scale is None else check_number("sm_scale", sm_scale)
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"sm_scale is {scale}; expected a number above 0")
    return heads, check_index("head_dim", head_dim, 1), softcap, scale


def _check_dtypes(q: Dtype, kv: Dtype | None, o: Dtype) -> tuple[torch.dtype, torch.dtype]:
    """Of q, k and v, and of the result."""
    dtypes = {"q_data_type": q, "kv_data_type": q if kv is None else kv, "o_data_type": o}
    for name, value in dtypes.items():
        dtype = getattr(torch, value, None) if isinstance(value, str) else value
        if dtype not in FLOATS:
            raise ValueError(f"{name} is {value!r}; expected float16, bfloat16, float32 or float64")
        dtypes[name] = dtype
    if dtypes["kv_data_type"] != dtypes["q_data_type"]:
        raise ValueError(f"kv_data_type is {kv!r}; expected {q!r}, the q_data_type")
    return dtypes["q_data_type"], dtypes["o_data_type"]


def _check_heads(name: str, x: Tensor, heads: tuple[int, int]) -> None:
    if x.shape[0] not in heads:
        raise ValueError(
            f"{name} has {x.shape[0]} heads; expected {heads[0]}, num_qo_heads, or {heads[1]}, num_kv_heads"
        )


def _write(name: str, result: Tensor, given: Tensor | None) -> Tensor:
    if given is None:
        return result
    check_tensor(name, given, (result.dim(),), (result.dtype,))
    if given.shape != result.shape:
        raise ValueError(f"{name} has shape {tuple(given.shape)}; expected {tuple(result.shape)}")
    return given.copy_(result)
