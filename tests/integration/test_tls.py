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
from mlx_serving.common.errors import QueueUnavailable
from mlx_serving.common.redis.local import LocalRedis
from tests.support.helpers import free_port, wait_until
from tests.support.worker_process import InProcessWorker, WorkerProcess, quick_settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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
        yield Tls(f"rediss://127.0.0.1:{port}", ours, theirs)


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


# With TLS 1.3 the server refuses after the client's handshake: what the client meets first, the
# alert or the closed socket, is a race.
CUT_OFF = ("connection", "eof occurred")


class TestRefused:
    def refusal(self, url: str, **settings: Any) -> str:
        started = time.monotonic()
        with (
            Client(settings=quick_settings(url, **settings)) as client,
            pytest.raises(QueueUnavailable) as refusal,
        ):
            client.submit(model="tally", prompt="my secret prompt")
        assert time.monotonic() - started < 10
        assert "secret" not in str(refusal.value)
        return str(refusal.value).lower()

    def test_a_server_of_another_ca(self, tls: Tls) -> None:
        login = tls.ours.login("producer") | {"redis__tls_ca": tls.theirs.file("ca.crt")}
        assert "certificate verify failed" in self.refusal(tls.url, **login)

    def test_a_server_that_no_known_ca_signed(self, tls: Tls) -> None:
        """Without a CA of ours, the system's decide."""
        login = tls.ours.login("producer")
        del login["redis__tls_ca"]
        assert "certificate verify failed" in self.refusal(tls.url, **login)

    def test_a_server_by_another_name(self, tls: Tls) -> None:
        by_name = tls.url.replace("127.0.0.1", "localhost")
        message = self.refusal(by_name, **tls.ours.login("producer"))
        assert "hostname mismatch" in message

    def test_no_client_certificate(self, tls: Tls) -> None:
        message = self.refusal(tls.url, redis__tls_ca=tls.ours.file("ca.crt"))
        assert any(words in message for words in ("certificate required", *CUT_OFF))

    def test_a_client_certificate_of_another_ca(self, tls: Tls) -> None:
        login = tls.theirs.login("producer") | {"redis__tls_ca": tls.ours.file("ca.crt")}
        message = self.refusal(tls.url, **login)
        assert any(words in message for words in ("unknown ca", *CUT_OFF))

    def test_a_plain_connection(self, tls: Tls) -> None:
        assert self.refusal(tls.url.replace("rediss://", "redis://"))


def test_a_worker_process_serves_over_tls(tls: Tls) -> None:
    settings = quick_settings(tls.url, **tls.ours.login("producer"))
    with Client(settings=settings) as client:
        handle = client.submit(model="tally", prompt="x", max_tokens=3, result_ttl=60)
        with WorkerProcess(tls.url, "tls", 200, **tls.ours.login("worker")):
            assert handle.result(timeout=30).worker == "tls"
