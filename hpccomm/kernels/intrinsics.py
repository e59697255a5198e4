"""Memory operations as machine instructions: intrinsics with the names of :mod:`hpccomm.kernels.shared_memory.memory`.

A rank writes a flag with a store-release after the data, and reads it with a load-acquire before the data; this orders
the two on every processor (plain moves on x86, ``stlr`` and ``ldar`` on ARM).
"""

from __future__ import annotations

import platform
from functools import wraps
from typing import Any

import llvmlite.binding  # type: ignore[import-untyped]
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

from hpccomm.kernels.futex import DOZE_NS, EVERY_SLEEPER, FUTEX, FUTEX_WAIT, FUTEX_WAKE

I8, I32, I64, VOID = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.VoidType()
int64, none = types.int64, types.void

MACHINE = platform.machine().lower()
X86 = MACHINE in ("x86_64", "amd64")
ARM = MACHINE in ("aarch64", "arm64")
CLOCK_MONOTONIC = 1
VECTOR_BYTES = 64
"""Bytes of one vector."""
UNROLL = 4
"""Vectors loaded before the first is stored."""
STACK_ELEMENTS = 2048
"""Elements reduced together, in the first-level cache."""


def pointer(builder: Any, address: Any, to: Any = I64) -> Any:
    """An integer as a pointer."""
    return builder.inttoptr(address, to.as_pointer())


