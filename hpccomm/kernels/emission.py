"""Compiles functions to machine code that is kept in files and runs without Numba.

A function takes and returns words.  Numba's convention for calls reports exceptions; these functions raise none.  So
each gets a plain C function around it, and only that is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import types
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from hpccomm.kernels import linker
from hpccomm.kernels.compiler import compile_module, jit
from hpccomm.kernels.intrinsics import I64, VOID, X86

OPTIMIZATION = 3
RUN_IN_PYTHON = ("shared_memory.collectives", "shared_memory.probe", "entry.body", "interpreter.body")


def emit(name: str, module: str, signature: str) -> tuple[bytes, dict[str, Any]]:
    """The code of a function of a module in this folder, and what its loader must know.

    It is linked here for the processors whose objects we can link, by LLVM when it is loaded for others.
    """
    function = getattr(load_source(module), name)
    data = compile_object(name, function, signature or function.signature)
    if not X86:
        return data, {"name": name, "externals": linker.read_externals(data)}
    image = linker.link(data, name)._asdict()
    return image.pop("code"), image


@cache
def load_source(module: str) -> Any:
    """A module in this folder; one that runs in Python, too, with intrinsics as memory operations."""
    found = import_module(f"{__package__}.{module}")
    return SimpleNamespace(**compile_module(found)) if module in RUN_IN_PYTHON else found


def compile_object(name: str, function: Callable[..., Any], signature: Any) -> bytes:
    """The object file of a function, in which it is called ``name``."""
    module = llvmlite.binding.parse_assembly(link_library(name, function, signature).get_llvm_str())
    machine = make_target_machine()
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    for each in module.functions:
        if not each.is_declaration and each.name != name:
            each.linkage = "internal"
    return bytes(machine.emit_object(module))


def make_target_machine() -> Any:
    """The target of the compiler in this process, but for code at any address."""
    triple, processor, features = cpu_target.target_context.codegen().magic_tuple()
    target = llvmlite.binding.Target.from_triple(triple)
    return target.create_target_machine(processor, features, OPTIMIZATION, reloc="pic", codemodel="small")


@global_compiler_lock
def link_library(name: str, function: Callable[..., Any], signature: Any) -> Any:
    """The compiled function, all that it calls, and a C function ``name`` around it."""
    dispatcher = jit(no_cpython_wrapper=True, no_cfunc_wrapper=True)(getattr(function, "py_func", function))
    dispatcher.compile(signature)
    (compiled,) = dispatcher.overloads.values()
    context = cpu_target.target_context
    library = context.codegen().create_library(name)
    library.add_ir_module(make_c_function(context, library, name, compiled.fndesc))
    library.add_linking_library(compiled.library)
    library.finalize()
    return library


def make_c_function(context: Any, library: Any, name: str, compiled: Any) -> Any:
    """A module with a C function of words that calls the compiled one."""
    module = library.create_ir_module(name)
    nothing = compiled.restype == types.void
    function = ir.Function(module, ir.FunctionType(VOID if nothing else I64, [I64] * len(compiled.argtypes)), name)
    builder = ir.IRBuilder(function.append_basic_block())
    kinds = [context.get_argument_type(each) for each in compiled.argtypes]
    values = [
        builder.inttoptr(each, kind) if isinstance(kind, ir.PointerType) else each
        for each, kind in zip(function.args, kinds, strict=True)
    ]
    convention = context.call_conv
    called = ir.Function(
        module, convention.get_function_type(compiled.restype, compiled.argtypes), compiled.mangled_name
    )
    _, result = convention.call_function(builder, called, compiled.restype, compiled.argtypes, values)
    builder.ret_void() if nothing else builder.ret(result)
    return module
