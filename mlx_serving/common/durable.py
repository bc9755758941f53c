"""Writes files to the disk itself: the one place that does, because macOS needs more than fsync."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

REFUSED: Final = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY}
"""What file systems say that can't do it, such as network volumes."""


def sync_to_disk(descriptor: int) -> None:
    """Return when a file or folder is on the disk, so that a power loss can't take it back.

    On macOS fsync leaves the data in the drive's own cache; F_FULLFSYNC empties that too. Where the
    file system can't do it, fsync is what there is.

    Raises:
        OSError: the disk failed.

    """
    command = getattr(fcntl, "F_FULLFSYNC", None)  # macOS alone has it
    if command is not None:
        try:
            fcntl.fcntl(descriptor, command)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
        else:
            return
    os.fsync(descriptor)


def sync_folder(path: Path) -> None:
    """Make new and renamed files in a folder outlive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync_to_disk(descriptor)
    finally:
        os.close(descriptor)
