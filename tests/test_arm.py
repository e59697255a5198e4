"""The functions of shared memory as objects for ARM: emitted here, linked by this test, run by an emulator.

The emulator sees this process's memory at its own addresses, so arrays, records and regions are used as they are.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from one_process import FLAT, TREES, Call, advance_in_any_order, open_ranks

from hpccomm.backends import shared_memory
from hpccomm.kernels import linker, objects
from hpccomm.kernels.reductions.reference import reduce

pytestmark = pytest.mark.slow
FUNCTIONS = ("allreduce", "allgather", "sum_f4", "sum_f2", "sum_bf16")
EMIT = """
import platform, sys
from pathlib import Path
from llvmlite import binding
import numba
platform.machine = lambda: "aarch64"
binding.initialize_all_targets()
binding.initialize_all_asmprinters()
from hpccomm.kernels import emission, intrinsics, objects
intrinsics.ARM = False  # numba makes code for this processor on the way, which has no hint to spin loops of ARM's kind
def make_target_machine():
    target = binding.Target.from_triple("aarch64-unknown-linux-gnu")
    return target.create_target_machine("generic", "", emission.OPTIMIZATION, reloc="pic", codemodel="small")
emission.make_target_machine = make_target_machine
for name in sys.argv[2:]:
    data, description = emission.emit(name, *objects.EMITTED[name])
    assert description["name"] == name, "linked by llvm where it is loaded"
    (Path(sys.argv[1]) / name).write_bytes(data)
"""
AARCH64 = 183
CALLS, PAGES, LOW_BITS, GOT_PAGE, GOT_LOW_BITS, POINTER, DISTANCE = (282, 283), 275, 277, 311, 312, 257, 261
SCALED = {278: 0, 284: 1, 285: 2, 286: 3, 299: 4}
"""Relocations of loads and stores, and the power of two by which they divide the lower bits of an address."""
RETURN = struct.pack("<I", 0xD65F03C0)


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with objects for ARM."""
    from llvmlite import binding

    binding.initialize_all_targets()
    try:
        binding.Target.from_triple("aarch64-unknown-linux-gnu")
    except RuntimeError:
        pytest.skip("this LLVM has no code generator for ARM")
    folder = tmp_path_factory.mktemp("arm")
    environ = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+avx,+f16c"}
    subprocess.run([sys.executable, "-c", EMIT, str(folder), *FUNCTIONS], env=environ, check=True, timeout=240)
    return folder


def test_our_linker_refuses_code_for_another_processor(emitted: Path) -> None:
    for name in FUNCTIONS:
        data = (emitted / name).read_bytes()
        assert struct.unpack_from("<H", data, 18) == (AARCH64,)
        assert set(linker.read_externals(data)) <= set(Emulator.EXTERNALS), name
        with pytest.raises(linker.LinkError, match="kind"):
            linker.link(data, name)


