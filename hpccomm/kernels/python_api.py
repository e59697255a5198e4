"""Functions of Python's C interface as intrinsics, and a built-in function that runs a kernel; objects are addresses.

The intrinsics have the names of Python's own functions.
"""

from __future__ import annotations

from typing import Any

from hpccomm.kernels.intrinsics import I64, VOID, call_1, external, instruction, int64, load, none


def call_python(builder: Any, name: str, *values: Any, result: Any = I64) -> Any:
    """Call a function of Python."""
    return builder.call(external(builder, name, result, [I64] * len(values)), values)


@instruction(int64, int64)
def PyLong_AsLongLong(builder, number):
    return call_python(builder, "PyLong_AsLongLong", number)


@instruction(int64, int64)
def PyLong_FromLongLong(builder, value):
    return call_python(builder, "PyLong_FromLongLong", value)


@instruction(int64)
def PyEval_SaveThread(builder):
    return call_python(builder, "PyEval_SaveThread")


@instruction(none, int64)
def PyEval_RestoreThread(builder, thread):
    call_python(builder, "PyEval_RestoreThread", thread, result=VOID)


def run_kernel(itself, arguments, n):
    """The body of a built-in function: run the kernel at the address ``itself`` on a call record, without the GIL."""
    kernel, call = PyLong_AsLongLong(itself), PyLong_AsLongLong(load(arguments))
    thread = PyEval_SaveThread()
    code = call_1(kernel, call)
    PyEval_RestoreThread(thread)
    return PyLong_FromLongLong(code)
