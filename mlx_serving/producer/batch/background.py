"""Starts a runner in a process of its own, which outlives the terminal that started it."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import msgspec

from mlx_serving.common import interpreter

if TYPE_CHECKING:
    from mlx_serving.common.settings import Settings
    from mlx_serving.producer.batch.folder import BatchFolder


_started: list[subprocess.Popen[bytes]] = []
"""Runners that this process started; kept to collect the exit status of those that ended."""


def start_runner(folder: BatchFolder, settings: Settings) -> int:
    """Start a runner in the background; return its process id.

    The settings go through a pipe: they hold secrets, and others can read a command line.
    """
    _started[:] = [process for process in _started if process.poll() is None]
    with folder.log.open("ab") as log:
        process = subprocess.Popen(  # noqa: S603 -- our own interpreter and module
            interpreter.command("-m", "mlx_serving.producer.batch", str(folder.path.resolve())),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    assert process.stdin is not None  # noqa: S101 -- it was asked for
    process.stdin.write(encode_settings(settings))
    process.stdin.close()
    _started.append(process)
    return process.pid


def encode_settings(settings: Settings) -> bytes:
    """Settings as JSON, with their secrets; `Settings(**decoded)` makes the same settings."""
    return msgspec.json.encode(_plain(settings.model_dump()))


def _plain(value: Any) -> Any:  # noqa: ANN401 -- any value of the settings
    if hasattr(value, "get_secret_value"):
        return value.get_secret_value()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)