class Emulator:
    """An ARM processor with the memory of this process."""

    EXTERNALS = (
        "memcpy",
        "memset",
        "sched_yield",
        "syscall",
        "clock_gettime",
        "process_vm_readv",
        "process_vm_writev",
    )

    def __init__(self, folder: Path) -> None:
        unicorn = pytest.importorskip("unicorn", reason="the emulator is not installed")
        from unicorn import arm64_const as registers

        self.folder, self.registers, self.known = folder, registers, dict[str, int]()
        self.cpu = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        self.cpu.reg_write(registers.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # floating point is permitted
        self.cpu.hook_add(unicorn.UC_HOOK_MEM_UNMAPPED, self.map_page)
        self.held: list[Any] = []
        self.stubs = self.reserve(RETURN * (1 + len(self.EXTERNALS)))
        self.stack = self.reserve(bytes(1 << 20)) + (1 << 20)
        self.cpu.hook_add(unicorn.UC_HOOK_CODE, self.call_external, None, self.stubs + 4, self.stubs + 4096)

    def reserve(self, content: bytes) -> int:
        """The address of new memory with a content, at the beginning of a page."""
        memory = mmap.mmap(-1, -(-len(content) // 4096) * 4096)
        memory[: len(content)] = content
        self.held.append(view := (ctypes.c_char * len(memory)).from_buffer(memory))
        return ctypes.addressof(view)

    def map_page(self, cpu: Any, access: int, address: int, size: int, value: int, data: Any) -> bool:
        """Show the emulator a page of this process."""
        page = address & -4096
        cpu.mem_map_ptr(page, 4096, 7, page)
        return True

    def call_external(self, cpu: Any, address: int, size: int, data: Any) -> None:
        """Do what a function of the C library would do."""
        x0, x1, x2 = (cpu.reg_read(self.registers.UC_ARM64_REG_X0 + k) for k in range(3))
        name, result = self.EXTERNALS[(address - self.stubs) // 4 - 1], 0
        if name in ("memcpy", "memset"):
            getattr(ctypes, name.replace("cpy", "move"))(x0, x1, x2)
            result = x0
        elif name == "clock_gettime":
            (ctypes.c_int64 * 2).from_address(x1)[:] = divmod(time.monotonic_ns(), 10**9)
        cpu.reg_write(self.registers.UC_ARM64_REG_X0, result)

    def address(self, name: str) -> int:
        """Link a function into memory."""
        if name not in self.known:
            self.known[name] = self.link((self.folder / name).read_bytes(), name)
        return self.known[name]

    def link(self, data: bytes, function: str) -> int:
        """Link an object: sections, then a table of the addresses that code finds there."""
        sections = linker.read_sections(data)
        symbols = linker.read_symbols(data, sections)
        code, places = linker.lay_out(data, sections)
        table = len(code)
        base = self.reserve(bytes(code) + bytes(8 * len(symbols)))
        image = (ctypes.c_char * (table + 8 * len(symbols))).from_address(base)
        targets = [
            self.stubs + 4 * (1 + self.EXTERNALS.index(name))
            if name in self.EXTERNALS
            else base + places.get(symbol["section"], 0) + int(symbol["value"])
            for name, symbol in symbols
        ]
        struct.pack_into(f"<{len(targets)}Q", image, table, *targets)
        for place, kind, number, addend in linker.read_relocations(data, sections, places):
            target, (word,) = targets[number] + addend, struct.unpack_from("<I", image, place)
            if kind in (GOT_PAGE, GOT_LOW_BITS):
                target = base + table + 8 * number
            if kind == POINTER:
                struct.pack_into("<Q", image, place, target)
                continue
            struct.pack_into("<I", image, place, relocate(kind, word, base + place, target))
        return next(targets[k] for k, (name, _) in enumerate(symbols) if name == function)

    def run(self, name: str, *words: int) -> int:
        """Call a function of words."""
        for k, word in enumerate(words):
            self.cpu.reg_write(self.registers.UC_ARM64_REG_X0 + k, word)
        self.cpu.reg_write(self.registers.UC_ARM64_REG_SP, self.stack)
        self.cpu.reg_write(self.registers.UC_ARM64_REG_LR, self.stubs)
        self.cpu.emu_start(self.address(name), self.stubs)
        return int(self.cpu.reg_read(self.registers.UC_ARM64_REG_X0))


def relocate(kind: int, word: int, place: int, target: int) -> int:
    """An instruction with the address that it uses."""
    if kind in CALLS:
        return word & 0xFC000000 | (target - place >> 2 & 0x3FFFFFF)
    if kind in (PAGES, GOT_PAGE):
        pages = (target >> 12) - (place >> 12)
        return word & 0x9F00001F | (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5
    if kind == DISTANCE:
        return target - place & 0xFFFFFFFF
    scale = {LOW_BITS: 0, GOT_LOW_BITS: 3, **SCALED}[kind]
    return word & ~(0xFFF << 10) | (target & 0xFFF) >> scale << 10


@pytest.mark.parametrize("way", ["flat", "pairs"])
def test_collectives_give_the_same_bits_on_arm(emitted: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    emulator = Emulator(emitted)
    monkeypatch.setattr(objects, "kernel", lambda name: partial(emulator.run, name))
    monkeypatch.setattr(objects, "fold", lambda op, code: emulator.address(objects.fold_name(op, code)))
    monkeypatch.setattr(shared_memory, "agree_on_code", lambda facts: True)
    kinds = ("allreduce", "allgather")
    calls = [Call(kind, n, n % 5, dtype) for dtype in ("f4", "f2") for n in (1, 5, 12, 13, 700) for kind in kinds]
    with open_ranks(5, {"flat": FLAT, **TREES}[way]) as ranks:
        advance_in_any_order(ranks, calls)


def test_bfloat16_sums_are_rounded_alike_on_arm(emitted: Path) -> None:
    emulator, rng = Emulator(emitted), np.random.default_rng(0)
    words = (rng.standard_normal((3, 500)).astype("f4").view("u4") >> 16).astype("u2")
    reduce("sum", "bfloat16", list(words), want := np.empty(500, "u2"))
    sources, out = np.array([each.ctypes.data for each in words]), np.empty(500, "u2")
    emulator.run("sum_bf16", sources.ctypes.data, 3, 0, out.ctypes.data, 500)
    assert np.array_equal(out, want)
