"""Other servers that the benchmarks run beside ours: OpenAI's HTTP API on a local port.

`mlx_lm.server` comes with the engine's own dependencies. vllm-mlx wants an older mlx-lm than ours,
so it lives in an environment of its own and is started by its command:

    python -m venv peer && peer/bin/pip install vllm-mlx 'mlx[cpu]'
    python -m benchmarks.peers.streams --peer vllm-mlx --peer-command peer/bin/vllm-mlx
"""

import logging
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Final

from benchmarks.lib.harness import START_SECONDS, child_call, free_port, wait_until

HOST: Final = "127.0.0.1"
PEERS: Final = ("mlx_lm.server", "vllm-mlx")


@contextmanager
def running_peer(name: str, command: str, folder: str, streams: int) -> Iterator[int]:
    """Run one of `PEERS` on the model in `folder`, with room for `streams` rows; yields its port.

    Raises RuntimeError where it ends before it listens.
    """
    port = free_port()
    if name == "vllm-mlx":
        with _vllm_mlx(command, folder, port, streams):
            yield port
    else:
        with _mlx_lm_server(folder, port, streams):
            yield port


@contextmanager
def _mlx_lm_server(folder: str, port: int, streams: int) -> Iterator[None]:
    peer = child_call(_serve_mlx_lm, folder, port, streams)
    try:
        peer.receive(str)
        _wait_until_listening(port, peer.process.is_alive, "mlx_lm.server")
        yield
    finally:
        peer.process.terminate()
        peer.end()


def _serve_mlx_lm(connection: Connection, folder: str, port: int, streams: int) -> None:
    connection.send("starting")
    from mlx_lm.server import APIHandler, main

    setattr(APIHandler, "log_message", lambda *_: None)  # noqa: B010 - a line a request costs it
    logging.disable(logging.INFO)
    sys.argv = [
        "mlx_lm.server", "--model", folder, "--host", HOST, "--port", str(port),
        "--decode-concurrency", str(streams), "--log-level", "WARNING",
    ]  # fmt: skip
    main()


@contextmanager
def _vllm_mlx(command: str, folder: str, port: int, streams: int) -> Iterator[None]:
    arguments = [
        command, "serve", folder, "--host", HOST, "--port", str(port), "--continuous-batching",
        "--max-num-seqs", str(streams),
    ]  # fmt: skip
    with tempfile.TemporaryFile() as log:
        peer = subprocess.Popen(arguments, stdout=log, stderr=log)
        try:
            _wait_until_listening(port, lambda: peer.poll() is None, "vllm-mlx")
            yield
        finally:
            peer.terminate()
            peer.wait(30)


def _wait_until_listening(port: int, alive: Callable[[], bool], name: str) -> None:
    wait_until(
        lambda: _listens(port) or not alive(),
        every=0.1, timeout=START_SECONDS, what=f"{name} listens",
    )  # fmt: skip
    if not alive():
        raise RuntimeError(f"{name} ended before it listened")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0
