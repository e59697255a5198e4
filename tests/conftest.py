"""MPI tests run in lock-step, at several world sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest_plugins = ["hpccomm.testing.lockstep"]


@pytest.fixture
def empty_arrays_are_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's uninitialised arrays of floating point hold NaN, so that reading one before writing it shows."""

    def fill(make: Callable[..., Any]) -> Callable[..., Any]:
        def make_filled(*args: Any, **named: Any) -> Any:
            made = make(*args, **named)
            if made.dtype.kind == "f":
                made.fill(np.nan)
            return made

        return make_filled

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(np, name, fill(getattr(np, name)))
