"""Block-sparse attention with independent query and key block sizes.

mask = hbsattn.BlockMask.from_dense(block_mask, 128, 64, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True)
out = hbsattn.block_sparse_attention(q, k, v, mask)
"""

from hbsattn import patterns
from hbsattn._contents import set_debug
from hbsattn._dropout import dropout_mask
from hbsattn._explain import explain
from hbsattn._merge import merge
from hbsattn._ops import build_info
from hbsattn.attention import block_sparse_attention
from hbsattn.flex import flex_attention
from hbsattn.hbsa_interface import HBSAttention
from hbsattn.mask import BlockMask

__version__ = "0.1.0"  # pyproject.toml and CMakeLists.txt read it from here

__all__ = [
    "BlockMask",
    "HBSAttention",
    "block_sparse_attention",
    "build_info",
    "dropout_mask",
    "explain",
    "flex_attention",
    "merge",
    "patterns",
    "set_debug",
]
