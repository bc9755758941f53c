"""The name of the machine, and that attempts say it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_serving.common import attempts, machine
from mlx_serving.common.machine import machine_id

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_a_machine_id_of_odd_bytes_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "id").write_bytes(b"\xff\xfe")
    monkeypatch.setattr(machine, "_LINUX_ID", tmp_path / "id")
    assert len(machine.machine_id.__wrapped__()) == 8


def test_a_machine_has_one_name_and_attempts_say_it() -> None:
    assert machine_id() == machine_id()
    assert len(machine_id()) == 8
    int(machine_id(), 16)
    nonce = attempts.new_nonce(machine_id())
    assert nonce.endswith("-" + machine_id())
    attempt = attempts.Attempt("a:b", 3, nonce)
    assert attempts.Attempt.parse(attempt.name) == attempt
