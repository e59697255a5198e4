"""Machine code that is compiled once and loaded without a compiler, and the built-in functions made of it."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpccomm.__main__ import main
from hpccomm.commands import warm
from hpccomm.kernels import linker, objects
from hpccomm.kernels.builtins import make_builtin
from hpccomm.launcher import launch_command
from hpccomm.performance import probe
from hpccomm.performance.machine import REFERENCE

FASTCALL = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object, ctypes.POINTER(ctypes.py_object), ctypes.c_ssize_t)


@FASTCALL
def add_up(itself, arguments, n):
    return itself + sum(arguments[:n])


def address_of(body: ctypes._CFuncPtr) -> int:
    return ctypes.cast(body, ctypes.c_void_p).value or 0


def test_a_builtin_passes_its_own_object_and_its_arguments() -> None:
    add = make_builtin("add", address_of(add_up), 1000)
    assert (add.__name__, add(), add(20, 3)) == ("add", 1000, 1023)
    with pytest.raises(TypeError, match="keyword"):
        add(x=1)


def test_a_builtin_holds_one_reference_to_its_object() -> None:
    body = make_builtin("add", address_of(add_up), itself := 10**6)
    held = sys.getrefcount(itself)
    for _ in range(1000):
        body(1)
    assert sys.getrefcount(itself) == held
    del body
    assert sys.getrefcount(itself) == held - 1


# Files


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for files, and no function loaded yet."""
    monkeypatch.setenv("HPCCOMM_CACHE", str(tmp_path))
    objects.address.cache_clear()
    yield tmp_path
    objects.address.cache_clear()


def run_kernel_on_a_callback() -> int:
    """Run the function ``run_kernel``, at the address that the cache gives, on a kernel that adds one."""
    kernel = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(lambda call: call + 1)
    return make_builtin("run_kernel", objects.address("run_kernel"), address_of(kernel))(41)


def test_a_function_is_loaded_from_the_file_that_was_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_kernel_on_a_callback() == 42
    assert sorted(each.name for each in cache.iterdir()) == ["lock", objects.file_name("run_kernel")]
    objects.address.cache_clear()
    monkeypatch.setattr(objects, "compile_for_all", None)
    assert run_kernel_on_a_callback() == 42


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:60] + b"?" + data[61:]]
)
def test_a_damaged_file_is_written_anew(cache: Path, damage) -> None:
    run_kernel_on_a_callback()
    file = cache / objects.file_name("run_kernel")
    file.write_bytes(damage(data := file.read_bytes()))
    objects.address.cache_clear()
    assert objects.read("run_kernel") is None
    assert run_kernel_on_a_callback() == 42
    assert file.read_bytes() == data


