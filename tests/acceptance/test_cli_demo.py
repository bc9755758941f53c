"""`mlx-serving demo`, whole: exit status, answers, figures, and nothing left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.helpers import wait_until
from tests.support.paths import ROOT

DEMO = [sys.executable, "-m", "mlx_serving", "demo"]


def _left_behind(output: str) -> list[str]:
    """Folder and processes that name the demo's temporary folder."""
    folder = output.split(" on ", 1)[1].split("/redis.sock", 1)[0]
    found = [folder] if Path(folder).exists() else []
    listing = subprocess.run(["/bin/ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return found + [line for line in listing.stdout.splitlines() if folder in line]


@pytest.mark.slow
@pytest.mark.parametrize("native", ["1", "0"])
def test_the_demo_gives_eight_right_answers(native: str) -> None:
    environment = {
        **os.environ,
        "MLX_SERVING_ENGINE_NATIVE": native,
        "MLX_SERVING_REDIS_URL": "redis://nowhere.invalid:1",  # the demo uses its own
        "MLX_SERVING_REDIS_PASSWORD": "x",
    }
    done = subprocess.run(
        DEMO, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "8 of 8 answers right" in done.stdout
    for figure in ("tokens/s", "time to first token", "inter-token latency", "p99"):
        assert figure in done.stdout
    assert "on MLX device " in done.stdout
    assert "detokenizer: " in done.stdout
    if native == "0":
        assert "twin (switched off by the settings)" in done.stdout
    assert _left_behind(done.stdout) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing(number: signal.Signals) -> None:
    process = subprocess.Popen(
        DEMO, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    first = process.stdout.readline()  # Redis runs; the worker is coming up
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert "answers right" not in out
    wait_until(lambda: _left_behind(first) == [], what="the demo's processes are gone")


def test_a_worker_that_does_not_come_up_is_a_clear_error() -> None:
    done = subprocess.run(
        [*DEMO, "--timeout", "1"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "error: engine_error: the worker did not come up within 1 s" in done.stderr
    assert _left_behind(done.stdout) == []
