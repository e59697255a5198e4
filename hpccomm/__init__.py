"""Faster, safer collectives and gradient synchronisation for training on MPI clusters.

Importing this package starts no MPI and loads no CuPy, PyTorch or Numba: every public name is imported when it is
first used.  Type checkers read the same names from ``__init__.pyi``.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "communicator": "Communicator",
    "functional": "allgather allreduce broadcast reduce_scatter",
    "buckets": "Bucket",
    "layout": "Layout",
    "errors": "ArgumentError HpccommError LaunchError MismatchError ScheduleError TransportError",
    "algorithms.transforms": "Transform adam apply_if_finite chain clip descend every flush momentum scale "
    "scale_by_schedule weight_decay",
    "algorithms.block_codes": "block_mean",
    "algorithms.row_sparse": "mean_rows",
    "collectives.compressed.rows": "allreduce_rows",
    "algorithms.bucketed": "BucketedExchange",
    "algorithms.loss_scaling": "LossScale loss_scale scale_loss",
    "algorithms.exchange": "mean synchronous_adam synchronous_sgd",
    "algorithms.error_feedback": "feedback without_feedback",
    "algorithms.threshold_compression": "gtc",
    "algorithms.deep_gradient_compression": "dgc",
    "algorithms.onebit": "ef_signsgd onebit_adam onebit_lamb onebit_sgd",
    "algorithms.power_sgd": "powersgd",
    "algorithms.blockwise_filtering": "bmuf bmuf_adam",
    "algorithms.two_tier": "hybrid",
    "algorithms.local_steps": "diloco local_sgd post_local_sgd slowmo",
    "algorithms.sharded.groups": "mics",
    "algorithms.sharded.checkpoints": "load_shards save_shards",
    "algorithms.sharded.units": "data_parallel zero",
    "algorithms.large_batch": "lamb lars",
    "algorithms.trust_ratio": "add_decayed_weights scale_by_global_norm scale_by_trust_ratio",
    "algorithms.parameter_server": "ParameterServer",
    "algorithms.compression.matrix_factors": "low_rank",
    "algorithms.compression.quantized": "cast natural none qsgd ternary",
    "algorithms.compression.selection": "randomk threshold topk",
    "algorithms.compression.signs": "onebit sign_majority",
    "algorithms.checkpoint_sets": "load_set save_set",
    "algorithms.checkpoints": "load load_state_dict save state_dict",
    "algorithms.reports": "report",
    "algorithms.states": "for_ranks snapshot",
    "jax.gradients": "optax",
}
"""Where the public names are defined, module by module."""

_HOME = {name: f"hpccomm.{module}" for module, names in _MODULES.items() for name in names.split()}

_FOLDERS = {"algorithms", "collectives", "performance", "testing", "train"}
"""Subpackages that ``import hpccomm`` alone makes reachable."""

__all__ = sorted(_HOME)  # noqa: PLE0605


def import_name(package: str, home: dict[str, str], name: str) -> Any:
    """Import a public name of one of our packages from its ``home``, and keep it in the package."""
    if name not in home:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's processes are no ranks of MPI before init_process_group
        import_module("hpccomm.torch.placeholders").postpone_mpi()
    value = getattr(import_module(home[name]), name)
    setattr(sys.modules[package], name, value)
    return value


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return import_module(f"hpccomm.{name}")
    return import_name(__name__, _HOME, name)


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__, *_FOLDERS})
