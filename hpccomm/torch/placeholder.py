"""The program of a placeholder: it gives its environment to the process that takes its place, and lives as long.

If that process ends without a last byte, as a killed one, the placeholder calls all other processes and fails.

It runs without packages, as ``placeholder.py NAME ...`` with the name of each rank's socket.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
from contextlib import suppress

RANK_VARIABLES = ("PMIX_RANK", "PMI_RANK", "PMI_ID")
"""Where launchers say which rank a process is: PRRTE, MPICH's, and that with ``-pmi-port``."""


def is_same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end belongs to this user."""
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return bool(user == os.geteuid())


def main(names: list[str]) -> int:
    """Send the environment, then wait until the process ends; returns the exit status."""
    rank = next(int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect("\0" + names[rank])
        if is_same_user(connection):
            connection.sendall(json.dumps(dict(os.environ)).encode() + b"\n")
            if connection.recv(1):
                connection.recv(1)
                return 0
    for name in names:
        with socket.socket(socket.AF_UNIX) as call, suppress(OSError):
            call.connect("\0" + name)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
