"""A wall clock that is wrong and jumps; the monotonic clock stays right, as kernels keep it."""

from __future__ import annotations

import datetime as dt
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self
from unittest import mock

from rq import utils as rq_utils

from mlx_serving.common.protocol import calls

if TYPE_CHECKING:
    from pathlib import Path


class WrongClock:
    """Replaces every reading of the wall clock that we or RQ make, until `stop`.

    `file` holds the error in seconds; what is written there counts from the next reading on.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._right = file, time.time
        namespace = SimpleNamespace(**(vars(dt) | {"datetime": self._datetime()}))
        self._patches: list[Any] = [
            mock.patch.object(time, "time", self._time),
            mock.patch.object(calls, "datetime", namespace.datetime),
            mock.patch.object(rq_utils, "datetime", namespace),
        ]

    def _error(self) -> float:
        return float(self._file.read_text() or 0)

    def _time(self) -> float:
        return self._right() + self._error()

    def _datetime(self) -> type[dt.datetime]:
        error = self._error

        class Wrong(dt.datetime):
            @classmethod
            def now(cls, tz: dt.tzinfo | None = None) -> Self:
                wrong = dt.datetime.now(tz) + dt.timedelta(seconds=error())
                return cls.fromisoformat(wrong.isoformat())

        return Wrong

    def start(self) -> None:
        for patch in self._patches:
            patch.start()

    def stop(self) -> None:
        for patch in self._patches:
            patch.stop()
