"""Settings: where each comes from, which wins, and how a wrong one is named."""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving.common.errors import InvalidSettings
from mlx_serving.common.redis.connection import Endpoint, resolve
from mlx_serving.common.settings import (
    RQ_VARIABLE,
    TABLES,
    TALLY_PATH,
    Settings,
    load_settings,
    setting_paths,
    unknown_variables,
    variable,
)

# ruff: noqa: S106 -- made-up secrets

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Write = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable and no file of the machine's own."""
    for name in (*map(variable, setting_paths()), "MLX_SERVING_CONFIG", RQ_VARIABLE):
        monkeypatch.delenv(name, raising=False)
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
    assert settings.redis.url.get_secret_value() == "redis://localhost:6379/0"
    assert (settings.worker.lease_seconds, settings.batch.max_rows) == (10.0, 64)
    assert settings.cache.budget_bytes is None


def test_every_setting_of_a_table_has_a_meaning_and_its_table_too() -> None:
    for path in setting_paths():
        table = TABLES.get(path[0], Settings)
        assert table.__doc__
        assert table.model_fields[path[-1]].description, path


def test_a_path_is_one_variable() -> None:
    """A table's name holds no underscore, so that no two paths share a variable."""
    assert variable(("cache", "prefix_bytes")) == "MLX_SERVING_CACHE_PREFIX_BYTES"
    assert not any("_" in table for table in TABLES)


