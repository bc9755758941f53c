"""The doctor's judgements, from faked servers and machines."""

from pathlib import Path
from typing import Any

import pytest
import redis

from mlx_serving.cli.doctor import engine, redis_server
from mlx_serving.cli.doctor.engine import fleet_problems, other_models
from mlx_serving.cli.doctor.machine import UNVERIFIED, condition_checks, mac_checks
from mlx_serving.cli.doctor.report import Check, Level, failed
from mlx_serving.cli.overview import Overview, QueueView
from mlx_serving.common.redis.server import Server
from mlx_serving.common.settings import load_settings
from mlx_serving.worker.status.conditions_mac import MacProbe
from tests.support.worker_fakes import FakeProbe
from tests.unit.cli.test_top import worker


class FakeRedis:
    """Answers INFO and CONFIG GET from tables; None: CONFIG is forbidden."""

    def __init__(self, info: dict[str, Any], config: dict[str, str] | None = None) -> None:
        self._info, self._config = info, config

    def info(self, _section: str) -> dict[str, Any]:
        return self._info

    def config_get(self, name: str) -> dict[str, str]:
        if self._config is None:
            raise redis.ResponseError("no CONFIG for you")
        return {name: self._config[name]} if name in self._config else {}


@pytest.mark.parametrize(
    ("version", "level"),
    [("6.2.14", "fail"), ("7.0.5", "warn"), ("7.0.15", "ok"), ("7.4.1", "ok"), ("8.2.0", "ok")],
)
def test_redis_version(version: str, level: str) -> None:
    check = redis_server.check_version(FakeRedis({"redis_version": version}))  # type: ignore[arg-type]
    assert check.level == level
    assert version in check.detail


@pytest.mark.parametrize(
    ("aof", "config", "level", "words"),
    [
        (0, {}, "warn", "restart loses jobs"),
        (1, {"appendfsync": "always"}, "ok", "AOF always"),
        (1, {"appendfsync": "everysec"}, "warn", "power loss"),
        (1, None, "skip", "may not read appendfsync"),
    ],
)
def test_persistence_says_what_it_means(
    aof: int, config: dict[str, str] | None, level: str, words: str
) -> None:
    server = FakeRedis({"aof_enabled": aof}, config)
    check = redis_server.check_persistence(server)  # type: ignore[arg-type]
    assert check.level == level
    assert words in check.detail


@pytest.mark.parametrize(
    ("policy", "limit", "level"),
    [("noeviction", 0, "ok"), ("allkeys-lru", 0, "warn"), ("allkeys-lru", 1024, "fail")],
)
def test_a_server_that_evicts_fails(policy: str, limit: int, level: str) -> None:
    assert redis_server.check_eviction(Server("standalone", policy, limit)).level == level


def test_an_install_without_the_engine_is_a_producer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "missing_engine", lambda: ["mlx"])
    checks = list(engine.engine_checks(load_settings(), "tally"))
    assert [check.name for check in checks] == ["versions", "engine"]
    assert checks[1].level is Level.WARN
    assert "mlx-serving[worker]" in checks[1].detail


def test_a_twin_that_was_asked_for_is_no_warning() -> None:
    checks = list(engine.check_acceleration(load_settings(engine__native=False)))
    assert [check.name for check in checks] == [
        "native detokenizer",
        "native sampler",
        "native prefix index",
    ]
    assert all(check.level is Level.OK and "twin" in check.detail for check in checks)


def test_a_model_that_is_not_there_fails() -> None:
    check = engine.check_model(load_settings(), "no-such")
    assert check.level is Level.FAIL
    assert "no-such" in check.detail


def test_one_failed_check_fails_the_report() -> None:
    good, bad = Check("a", Level.WARN, ""), Check("b", Level.FAIL, "")
    assert not failed([good])
    assert failed([good, bad])


# -- when a worker may work --------------------------------------------------------------


def test_no_condition_is_said() -> None:
    (check,) = condition_checks(load_settings(), FakeProbe(None, None, None))
    assert (check.name, check.level) == ("work", Level.OK)
    assert "all times" in check.detail


