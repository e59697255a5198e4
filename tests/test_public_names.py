"""Every public name is at ``hpccomm``, imported when it is first used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hpccomm

PACKAGE = Path(hpccomm.__file__).parent
PROMISED = """
Communicator allreduce allgather reduce_scatter broadcast Bucket Layout
chain clip scale momentum weight_decay adam every mean feedback synchronous_sgd synchronous_adam
gtc dgc onebit_sgd onebit_adam onebit_lamb ef_signsgd powersgd
bmuf bmuf_adam hybrid local_sgd post_local_sgd slowmo diloco
mics zero data_parallel lars lamb scale_by_trust_ratio ParameterServer
none cast threshold topk randomk onebit sign_majority ternary qsgd natural low_rank
save load save_set load_set save_shards load_shards state_dict load_state_dict for_ranks
HpccommError ArgumentError LaunchError MismatchError ScheduleError TransportError
"""


def test_every_name_of_the_readme_is_public() -> None:
    assert set(PROMISED.split()) <= set(hpccomm.__all__)


@pytest.mark.parametrize("name", hpccomm.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(hpccomm, name).__name__ == name


def test_type_checkers_see_the_names_that_programs_see() -> None:
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    seen = {each.name for node in stub.body if isinstance(node, ast.ImportFrom) for each in node.names}
    homes = {each.name: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for each in node.names}
    assert seen == set(hpccomm.__all__)
    assert homes == hpccomm._HOME


def test_importing_the_package_loads_no_other_one() -> None:
    code = "import sys, hpccomm, hpccomm.testing; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"mpi4py", "numpy", "numba", "cupy", "torch"} & set(loaded)
    assert {name for name in loaded if name.startswith("hpccomm")} == {"hpccomm", "hpccomm.testing"}


def test_run_on_ranks_is_where_tests_look_for_it() -> None:
    import hpccomm.testing

    assert hpccomm.testing.run_on_ranks(2, lambda comm: comm.rank) == [0, 1]


@pytest.mark.parametrize("folder", sorted(hpccomm._FOLDERS))
def test_subpackages_are_reachable_after_importing_the_package_alone(folder: str) -> None:
    code = f"import hpccomm; assert {folder!r} in dir(hpccomm); print(hpccomm.{folder}.__name__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == f"hpccomm.{folder}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'gradient_descent'"):
        _ = hpccomm.gradient_descent


@pytest.mark.parametrize("module", sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")))
def test_no_function_is_named_after_its_module(module: str) -> None:
    """Importing such a function into the package would hide the module, or the module the function."""
    body = ast.parse((PACKAGE / module).read_text()).body
    assert Path(module).stem not in {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
