"""TLS with client certificates against a real redis-server, under a throw-away CA."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving import AsyncClient, Client
from mlx_serving.common.errors import MlxServingError, TlsFailed
from mlx_serving.common.redis.local import LocalRedis
from tests.support.helpers import free_port, wait_until
from tests.support.worker_process import InProcessWorker, WorkerProcess, quick_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Ask = Callable[..., MlxServingError]

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl CLI")


@dataclass(frozen=True)
class Authority:
    """A CA in a folder, and what it signs."""

    folder: Path

    def openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)  # noqa: S607

    def found(self) -> Authority:
        self.folder.mkdir()
        self.openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
            "-days", "2", "-subj", "/CN=throw-away CA", "-keyout", "ca.key", "-out", "ca.crt",
        )  # fmt: skip
        return self

    def issue(self, name: str) -> None:
        """Issue a certificate for 127.0.0.1, good for servers and clients."""
        (self.folder / "san.cnf").write_text("subjectAltName=IP:127.0.0.1\n")
        self.openssl(
            "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
            "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr",
        )  # fmt: skip
        self.openssl(
            "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key",
            "-CAcreateserial", "-days", "2", "-extfile", "san.cnf", "-out", f"{name}.crt",
        )  # fmt: skip

    def file(self, name: str) -> str:
        return str(self.folder / name)

    def login(self, name: str) -> dict[str, Any]:
        return {
            "redis__tls_ca": self.file("ca.crt"),
            "redis__tls_cert": self.file(f"{name}.crt"),
            "redis__tls_key": self.file(f"{name}.key"),
        }


@dataclass(frozen=True)
class Tls:
    url: str
    server: LocalRedis
    ours: Authority
    theirs: Authority


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tls]:
    folder = tmp_path_factory.mktemp("tls")
    ours, theirs = Authority(folder / "ours").found(), Authority(folder / "theirs").found()
    for name in ("server", "producer", "worker"):
        ours.issue(name)
    theirs.issue("producer")
    port = free_port()
    options = {
        "tls-port": str(port),
        "tls-cert-file": ours.file("server.crt"),
        "tls-key-file": ours.file("server.key"),
        "tls-ca-cert-file": ours.file("ca.crt"),
        "tls-auth-clients": "yes",
    }
    with LocalRedis(options=options) as server, server.client() as client:
        wait_until(lambda: client.info("server")["uptime_in_seconds"] >= 5)
        yield Tls(f"rediss://127.0.0.1:{port}", server, ours, theirs)


def test_producer_and_worker_end_to_end(tls: Tls) -> None:
    settings = quick_settings(tls.url, **tls.ours.login("producer"))
    with (
        InProcessWorker(tls.url, rate=500, **tls.ours.login("worker")) as worker,
        Client(settings=settings) as client,
    ):
        handles = [client.submit(model="tally", prompt="x", max_tokens=20) for _ in range(4)]
        for handle in handles:
            tokens = [t for event in handle.stream() for c in event.choices for t in c.token_ids]
            assert tokens == list(range(1, 21))
            assert handle.result(timeout=10).worker == worker.name


def test_the_async_client(tls: Tls) -> None:
    settings = quick_settings(tls.url, **tls.ours.login("producer"))

    async def use() -> str:
        async with AsyncClient(settings=settings) as client:
            job = await client.submit(model="tally", prompt="x", max_tokens=5)
            async for _ in job.stream():
                pass
            return (await job.result(timeout=10)).text

    with InProcessWorker(tls.url, rate=500, **tls.ours.login("worker")):
        assert asyncio.run(use()) == "1 2 3 4 5"


def told(url: str, **settings: Any) -> MlxServingError:
    """What a client is told, and soon."""
    started = time.monotonic()
    with (
        Client(settings=quick_settings(url, **settings)) as client,
        pytest.raises(MlxServingError) as refusal,
    ):
        client.submit(model="tally", prompt="my secret prompt")
    assert time.monotonic() - started < 10
    return refusal.value


def told_async(url: str, **settings: Any) -> MlxServingError:
    async def submit() -> None:
        async with AsyncClient(settings=quick_settings(url, **settings)) as client:
            await client.submit(model="tally", prompt="my secret prompt")

    with pytest.raises(MlxServingError) as refusal:
        asyncio.run(submit())
    return refusal.value


@pytest.mark.parametrize("ask", [told, told_async])
class TestRefused:
    """One code, that no retry mends, whichever side is wrong; the reason is in the message.

    With TLS 1.3 the server refuses after the client's handshake: what the client meets first, the
    alert or the closed socket, is a race. A server that has no TLS, or has it, answers not at all.
    """

    @staticmethod
    def reason(error: MlxServingError) -> str:
        assert (type(error), error.code, error.retryable) == (TlsFailed, "redis_tls", False)
        assert "secret" not in str(error)
        assert "\n" not in str(error)
        return str(error).lower()

    def test_a_server_of_another_ca(self, tls: Tls, ask: Ask) -> None:
        login = tls.ours.login("producer") | {"redis__tls_ca": tls.theirs.file("ca.crt")}
        assert "certificate verify failed" in self.reason(ask(tls.url, **login))

    def test_a_server_that_no_known_ca_signed(self, tls: Tls, ask: Ask) -> None:
        """Without a CA of ours, the system's decide."""
        login = tls.ours.login("producer")
        del login["redis__tls_ca"]
        assert "certificate verify failed" in self.reason(ask(tls.url, **login))

    def test_a_server_by_another_name(self, tls: Tls, ask: Ask) -> None:
        by_name = tls.url.replace("127.0.0.1", "localhost")
        assert "hostname mismatch" in self.reason(ask(by_name, **tls.ours.login("producer")))

    def test_no_client_certificate(self, tls: Tls, ask: Ask) -> None:
        error = ask(tls.url, redis__tls_ca=tls.ours.file("ca.crt"))
        assert "certificate required" in self.reason(error)

    def test_a_client_certificate_of_another_ca(self, tls: Tls, ask: Ask) -> None:
        login = tls.theirs.login("producer") | {"redis__tls_ca": tls.ours.file("ca.crt")}
        assert "unknown ca" in self.reason(ask(tls.url, **login))

    def test_a_key_of_another_certificate(self, tls: Tls, ask: Ask) -> None:
        login = tls.ours.login("producer") | {"redis__tls_key": tls.theirs.file("producer.key")}
        assert "mismatch" in self.reason(ask(tls.url, **login))

    def test_a_plain_connection_to_a_server_with_tls(self, tls: Tls, ask: Ask) -> None:
        plain = tls.url.replace("rediss://", "redis://:secret@")
        assert "speaks tls" in self.reason(ask(plain))

    def test_tls_to_a_plain_server(self, ask: Ask) -> None:
        with LocalRedis(port=free_port()) as plain, plain.client() as admin:
            admin.config_set("requirepass", "secret")
            url = f"rediss://:secret@127.0.0.1:{plain.port}"
            assert "speaks no tls" in self.reason(ask(url, redis__timeout_seconds=1.0))

    def test_a_server_that_takes_no_more_clients_is_no_fault_of_tls(
        self, tls: Tls, ask: Ask
    ) -> None:
        with tls.server.client() as admin:
            admin.config_set("maxclients", "1")
            try:
                error = ask(tls.url, **tls.ours.login("producer"))
            finally:
                admin.config_set("maxclients", "1000")
        assert error.retryable


@pytest.mark.parametrize("name", ["ca", "cert", "key"])
def test_a_file_that_goes_while_its_client_runs(tls: Tls, tmp_path: Path, name: str) -> None:
    login = tls.ours.login("producer")
    path = tmp_path / "x.pem"
    shutil.copy(login[f"redis__tls_{name}"], path)
    settings = quick_settings(tls.url, **login | {f"redis__tls_{name}": str(path)})
    path.unlink()

    async def submit() -> None:
        async with AsyncClient(settings=settings) as client:
            await client.submit(model="tally", prompt="x")

    said = f"redis.tls_{name}: {path}: No such file or directory"
    with Client(settings=settings) as client, pytest.raises(TlsFailed, match=said):
        client.submit(model="tally", prompt="x")
    with pytest.raises(TlsFailed, match=said):
        asyncio.run(submit())


def test_a_worker_process_serves_over_tls(tls: Tls) -> None:
    settings = quick_settings(tls.url, **tls.ours.login("producer"))
    with Client(settings=settings) as client:
        handle = client.submit(model="tally", prompt="x", max_tokens=3, result_ttl=60)
        with WorkerProcess(tls.url, "tls", 200, **tls.ours.login("worker")):
            assert handle.result(timeout=30).worker == "tls"
