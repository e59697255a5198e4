"""Linux's futex: processes sleep at a word of shared memory until another one wakes them."""

from __future__ import annotations

import platform

FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221}.get(platform.machine(), 0)
"""The number of the system call; 0 where it is not used: ranks then doze instead of sleeping until they are woken."""
FUTEX_WAIT, FUTEX_WAKE = 0, 1
EVERY_SLEEPER = (1 << 31) - 1
DOZE_NS = 200_000
"""The longest sleep where no other process can end it."""