def test_without_a_folder_functions_are_compiled_in_each_process(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCCOMM_CACHE", "/proc/nowhere")
    assert objects.writable_folder() is None
    assert run_kernel_on_a_callback() == 42


def test_on_a_full_disk_nothing_is_left_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_the_disk_full(part: Path, target: Path) -> None:
        assert part.stat().st_size > 0
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", find_the_disk_full)
    assert run_kernel_on_a_callback() == 42
    assert [each.name for each in cache.iterdir()] == ["lock"]


def test_a_temporary_folder_that_others_can_write_to_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HPCCOMM_CACHE", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    private = tmp_path / f"hpccomm-{os.getuid()}"
    assert private in objects.folders()
    private.chmod(0o770)
    assert private not in objects.folders()


def compute_key(module: str) -> str:
    objects.describe_compiler.cache_clear()
    return objects.key.__wrapped__(module)


def test_the_key_changes_with_every_source_of_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    read, before = objects.read_beginning, {module: compute_key(module) for module in objects.SOURCES}
    for module, sources in objects.SOURCES.items():
        for source in sources:
            edited = str(objects.KERNELS / source)
            assert read(edited)
            monkeypatch.setattr(
                objects, "read_beginning", lambda path, edited=edited: read(path) + b"#" * (path == edited)
            )
            changed = {each for each in objects.SOURCES if compute_key(each) != before[each]}
            uses = {each for each, files in objects.SOURCES.items() if source in files}
            assert changed == (uses if module else set(objects.SOURCES)), source
    objects.describe_compiler.cache_clear()


def test_the_key_changes_with_the_processor_and_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, read = {compute_key("python_api")}, objects.read_beginning
    for file in (objects.PROCESSOR_FILES[0], *map(objects.version_file, ("numba", "llvmlite"))):
        monkeypatch.setattr(objects, "read_beginning", lambda path, file=file: read(path) + b"#" * (path == file))
        keys.add(compute_key("python_api"))
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    assert len(keys | {compute_key("python_api")}) == 5
    objects.describe_compiler.cache_clear()


SCRIPT = """
import sys
from hpccomm.kernels import objects
for name in ("run_kernel", "barrier"):
    objects.address(name)
"""
REPORT = """
from hpccomm.kernels import emission
emit = emission.emit
emission.emit = lambda name, *rest: print(name) or emit(name, *rest)
"""


def run_script(code: str, folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "HPCCOMM_CACHE": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_of_processes_that_start_together_one_compiles(tmp_path: Path) -> None:
    running = [run_script(REPORT + SCRIPT, tmp_path) for _ in range(3)]
    printed = "".join(each.communicate(timeout=240)[0] for each in running)
    assert sorted(printed.split()) == ["barrier", "run_kernel"]
    again = run_script(SCRIPT + "print({'numba', 'llvmlite'} & set(sys.modules))", tmp_path)
    assert again.communicate(timeout=240)[0] == "set()\n"


@pytest.mark.parametrize("module", sorted(set(objects.SOURCES) - {""}))
def test_the_sources_name_all_that_is_imported_to_compile(module: str, tmp_path: Path) -> None:
    code = f"import hpccomm.kernels.emission, hpccomm.kernels.{module}, sys\n"
    code += "print(*[each.__file__ for name, each in sys.modules.items() if name.startswith('hpccomm.kernels.')])"
    files = {Path(each) for each in run_script(code, tmp_path).communicate(timeout=240)[0].split()}
    sources = {objects.KERNELS / each for each in objects.SOURCES[""] + objects.SOURCES[module]}
    assert {each for each in files if each.name != "__init__.py"} <= sources


ALLREDUCE = """
import sys
import numpy as np
from mpi4py import MPI
import hpccomm
comm = hpccomm.Communicator(MPI.COMM_WORLD)
total = np.empty(3)
comm.Allreduce(np.full(3, comm.rank + 1.0), total)
assert (total == comm.size * (comm.size + 1) / 2).all()
modules = [each for each in ("numba", "llvmlite") if sys.modules.get(each)]
for line in MPI.COMM_WORLD.gather((comm.context.shared_memory._compiled, *modules)) or []:
    print(*line)
"""


def run_program(tmp_path: Path, code: str, ranks: int, **variables: str) -> list[str]:
    """The lines that ranks print."""
    script = tmp_path / "program.py"
    script.write_text(code)
    command, environment = launch_command(ranks, [str(script)], environ={**os.environ, **variables})
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=240, check=True)
    return done.stdout.splitlines()


def run_allreduce(tmp_path: Path, code: str = ALLREDUCE) -> list[str]:
    """The lines that two ranks print, with an empty cache in ``tmp_path`` at first."""
    return run_program(tmp_path, code, 2, HPCCOMM_CACHE=str(tmp_path / "cache"), HPCCOMM_COMPILE="wait")


@pytest.mark.slow
def test_a_program_with_files_never_imports_the_compiler(tmp_path: Path) -> None:
    assert len(run_allreduce(tmp_path)) == 2
    assert run_allreduce(tmp_path) == ["True", "True"]


@pytest.mark.slow(keep=1)
def test_without_numba_and_files_numpy_computes_the_same(tmp_path: Path) -> None:
    assert run_allreduce(tmp_path, "import sys; sys.modules['numba'] = None" + ALLREDUCE) == ["False", "False"]


def test_warm_compiles_what_is_missing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(objects, "EMITTED", {"run_kernel": objects.EMITTED["run_kernel"]})
    monkeypatch.setattr(probe, "ensure", lambda cores: (probe.Found(REFERENCE, cache / "machine.json"), True))
    monkeypatch.setattr(warm, "LOOPS", ("vectors",))
    assert objects.describe() == "not compiled yet: run `hpccomm warm`"
    for compiled in (1, 0):
        assert main(["warm"]) == 0
        told = capsys.readouterr().out
        assert told.startswith(f"compiled {compiled} functions in ")
        assert told.endswith(f": 1 of 1 in {cache}\nmachine: AMD EPYC, probe in {cache}/machine.json\n")
    monkeypatch.setenv("HPCCOMM_CACHE", "/proc/nowhere")
    assert main(["warm"]) == 1
    assert "set HPCCOMM_CACHE" in capsys.readouterr().err


def test_warm_knows_all_loops() -> None:
    families = {each.parent.name for each in objects.KERNELS.glob("*/loops.py") if "\n@loop(" in each.read_text()}
    assert set(warm.LOOPS) == families
    assert warm.compile_loops("vectors") == (objects.KERNELS / "vectors/loops.py").read_text().count("\n@loop(")


def test_a_second_process_in_the_background_leaves_the_work_to_the_first(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "EMITTED", {"run_kernel": objects.EMITTED["run_kernel"]})
    monkeypatch.setattr(os, "nice", lambda _: 0)
    probed: list[Any] = []
    monkeypatch.setattr(probe, "ensure", probed.append)
    code = f"""
from pathlib import Path
from hpccomm.kernels import objects
with objects.lock(Path({str(cache)!r}), "background", wait=False) as mine:
    input(mine)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.read(4) == "True"
        assert main(["warm", "--quiet", "--background"]) == 0
        assert objects.missing() == ["run_kernel"]
        assert not probed
        first.communicate("\n")
    assert main(["warm", "--quiet", "--background"]) == 0
    assert objects.missing() == []
    assert probed == [os.sched_getaffinity(0)]


# Linking


def test_llvm_links_where_we_do_not(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpccomm.kernels import emission

    monkeypatch.setattr(emission, "X86", False)
    assert run_kernel_on_a_callback() == 42
    assert b'"table"' not in objects.read("run_kernel")


def compile_text(code: str) -> bytes:
    """The object file of code in LLVM's language."""
    from llvmlite import binding

    from hpccomm.kernels import emission

    return emission.make_target_machine().emit_object(binding.parse_assembly(code))


def test_constants_may_point_to_each_other() -> None:
    data = compile_text("""
        @seven = internal constant i64 7
        @nine = internal constant i64 9
        @both = internal constant [2 x i64*] [i64* @seven, i64* @nine]
        define i64 @pick(i64 %which) {
            %place = getelementptr [2 x i64*], [2 x i64*]* @both, i64 0, i64 %which
            %pointer = load volatile i64*, i64** %place
            %value = load volatile i64, i64* %pointer
            ret i64 %value
        }""")
    image = linker.link(data, "pick")._asdict()
    pick = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(objects.place_image(**image))
    assert len(image["pointers"]) == 2
    assert [pick(0), pick(1)] == [7, 9]


def test_variables_are_refused() -> None:
    data = compile_text("""
        @counter = global i64 0
        define i64 @count(i64 %word) {
            store i64 %word, i64* @counter
            ret i64 %word
        }""")
    with pytest.raises(linker.LinkError, match="counter"):
        linker.link(data, "count")


# Programs that start before the functions are compiled

SWITCH = """
import numpy as np
from mpi4py import MPI
import hpccomm, hpccomm.context
from hpccomm.kernels import objects
rank, calls = MPI.COMM_WORLD.rank, 0
hpccomm.context.LOOK_SECONDS = 0
started = []
objects.compile_in_background = lambda: started.append(1)
objects.complete = lambda: calls > 3 * rank  # this rank has the functions from call 3 rank + 1 on
comm = hpccomm.Communicator(MPI.COMM_WORLD)
native = []
def make(call, *arguments):
    global calls
    calls += 1
    call(*arguments)
    native.append(comm.context.awaits_code)
x, y = np.full(10, rank + 1.0), np.empty(10)
for turn in range(4):
    make(comm.Allreduce, x, y)
    assert (y == comm.size * (comm.size + 1) / 2).all()
    make(comm.Bcast, y, turn % comm.size)
    make(comm.Allreduce, x[:0], y[:0])
    assert comm.explain("allreduce", 80).algorithm == ("native" if native[-1] else "shared")
    make(comm.Barrier)
print(native.index(False), len(started), all(native[:native.index(False)]), any(native[native.index(False):]))
"""


@pytest.mark.slow(keep=1)
def test_all_ranks_change_to_shared_memory_at_the_same_call(tmp_path: Path) -> None:
    lines = run_program(tmp_path, SWITCH, 3, HPCCOMM_COMPILE="background")
    # the last rank has the functions on entering call 7, which synchronises all ranks
    assert sorted(lines) == ["6 0 True False", "6 0 True False", "6 1 True False"]


OF_OBJECTS = """
import numpy as np
from mpi4py import MPI
import hpccomm, hpccomm.context
from hpccomm.kernels import objects
rank, size, number = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size, 0
hpccomm.context.LOOK_SECONDS = 0
objects.compile_in_background = lambda: None
objects.complete = lambda: number > 2  # all ranks have the functions from call 3 on
def read():
    if rank == 1:
        raise ValueError("cannot be read")
    return 1
class Unreadable:
    def __reduce__(self):
        return read, ()
comm = hpccomm.Communicator(MPI.COMM_WORLD)
comm.Allreduce(np.ones(3), y := np.empty(3))
awaits, failed = [], 0
for number in range(6):
    given = Unreadable() if number == 3 else 1
    try:
        {call}
    except ValueError:
        failed += 1
    awaits.append(comm.context.awaits_code)
comm.Allreduce(np.ones(3), y)
print(awaits.index(False), failed == (rank == 1), y[0] == size)
"""


@pytest.mark.parametrize("call", ["comm.allgather(given)", "comm.alltoall([given] * size)"])
def test_ranks_change_to_shared_memory_after_a_call_in_which_one_cannot_read_an_object(
    call: str, tmp_path: Path
) -> None:
    lines = run_program(tmp_path, OF_OBJECTS.format(call=call), 2, HPCCOMM_COMPILE="background")
    assert lines == ["4 True True"] * 2


NAMED = """
import numpy as np
from mpi4py import MPI
import hpccomm
from hpccomm.kernels import objects
objects.compile_in_background = lambda: None
objects.complete = lambda: False
comm = hpccomm.Communicator(MPI.COMM_WORLD)
comm.Allreduce(np.ones(3), y := np.empty(3))
assert "shared" not in comm.algorithms("allreduce")
if {registered}:
    y = comm.zeros(3)
else:
    comm.Allreduce(np.ones(3), y, algorithm="shared")
print(comm.explain("allreduce", 24).algorithm)
"""


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("registered", [False, True])
def test_a_program_that_asks_for_shared_memory_gets_it_at_once(registered: bool, tmp_path: Path) -> None:
    lines = run_program(tmp_path, NAMED.format(registered=registered), 2, HPCCOMM_COMPILE="background")
    assert lines == ["shared", "shared"]
