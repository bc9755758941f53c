"""Settings: where each comes from, which wins, and how a wrong one is named."""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving.common.errors import InvalidSettings

# ruff: noqa: S106 -- made-up secrets
from mlx_serving.common.redis.connection import Endpoint, resolve
from mlx_serving.common.settings import TALLY_PATH, Settings, load_settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Write = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable and no file of the machine's own."""
    for name in (*(f"MLX_SERVING_{field.upper()}" for field in Settings.model_fields), "CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("MLX_SERVING_CONFIG", raising=False)
    monkeypatch.delenv("RQ_KEY_PREFIX", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(text: str) -> Path:
        path = tmp_path / "mlx-serving.toml"
        path.write_text(text)
        return path

    return write_file


def test_every_setting_has_a_default() -> None:
    settings = load_settings()
    assert settings.redis_url.get_secret_value() == "redis://localhost:6379/0"
    assert (settings.lease_seconds, settings.max_batch_rows) == (10.0, 64)
    assert settings.kv_budget_bytes is None


def test_keywords_win_over_the_environment_and_that_over_the_file(
    monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    write("max_batch_rows = 2\nlease_seconds = 20\nkey_prefix = 'file'\n")
    monkeypatch.setenv("MLX_SERVING_MAX_BATCH_ROWS", "3")
    monkeypatch.setenv("MLX_SERVING_LEASE_SECONDS", "30")
    settings = load_settings(max_batch_rows=4)
    assert settings.max_batch_rows == 4
    assert settings.lease_seconds == 30
    assert settings.key_prefix == "file"


def test_the_file_may_be_named(
    monkeypatch: pytest.MonkeyPatch, write: Write, tmp_path: Path
) -> None:
    named = write("log_format = 'json'\n").rename(tmp_path / "other.toml")
    assert load_settings().log_format == "console"
    monkeypatch.setenv("MLX_SERVING_CONFIG", str(named))
    assert load_settings().log_format == "json"


def test_a_named_file_has_to_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_SERVING_CONFIG", "/nowhere.toml")
    with pytest.raises(InvalidSettings, match="MLX_SERVING_CONFIG: there is no file"):
        load_settings()


def test_models_come_as_a_table_or_as_json_and_tally_is_always_there(
    monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    assert load_settings().models == {"tally": str(TALLY_PATH)}
    write("[models]\nsmall = '/models/small'\n")
    assert load_settings().models == {"small": "/models/small", "tally": str(TALLY_PATH)}
    monkeypatch.setenv("MLX_SERVING_MODELS", json.dumps({"tally": "/mine"}))
    assert load_settings().models["tally"] == "/mine"


@pytest.mark.parametrize(("value", "expected"), [("0", False), ("1", True), ("false", False)])
def test_native_is_switched_by_its_variable(
    monkeypatch: pytest.MonkeyPatch, value: str, *, expected: bool
) -> None:
    monkeypatch.setenv("MLX_SERVING_NATIVE", value)
    assert load_settings().native is expected


def test_rqs_own_variable_sets_its_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RQ_KEY_PREFIX", "jobs")
    assert load_settings().rq_prefix == "jobs"
    assert load_settings(rq_prefix="other").rq_prefix == "other"


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"lease_second": 3}, "lease_second"),
        ({"lease_seconds": 0}, "lease_seconds"),
        ({"lease_seconds": float("nan")}, "lease_seconds"),
        ({"lease_seconds": 1}, ""),
        ({"redis_url": "localhost:6379"}, "redis_url"),
        ({"redis_url": "redis://h:port/0"}, "redis_url"),
        ({"redis_url": "redis://h:99999/0"}, "redis_url"),
        ({"redis_url": "redis://[::1/0"}, "redis_url"),
        ({"redis_url": "redis://h:1/zero"}, "redis_url"),
        ({"redis_url": "redis://h:1/0?socket_timeout=soon"}, "redis_url"),
        ({"redis_url": "redis://h:1/0?no_option=1"}, "redis_url"),
        ({"redis_by_model": {"m": "http://x"}}, "redis_by_model.m"),
        ({"redis_tls_ca": "/nowhere.pem"}, "redis_tls_ca"),
        ({"sentinel_hosts": "a:1,b"}, "sentinel_hosts[1]"),
        ({"key_prefix": "a b"}, "key_prefix"),
        ({"rq_prefix": ""}, "rq_prefix"),
        ({"models": {"a:b": "/x"}}, "models.a:b"),
        ({"max_batch_rows": 0}, "max_batch_rows"),
        ({"max_payload_bytes": 10}, "max_payload_bytes"),
        ({"native": "perhaps"}, "native"),
        ({"log_format": "xml"}, "log_format"),
    ],
)
def test_a_wrong_setting_is_named(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidSettings) as raised:
        load_settings(**fields)
    assert [error.path for error in raised.value.errors] == [path]


