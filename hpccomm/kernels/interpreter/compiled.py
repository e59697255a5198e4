"""The interpreter, compiled with intrinsics as memory operations."""

from __future__ import annotations

from hpccomm.kernels.compiler import compile_module
from hpccomm.kernels.interpreter import body
from hpccomm.kernels.intrinsics import call_address, instruction, int64


@instruction(int64, *[int64] * 4)
def call_3(builder, address, a, b, c):
    """Call a function of three words."""
    return call_address(builder, address, a, b, c)


@instruction(int64, *[int64] * 6)
def call_5(builder, address, a, b, c, d, e):
    """Call a function of five words."""
    return call_address(builder, address, a, b, c, d, e)


@instruction(int64, *[int64] * 8)
def call_7(builder, address, a, b, c, d, e, f, g):
    """Call a function of seven words."""
    return call_address(builder, address, a, b, c, d, e, f, g)


_scope = compile_module(body)
_scope.update(call_3=call_3, call_5=call_5, call_7=call_7)
interpret = _scope["interpret"]
