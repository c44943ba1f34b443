"""The calls of other libraries, computed by this one."""

import importlib.util
import sys

from hbsattn.compat import block_sparse_attn

ALIAS = "block_sparse_attn"


def install_block_sparse_attn() -> None:
    """Lets `from block_sparse_attn import block_sparse_attn_func` find `hbsattn.compat.block_sparse_attn`.

    For programs that import MIT's package and shall run on this one unchanged: call it before they do. The name is
    taken in this process alone.

    Raises:
        ImportError: if a package of that name is installed or imported already.
    """
    found = sys.modules.get(ALIAS)
    if found is block_sparse_attn:
        return
    where = importlib.util.find_spec(ALIAS) if found is None else found
    if where is not None:
        place = getattr(where, "origin", None) or getattr(where, "__file__", None)
        raise ImportError(f"a package {ALIAS} is there already, at {place}; expected none: uninstall it first")
    sys.modules[ALIAS] = block_sparse_attn
