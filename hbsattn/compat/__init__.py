"""The calls of other libraries, computed by this one."""

import importlib.util
import sys

from hbsattn.compat import block_sparse_attn

ALIAS = "block_sparse_attn"


def install_block_sparse_attn() -> None:
    """Lets programs that import MIT's package find `hbsattn.compat.block_sparse_attn` by its name.

    from hbsattn.compat import install_block_sparse_attn
    install_block_sparse_attn()
    from block_sparse_attn import block_sparse_attn_func  # as such programs do

    For the three functions of that module; the name is taken in this process alone.

    Raises:
        ImportError: if a package of that name is installed or imported already.
    """
    found = sys.modules.get(ALIAS)
    if found is block_sparse_attn:
        return
    where = importlib.util.find_spec(ALIAS) if found is None else found
    if where is not None:
        place = getattr(where, "origin", None) or getattr(where, "__file__", None) or f"{where!r}"
        raise ImportError(f"a package {ALIAS} is there already, {place}; expected none: remove it first")
    sys.modules[ALIAS] = block_sparse_attn