def test_keywords_win_over_the_environment_and_that_over_the_file(
    monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    write("[batch]\nmax_rows = 2\n[worker]\nlease_seconds = 20\n[redis]\nkey_prefix = 'file'\n")
    monkeypatch.setenv("MLX_SERVING_BATCH_MAX_ROWS", "3")
    monkeypatch.setenv("mlx_serving_worker_lease_seconds", "30")
    settings = load_settings(batch__max_rows=4)
    assert settings.batch.max_rows == 4
    assert settings.worker.lease_seconds == 30
    assert settings.redis.key_prefix == "file"


def test_keywords_are_paths_or_tables() -> None:
    settings = load_settings(redis={"key_prefix": "a", "timeout_seconds": 1}, redis__key_prefix="b")
    assert (settings.redis.key_prefix, settings.redis.timeout_seconds) == ("b", 1.0)


def test_a_table_of_aliases_is_replaced_and_not_merged(
    monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    """A URL of the command line is for every model, whatever the file says of some."""
    write("[models]\na = '/a'\n[redis.by_model]\na = 'redis://a'\n")
    assert load_settings(redis__by_model={}).redis.by_model == {}
    monkeypatch.setenv("MLX_SERVING_MODELS", '{"b": "/b"}')
    assert load_settings().models == {"b": "/b", "tally": str(TALLY_PATH)}


def test_settings_are_replaced_in_a_copy() -> None:
    settings = load_settings(redis__url="redis://h:1", jobs__signing_keys=["k" * 32])
    changed = settings.replace(redis__key_prefix="own")
    assert changed.redis == load_settings(redis__url="redis://h:1", redis__key_prefix="own").redis
    assert changed.jobs == settings.jobs
    assert settings.redis.key_prefix == "mlxs"
    with pytest.raises(InvalidSettings, match=r"batch\.max_rows"):
        settings.replace(batch__max_rows=0)


def test_the_file_may_be_named(
    monkeypatch: pytest.MonkeyPatch, write: Write, tmp_path: Path
) -> None:
    named = write("[log]\nformat = 'json'\n").rename(tmp_path / "other.toml")
    assert load_settings().log.format == "console"
    monkeypatch.setenv("MLX_SERVING_CONFIG", str(named))
    assert load_settings().log.format == "json"


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
    assert Settings().models == {"tally": str(TALLY_PATH)}, "no default was changed"


@pytest.mark.parametrize(("value", "expected"), [("0", False), ("1", True), ("false", False)])
def test_native_is_switched_by_its_variable(
    monkeypatch: pytest.MonkeyPatch, value: str, *, expected: bool
) -> None:
    monkeypatch.setenv("MLX_SERVING_ENGINE_NATIVE", value)
    assert load_settings().engine.native is expected


def test_variables_give_lists_numbers_and_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_SERVING_SENTINEL_HOSTS", "a:1, b:2")
    monkeypatch.setenv("MLX_SERVING_CACHE_BITS", "8")
    monkeypatch.setenv("MLX_SERVING_REDIS_BY_MODEL", '{"m": "redis://m"}')
    monkeypatch.setenv("MLX_SERVING_METRICS_PORT", "0")
    settings = load_settings()
    assert settings.sentinel.hosts == ("a:1", "b:2")
    assert (settings.cache.bits, settings.metrics.port) == (8, 0)
    assert settings.redis.by_model["m"].get_secret_value() == "redis://m"


def test_rqs_own_variable_is_its_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(load_settings()).rq_prefix == "rq"
    monkeypatch.setenv(RQ_VARIABLE, "jobs")
    assert resolve(load_settings()).rq_prefix == "jobs"
    monkeypatch.setenv(RQ_VARIABLE, "a b")
    with pytest.raises(InvalidSettings, match=RQ_VARIABLE):
        load_settings()


def test_unknown_variables_are_those_that_name_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_SERVING_REDIS_URL", "redis://h")
    monkeypatch.setenv("MLX_SERVING_LEASE_SECONDS", "3")
    monkeypatch.setenv("MLX_SERVING_REDIS_URLS", "redis://h")
    assert unknown_variables() == ["MLX_SERVING_LEASE_SECONDS", "MLX_SERVING_REDIS_URLS"]


WRONG: list[tuple[str, Any, str]] = [
    ("worker__lease_second", 3, "worker.lease_second"),
    ("workers__lease_seconds", 3, "workers"),
    ("lease_seconds", 3, "lease_seconds"),
    ("worker", 3, "worker"),
    ("worker__lease_seconds", 0, "worker.lease_seconds"),
    ("worker__lease_seconds", float("nan"), "worker.lease_seconds"),
    ("redis__url", "localhost:6379", "redis.url"),
    ("redis__url", "redis://h:port/0", "redis.url"),
    ("redis__url", "redis://h:99999/0", "redis.url"),
    ("redis__url", "redis://[::1/0", "redis.url"),
    ("redis__url", "redis://h:1/zero", "redis.url"),
    ("redis__url", "redis://h:1/0?socket_timeout=soon", "redis.url"),
    ("redis__url", "redis://h:1/0?no_option=1", "redis.url"),
    ("redis__by_model", {"m": "http://x"}, "redis.by_model.m"),
    ("redis__by_model", "redis://x", "redis.by_model"),
    ("redis__tls_ca", "/nowhere.pem", "redis.tls_ca"),
    ("sentinel__hosts", "a:1,b", "sentinel.hosts[1]"),
    ("redis__key_prefix", "a b", "redis.key_prefix"),
    ("models", {"a:b": "/x"}, "models.a:b"),
    ("batch__max_rows", 0, "batch.max_rows"),
    ("cache__bits", 3, "cache.bits"),
    ("cache", {"bits": 8, "kind": "paged"}, "cache.bits"),
    ("jobs__max_bytes", 10, "jobs.max_bytes"),
    ("engine__native", "perhaps", "engine.native"),
    ("log__format", "xml", "log.format"),
]


@pytest.mark.parametrize(("keyword", "value", "path"), WRONG)
def test_a_wrong_setting_is_named(keyword: str, value: object, path: str) -> None:
    with pytest.raises(InvalidSettings) as raised:
        load_settings(**{keyword: value})
    assert [error.path for error in raised.value.errors] == [path]


@pytest.mark.parametrize(("given", "missing"), [("cert", "key"), ("key", "cert")])
def test_certificate_and_key_go_together(tmp_path: Path, given: str, missing: str) -> None:
    pem = tmp_path / "x.pem"
    pem.touch()
    with pytest.raises(InvalidSettings, match=rf"redis\.tls_{missing}: is needed with") as raised:
        load_settings(**{f"redis__tls_{given}": pem})
    assert [error.path for error in raised.value.errors] == [f"redis.tls_{missing}"]


@pytest.mark.parametrize("url", ["redis://:hush/@h:1/0", "rediss://u:hush@h:hush/0"])
def test_a_wrong_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InvalidSettings, match=r"redis\.url") as raised:
        load_settings(redis__url=url)
    assert "hush" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    ["redis://", "rediss://u:p%2F@h:1/15?ssl_cert_reqs=none", "unix:///run/x.sock?db=3",
     "redis://h:1?db=2&socket_timeout=3", "unix://u:p@/run/x.sock"],
)  # fmt: skip
def test_urls_that_redis_py_reads_are_taken(url: str) -> None:
    assert load_settings(redis__url=url).redis.url.get_secret_value() == url


