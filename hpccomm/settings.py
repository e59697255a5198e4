"""The environment variables ``HPCCOMM_*`` and their values; a wrong name or value is an error, not a default."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hpccomm.errors import ArgumentError


def one_of(*values: str) -> Callable[[str], str]:
    """What gives the remedy for a value that is none of these."""
    remedy = f"use {', '.join(values[:-1])} or {values[-1]}"
    return lambda value: "" if value in values else remedy


on_or_off = one_of("on", "off")


def seconds(value: str) -> str:
    """The remedy for a value that is not a number of seconds."""
    try:
        return "" if float(value) >= 0 else "use a number of seconds, such as 60"
    except ValueError:
        return "use a number of seconds, such as 60"


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
    "HPCCOMM_COMPILE": one_of("wait", "background"),
    "HPCCOMM_CONSISTENCY": on_or_off,
    "HPCCOMM_DEBUG": one_of("sample", "detail", "off"),
    "HPCCOMM_ENTRY": on_or_off,
    "HPCCOMM_EXCEPTHOOK": on_or_off,
    DEVICE_SETTING: elsewhere,
    "HPCCOMM_GUARD": on_or_off,
    "HPCCOMM_MPI": elsewhere,
    "HPCCOMM_PROGRESS": one_of("on", "off", "all"),
    "HPCCOMM_SHARED_MEMORY": on_or_off,
    "HPCCOMM_STALL_ACTION": one_of("warn", "abort"),
    "HPCCOMM_STALL_SECONDS": seconds,
    "HPCCOMM_TEST_LAUNCHER": elsewhere,
    "HPCCOMM_TIMELINE": elsewhere,
    "HPCCOMM_TRACEBACK": one_of("short", "full"),
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
