"""Whether Numba can be used, and if not, why."""

from __future__ import annotations

import importlib.util
from functools import cache


@cache
def why_no_numba() -> str:
    """Empty where Numba can be imported; an installed Numba may refuse the NumPy that it finds."""
    if importlib.util.find_spec("numba") is None:
        return "Numba is not installed"
    try:
        import numba  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: the library of llvmlite cannot be loaded
        return str(error)
    return ""