@pytest.mark.parametrize(
    ("name", "value", "path"),
    [
        ("MLX_SERVING_MODELS", "{hush", "models"),
        ("MLX_SERVING_CACHE_PREFIX_BYTES", "hush", "cache.prefix_bytes"),
        ("MLX_SERVING_JOBS_SIGNING_KEYS", "hush", "jobs.signing_keys[0]"),
    ],
)
def test_a_wrong_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, path: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidSettings) as raised:
        load_settings()
    assert [error.path for error in raised.value.errors] == [path]
    assert "hush" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("lease_seconds = 3", "lease_seconds"),
        ("[unknown]\na = 1", "unknown"),
        ("[batch]\nmax_rows = 'x'", "batch.max_rows"),
        ("[batch]\nmin_rows = 1", "batch.min_rows"),
        ("batch = 3", "batch"),
    ],
)
def test_a_wrong_file_is_refused(write: Write, text: str, path: str) -> None:
    write(text)
    with pytest.raises(InvalidSettings) as raised:
        load_settings()
    assert [error.path for error in raised.value.errors] == [path]


@pytest.mark.parametrize("text", [b"a = = 3", b"a = '\xff'"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "mlx-serving.toml").write_bytes(text)
    with pytest.raises(InvalidSettings, match=r"mlx-serving\.toml: is not TOML"):
        load_settings()


def test_secrets_are_in_no_repr() -> None:
    settings = load_settings(
        redis__url="redis://:hush@h:1",
        redis__password="hush",
        redis__by_model={"m": "redis://:hush@h:2"},
        sentinel__password="hush",
        jobs__signing_keys="hush" * 8,
    )
    assert "hush" not in repr(settings) + str(settings) + repr(resolve(settings))


def test_settings_travel_to_a_spawned_child() -> None:
    settings = load_settings(redis__url="unix:///x")
    assert pickle.loads(pickle.dumps(settings)) == settings  # noqa: S301 -- our own bytes


def test_an_endpoint_takes_all_of_the_settings(tmp_path: Path) -> None:
    pem = tmp_path / "x.pem"
    pem.touch()
    settings = load_settings(
        redis={
            "url": "rediss://u@h:1/2", "password": "p", "tls_ca": pem, "tls_cert": pem,
            "tls_key": pem, "timeout_seconds": 2, "key_prefix": "own",
        },
        sentinel={"hosts": "a:1, b:2", "service": "s", "username": "su", "password": "sp"},
    )  # fmt: skip
    assert resolve(settings) == Endpoint(
        url="rediss://u@h:1/2",
        password="p",
        tls_ca=str(pem),
        tls_cert=str(pem),
        tls_key=str(pem),
        sentinels=(("a", 1), ("b", 2)),
        sentinel_service="s",
        sentinel_username="su",
        sentinel_password="sp",
        connect_timeout=2,
        read_timeout=2,
        key_prefix="own",
        rq_prefix="rq",
    )


def test_a_model_may_have_a_redis_of_its_own() -> None:
    settings = load_settings(
        redis={"url": "redis://a:1", "by_model": {"big": "redis://b:2"}}, sentinel__hosts="s:1"
    )
    assert resolve(settings, "big", "tenant").url == "redis://b:2"
    assert resolve(settings, "big").sentinels == ()
    assert resolve(settings, "small").url == "redis://a:1"
    assert resolve(settings, "small").sentinels == (("s", 1),)


def test_aliases_of_models_are_given_one_by_one() -> None:
    models = load_settings(models__a="/models/a", models__b="/models/b").models
    assert models.keys() >= {"a", "b"}


def test_a_table_that_a_file_has_as_a_number_is_refused_beside_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("batch = 3\n")
    monkeypatch.setenv("MLX_SERVING_CONFIG", str(file))
    monkeypatch.setenv("MLX_SERVING_BATCH_MAX_ROWS", "8")
    with pytest.raises(InvalidSettings, match="batch"):
        load_settings()


@pytest.mark.parametrize("name", ["tls_ca", "tls_cert"])
def test_files_for_tls_are_refused_without_a_url_that_has_it(tmp_path: Path, name: str) -> None:
    pem = tmp_path / "x.pem"
    pem.touch()
    files: dict[str, Any] = {name: pem} | ({"tls_key": pem} if name == "tls_cert" else {})
    with pytest.raises(InvalidSettings, match=rf"redis\.{name}.*rediss://"):
        load_settings(redis={"url": "redis://h:1", **files})
    load_settings(redis={"url": "rediss://h:1", **files})
    load_settings(redis={"by_model": {"a": "rediss://h:1"}, **files})


@pytest.mark.parametrize(
    "option",
    ["decode_responses=true", "decode_responses=False", "encoding=ascii", "max_connections=1"],
)
def test_a_url_may_not_change_how_a_client_of_ours_works(option: str) -> None:
    name = option.partition("=")[0]
    with pytest.raises(InvalidSettings, match=rf"^redis\.url: must not have \?{name}: ") as raised:
        load_settings(redis__url=f"redis://:hush@h:1/0?{option}")
    assert "hush" not in str(raised.value)


class TestTheFileIsNamed:
    def reasons(self) -> dict[str, str]:
        with pytest.raises(InvalidSettings) as raised:
            load_settings()
        return dict(raised.value.errors)

    def test_beside_each_value_that_comes_from_it(self, write: Write) -> None:
        write("[batch]\nmax_rows = 0\n[redis]\nurl = 'http://x'\n[models]\na = 5\n")
        reasons = self.reasons()
        assert set(reasons) == {"batch.max_rows", "redis.url", "models.a"}
        assert all(reason.endswith("(in mlx-serving.toml)") for reason in reasons.values())

    def test_of_a_table_and_a_key_that_are_unknown(self, write: Write) -> None:
        write("[batches]\nmax_rows = 1\n[batch]\nrows = 1\n")
        assert all("(in mlx-serving.toml)" in reason for reason in self.reasons().values())

    def test_by_its_path_where_a_variable_names_it(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        path = tmp_path / "other.toml"
        path.write_text("[batch]\nmax_rows = 0\n")
        monkeypatch.setenv("MLX_SERVING_CONFIG", str(path))
        assert f"(in {path})" in self.reasons()["batch.max_rows"]

    def test_but_not_beside_what_the_environment_gave(
        self, monkeypatch: pytest.MonkeyPatch, write: Write
    ) -> None:
        write("[batch]\nmax_rows = 8\n")
        monkeypatch.setenv("MLX_SERVING_BATCH_MAX_ROWS", "0")
        assert "toml" not in self.reasons()["batch.max_rows"]