def test_a_condition_that_can_not_be_told_is_warned_of() -> None:
    settings = load_settings(conditions__pause_when_hot=True, conditions__pause_on_battery=True)
    by_name = {c.name: c for c in condition_checks(settings, FakeProbe(None, None, battery=True))}
    assert "paused now: on_battery" in by_name["work"].detail
    assert by_name["work heat"].level is Level.WARN
    assert by_name["work battery"].level is Level.OK
    assert "work user" not in by_name


def test_a_macs_own_words_are_called_unverified() -> None:
    probe = MacProbe(lambda *command: "Now drawing from 'AC Power'" if "batt" in command else None)
    checks = list(condition_checks(load_settings(conditions__pause_on_battery=True), probe))
    assert [check.name for check in checks] == ["work", "work battery"]
    assert all(UNVERIFIED in check.detail for check in checks)


# -- the Mac, faked ---------------------------------------------------------------------


class FakeMac:
    platform = "darwin"

    def __init__(self, **answers: str) -> None:
        self._answers = answers

    def read(self, *command: str) -> str | None:
        return self._answers.get(command[-1].rpartition(".")[2].strip("-"))


def test_another_system_skips_the_mac() -> None:
    probe = FakeMac()
    probe.platform = "linux"
    (check,) = mac_checks(probe)
    assert check.level is Level.OK
    assert "linux" in check.detail


def test_a_good_mac_is_ok_and_called_unverified() -> None:
    probe = FakeMac(
        brand_string="Apple M4 Max", memsize=str(64 << 30), productVersion="26.1",
        wired_limit_mb="0", g=" sleep                0\n lowpowermode         0\n",
    )  # fmt: skip
    checks = list(mac_checks(probe))
    assert {check.level for check in checks} == {Level.OK}
    assert all(UNVERIFIED in check.detail for check in checks)
    assert "Apple M4 Max, 64 GiB, macOS 26.1" in checks[0].detail


def test_a_mac_that_sleeps_is_warned_of() -> None:
    probe = FakeMac(g=" disksleep 10\n sleep                15 (sleep prevented)\n powermode 1\n")
    by_name = {check.name: check for check in mac_checks(probe)}
    assert by_name["mac sleep"].level is Level.WARN
    assert "15 min" in by_name["mac sleep"].detail
    assert by_name["mac power"].level is Level.WARN
    assert by_name["mac hardware"].level is Level.WARN


def test_a_mac_that_tells_nothing_is_warned_of() -> None:
    by_name = {check.name: check.level for check in mac_checks(FakeMac())}
    assert by_name["mac sleep"] is Level.WARN
    assert by_name["mac wired limit"] is Level.WARN


def test_other_models_are_looked_at_and_not_loaded(tmp_path: Path) -> None:
    settings = load_settings(models={"gone": str(tmp_path / "gone")})
    gone, tally = other_models(settings, "none of them")
    assert (gone.name, gone.level) == ("model gone", Level.WARN)
    assert "is not a folder" in gone.detail
    assert (tally.level, tally.detail.partition(";")[0]) == (Level.OK, "complete, not loaded here")
    assert [check.name for check in other_models(settings, "tally")] == ["model gone"]


def test_a_fleet_says_what_it_can_not_load_and_which_jobs_nobody_takes() -> None:
    able = worker("w1", "tally,big")
    unable = worker("w2", "big", unloadable=("big: ModelFilesError: config.json: missing",))
    waits = [QueueView("big:bulk", 2, 0, 2), QueueView("old:default", 1, 0, 1)]
    assert list(fleet_problems(Overview(waits, [able, unable]))) == [
        "worker w2 can't load big: ModelFilesError: config.json: missing",
        "a job waits in old:default, and no live worker can load the model",
    ]
    lines = list(fleet_problems(Overview(waits, [unable])))
    assert "2 jobs wait in big:bulk, and no live worker can load the model" in lines
