"""Watches the child from the parent, and serves `/healthz` and `/metrics`.

It is in the parent because that outlives an engine that hangs or dies. Each child sends its
snapshots through a pipe, which a thread reads. There is an HTTP server only if `metrics.port` is
set.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET, AF_INET6
from socketserver import TCPServer
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog

from mlx_serving.common.errors import InvalidSettings, MissingDependency
from mlx_serving.worker.status.health import HealthLimits, assess
from mlx_serving.worker.status.status import StatusTracker, decode

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnContext
    from multiprocessing.process import BaseProcess

    from mlx_serving.common.settings import Settings

log = structlog.get_logger(__name__)

JOIN_SECONDS: Final = 1.0  # that a reader of snapshots gets to end in
WATCH_SECONDS: Final = 0.5
SLEPT_SECONDS: Final = 1.0  # longer than asked for: then this process slept too
ABORT_SECONDS: Final = 2.0  # that a child gets to die of SIGABRT
Answer = tuple[int, str, bytes]
"""HTTP status, content type, body."""


class Monitor:
    """Follows one child after the other; the supervisor tells it when one starts and ends.

    Raises:
        InvalidSettings: `metrics.host` and `metrics.port` can't be listened on.
        MissingDependency: prometheus-client is not installed.

    """

    def __init__(self, settings: Settings, model: str, worker: str) -> None:
        self.tracker = StatusTracker()
        self._limits = HealthLimits(settings.engine.stall_seconds, settings.worker.buffer_tokens)
        self._model, self._worker = model, worker
        self._ends: tuple[Connection, Connection] | None = None
        self._reader: threading.Thread | None = None
        self._began = time.monotonic()
        self._server: _Server | None = None
        if settings.metrics.port is not None:
            self._server = self._serve(settings.metrics.host, settings.metrics.port)

    @property
    def port(self) -> int | None:
        """Port that the server listens on."""
        return self._server.server_port if self._server else None

    def _serve(self, host: str, port: int) -> _Server:
        routes = {"/healthz": self.healthz, "/metrics": self._exposition()}
        try:
            server = _Server(host, port, routes)
        except OSError as error:
            raise InvalidSettings(
                [("metrics.port", f"can't listen on {host}, port {port}: {error.strerror}")]
            ) from None
        thread = threading.Thread(target=server.serve_forever, name="monitor", daemon=True)
        thread.start()
        log.info("monitor_listens", host=host, port=server.server_port, paths=list(routes))
        return server

    # What the supervisor calls

    def pipe(self, context: SpawnContext) -> Connection:
        """Open the pipe for the next child and return the child's end."""
        self._ends = context.Pipe(duplex=False)
        return self._ends[1]

    def child_started(self) -> None:
        """Read the child's snapshots; call it after the process has started."""
        self.tracker.begin()
        if self._ends is None:
            return
        ours, theirs = self._ends
        theirs.close()
        self._reader = threading.Thread(
            target=self._read, args=(ours,), name="child reports", daemon=True
        )
        self._reader.start()

    def watch(self, process: BaseProcess) -> bool:
        """Wait until the child ends, and end it if it sends nothing for the stall time.

        Usually its own watchdog does that. It can't if native code hangs and keeps the
        interpreter's lock. Returns whether this ended the child.
        """
        while process.is_alive():
            before = time.monotonic()
            process.join(WATCH_SECONDS)
            if process.exitcode is not None:
                return False  # and its id may be another process's by now
            if time.monotonic() - before > WATCH_SECONDS + SLEPT_SECONDS:
                self.tracker.excuse()
                continue
            worker = self.tracker.status()
            allowed = self._limits.hung_seconds(worker.snapshot)
            if worker.child == "up" and worker.silent_for >= allowed:
                log.critical("child_silent", seconds=round(worker.silent_for, 1))
                _abort(process)
                return True
        return False

    def child_ended(self, cause: str, *, restarts: bool) -> None:
        """Note how the child ended, and whether another one will start."""
        if self._reader is not None:
            self._reader.join(JOIN_SECONDS)  # it ends with the pipe, which died with the child
        self.tracker.end(cause, restarts=restarts)
        self._ends = self._reader = None

    def stop(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def _read(self, connection: Connection) -> None:
        with connection, suppress(EOFError, OSError):
            while True:
                snapshot = decode(connection.recv_bytes())
                if threading.current_thread() is self._reader:
                    self.tracker.receive(snapshot)

    # What the HTTP server calls

    def healthz(self, _accept: str = "") -> Answer:
        """The health in JSON, with the figures that it goes by."""
        worker = self.tracker.status()
        now, health = worker.snapshot, assess(worker, self._limits)
        up = worker.child == "up"
        body = {
            "status": health.status,
            "reasons": health.reasons,
            "worker": self._worker,
            "model": self._model,
            "engine_progress_age_seconds": _rounded(now.engine_age + worker.silent_for, up=up),
            "redis_answer_age_seconds": _rounded(now.redis_age + worker.silent_for, up=up),
            "redis_failing_seconds": round(now.redis_failing, 3),
            "held_jobs": now.held,
            "backlog_tokens": now.backlog,
            "backlog_bound_tokens": self._limits.buffer_tokens,
            "memory_active_bytes": now.memory_active,
            "memory_limit_bytes": now.memory_limit,
            "report_age_seconds": _rounded(worker.silent_for, up=up),
            "child_pid": now.pid or None,
            "restarts": worker.restarts,
            "uptime_seconds": round(time.monotonic() - self._began, 3),
        }
        return health.http_status, "application/json", msgspec.json.encode(body)

    def _exposition(self) -> Callable[[str], Answer]:
        try:
            from prometheus_client import CollectorRegistry
            from prometheus_client.exposition import choose_encoder

            from mlx_serving.worker.status.metrics import WorkerCollector
        except ModuleNotFoundError as error:
            raise MissingDependency(
                f'{error.name}, for metrics.port: pip install "mlx-serving[worker]"'
            ) from None
        registry = CollectorRegistry(auto_describe=False)
        registry.register(WorkerCollector(self.tracker, self._limits, self._model, self._worker))

        def expose(accept: str) -> Answer:
            encoder, content_type = choose_encoder(accept)
            return 200, content_type, encoder(registry)

        return expose


def _abort(process: BaseProcess) -> None:
    """End the process as a crash would; SIGKILL ends one that is stopped."""
    if process.pid is not None:
        os.kill(process.pid, signal.SIGABRT)
    process.join(ABORT_SECONDS)
    process.kill()
    process.join()


def _rounded(seconds: float, *, up: bool) -> float | None:
    """An age; None if no child is up."""
    return round(seconds, 3) if up else None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, routes: dict[str, Callable[[str], Answer]]) -> None:
        self.address_family = AF_INET6 if ":" in host else AF_INET
        self.routes = routes
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """Bind without looking up the host's name, which may take a DNS server seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, *_: Any) -> None:
        """Log nothing: a client that went away is no event."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 5  # seconds that a client may take to send its request
    server_version, sys_version = "mlx-serving", ""

    def do_GET(self) -> None:
        """Answer a GET."""
        route = self.server.routes.get(self.path.partition("?")[0])
        if route is None:
            self._send(404, "text/plain", b"/healthz or /metrics\n")
            return
        self._send(*route(self.headers.get("Accept", "")))

    def _send(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing: a scrape is no event."""
