"""A private, real `redis-server`, for the demo and the tests."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Final, Literal, Self

import redis

from mlx_serving.common.errors import MissingDependency, QueueUnavailable
from mlx_serving.common.redis.connection import Endpoint, connect

AppendOnly = Literal["no", "everysec", "always"]

START_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.01


class LocalRedis:
    """A `redis-server` of our own, on a unix socket in a temporary folder.

    Args:
        appendonly: "no" keeps nothing over a kill; "everysec" and "always" are AOF's fsync.
        port: also listen on this TCP port of the loopback interface (0: none).
        options: more `redis.conf` directives, as `{"maxmemory": "64mb"}`.

    Raises MissingDependency if `redis-server` is not installed, QueueUnavailable if it does
    not answer within 10 s.

    """

    def __init__(
        self,
        *,
        appendonly: AppendOnly = "no",
        port: int = 0,
        options: dict[str, str] | None = None,
    ) -> None:
        """Remember what to run; `start` or `with` runs it."""
        self.appendonly = appendonly
        self.port = port
        self._options = options or {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start it."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """End it, and delete its data."""
        self.stop()

    @property
    def folder(self) -> Path:
        """Folder of its socket, data and log."""
        if self._folder is None:
            # Short, because a socket's path may have 104 bytes on macOS, and TMPDIR is long there.
            self._folder = tempfile.TemporaryDirectory(prefix="mlxs-", dir="/tmp")
        return Path(self._folder.name)

    @property
    def socket(self) -> Path:
        """Its unix socket."""
        return self.folder / "redis.sock"

    @property
    def url(self) -> str:
        """URL for settings and clients."""
        return f"unix://{self.socket}"

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def client(self) -> redis.Redis:
        """Open a new client."""
        return connect(Endpoint(url=self.url))

    def start(self) -> Self:
        """Start it, and wait until it answers (with its AOF loaded)."""
        if self.pid is None:
            command = self._command()
            with (self.folder / "startup.log").open("wb") as output:
                self._process = subprocess.Popen(  # noqa: S603 -- our own arguments
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    process_group=0,  # a Ctrl-C at the terminal is for us, and Redis ends last
                )
            try:
                self._wait_until_ready(self._process)
            except BaseException:
                self.stop()
                raise
        return self

    def kill(self) -> None:
        """End it by SIGKILL, as a crash would; its data stay."""
        self._end(signal.SIGKILL)

    def restart(self) -> Self:
        """Start it again on the same data; one that runs is killed first."""
        self.kill()
        return self.start()

    def stop(self) -> None:
        """End it in order, and delete its data."""
        self._end(signal.SIGTERM)
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _command(self) -> list[str]:
        program = shutil.which("redis-server")
        if program is None:
            raise MissingDependency(
                "redis-server is not installed: "
                "`apt-get install redis-server` (Debian) or `brew install redis` (macOS)"
            )
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self.folder),
            "logfile": str(self.folder / "redis.log"),
            "save": "",
            "appendonly": "no" if self.appendonly == "no" else "yes",
            "daemonize": "no",
        }
        if self.appendonly != "no":
            options["appendfsync"] = self.appendonly
        options |= self._options
        return [
            program,
            *(word for name, value in options.items() for word in (f"--{name}", value)),
        ]

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        with self.client() as client:
            while time.monotonic() < deadline and process.poll() is None:
                try:
                    if client.ping():
                        return
                except (redis.ConnectionError, redis.TimeoutError):
                    # Not listening yet, or still loading its AOF (BusyLoadingError).
                    time.sleep(_POLL_SECONDS)
        raise QueueUnavailable(f"redis-server did not come up: {self.log()}")

    def log(self, lines: int = 5) -> str:
        """Last lines of its log, with what it said about its configuration."""
        logs = (self.folder / "startup.log", self.folder / "redis.log")
        text = "".join(log.read_text() for log in logs if log.exists())
        return "\n".join(text.splitlines()[-lines:])

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            process.wait()
