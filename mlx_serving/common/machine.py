"""Which machine this is: the same for all of its processes, and after a restart."""

from __future__ import annotations

import ctypes
import hashlib
import socket
import sys
from functools import cache
from pathlib import Path
from typing import Final

ID_DIGITS: Final = 8
_LINUX_ID: Final = Path("/etc/machine-id")


@cache
def machine_id() -> str:
    """Return eight hex digits that tell this machine from others.

    From the hardware's UUID on macOS (unverified there), from ``/etc/machine-id`` and the host's
    name on Linux, where containers may share the one; from the host's name alone if there is
    nothing else.
    """
    known = _mac_uuid() if sys.platform == "darwin" else _linux_id() + socket.gethostname()
    return hashlib.sha256((known or socket.gethostname()).encode()).hexdigest()[:ID_DIGITS]


def _mac_uuid() -> str:
    """What `gethostuuid(2)` says; '' if it fails."""
    uuid, wait = (ctypes.c_ubyte * 16)(), (ctypes.c_long * 2)(1, 0)
    try:
        failed = ctypes.CDLL(None).gethostuuid(uuid, wait)
    except (OSError, AttributeError):
        return ""
    return "" if failed else bytes(uuid).hex()


def _linux_id() -> str:
    try:
        return _LINUX_ID.read_text().strip()
    except (OSError, ValueError):  # a ValueError: no UTF-8
        return ""