def external(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """A function of the C library or of LLVM."""
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def instruction(result: Any, *arguments: Any) -> Any:
    """Make an intrinsic of a function that emits its code: ``emit(builder, *values)`` returns the result, if any."""

    def make(emit: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = emit(builder, *args)
            return context.get_dummy_value() if result is none else value

        @wraps(emit)
        def define(context: Any, *given: Any) -> Any:
            return result(*arguments), generate

        return intrinsic(define)

    return make


@instruction(int64, int64)
def load(builder, address):
    """Read a word that no other process writes at the same time."""
    return builder.load(pointer(builder, address))


@instruction(none, int64, int64)
def store(builder, address, value):
    """Write a word."""
    builder.store(value, pointer(builder, address))


@instruction(int64, int64)
def load_acquire(builder, address):
    """Read a word of another process; all that this process wrote before it is visible afterwards."""
    return builder.load_atomic(pointer(builder, address), "acquire", 8)


@instruction(none, int64, int64)
def store_release(builder, address, value):
    """Write a word; a process that sees it also sees everything written before."""
    builder.store_atomic(value, pointer(builder, address), "release", 8)


@instruction(none, int64, int64, int64)
def copy(builder, to, source, nbytes):
    """Copy bytes; source and target are disjoint or equal."""
    to, source = pointer(builder, to, I8), pointer(builder, source, I8)
    cgutils.raw_memcpy(builder, to, source, nbytes, 1)


@instruction(none, int64, int64, int64)
def copy_nontemporal(builder, to, source, nbytes):
    """Copy bytes that will not be read soon, with non-temporal stores."""
    vector = ir.VectorType(I64, VECTOR_BYTES // 8)
    hint = builder.module.add_metadata([ir.Constant(I32, 1)])
    misfit = builder.and_(builder.neg(to), ir.Constant(I64, VECTOR_BYTES - 1))
    head = builder.select(builder.icmp_signed("<", misfit, nbytes), misfit, nbytes)
    memcpy(builder, to, source, head)
    body = builder.and_(builder.sub(nbytes, head), ir.Constant(I64, -VECTOR_BYTES))
    end = builder.add(head, body)
    with cgutils.for_range_slice(builder, head, end, ir.Constant(I64, VECTOR_BYTES), I64) as (at, _):
        line = builder.load(pointer(builder, builder.add(source, at), vector), align=1)
        write = builder.store(line, pointer(builder, builder.add(to, at), vector), align=VECTOR_BYTES)
        write.set_metadata("nontemporal", hint)
    memcpy(builder, builder.add(to, end), builder.add(source, end), builder.sub(nbytes, end))
    if X86:
        builder.call(external(builder, "llvm.x86.sse.sfence", VOID, []), [])


@instruction(none, int64, int64, int64)
def fetch(builder, to, source, nbytes):
    """Copy bytes that another core wrote last, with vector loads.

    Measured on Zen 4: twice as fast as the C library, which uses the string instruction.  To store into lines that
    another core holds, the C library is as fast.
    """
    vector = ir.VectorType(I64, VECTOR_BYTES // 8)
    step = ir.Constant(I64, UNROLL * VECTOR_BYTES)
    body = builder.and_(nbytes, ir.Constant(I64, -UNROLL * VECTOR_BYTES))
    with cgutils.for_range_slice(builder, ir.Constant(I64, 0), body, step, I64) as (at, _):
        places = [builder.add(at, ir.Constant(I64, VECTOR_BYTES * k)) for k in range(UNROLL)]
        lines = [builder.load(pointer(builder, builder.add(source, each), vector), align=1) for each in places]
        for line, each in zip(lines, places, strict=True):
            builder.store(line, pointer(builder, builder.add(to, each), vector), align=1)
    memcpy(builder, builder.add(to, body), builder.add(source, body), builder.sub(nbytes, body))


def call_process_vm(builder: Any, call: str, pid: Any, here: Any, there: Any, nbytes: Any) -> Any:
    """Call ``process_vm_readv`` or ``process_vm_writev`` with one ``struct iovec`` on either side."""
    iovec = ir.ArrayType(I64, 2)
    iovecs = []
    for address in (here, there):
        place = cgutils.alloca_once(builder, iovec)
        builder.store(builder.insert_value(builder.insert_value(iovec(ir.Undefined), address, 0), nbytes, 1), place)
        iovecs += [builder.bitcast(place, I64.as_pointer()), ir.Constant(I64, 1)]
    kinds = [I32, I64.as_pointer(), I64, I64.as_pointer(), I64, I64]
    function = external(builder, call, I64, kinds)
    return builder.call(function, [builder.trunc(pid, I32), *iovecs, ir.Constant(I64, 0)])


@instruction(int64, int64, int64, int64, int64)
def pull(builder, pid, to, source, nbytes):
    """Copy bytes of another process; returns their number, or -1."""
    return call_process_vm(builder, "process_vm_readv", pid, to, source, nbytes)


@instruction(int64, int64, int64, int64, int64)
def push(builder, pid, to, source, nbytes):
    """Copy bytes into another process; returns their number, or -1."""
    return call_process_vm(builder, "process_vm_writev", pid, source, to, nbytes)


def memcpy(builder: Any, to: Any, source: Any, nbytes: Any) -> None:
    """Call the C library."""
    cgutils.raw_memcpy(builder, pointer(builder, to, I8), pointer(builder, source, I8), nbytes, 1)


@instruction(none)
def pause(builder):
    """Tell the processor that this is a spin loop."""
    if X86:
        builder.call(external(builder, "llvm.x86.sse2.pause", VOID, []), [])
    elif ARM:
        builder.call(external(builder, "llvm.aarch64.hint", VOID, [I32]), [ir.Constant(I32, 1)])


@instruction(none)
def yield_cpu(builder):
    """Yield the core to another process."""
    builder.call(external(builder, "sched_yield", I32, []), [])


def timespec(builder: Any, nanoseconds: Any) -> Any:
    """The address of a ``struct timespec``."""
    kind, second = ir.ArrayType(I64, 2), ir.Constant(I64, 10**9)
    place = cgutils.alloca_once(builder, kind)
    seconds, rest = builder.sdiv(nanoseconds, second), builder.srem(nanoseconds, second)
    builder.store(builder.insert_value(builder.insert_value(kind(ir.Undefined), seconds, 0), rest, 1), place)
    return builder.bitcast(place, I64.as_pointer())


def call_futex(builder: Any, address: Any, action: int, value: Any, limit: Any) -> None:
    """The system call; ``limit`` is the address of a time."""
    nothing = ir.Constant(I64, 0)
    arguments = [ir.Constant(I64, FUTEX), address, ir.Constant(I64, action), value, limit, nothing, nothing]
    builder.call(external(builder, "syscall", I64, [I64] * len(arguments)), arguments)


@instruction(none, int64, int64, int64)
def sleep(builder, address, value, nanoseconds):
    """Sleep until a process wakes those that sleep at a word, unless the word no longer has this value; or a time."""
    if FUTEX:
        limit = builder.ptrtoint(timespec(builder, nanoseconds), I64)
        call_futex(builder, address, FUTEX_WAIT, builder.and_(value, ir.Constant(I64, 0xFFFFFFFF)), limit)
        return
    longest = ir.Constant(I64, DOZE_NS)
    time = builder.select(builder.icmp_signed("<", nanoseconds, longest), nanoseconds, longest)
    doze = external(builder, "nanosleep", I32, [I64.as_pointer()] * 2)
    builder.call(doze, [timespec(builder, time), I64.as_pointer()(None)])


@instruction(none, int64)
def wake(builder, address):
    """Wake the processes that sleep at a word."""
    if FUTEX:
        call_futex(builder, address, FUTEX_WAKE, ir.Constant(I64, EVERY_SLEEPER), ir.Constant(I64, 0))


@instruction(int64)
def nanoseconds(builder):
    """A monotonic clock."""
    time = cgutils.alloca_once(builder, ir.ArrayType(I64, 2))
    words = builder.bitcast(time, I64.as_pointer())
    clock = external(builder, "clock_gettime", I32, [I32, I64.as_pointer()])
    builder.call(clock, [ir.Constant(I32, CLOCK_MONOTONIC), words])
    seconds = builder.load(words)
    fraction = builder.load(builder.gep(words, [ir.Constant(I64, 1)]))
    return builder.add(builder.mul(seconds, ir.Constant(I64, 10**9)), fraction)


@instruction(none, *[int64] * 6)
def fold(builder, handle, sources, k, first, out, n):
    """Reduce elements [first, first+n) of k vectors, in order, with the compiled function at ``handle``."""
    kind = ir.FunctionType(VOID, [I64] * 5)
    builder.call(pointer(builder, handle, kind), [sources, k, first, out, n])


def call_address(builder: Any, address: Any, *arguments: Any) -> Any:
    """Call a function of words at an address."""
    return builder.call(pointer(builder, address, ir.FunctionType(I64, [I64] * len(arguments))), arguments)


@instruction(int64, int64)
def call_0(builder, address):
    """Call a function without arguments."""
    return call_address(builder, address)


@instruction(int64, int64, int64)
def call_1(builder, address, a):
    """Call a function of one word."""
    return call_address(builder, address, a)


@instruction(int64, int64, int64, int64)
def call_2(builder, address, a, b):
    """Call a function of two words."""
    return call_address(builder, address, a, b)


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


@instruction(int64, int64, int64)
def call_9(builder, address, words):
    """Call a function of up to 9 words, which lie at an address; what it returns has 32 bits."""
    first = builder.inttoptr(words, I64.as_pointer())
    arguments = [builder.load(builder.gep(first, [ir.Constant(I64, k)])) for k in range(9)]
    return builder.sext(builder.trunc(call_address(builder, address, *arguments), I32), I64)


@intrinsic
def stack_buffer(context: Any, sample: Any) -> Any:
    """``STACK_ELEMENTS`` elements of the type of ``sample`` on the stack."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element = context.get_data_type(sample)
        array = cgutils.alloca_once(builder, ir.ArrayType(element, STACK_ELEMENTS))
        array.align = VECTOR_BYTES
        return builder.bitcast(array, element.as_pointer())

    return types.CPointer(sample)(sample), emit


def scope(builder: Any) -> Any:
    """The alias scope of a reduction: its sources, which its result does not alias."""
    module = builder.module
    domain = module.add_metadata(["hpccomm.reduction"])
    return module.add_metadata([module.add_metadata(["hpccomm.sources", domain])])


@intrinsic
def element(context: Any, source: Any, i: Any) -> Any:
    """``source[i]``."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(builder.gep(args[0], [args[1]]))
        value.set_metadata("alias.scope", scope(builder))
        return context.data_model_manager[source.dtype].from_data(builder, value)

    return source.dtype(source, i), emit


@intrinsic
def set_element(context: Any, out: Any, i: Any, value: Any) -> Any:
    """``out[i] = value``, where ``out`` is one of the sources or overlaps none.

    The compiler may then vectorise: each element is written after it was read, and never read again.
    """

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        converted = context.cast(builder, args[2], value, out.dtype)
        data = context.data_model_manager[out.dtype].as_data(builder, converted)
        write = builder.store(data, builder.gep(args[0], [args[1]]))
        write.set_metadata("noalias", scope(builder))
        return context.get_dummy_value()

    return none(out, i, value), emit


@intrinsic
def field(context: Any, address: Any, kind: Any) -> Any:
    """The number of type ``kind`` at an address."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(pointer(builder, args[0], context.get_data_type(kind.dtype)))

    return kind.dtype(address, kind), emit


@intrinsic
def set_field(context: Any, address: Any, value: Any) -> Any:
    """Write a number at an address."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], pointer(builder, args[0], context.get_data_type(value)))
        return context.get_dummy_value()

    return none(address, value), emit


@instruction(types.uint32, types.float32)
def bits(builder, value):
    """The bits of a float32 as an integer."""
    return builder.bitcast(value, I32)


@instruction(types.float32, types.uint32)
def float_of(builder, value):
    """The float32 with these bits."""
    return builder.bitcast(value, ir.FloatType())


OTHER_PROCESSOR = config.CPU_NAME or config.CPU_FEATURES  # type: ignore[attr-defined]
F16C = llvmlite.binding.get_host_cpu_features().get("f16c", False) and not OTHER_PROCESSOR
HALF_INSTRUCTIONS = ARM or (X86 and F16C)
"""Whether the processor has instructions that convert between float16 and float32."""


@instruction(types.float32, types.uint16)
def half_to_float(builder, word):
    """The float32 value of a float16, given as its bits."""
    return builder.fpext(builder.bitcast(word, ir.HalfType()), ir.FloatType())


@instruction(types.uint16, types.float32)
def float_to_half(builder, value):
    """The bits of the float16 nearest to a float32."""
    return builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
