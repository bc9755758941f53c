"""Files reach the disk itself, also on macOS, whose fsync leaves them in the drive's cache."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING

import pytest

from mlx_serving.common.durable import sync_folder, sync_to_disk

if TYPE_CHECKING:
    from pathlib import Path

FULL = 51  # F_FULLFSYNC on macOS


class Disk:
    """Writes down what it is asked for; fails the full sync with `refusal`, if there is one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refusal: int = 0) -> None:
        self.asked: list[str] = []
        self._refusal, self._fsync = refusal, os.fsync
        monkeypatch.setattr(os, "fsync", self._sync)
        monkeypatch.setattr(fcntl, "fcntl", self._control)

    def _sync(self, descriptor: int) -> None:
        self.asked.append("fsync")
        self._fsync(descriptor)

    def _control(self, _descriptor: int, command: int) -> int:
        assert command == FULL
        self.asked.append("full")
        if self._refusal:
            raise OSError(self._refusal, os.strerror(self._refusal))
        return 0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a"
    path.write_text("text")
    return path


def synced(path: Path) -> None:
    with path.open("rb") as file:
        sync_to_disk(file.fileno())


def test_fsync_is_all_that_other_systems_have(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.delattr(fcntl, "F_FULLFSYNC", raising=False)
    disk = Disk(monkeypatch)
    synced(file)
    assert disk.asked == ["fsync"]


def test_on_macos_the_drive_empties_its_cache(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", FULL, raising=False)
    disk = Disk(monkeypatch)
    synced(file)
    assert disk.asked == ["full"]
    sync_folder(file.parent)
    assert disk.asked == ["full", "full"]


@pytest.mark.parametrize("refusal", [errno.ENOTSUP, errno.EINVAL, errno.ENOTTY])
def test_a_file_system_that_can_not_gets_fsync(
    monkeypatch: pytest.MonkeyPatch, file: Path, refusal: int
) -> None:
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", FULL, raising=False)
    disk = Disk(monkeypatch, refusal)
    synced(file)
    assert disk.asked == ["full", "fsync"]


def test_a_disk_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    """Never a second try by fsync: it might say that all is well."""
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", FULL, raising=False)
    disk = Disk(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        synced(file)
    assert disk.asked == ["full"]