@pytest.mark.parametrize("url", ["redis://:hush/@h:1/0", "rediss://u:hush@h:hush/0"])
def test_a_wrong_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InvalidSettings, match="redis_url") as raised:
        load_settings(redis_url=url)
    assert "hush" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    ["redis://", "rediss://u:p%2F@h:1/15?ssl_cert_reqs=none", "unix:///run/x.sock?db=3",
     "redis://h:1?db=2&socket_timeout=3"],
)  # fmt: skip
def test_urls_that_redis_py_reads_are_taken(url: str) -> None:
    assert load_settings(redis_url=url).redis_url.get_secret_value() == url


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_SERVING_MODELS", "{hush")
    with pytest.raises(InvalidSettings, match="models") as raised:
        load_settings()
    assert "hush" not in str(raised.value)


@pytest.mark.parametrize("text", ["lease_seconds = = 3", "unknown = 1", "max_batch_rows = 'x'"])
def test_a_wrong_file_is_refused(write: Write, text: str) -> None:
    write(text)
    with pytest.raises(InvalidSettings, match=r"toml|unknown|max_batch_rows"):
        load_settings()


def test_secrets_are_in_no_repr() -> None:
    settings = load_settings(
        redis_url="redis://:hush@h:1", redis_password="hush", sentinel_password="hush"
    )
    assert "hush" not in repr(settings) + str(settings) + repr(resolve(settings))


def test_settings_travel_to_a_spawned_child() -> None:
    settings = load_settings(redis_url="unix:///x")
    assert pickle.loads(pickle.dumps(settings)) == settings  # noqa: S301 -- our own bytes


def test_an_endpoint_takes_all_of_the_settings(tmp_path: Path) -> None:
    pem = tmp_path / "x.pem"
    pem.touch()
    settings = load_settings(
        redis_url="redis://h:1/2",
        redis_username="u",
        redis_password="p",
        redis_tls=True,
        redis_tls_ca=pem,
        redis_tls_cert=pem,
        redis_tls_key=pem,
        sentinel_hosts="a:1, b:2",
        sentinel_service="s",
        sentinel_username="su",
        sentinel_password="sp",
        key_prefix="own",
        rq_prefix="theirs",
        redis_connect_timeout_seconds=1,
        redis_read_timeout_seconds=2,
    )
    assert resolve(settings) == Endpoint(
        url="redis://h:1/2",
        username="u",
        password="p",
        tls=True,
        tls_ca=str(pem),
        tls_cert=str(pem),
        tls_key=str(pem),
        sentinels=(("a", 1), ("b", 2)),
        sentinel_service="s",
        sentinel_username="su",
        sentinel_password="sp",
        connect_timeout=1,
        read_timeout=2,
        key_prefix="own",
        rq_prefix="theirs",
    )


def test_a_model_may_have_a_redis_of_its_own() -> None:
    settings = load_settings(
        redis_url="redis://a:1", redis_by_model={"big": "redis://b:2"}, sentinel_hosts="s:1"
    )
    assert resolve(settings, "big", "tenant").url == "redis://b:2"
    assert resolve(settings, "big").sentinels == ()
    assert resolve(settings, "small").url == "redis://a:1"
    assert resolve(settings, "small").sentinels == (("s", 1),)
