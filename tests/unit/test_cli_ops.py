"""The service files in `ops/` say what the command line and the settings say."""

import configparser
import plistlib
import shlex
from pathlib import Path

from typer.testing import CliRunner

from mlx_serving.cli.main import app
from mlx_serving.common.settings import load_settings

OPS = Path(__file__).parents[2] / "ops"


def _is_a_command(words: list[str]) -> bool:
    """Whether the command line takes these words; --help stops it before it does anything."""
    return CliRunner().invoke(app, [*words, "--help"]).exit_code == 0


def _unit() -> configparser.SectionProxy:
    """The service's section; configparser reads names in lower case."""
    parser = configparser.RawConfigParser(strict=False)
    parser.read(OPS / "systemd" / "mlx-serving-worker@.service")
    return parser["Service"]


def test_launchd_starts_a_worker_and_lets_it_drain() -> None:
    path = OPS / "launchd" / "org.mlx-serving.worker.plist"
    text = path.read_text()
    plist = plistlib.loads(text.encode())
    program, *words = plist["ProgramArguments"]
    assert program.endswith("/mlx-serving")
    assert _is_a_command(words)
    assert plist["Label"] == path.stem
    assert plist["ExitTimeOut"] > load_settings().drain_grace_seconds
    assert "UNVERIFIED" in text


def test_systemd_starts_a_worker_and_lets_it_drain() -> None:
    unit = _unit()
    program, *words = shlex.split(unit["ExecStart"].replace("%i", "tally"))
    assert program.endswith("/mlx-serving")
    assert _is_a_command(words)
    assert int(unit["TimeoutStopSec"]) > load_settings().drain_grace_seconds
    assert unit["KillMode"] == "mixed"


def test_redis_conf_is_what_the_doctor_asks_for() -> None:
    lines = (OPS / "redis" / "redis.conf").read_text().splitlines()
    options = dict(line.split(maxsplit=1) for line in lines if line and not line.startswith("#"))
    assert options["appendonly"] == "yes"
    assert options["appendfsync"] == "always"
    assert options["maxmemory-policy"] == "noeviction"
