"""Connections against real servers: an ACL user, TLS with client certificates, Sentinel."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import redis

from mlx_serving.common.errors import WrongCredentials
from mlx_serving.common.redis.connection import Endpoint, connect, connect_async
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.common.redis.retrying import answered
from tests.support.helpers import free_port, wait_until
from tests.support.redis_users import as_user

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# ruff: noqa: S106 -- made-up secrets


async def test_an_acl_user_gets_in_and_may_do_no_more_than_its_rules(
    local_redis: LocalRedis,
) -> None:
    with local_redis.client() as admin:
        admin.acl_setuser(
            "app", enabled=True, passwords=["+pw"], keys=["app:*"], categories=["+@all"]
        )
    endpoint = Endpoint(url=as_user(local_redis.url, "app"), password="pw")
    with connect(endpoint) as client:
        assert client.set("app:x", 1, ex=60)
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.set("other", 1)
    async with connect_async(endpoint) as async_client:
        assert await async_client.get("app:x") == b"1"


def test_a_wrong_password_is_a_clear_error(local_redis: LocalRedis) -> None:
    endpoint = Endpoint(url=as_user(local_redis.url, "nobody"), password="hush")
    with connect(endpoint) as client, pytest.raises(WrongCredentials) as raised:
        answered(client.ping)
    assert "hush" not in str(raised.value)


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    """Self-signed certificate of 127.0.0.1, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificate")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "1", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    return str(cert), str(key)


async def test_tls_with_a_client_certificate(certificate: tuple[str, str]) -> None:
    cert, key = certificate
    port = free_port()
    options = {
        "tls-port": str(port),
        "tls-cert-file": cert,
        "tls-key-file": key,
        "tls-ca-cert-file": cert,
    }
    endpoint = Endpoint(url=f"rediss://127.0.0.1:{port}/0", tls_ca=cert, tls_cert=cert, tls_key=key)
    with LocalRedis(options=options):
        with connect(endpoint) as client:
            assert client.ping()
        async with connect_async(endpoint) as async_client:
            assert await async_client.ping()
        stranger = Endpoint(url=endpoint.url, tls_ca=cert)
        with connect(stranger) as client, pytest.raises((redis.ConnectionError, OSError)):
            client.ping()


@contextmanager
def sentinel(primary_port: int, folder: Path) -> Iterator[int]:
    """One Sentinel that watches a primary."""
    port = free_port()
    config = folder / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
        f"sentinel monitor main 127.0.0.1 {primary_port} 1\n"
    )
    process = subprocess.Popen(
        ["redis-server", str(config), "--sentinel"],  # noqa: S607 -- LocalRedis found it on PATH
        stdout=subprocess.DEVNULL,
    )
    try:
        yield port
    finally:
        process.terminate()
        process.wait()


async def test_sentinel_leads_to_the_primary(tmp_path: Path) -> None:
    primary_port = free_port()
    with LocalRedis(port=primary_port) as server, sentinel(primary_port, tmp_path) as port:
        endpoint = Endpoint(
            url="redis:///2", sentinels=(("127.0.0.1", port),), sentinel_service="main"
        )

        def reached() -> bool:
            try:
                with connect(endpoint) as client:
                    return bool(client.set("x", 1))
            except redis.ConnectionError:
                return False

        wait_until(reached, what="the Sentinel to know its primary")
        async with connect_async(endpoint) as async_client:
            assert await async_client.get("x") == b"1"
        with server.client() as direct:
            direct.select(2)
            assert direct.get("x") == b"1"
