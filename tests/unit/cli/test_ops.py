"""The service files in `ops/` say what the command line and the settings say."""

import configparser
import plistlib
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlx_serving.cli.main import app
from mlx_serving.common.redis.connection import resolve
from mlx_serving.common.settings import load_settings
from mlx_serving.worker.dispatcher import RELEASE_SECONDS
from mlx_serving.worker.process.crash import EXIT_CONFIGURATION
from mlx_serving.worker.process.supervisor import VERDICT_SECONDS
from tests.support.paths import ROOT

OPS = ROOT / "ops"
UNIT = "mlx-serving-worker@.service"
# The grace time; the engine's last step and the last flush; the release, the name's deletion and
# the parent's verdict, each as long as a Redis that hangs makes them wait.
REDIS_SECONDS = resolve(load_settings()).read_timeout
LONGEST_DRAIN_SECONDS = (
    load_settings().worker.drain_seconds + 2 * RELEASE_SECONDS + 4 * REDIS_SECONDS + VERDICT_SECONDS
)


def _is_a_command(words: list[str]) -> bool:
    """Whether the command line takes these words; --help stops it before it does anything."""
    return CliRunner().invoke(app, [*words, "--help"]).exit_code == 0


def _unit() -> configparser.SectionProxy:
    """The service's section; configparser reads names in lower case."""
    parser = configparser.RawConfigParser(strict=False)
    parser.read(OPS / "systemd" / UNIT)
    return parser["Service"]


def test_launchd_starts_a_worker_and_lets_it_drain() -> None:
    path = OPS / "launchd" / "org.mlx-serving.worker.plist"
    text = path.read_text()
    plist = plistlib.loads(text.encode())
    program, *words = plist["ProgramArguments"]
    assert program.endswith("/mlx-serving")
    assert _is_a_command(words)
    assert plist["Label"] == path.stem
    assert plist["ExitTimeOut"] > LONGEST_DRAIN_SECONDS
    assert plist["KeepAlive"] == {"SuccessfulExit": False}  # a drained worker stays away
    assert plist["ThrottleInterval"] >= 10
    assert plist["SoftResourceLimits"]["NumberOfFiles"] >= 4096
    assert plist["HardResourceLimits"]["Core"] == 0
    assert plist["StandardErrorPath"].endswith(".log")  # launchd throws away what goes nowhere
    assert "UNVERIFIED" in text


def test_systemd_starts_a_worker_and_lets_it_drain() -> None:
    unit = _unit()
    program, *words = shlex.split(unit["ExecStart"].replace("%i", "tally"))
    assert program.endswith("/mlx-serving")
    assert _is_a_command(words)
    assert int(unit["TimeoutStopSec"]) > LONGEST_DRAIN_SECONDS
    assert unit["KillMode"] == "mixed"
    assert unit["Restart"] == "on-failure"  # a drained worker stays away
    assert unit["RestartPreventExitStatus"] == str(EXIT_CONFIGURATION)
    assert unit["OOMPolicy"] == "continue"
    assert unit["LimitCORE"] == "0"
    assert int(unit["LimitNOFILE"]) >= 4096


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    text = (OPS / "systemd" / UNIT).read_text()
    assert _verified(tmp_path, text) == []
    assert _verified(tmp_path, text.replace("TimeoutStopSec", "TimeoutStopSecs")) != []


def _verified(folder: Path, text: str) -> list[str]:
    """What systemd-analyze says of the unit, its program put where there is one."""
    path = folder / UNIT
    path.write_text(text.replace("/opt/mlx-serving/bin/mlx-serving", sys.executable))
    run = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", path],  # noqa: S607 -- wherever it is installed
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return [line for line in (run.stdout + run.stderr).splitlines() if "mlx-serving" in line]


def test_redis_conf_is_what_the_doctor_asks_for() -> None:
    lines = (OPS / "redis" / "redis.conf").read_text().splitlines()
    options = dict(line.split(maxsplit=1) for line in lines if line and not line.startswith("#"))
    assert options["appendonly"] == "yes"
    assert options["appendfsync"] == "always"
    assert options["maxmemory-policy"] == "noeviction"
