"""The environment variables ``HPCCOMM_*`` and their values; a wrong name or value is an error, not a default."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hpccomm.errors import ArgumentError


def on_or_off(value: str) -> str:
    """The remedy for a value that is neither ``on`` nor ``off``."""
    return "" if value in ("on", "off") else "use on or off"


def wait_or_background(value: str) -> str:
    """The remedy for a value that is neither ``wait`` nor ``background``."""
    return "" if value in ("wait", "background") else "use wait or background"


def short_or_full(value: str) -> str:
    """The remedy for a value that is neither ``short`` nor ``full``."""
    return "" if value in ("short", "full") else "use short or full"


def progress_kind(value: str) -> str:
    """The remedy for a value that names no use of the progress thread."""
    return "" if value in ("on", "off", "all") else "use on, off or all"


def seconds(value: str) -> str:
    """The remedy for a value that is not a number of seconds."""
    try:
        return "" if float(value) >= 0 else "use a number of seconds, such as 60"
    except ValueError:
        return "use a number of seconds, such as 60"


def warn_or_abort(value: str) -> str:
    """The remedy for a value that is neither ``warn`` nor ``abort``."""
    return "" if value in ("warn", "abort") else "use warn or abort"


def sample_or_detail(value: str) -> str:
    """The remedy for a value that says of no calls whether they are compared between nodes."""
    return "" if value in ("sample", "detail", "off") else "use sample, detail or off"


def elsewhere(value: str) -> str:
    """No remedy: the value is checked where it is used."""
    return ""


DEVICE_SETTING = "HPCCOMM_GPU_TRANSPORT"
"""The environment variable that names the transport for arrays on a device."""
ON_HOST = "host"
"""Its value for device arrays in memory that the host can address, such as managed memory."""

CHECKS: dict[str, Callable[[str], str]] = {
    "HPCCOMM_ALGORITHM": elsewhere,
    "HPCCOMM_CACHE": elsewhere,
    "HPCCOMM_COMPILE": wait_or_background,
    "HPCCOMM_CONSISTENCY": on_or_off,
    "HPCCOMM_DEBUG": sample_or_detail,
    "HPCCOMM_ENTRY": on_or_off,
    "HPCCOMM_EXCEPTHOOK": on_or_off,
    DEVICE_SETTING: elsewhere,
    "HPCCOMM_GUARD": on_or_off,
    "HPCCOMM_MPI": elsewhere,
    "HPCCOMM_PROGRESS": progress_kind,
    "HPCCOMM_SHARED_MEMORY": on_or_off,
    "HPCCOMM_STALL_ACTION": warn_or_abort,
    "HPCCOMM_STALL_SECONDS": seconds,
    "HPCCOMM_TEST_LAUNCHER": elsewhere,
    "HPCCOMM_TIMELINE": elsewhere,
    "HPCCOMM_TRACEBACK": short_or_full,
    "HPCCOMM_TUNING": elsewhere,
}
"""Each variable with the function that gives the remedy for a wrong value; empty values are as good as none."""


def check_environment(environ: Mapping[str, str]) -> None:
    """Raise ArgumentError for a variable ``HPCCOMM_*`` that does not exist or has a wrong value."""
    for name in filter(lambda each: each.startswith("HPCCOMM_"), environ):
        if name not in CHECKS:
            import difflib

            close = difflib.get_close_matches(name, CHECKS, 1, cutoff=0.8)
            raise ArgumentError(f"{name} is not a setting of hpccomm: use {' or '.join(close or CHECKS)}")
        value = environ[name]
        remedy = CHECKS[name](value) if value else ""
        if remedy:
            raise ArgumentError(f"{name}={value!r} is not known: {remedy}")
